"""Whether packed latents have about mean 0 and deviation 1 by channel, as sums over the set."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch

from data.latent_space import LatentSpace
from runtime import cli
from runtime.plain_data import read_as

MOST_MEAN, DEVIATIONS = 0.5, (0.5, 2.0)  # by channel: beyond these, people are warned


@dataclass(frozen=True)
class LatentSums:
    """Sums over latents as the network sees them, both mirrored and not.

    Attributes:
        count: numbers of a channel.
        sums: of the expected values, by channel.
        squares: of the expected squares, by channel.
    """

    count: Annotated[int, cli.whole(0, 2**62)] = 0
    sums: tuple[Annotated[float, cli.number], ...] = ()
    squares: tuple[Annotated[float, cli.non_negative_float], ...] = ()

    @staticmethod
    def of(moments: np.ndarray, space: LatentSpace) -> "LatentSums":
        """The sums of moments (N, 2, 2, C, [t,] h, w): as they are and mirrored, mean and deviation."""
        mean, deviation = torch.from_numpy(moments).float().flatten(0, 1).unbind(1)  # (2N, C, [t,] h, w) each
        centre = space.normalised(mean)
        spread = space.normalised(mean + deviation) - centre
        inner = (0, *range(2, mean.dim()))
        sums = centre.double().sum(inner).tolist()
        squares = (centre.double() ** 2 + spread.double() ** 2).sum(inner).tolist()
        return LatentSums(mean.numel() // mean.shape[1], tuple(sums), tuple(squares))

    @staticmethod
    def read(contents: object) -> "LatentSums":
        """From plain data. Raises ValueError if they are wrong."""
        found = read_as(LatentSums, contents, "latents")
        if len(found.sums) != len(found.squares) or bool(found.count) != bool(found.sums):
            raise ValueError("latents have other sums than squares")
        return found

    def as_dict(self) -> dict:
        """As plain data."""
        return asdict(self) | {"sums": list(self.sums), "squares": list(self.squares)}

    def __add__(self, other: "LatentSums") -> "LatentSums":
        if not (self.count and other.count):
            return self if self.count else other
        pairs = zip((self.sums, self.squares), (other.sums, other.squares), strict=True)
        return LatentSums(self.count + other.count, *(tuple(np.add(*pair).tolist()) for pair in pairs))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, (C,) each."""
        means, squares = np.array(self.sums) / self.count, np.array(self.squares) / self.count
        return means, np.sqrt(np.maximum(squares - means**2, 0))

    def report(self, space: LatentSpace) -> Iterator[str]:
        """Lines for people: what was found by channel, and which numbers would be better."""
        if not self.count:
            return
        means, deviations = self.moments()
        yield (
            f"latents by channel: mean {means.min():.3g} to {means.max():.3g},"
            f" deviation {deviations.min():.3g} to {deviations.max():.3g} (best are 0 and 1)"
        )
        far = (abs(means) > MOST_MEAN) | (deviations < DEVIATIONS[0]) | (deviations > DEVIATIONS[1])
        if not far.any():
            return
        yield f"WARNING: channels {', '.join(map(str, np.flatnonzero(far)))} are far from that, and train worse"
        if max(len(space.means), len(space.deviations)) <= space.channels:
            raw_means = means * (space.deviations or 1) / space.scale + (space.means or 0)
            raw_deviations = deviations * (space.deviations or 1)
            better = [", ".join(f"{value:.4g}" for value in values) for values in (raw_means, raw_deviations)]
            yield "  in the VAE's config.json, these would bring them there (docs/latents.md says for which VAEs):"
            yield f"  latents_mean [{better[0]}], latents_std [{better[1]}]"
