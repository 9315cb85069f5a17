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
    point = look_ahead(x, previous, mu)
    value = field(point).float()
    return torch.add(x, value, alpha=stepsize), point, value


def look_ahead(x: Tensor, previous: Tensor, mu: float) -> Tensor:
    """The point x + μ·(x − x₋₁) where the field is evaluated, x itself without look-ahead: (N, …) each."""
    return torch.add(x, x - previous, alpha=mu) if mu else x


def value_norms(value: Tensor) -> Tensor:
    """The root mean square of each sample's elements: (N, …) → (N,), in float32, the same scale for any size."""
    return torch.linalg.vector_norm(value.float().flatten(1), dim=1) / math.sqrt(value[0].numel())


class Composition:
    """Sums Σ wₖ·gₖ of the guided fields gₖ = u + s·(cₖ − u) of classes, each in one batched call.

    Fields are gradients of energies, so that their sum is the gradient of the sum (Du, Li & Mordatch 2020,
    arXiv 2004.06030). The unconditional field u is the same for all classes: one row of labels more.

    Args:
        weights: wₖ, one for each class of a sum.
        scale: s of classifier-free guidance, or one for each channel; where all are 1, u is not evaluated.
        device: where the fields are.

    Attributes:
        rows: evaluations of the network that one of the sum takes.
    """

    def __init__(
        self, weights: Sequence[float], null_class: int, scale: float | Sequence[float], device: torch.device | str
    ):
        w, s = torch.tensor(weights)[:, None], torch.tensor(scale, dtype=torch.float32).view(1, -1)  # (K, 1), (1, C)
        self.null_class, self.guides = null_class, bool((s != 1).any())
        self.coefficients = (torch.cat([w * s, w.sum() * (1 - s)]) if self.guides else w).to(device)  # (R, C or 1)
        self.rows = len(self.coefficients)
        self.is_plain = self.rows == 1 and weights[0] == 1

    def field(self, conditioned: Callable[[Tensor], Field], y: Tensor) -> Field:
        """The field of classes y (K, N), of N samples, from the function that gives a batch of labels its field."""
        if self.is_plain:
            return conditioned(y[0])
        rows = torch.cat([y, torch.full_like(y[:1], self.null_class)]) if self.guides else y  # (R, N)
        every = conditioned(rows.flatten())  # of a batch of RN

        def field(x: Tensor) -> Tensor:
            fields = every(torch.cat([x] * len(rows))).float().unflatten(0, rows.shape)  # (R, N, C, …)
            return (fields * self.coefficients.view(len(rows), 1, -1, *[1] * (x.dim() - 2))).sum(0)  # (N, C, …)

        return field


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape) on the CPU, each sample from (seed, its index) alone.

    A sample thus starts from the same noise in any batch, on any device and in any process.
    """

    def draw(index: int) -> Tensor:
        state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        return torch.randn(*shape, generator=torch.Generator().manual_seed(state))

    return torch.stack([draw(index) for index in indices])
