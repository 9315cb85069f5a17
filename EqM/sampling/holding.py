"""Parts of given clips and images that stay as they are while the rest of a sample descends.

There are two ways. If the network was trained with --gamma-per-frame, given frames are frames at γ = 1, and they are
held there from the start. Otherwise a network knows only samples with one noise level, so the held part gets the level
that the rest has reached: α(γ)·x + σ(γ)·ε, with the noise ε that the sample starts from. Lugmayr et al. 2022 (RePaint,
arXiv 2201.09865) hold known pixels of diffusion models in this way. A step of size η takes γ to γ + η·c(γ).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.clips import read_image
from data.latent_space import LatentSpace
from data.untrusted import Unreadable
from paths import coefficients
from runs.config import Config
from runtime.errors import UserError
from runtime.logs import log

WHITE = 128  # a mask is white where its grey is at least this


@dataclass(frozen=True)
class Kept:
    """What is held of each clip or image that samples start from.

    Attributes:
        mask: where, as the network sees samples: (1, [T,] H, W), True where they are held.
        clean: held at γ = 1 from the start; False: at the level that the rest has reached.
        frames: all of so many first frames, as pixels.
        picture: the white part of this picture, in all frames; None: of none.
    """

    mask: Tensor
    clean: bool
    frames: int = 0
    picture: Path | None = None


@dataclass(frozen=True)
class Hold:
    """Puts the held part of N samples in its place, at each step of a descent.

    Attributes:
        mask: True where samples are held, (1, [T,] H, W) for all samples, or (N, 1, [T,] H, W).
        given: what is held there, (N, C, [T,] H, W). Elsewhere it means nothing.
        noise: ε of the samples, in that shape.
        levels: (α, σ) of the held part before each step, and after the last.
    """

    mask: Tensor
    given: Tensor
    noise: Tensor
    levels: Sequence[tuple[float, float]]

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x (N, C, [T,] H, W), but α·given + σ·ε of this step where it is held."""
        alpha, sigma = self.levels[step]
        return torch.where(self.mask, alpha * self.given + sigma * self.noise, x)

    def end(self, x: Tensor) -> Tensor:
        """x, but to the bit what was given where it is held."""
        return torch.where(self.mask, self.given, x)


def how_held(clean: bool) -> str:
    """The way in words."""
    return "clean, as in the training with --gamma-per-frame" if clean else "at the noise of the rest"


def held_levels(path: str, shares: Sequence[float], clean: bool) -> list[tuple[float, float]]:
    """(α, σ) of the held part where so much is left of the noise, 1 − γ, on a path: one pair for each share."""
    if clean:
        return [(1.0, 0.0)] * len(shares)
    gammas = 1 - torch.tensor(shares, dtype=torch.float64)  # (K + 1,)
    return list(zip(*(values.tolist() for values in coefficients(path, gammas)), strict=True))


def choose_kept(frames: int, picture: Path | None, config: Config, shape: Sequence[int]) -> Kept:
    """What is held of samples of this shape, (C, [T,] H, W), of a network.

    Args:
        frames: all of so many first frames.
        picture: a file whose white part is held in all frames. Transparent parts are white.

    Raises:
        UserError: frames are no whole tokens, the picture cannot be read, or nothing or everything would be held.
    """
    mask = torch.zeros(1, *shape[1:], dtype=torch.bool)  # (1, [T,] H, W)
    if frames:
        mask[:, : held_frames(frames, config)] = True
    if picture:
        mask |= white_part(picture, config)  # (H, W)
    if not mask.any() or mask.all():
        what = "everything, and leaves nothing to make" if mask.all() else "nothing: no white part is large enough"
        raise UserError(f"--keep-mask {picture} holds {what}: give another picture")
    # Levels by frame say nothing of two levels within a frame.
    clean = config.objective.by_frame > 0 and not picture
    log.info("given parts are held %s", how_held(clean))
    return Kept(mask, clean, frames, picture)


def held_frames(frames: int, config: Config) -> int:
    """So many first frames, as frames that the network sees.

    Raises:
        UserError: the network makes images, or these frames are no whole tokens, or all that there are.
    """
    network, space = config.network, config.space
    if not network.is_video:
        raise UserError("--keep-frames holds frames of clips, and the checkpoint makes images: leave it out")
    whole = range(network.temporal_patch, network.frames, network.temporal_patch)
    seen = {space.clip_len(count) if space else count: count for count in whole}
    check_whole("--keep-frames", frames, list(seen), config)
    return seen[frames]


def check_whole(flag: str, frames: int, possible: Sequence[int], config: Config) -> None:
    """Raises UserError, with the nearest `possible` numbers, ascending, unless the number of frames is one of them."""
    if frames in possible:
        return
    if not possible:
        raise UserError(f"{flag} {frames}: all frames of a clip are one token, of which no part can be held")
    near = sorted(sorted(possible, key=lambda each: abs(each - frames))[:2])
    tokens = f"tokens of {config.network.temporal_patch} frames" + (" of latents" if config.space else "")
    clip = f"clips of {config.form.clip_len} frames are cut into {tokens}"
    raise UserError(f"{flag} {frames}: {clip}: give {' or '.join(map(str, near))}")


def white_part(picture: Path, config: Config) -> Tensor:
    """Where a picture, resized and cropped like the data, is white, as the network sees pictures: (H, W).

    A position of latents counts if all its pixels are white.

    Raises:
        UserError: it cannot be read.
    """
    try:
        pixels = read_image(picture, config.form.image_size)  # (3, H, W)
    except Unreadable as error:
        raise UserError(f"--keep-mask {picture} cannot be read: {error}") from None
    white = pixels.float().mean(0) >= WHITE  # (H, W)
    return all_pixels(white, config.space)


def all_pixels(white: Tensor, space: LatentSpace | None) -> Tensor:
    """Where all pixels of a position of latents are white: (H, W) → (h, w)."""
    if not space:
        return white
    side = space.downsampling
    return white.unflatten(1, (-1, side)).unflatten(0, (-1, side)).all(3).all(1)
