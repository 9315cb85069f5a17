"""Sampling as optimisation: gradient descent, plain or with Nesterov's look-ahead, along a field.

A field is a function x ↦ f(x) that points from noise to data and is added (Wang & Du 2025,
arXiv 2510.02300). Nothing here knows of networks or ranks; x stays in float32.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


def gradient_descent(field: Field, x: Tensor, stepsize: float, steps: Iterable, mu: float = 0.0) -> Tensor:
    """x ← x + η·f(x + μ·(x − x₋₁)), once for each element of `steps`, with x₋₁ = x at the start.

    With mu = 0 this is GD, otherwise NAG-GD. `steps` is any iterable, a progress bar included.
    """
    previous = x
    for _ in steps:
        look_ahead = x + mu * (x - previous) if mu else x
        previous, x = x, x + stepsize * field(look_ahead).float()
    return x


def guided(conditioned: Callable[[Tensor], Field], y: Tensor, null_class: int, scale: float) -> Field:
    """The field of classes y (N,), with classifier-free guidance u + s·(c − u) in one batched call.

    `conditioned` gives the field of the labels of a batch.
    """
    if scale == 1:
        return conditioned(y)
    both = conditioned(torch.cat([y, torch.full_like(y, null_class)]))  # of a batch of 2N

    def field(x: Tensor) -> Tensor:
        conditional, unconditional = both(torch.cat([x, x])).float().chunk(2)  # (N, …) each
        return unconditional + scale * (conditional - unconditional)

    return field


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape) on the CPU, each sample from (seed, its index) alone.

    A sample thus starts from the same noise in any batch, on any device and in any process.
    """

    def draw(index: int) -> Tensor:
        state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        return torch.randn(*shape, generator=torch.Generator().manual_seed(state))

    return torch.stack([draw(index) for index in indices])
