"""Samples as they come out of descent: how often their field was evaluated, and its norms on the way."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampling import value_norms


@dataclass(frozen=True)
class Finished:
    """A sample x (…) in float32, and how often its field was evaluated; its norms, of each time or of the last."""

    index: int
    x: Tensor
    evaluations: int
    norms: list[float]


class Norms:
    """The norms of a field's values, as `gradient_descent` shows them: of the last, or of `every` step."""

    def __init__(self, every: bool):
        self.every = every
        self.steps: list[Tensor] = []  # (N,) each
        self.last: Tensor | None = None

    def __call__(self, value: Tensor) -> None:
        self.last = value
        if self.every:
            self.steps.append(value_norms(value))

    def read(self) -> list[list[float]]:
        """A list of norms for each sample. To be called before the field is, since that may overwrite its value."""
        return torch.stack(self.steps or [value_norms(self.last)], dim=1).tolist()


def fixed_descents(
    sample: Callable[[Sequence[int], Iterable, Norms], Tensor],
    batches: Sequence[Sequence[int]],
    steps: int,
    traced: int,
    progress: Callable[[int], object],
) -> Iterator[list[Finished]]:
    """Samples batch by batch, each after the same number of steps.

    Args:
        sample: makes samples (N, …) of indices, in steps that it iterates over, and shows the field's values.
        traced: the samples of the first so many indices have the norms of each step.
        progress: gets the number of evaluations as they are made.
    """
    size = max(map(len, batches), default=0)

    def counted_steps(samples: int) -> Iterator[int]:
        for step in range(steps):
            yield step
            progress(samples)

    for indices in batches:
        # Every batch has the same size, since another would have to be compiled: the last repeats a sample.
        padded = [*indices, *[indices[-1]] * (size - len(indices))]
        norms = Norms(every=indices[0] < traced)
        x = sample(padded, counted_steps(len(indices)), norms)  # (N, …)
        yield [Finished(*each) for each in zip(indices, x, [steps] * len(indices), norms.read(), strict=False)]
