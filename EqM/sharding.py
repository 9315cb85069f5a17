"""How weights lie in one flat tensor, and how the ranks share the update of them.

Every rank computes gradients of all weights, and updates only its share of them. So each rank keeps only its share of
what an update needs. Source: ZeRO, stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054). Each weight lies whole on one
rank.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compiled import copy_all
from runtime import distributed

# Each weight begins at a multiple of so many elements of the flat tensor. That is 128 bytes in 16 bits, so that matrix
# products find every weight aligned.
ALIGNMENT = 64
# Where spans end, as parts of all weights. Gradients of the last span are ready first, and those of the first one when
# the backward pass ends: it is small, since nothing covers its exchange.
SPAN_ENDS = (0.1, 0.4, 0.7, 1.0)
PIECE = 2**26  # elements of one message between hosts


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def aligned(shape: torch.Size) -> int:
    """The elements of a weight, with the gap after it."""
    return shape.numel() + -shape.numel() % ALIGNMENT


@dataclass(frozen=True)
class Span:
    """Weights that are exchanged and updated at once.

    Attributes:
        shapes: of its weights, in order.
        parts: the part of each rank in the plain tensor.
        padded: its place in the padded tensor: a share of the same size for each rank, which begins with that part.
        mine: this rank's share there.
        share: its place in this rank's share.
    """

    shapes: tuple[torch.Size, ...]
    parts: tuple[slice, ...]
    padded: slice
    mine: slice
    share: slice

    @property
    def size(self) -> int:
        """Elements of a rank's share of this span."""
        return self.share.stop - self.share.start

    def views(self, padded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the span's piece of a padded tensor: one in the shape of each weight, and the gaps between them."""
        weights, gaps, shapes = [], [], iter(self.shapes)
        for part, share in zip(self.parts, padded.split(self.size), strict=True):
            place, length = 0, part.stop - part.start
            while place < length:
                shape = next(shapes)
                weights.append(share[place : place + shape.numel()].view(shape))
                gaps.append(share[place + shape.numel() : place + aligned(shape)])
                place += aligned(shape)
            gaps.append(share[length:])
        return weights, [gap for gap in gaps if len(gap)]

    @torch.no_grad()
    def packed(self, weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The span's weights, copied into a new piece of a padded tensor, of this type and on this device."""
        flat = torch.empty(self.padded.stop - self.padded.start, dtype=dtype, device=device)
        views, gaps = self.views(flat)
        copy_all(views, list(weights))
        for gap in gaps:
            gap.zero_()
        return flat


@dataclass(frozen=True)
class Sharding:
    """The places of all weights in flat tensors.

    The plain flat tensor (P,) holds all weights in order, with gaps that align them. Checkpoints hold the optimizer's
    state in this form. The padded one (R·S,) has S elements for each of R ranks, and a rank's share (S,) is its part
    of it. With one rank all three are the same.
    """

    shapes: dict[str, torch.Size]
    spans: tuple[Span, ...]
    rank: int

    @staticmethod
    def of(weights: dict[str, nn.Parameter]) -> "Sharding":
        """Spans and shares for this group of ranks. The shares of a span have nearly the same size."""
        ranks, rank = distributed.world_size(), distributed.rank()
        shapes = {name: weight.shape for name, weight in weights.items()}
        starts = [0, *accumulate(map(aligned, shapes.values()))]  # of each weight, and the end of all
        spans, first, padded, share = [], 0, 0, 0
        for end in SPAN_ENDS:
            last = nearest(starts, end * starts[-1])
            if last == first:
                continue
            low, high = starts[first], starts[last]
            cuts = [nearest(starts, low + (high - low) * r / ranks) for r in range(ranks + 1)]
            parts = tuple(slice(starts[a], starts[b]) for a, b in zip(cuts, cuts[1:], strict=False))
            size = max(part.stop - part.start for part in parts)
            mine = padded + rank * size
            places = slice(padded, padded + ranks * size), slice(mine, mine + size), slice(share, share + size)
            spans.append(Span(tuple(shapes.values())[first:last], parts, *places))
            first, padded, share = last, padded + ranks * size, share + size
        return Sharding(shapes, tuple(spans), rank)

    @property
    def plain_size(self) -> int:
        return self.spans[-1].parts[-1].stop

    def views(self, padded: Tensor) -> dict[str, Tensor]:
        """Views of a padded tensor (R·S,) in the shape of each weight, by name."""
        weights = [weight for span in self.spans for weight in span.views(padded[span.padded])[0]]
        return dict(zip(self.shapes, weights, strict=True))

    def packed(self, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weights, copied into a new padded tensor (R·S,) of this type and on this device."""
        flat = torch.zeros(self.spans[-1].padded.stop, dtype=dtype, device=device)
        with torch.no_grad():
            copy_all(list(self.views(flat).values()), [weights[name] for name in self.shapes])
        return flat

    def my_share(self, padded: Tensor) -> Tensor:
        """This rank's share (S,) of a padded tensor (R·S,): the tensor itself with one rank, else a copy."""
        return padded if distributed.world_size() == 1 else torch.cat([padded[span.mine] for span in self.spans])

    def named(self, plain: Tensor) -> dict[str, Tensor]:
        """Views of a plain tensor (P,) in the shape of each weight, by name."""
        pieces = plain.split([aligned(shape) for shape in self.shapes.values()])
        parts = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece[: shape.numel()].view(shape) for (name, shape), piece in parts}

    def take_part(self, plain: Tensor, share: Tensor) -> None:
        """Copies this rank's parts of a plain tensor (P,) into its share (S,)."""
        for span in self.spans:
            part = span.parts[self.rank]
            share[span.share][: part.stop - part.start] = plain[part]

    def whole(self, share: Tensor) -> dict[str, Tensor]:
        """All weights by name, on every rank, from the shares (S,) of the ranks. Every rank must call it."""
        if distributed.world_size() == 1:
            return self.views(share)
        padded = share.new_empty(self.spans[-1].padded.stop)
        for span in self.spans:
            padded[span.mine] = share[span.share]
            spread(padded, span)()
        return self.views(padded)


class HostGather:
    """Collects the shares of all ranks in the memory of rank 0's host.

    It has a group of its own, since a thread uses it. Messages of other threads would come between its own.
    """

    def __init__(self, sharding: Sharding):
        self.sharding, self.plain = sharding, {}
        self.group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT) if distributed.is_group() else None

    def collect(self, shares: dict[str, Tensor], problem: Exception | None = None) -> dict[str, Tensor]:
        """The plain tensors (P,) by name, on rank 0; nothing on the other ranks. Every rank must call it.

        Args:
            shares: this rank's, (S,), on the host.
            problem: why this rank has none.

        Raises:
            MemoryError, RuntimeError: the problem, or a rank has one.
        """
        if self.group is None:
            if problem:
                raise problem
            return shares
        try:
            if self.sharding.rank == 0 and not self.plain:
                self.plain = {name: share.new_empty(self.sharding.plain_size) for name, share in shares.items()}
        except (MemoryError, RuntimeError) as error:
            problem = error
        ready = torch.tensor(int(problem is None))
        dist.all_reduce(ready, dist.ReduceOp.MIN, self.group)
        if problem:
            raise problem
        if not ready:
            raise RuntimeError("another process has no memory for its share of a checkpoint")
        for name in shares:
            self.send_to_main(shares[name], self.plain.get(name))
        return self.plain

    def send_to_main(self, share: Tensor, plain: Tensor | None) -> None:
        """Sends each rank's share (S,) to rank 0, which puts it into `plain` (P,)."""
        own = self.sharding.rank
        for span in self.sharding.spans:
            for rank, part in enumerate(span.parts):
                used = share[span.share][: part.stop - part.start]
                if own == rank == 0:
                    plain[part] = used
                elif own == 0:
                    for piece in plain[part].split(PIECE):
                        dist.recv(piece, rank, group=self.group)
                elif own == rank:
                    for piece in used.split(PIECE):
                        dist.send(piece, 0, group=self.group)


def nearest(starts: list[int], target: float) -> int:
    """The index of the number nearest to the target, in an increasing list."""
    after = bisect.bisect(starts, target)
    return min(range(max(after - 1, 0), min(after + 1, len(starts))), key=lambda i: abs(starts[i] - target))


def sum_of_ranks(piece: Tensor, span: Span, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Starts to add up all ranks' gradients of a span, in this type.

    Returns a function that waits for this rank's share of the sum. One process gets its own tensor back.
    """
    if not distributed.is_group():
        return lambda: piece
    share = torch.empty(span.size, dtype=dtype, device=piece.device)
    work = collective("reduce_scatter_single", "reduce_scatter_tensor")(share, piece.to(dtype), async_op=True)

    def wait() -> Tensor:
        work.wait()
        return share

    return wait


def spread(padded: Tensor, span: Span) -> Callable[[], object]:
    """Starts to copy each rank's share of a span to all other ranks. Returns a function that waits for it."""
    if not distributed.is_group():
        return lambda: None
    gather = collective("all_gather_single", "all_gather_into_tensor")
    return gather(padded[span.padded], padded[span.mine], async_op=True).wait


def collective(name: str, older_name: str) -> Callable[..., dist.Work]:
    """A function of torch.distributed. Newer versions of torch have another name, and warn of the older one."""
    return getattr(dist, name, None) or getattr(dist, older_name)
