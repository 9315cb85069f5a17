"""Sampling as optimisation: gradient descent along a field, plain or with Nesterov's look-ahead.

A field is a function x ↦ f(x). It points from noise to data, and descent adds it (Wang & Du 2025,
arXiv 2510.02300). A field that depends on time can be integrated over time instead. Nothing here knows of
networks or ranks. x stays in float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from energy import energy_of_field

Field = Callable[[Tensor], Tensor]

STEPSIZE, STEPS, MU = 0.0017, 250, 0.3  # η, updates of a sample and look-ahead, as published
TRACED = 8  # a trace shows so many of the first samples


def gradient_descent(
    field: Field,
    x: Tensor,
    stepsize: float | Sequence[float],
    steps: Iterable,
    mu: float | Sequence[float] = 0.0,
    watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
    hold: Callable[[Tensor, int], Tensor] = lambda x, step: x,
) -> Tensor:
    """x ← x + η·f(x + μ·(x − x₋₁)), once for each element of `steps`, with x₋₁ = x at the start.

    With mu = 0 this is GD, otherwise NAG-GD.

    Args:
        x: the start, (N, …).
        stepsize: η of all steps, or of each. The descent ends when there is no η left.
        steps: any iterable, also a progress bar.
        mu: μ of all steps, or of each.
        watch: gets each point where the field was evaluated, and the value there.
        hold: puts parts of x (N, …) in their place before a step, counted from 0, and after the last. A look-ahead
            goes on from there for all parts.
    """
    each = (value if isinstance(value, Sequence) else repeat(value) for value in (stepsize, mu))
    x = previous = hold(x, 0)
    for step, (_, eta, ahead) in enumerate(zip(steps, *each, strict=False)):
        point = look_ahead(x, previous, ahead)
        value = field(point).float()
        previous, x = x, hold(torch.add(x, value, alpha=eta), step + 1)
        watch(point, value)
    return x


def integrate(
    velocity_at: Callable[[float], Field],
    x: Tensor,
    gammas: Sequence[float],
    steps: Iterable,
    watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
) -> Tensor:
    """Euler's steps x ← x + (γ₊₁ − γ)·v(x, γ), from each of K + 1 times to the next.

    Flow matching samples in this way, from noise at γ = 0 to data at γ = 1 (Lipman et al. 2023, arXiv 2210.02747).

    Args:
        velocity_at: gives v(·, γ) from γ.
        x: the start, (N, …).
        gammas: the K + 1 times.
        steps, watch: as for gradient_descent. The result is complete after K steps.
    """
    for _, gamma, after in zip(steps, gammas, gammas[1:], strict=False):
        point, value = x, velocity_at(gamma)(x).float()  # (N, …)
        x = point + (after - gamma) * value
        watch(point, value)
    return x


def look_ahead(x: Tensor, previous: Tensor, mu: float) -> Tensor:
    """The point x + μ·(x − x₋₁) where the field is evaluated, (N, …). Without look-ahead it is x."""
    return torch.add(x, x - previous, alpha=mu) if mu else x


def value_norms(value: Tensor) -> Tensor:
    """The root mean square of each sample's elements, in float32: (N, …) → (N,). Its scale is the same for any size."""
    return torch.linalg.vector_norm(value.float().flatten(1), dim=1) / math.sqrt(value[0].numel())


# From the classes of samples (N,), points (N, …) and the values of the field there to numbers (N, K), the norm first.
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


def norm_alone(y: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """The Measure of the norm: (N, 1)."""
    return value_norms(value)[:, None]


def norm_and_energy(explicit: Callable[[Tensor, Tensor], Tensor] | None = None) -> Measure:
    """The Measure of norm and energy: (N, 2).

    Args:
        explicit: gives the energies (N,) of samples from their classes (N,) and points (N, …). None: the energy is
            −⟨x, f(x)⟩ over the number of elements.
    """

    def measure(y: Tensor, x: Tensor, value: Tensor) -> Tensor:
        energies = energy_of_field(x, value) if explicit is None else explicit(y, x)  # (N,)
        return torch.stack([value_norms(value), energies], dim=1)

    return measure


@dataclass(frozen=True)
class Finished:
    """A sample that has ended.

    Attributes:
        index: which sample.
        x: the sample (…), float32.
        evaluations: how often its field was evaluated.
        measured: one row per evaluation, or only the last.
        window: of a long video; x is this window, and evaluations are those of all windows so far.
    """

    index: int
    x: Tensor
    evaluations: int
    measured: list[list[float]]
    window: int = 0

    @property
    def final_norm(self) -> float:
        return self.measured[-1][0]


class Watch:
    """Measures samples while they descend: the last step, or `every` step. It is the `watch` of gradient_descent."""

    def __init__(self, measure: Measure, y: Tensor, every: bool):
        self.measure, self.y, self.every = measure, y, every
        self.steps: list[Tensor] = []  # (N, K) each
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, point: Tensor, value: Tensor) -> None:
        self.last = point, value
        if self.every:
            self.steps.append(self.measure(self.y, point, value))

    def read(self) -> list[list[list[float]]]:
        """The rows that were measured, by sample.

        Call this before the next evaluation: a replayed graph reuses its output buffer.
        """
        return torch.stack(self.steps or [self.measure(self.y, *self.last)], dim=1).tolist()


def counted(steps: int, samples: int, progress: Callable[[int], object]) -> Iterator[int]:
    """So many steps. `progress` gets the evaluations of each, one for each of the samples."""
    for step in range(steps):
        yield step
        progress(samples)


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
        sample: makes samples (N, …) from indices, starts, steps and a watch. It iterates over the steps, and
            shows each of them to the watch.
        starts: gives the starts (N, …) from indices. It is called one batch ahead.
        labels: gives the classes (N,) from indices.
        traced: samples with an index below this are measured at each step, the others only at the last.
        progress: gets the number of new evaluations.
    """
    size = max(map(len, batches), default=0)
    # Another batch size would be compiled again. So the last batch repeats a sample until it is full.
    padded = [[*indices, *[indices[-1]] * (size - len(indices))] for indices in batches]
    following = map(starts, padded)
    start = next(following, None)  # (N, …)
    for indices, whole in zip(batches, padded, strict=True):
        watch = Watch(measure, labels(whole), every=indices[0] < traced)
        x = sample(whole, start, counted(steps, len(indices), progress), watch)  # (N, …)
        start = next(following, None)  # drawn while the GPU still descends
        yield [Finished(*each) for each in zip(indices, x, [steps] * len(indices), watch.read(), strict=False)]
