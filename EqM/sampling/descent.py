"""Sampling as optimisation: gradient descent, plain or with Nesterov's look-ahead, along a field.

A field is a function x ↦ f(x) that points from noise to data and is added (Wang & Du 2025,
arXiv 2510.02300). One that depends on time can be integrated over it instead. Nothing here knows of
networks or ranks; x stays in float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]

STEPSIZE, STEPS, MU = 0.0017, 250, 0.3  # η, updates a sample and look-ahead, as published


def gradient_descent(
    field: Field,
    x: Tensor,
    stepsize: float,
    steps: Iterable,
    mu: float = 0.0,
    watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
) -> Tensor:
    """x ← x + η·f(x + μ·(x − x₋₁)), once for each element of `steps`, with x₋₁ = x at the start.

    With mu = 0 this is GD, otherwise NAG-GD. `steps` is any iterable, a progress bar included; `watch`
    sees each point and the field's value there.
    """
    previous = x
    for _ in steps:
        after, point, value = update(field, x, previous, stepsize, mu)
        previous, x = x, after
        watch(point, value)
    return x


def integrate(
    velocity_at: Callable[[float], Field],
    x: Tensor,
    gammas: Sequence[float],
    steps: Iterable,
    watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
) -> Tensor:
    """Euler's steps x ← x + (γ₊₁ − γ)·v(x, γ) from each of K + 1 times to the next, one for each of K `steps`.

    This is how flow matching samples, from noise at γ = 0 to data at γ = 1 (Lipman et al. 2023, arXiv 2210.02747).
    """
    for _, gamma, after in zip(steps, gammas, gammas[1:], strict=False):
        point, value = x, velocity_at(gamma)(x).float()  # (N, …)
        x = point + (after - gamma) * value
        watch(point, value)
    return x


def update(field: Field, x: Tensor, previous: Tensor, stepsize: float, mu: float) -> tuple[Tensor, Tensor, Tensor]:
    """x one step on, the point ahead where the field was evaluated, and its value there; (N, …) each, in float32."""
    point = look_ahead(x, previous, mu)
    value = field(point).float()
    return torch.add(x, value, alpha=stepsize), point, value


def look_ahead(x: Tensor, previous: Tensor, mu: float) -> Tensor:
    """The point x + μ·(x − x₋₁) where the field is evaluated, x itself without look-ahead: (N, …) each."""
    return torch.add(x, x - previous, alpha=mu) if mu else x


def value_norms(value: Tensor) -> Tensor:
    """The root mean square of each sample's elements: (N, …) → (N,), in float32, the same scale for any size."""
    return torch.linalg.vector_norm(value.float().flatten(1), dim=1) / math.sqrt(value[0].numel())


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
