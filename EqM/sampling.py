"""Sampling as optimisation: gradient descent, plain or with Nesterov's look-ahead, along a field.

A field is a function x ↦ f(x) that points from noise to data and is added (Wang & Du 2025,
arXiv 2510.02300). One that depends on time can be integrated over it instead. Nothing here knows of
networks or ranks; x stays in float32.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
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
    point = x + mu * (x - previous) if mu else x
    value = field(point).float()
    return x + stepsize * value, point, value


def value_norms(value: Tensor) -> Tensor:
    """The root mean square of each sample's elements: (N, …) → (N,), in float32, the same scale for any size."""
    return torch.linalg.vector_norm(value.float().flatten(1), dim=1) / math.sqrt(value[0].numel())


def guided(conditioned: Callable[[Tensor], Field], y: Tensor, null_class: int, scale: float | Sequence[float]) -> Field:
    """The field of classes y (N,), with classifier-free guidance u + s·(c − u): `composed` of one class a sample."""
    return composed(conditioned, y[None], [1.0], null_class, scale)


def composed(
    conditioned: Callable[[Tensor], Field],
    y: Tensor,
    weights: Sequence[float],
    null_class: int,
    scale: float | Sequence[float],
) -> Field:
    """The sum Σ wₖ·gₖ of the guided fields gₖ = u + s·(cₖ − u) of classes y (K, N), in one batched call.

    Fields are gradients of energies, so that their sum is the gradient of the sum (Du, Li & Mordatch 2020,
    arXiv 2004.06030). The unconditional field u is the same for all classes: one row of labels more.

    Args:
        conditioned: gives the field of the labels of a batch.
        weights: wₖ, one for each row of y.
        scale: s, or one for each channel; where all are 1, u is not evaluated.
    """
    w, s = torch.tensor(weights)[:, None], torch.tensor(scale, dtype=torch.float32).view(1, -1)  # (K, 1), (1, C or 1)
    if (s == 1).all():
        return weighted_sum(conditioned, y, w)
    rows = torch.cat([y, torch.full_like(y[:1], null_class)])  # (K + 1, N)
    return weighted_sum(conditioned, rows, torch.cat([w * s, w.sum() * (1 - s)]))


def weighted_sum(conditioned: Callable[[Tensor], Field], rows: Tensor, weights: Tensor) -> Field:
    """The sum over r of weights (R, C or 1), a number for each channel or for all, times the fields of rows (R, N)."""
    if len(rows) == 1 and (weights == 1).all():
        return conditioned(rows[0])
    every = conditioned(rows.flatten())  # of a batch of RN

    def field(x: Tensor) -> Tensor:
        nonlocal weights
        weights = weights.to(x.device, non_blocking=True)  # at the first call: rows may be on the host
        fields = every(torch.cat([x] * len(rows))).float().unflatten(0, rows.shape)  # (R, N, C, …)
        return (fields * weights.view(len(rows), 1, -1, *[1] * (x.dim() - 2))).sum(0)  # (N, C, …)

    return field


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape) on the CPU, each sample from (seed, its index) alone.

    A sample thus starts from the same noise in any batch, on any device and in any process.
    """

    def draw(index: int) -> Tensor:
        state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        return torch.randn(*shape, generator=torch.Generator().manual_seed(state))

    return torch.stack([draw(index) for index in indices])
