"""The Equilibrium Matching objective, for tensors of any rank, in float32.

Source: Wang & Du 2025, arXiv 2510.02300. The sign is the published code's: the field points
from noise to data, and sampling adds it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LABEL_DROPOUT = 0.1


def c_truncated(gamma: Tensor, a: float = 0.8, scale: float = 4.0) -> Tensor:
    """The field's magnitude c(γ) = λ·h(γ): h is 1 up to γ = a, then falls linearly to 0 at γ = 1."""
    return scale * ((1 - gamma) / (1 - a)).clamp(max=1)


def broadcast_over(values: Tensor, x: Tensor) -> Tensor:
    """(N,) → (N, 1, …, 1) with x's rank, so that each sample of x meets its own value."""
    return values.view(-1, *[1] * (x.dim() - 1))


def interpolate(x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """x_γ = γ·x + (1 − γ)·ε, with gamma (N,) and x, noise (N, …)."""
    gamma = broadcast_over(gamma, x)
    return gamma * x + (1 - gamma) * noise


def target_field(x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """u = (x − ε)·c(γ), with gamma (N,) and x, noise (N, …)."""
    return (x - noise) * broadcast_over(c_truncated(gamma), x)


def drop_labels(y: Tensor, uniform: Tensor, null_class: int) -> Tensor:
    """Replaces the labels whose uniform draw falls below 0.1 by the null class: y, uniform (N,)."""
    return torch.where(uniform < LABEL_DROPOUT, null_class, y)


def eqm_loss(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """Mean squared error of the field at x_γ against its target, a float32 scalar.

    Args:
        field: (x_γ, γ) ↦ f, in x's shape and any precision.
        x, noise: data and standard normal noise, (N, …).
        gamma: (N,) in [0, 1].
    """
    prediction = field(interpolate(x, noise, gamma), gamma).float()
    return (prediction - target_field(x, noise, gamma)).square().mean()
