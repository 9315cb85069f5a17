"""Gradients of the working network: packed and exchanged while the backward pass goes on."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from runtime import distributed
from sharding import Sharding, sum_of_ranks


class Gradients:
    """The gradients of one step, in spans.

    As soon as all weights of a span have gradients, these move into one flat tensor, and their exchange starts. The
    backward pass goes on meanwhile. Gradients of micro-batches add up in float32 before.

    Args:
        weights: those of the working network, in order.
    """

    def __init__(self, sharding: Sharding, weights: list[nn.Parameter]):
        self.spans, self.groups, rest = sharding.spans, [], iter(weights)
        for index, span in enumerate(self.spans):
            self.groups.append([next(rest) for _ in span.shapes])
            for weight in self.groups[-1]:
                weight.register_post_accumulate_grad_hook(partial(self.note, index))
        self.forget()

    def forget(self) -> None:
        """Drops all gradients, also those of a step that broke off."""
        for group in self.groups:
            for weight in group:
                weight.grad = None
        self.sums: list[Tensor | None] = [None] * len(self.groups)
        self.exchanged: list[Callable[[], Tensor] | None] = [None] * len(self.groups)
        self.missing = [len(group) for group in self.groups]

    def expect(self, is_first: bool, is_last: bool) -> None:
        """Must be called before the backward pass of each micro-batch."""
        self.adds_up, self.is_last = not (is_first and is_last), is_last
        self.missing = [len(group) for group in self.groups]

    def note(self, index: int, weight: nn.Parameter) -> None:
        """Notes that a weight of this span has its gradient."""
        self.missing[index] -= 1
        if not self.missing[index]:
            self.take(index)

    def take(self, index: int) -> None:
        """Moves the gradients of a span into a flat tensor, and starts their exchange after the last micro-batch."""
        group, span = self.groups[index], self.spans[index]
        dtype, device = group[0].dtype, group[0].device
        packed = span.packed([weight.grad for weight in group], torch.float32 if self.adds_up else dtype, device)
        for weight in group:
            weight.grad = None
        total = packed if self.sums[index] is None else self.sums[index].add_(packed)
        self.sums[index] = None if self.is_last else total
        if self.is_last:
            self.exchanged[index] = sum_of_ranks(total, span, dtype)

    def collect(self) -> tuple[list[Tensor], Tensor]:
        """This rank's share of the sum of all ranks' gradients, by span, and the norm of the whole sum."""
        shares = [wait() for wait in self.exchanged]
        self.exchanged = [None] * len(self.groups)
        squares = torch.stack([torch.linalg.vector_norm(share, dtype=torch.float32).square() for share in shares])
        return shares, distributed.total(squares.sum()).sqrt()
