"""Explicit energies: scalars E(x) made of a network's output f(x), whose gradient ∇ₓE is the field (EqM-E).

Source: Wang & Du 2025, arXiv 2510.02300. Sampling adds the field and so climbs E; the energy of a
sample, low at the data, is −E.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models import EqM

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


@torch.no_grad()
def sample_energy(network: "EqM", x: Tensor, y: Tensor, seconds_per_frame: Tensor | float = 0.1) -> Tensor:
    """The energy −E of samples over their number of elements, low at the data, in float32: (N,).

    Args:
        network: one with an explicit energy.
        x: (N, C, H, W) or (N, C, T, H, W), float32.
        y: (N,) class labels; `num_classes` is the null class.
        seconds_per_frame: (N,) or one for all; images have no use for it.

    Raises:
        ValueError: the network has none.
    """
    if network.energy == "none":
        raise ValueError("the network has no explicit energy")
    blocks, final = network.modulations(torch.zeros(len(x), device=x.device), y)
    f, _ = network.output(x, blocks, final, seconds_per_frame)
    return -energy(network.energy, x, f) / x[0].numel()
