"""Explicit energies: scalars E(x) made of a network's output f(x), whose gradient ∇ₓE is the field (EqM-E).

Source: Wang & Du 2025, arXiv 2510.02300. Sampling adds the field and so climbs E; the energy of a
sample, low at the data, is −E.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

ENERGIES = ("none", "dot", "l2")


def energy(kind: str, x: Tensor, f: Tensor) -> Tensor:
    """E = ⟨x, f⟩ for `dot`, −½‖f‖² for `l2`, in float32: x, f (N, …) → (N,)."""
    x, f = x.float().flatten(1), f.float().flatten(1)  # (N, CTHW)
    return (x * f).sum(1) if kind == "dot" else -0.5 * f.square().sum(1)


def energy_gradient(kind: str, output: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """∇ₓE in float32, under torch.no_grad too, and what `output` gave beside f.

    Both can be differentiated again. The compiler follows torch.func.grad into one graph with its
    surroundings, which it does not do with autograd.grad.

    Args:
        output: x ↦ f, and other tensors.
        x: (N, …), float32.
    """

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        f, others = output(x)
        # Samples do not mix: the sum's gradient is each one's own.
        return energy(kind, x, f).sum(), others

    return torch.func.grad(total, has_aux=True)(x)


def energy_of_field(x: Tensor, field: Tensor) -> Tensor:
    """−⟨x, f(x)⟩ over the number of elements, the `dot` energy read off any field: x, field (N, …) → (N,)."""
    return -(x.float() * field.float()).flatten(1).mean(1)
