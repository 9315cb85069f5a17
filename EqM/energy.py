"""Explicit energies (EqM-E): scalars E(x) computed from the network's output f(x). Their gradient ∇ₓE is the field.

Source: Wang & Du 2025, arXiv 2510.02300. Sampling adds the field and so climbs E. The energy of a sample is −E, which
is low at the data.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ENERGIES = ("none", "dot", "l2")


def energy(kind: str, x: Tensor, f: Tensor) -> Tensor:
    """E = ⟨x, f⟩ for `dot`, −½‖f‖² for `l2`, in float32: x, f (N, …) → (N,)."""
    x, f = x.float().flatten(1), f.float().flatten(1)  # (N, CTHW)
    return (x * f).sum(1) if kind == "dot" else -0.5 * f.square().sum(1)


def energy_gradient(kind: str, output: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """∇ₓE in float32, under torch.no_grad too, and the second value of `output`.

    Both can be differentiated again. torch.func.grad, unlike autograd.grad, is compiled into one graph with the code
    around it.

    Args:
        output: x ↦ (f, another tensor).
        x: (N, …), float32.
    """

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        f, other = output(x)
        # Samples do not mix, so the gradient of the sum holds each sample's own gradient.
        return energy(kind, x, f).sum(), other

    return torch.func.grad(total, has_aux=True)(x)


def energy_of_field(x: Tensor, field: Tensor) -> Tensor:
    """The `dot` energy of samples in any field, −⟨x, f(x)⟩/D: x, field (N, …) with D elements a sample → (N,)."""
    return -(x.float() * field.float()).flatten(1).mean(1)
