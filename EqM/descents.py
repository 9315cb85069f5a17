"""Samples as they come out of descent: how often their field was evaluated, and what was measured on the way."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampling import value_norms

# From samples' classes (N,), the points x (N, …) and the field's values there to numbers (N, K), the norm first.
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


def norm_alone(y: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """The Measure of the norm: (N, 1)."""
    return value_norms(value)[:, None]


@dataclass(frozen=True)
class Finished:
    """A sample x (…) in float32, and how often its field was evaluated; what was measured each time or the last."""

    index: int
    x: Tensor
    evaluations: int
    measured: list[list[float]]

    @property
    def final_norm(self) -> float:
        return self.measured[-1][0]


class Watch:
    """Measures the descent of samples as `gradient_descent` shows it: the last step of it, or `every` one."""

    def __init__(self, measure: Measure, y: Tensor, every: bool):
        self.measure, self.y, self.every = measure, y, every
        self.steps: list[Tensor] = []  # (N, K) each
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, point: Tensor, value: Tensor) -> None:
        self.last = point, value
        if self.every:
            self.steps.append(self.measure(self.y, point, value))

    def read(self) -> list[list[list[float]]]:
        """What was measured of each sample. To be called before the field is, since that may overwrite its value."""
        return torch.stack(self.steps or [self.measure(self.y, *self.last)], dim=1).tolist()


def fixed_descents(
    sample: Callable[[Sequence[int], Tensor, Iterable, Watch], Tensor],
    starts: Callable[[Sequence[int]], Tensor],
    labels: Callable[[Sequence[int]], Tensor],
    batches: Sequence[Sequence[int]],
    steps: int,
    traced: int,
    progress: Callable[[int], object],
    measure: Measure = norm_alone,
) -> Iterator[list[Finished]]:
    """Samples batch by batch, each after the same number of steps.

    Args:
        sample: makes samples (N, …) of indices from where they start, in steps that it iterates over, and shows
            each to the watch.
        starts: from indices to where samples start, (N, …); called one batch ahead.
        labels: from indices to classes (N,).
        traced: the samples of the first so many indices are measured at each step.
        progress: gets the number of evaluations as they are made.
    """
    size = max(map(len, batches), default=0)

    def counted_steps(samples: int) -> Iterator[int]:
        for step in range(steps):
            yield step
            progress(samples)

    # Every batch has the same size, since another would have to be compiled: the last repeats a sample.
    padded = [[*indices, *[indices[-1]] * (size - len(indices))] for indices in batches]
    following = map(starts, padded)
    start = next(following, None)  # (N, …)
    for indices, whole in zip(batches, padded, strict=True):
        watch = Watch(measure, labels(whole), every=indices[0] < traced)
        x = sample(whole, start, counted_steps(len(indices)), watch)  # (N, …)
        start = next(following, None)  # drawn while a GPU is still descending
        yield [Finished(*each) for each in zip(indices, x, [steps] * len(indices), watch.read(), strict=False)]
