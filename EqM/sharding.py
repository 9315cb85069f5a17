"""How weights lie in one flat tensor, and how the ranks share the update of them.

Every rank computes gradients of all weights, and updates only its share of them: one part of the flat tensor, which
holds whole weights. So each rank keeps only its share of what an update needs. Source: ZeRO, stage 1 (Rajbhandari et
al. 2020, arXiv 1910.02054).
"""

import bisect
from collections.abc import Iterable
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
PIECE = 2**26  # elements of one message between hosts


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


@dataclass(frozen=True)
class Sharding:
    """The places of weights in flat tensors.

    The plain flat tensor (P,) holds all weights in order, with gaps that align them. Checkpoints hold the optimizer's
    state in this form. The padded one (R·S,) has a share of S elements for each of R ranks. A share begins with the
    rank's part of the plain tensor.

    Attributes:
        shapes: of the weights, by name.
        ends: where the parts of the ranks end in the plain tensor.
        rank: the rank whose share is `mine`.
    """

    shapes: dict[str, torch.Size]
    ends: tuple[int, ...]
    rank: int

    @staticmethod
    def of(weights: dict[str, nn.Parameter]) -> "Sharding":
        """Shares of nearly the same size, for this group of ranks."""
        shapes = {name: weight.shape for name, weight in weights.items()}
        ranks, ends = distributed.world_size(), [0, *accumulate(map(aligned, shapes.values()))]

        def nearest(target: float) -> int:
            after = bisect.bisect(ends, target)
            return min(ends[max(after - 1, 0) : after + 1], key=lambda end: abs(end - target))

        cuts = tuple(nearest(ends[-1] * (rank + 1) / ranks) for rank in range(ranks))
        return Sharding(shapes, cuts, distributed.rank())

    @property
    def ranks(self) -> int:
        return len(self.ends)

    @property
    def parts(self) -> list[slice]:
        """The part of each rank in the plain tensor."""
        return [slice(start, end) for start, end in zip((0, *self.ends), self.ends, strict=False)]

    @property
    def share(self) -> int:
        """Elements of a share, S."""
        return max(part.stop - part.start for part in self.parts)

    @property
    def mine(self) -> slice:
        """The place of this rank's share in the padded tensor."""
        return slice(self.rank * self.share, (self.rank + 1) * self.share)

    def held(self) -> dict[str, int]:
        """The weights in this rank's share, by name: where each begins, in elements."""
        part, places = self.parts[self.rank], accumulate(map(aligned, self.shapes.values()), initial=0)
        starts = zip(self.shapes, places, strict=False)
        return {name: place - part.start for name, place in starts if part.start <= place < part.stop}

    def views(self, padded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of a padded tensor (R·S,): one in the shape of each weight, and the gaps between them."""
        weights, gaps, shapes = [], [], iter(self.shapes.values())
        for part, share in zip(self.parts, padded.split(self.share), strict=True):
            place = part.start
            while place < part.stop:
                shape = next(shapes)
                start, end = place - part.start, place - part.start + shape.numel()
                weights.append(share[start:end].view(shape))
                place += aligned(shape)
                gaps.append(share[end : place - part.start])
            gaps.append(share[part.stop - part.start :])
        return weights, [gap for gap in gaps if len(gap)]

    def named(self, plain: Tensor) -> dict[str, Tensor]:
        """Views of a plain tensor (P,) in the shape of each weight, by name."""
        parts = plain.split([aligned(shape) for shape in self.shapes.values()])
        return {
            name: part[: shape.numel()].view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def padded(self, weights: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weights, in order, copied into a new padded tensor (R·S,) of this type and on this device."""
        flat = torch.empty(self.ranks * self.share, dtype=dtype, device=device)
        views, gaps = self.views(flat)
        copy_all(views, list(weights))
        for gap in gaps:
            gap.zero_()
        return flat

    def take_part(self, plain: Tensor, share: Tensor) -> None:
        """Copies this rank's part of a plain tensor (P,) into its share (S,)."""
        part = self.parts[self.rank]
        share[: part.stop - part.start] = plain[part]

    def sum_of_ranks(self, padded: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's share (S,) of the sum of all ranks' padded tensors (R·S,), exchanged in this type.

        A process without a group gets its own tensor back.
        """
        if not distributed.is_group():
            return padded
        share = torch.empty(self.share, dtype=dtype, device=padded.device)
        collective("reduce_scatter_single", "reduce_scatter_tensor")(share, padded.to(dtype))
        return share

    def fill_from_shares(self, padded: Tensor) -> None:
        """Copies the share that each rank has in a padded tensor (R·S,) to all other ranks."""
        if distributed.is_group():
            collective("all_gather_single", "all_gather_into_tensor")(padded, padded[self.mine])

    def whole(self, share: Tensor) -> dict[str, Tensor]:
        """All weights by name, on every rank, from the shares (S,) of the ranks."""
        padded = share
        if distributed.is_group():
            padded = share.new_empty(self.ranks * self.share)
            padded[self.mine] = share
            self.fill_from_shares(padded)
        return dict(zip(self.shapes, self.views(padded)[0], strict=True))


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
                self.plain = {name: share.new_empty(self.sharding.ends[-1]) for name, share in shares.items()}
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
        for rank, part in enumerate(self.sharding.parts):
            used = share[: part.stop - part.start]
            if self.sharding.rank == 0 and rank == 0:
                plain[part] = used
            elif self.sharding.rank == 0:
                for piece in plain[part].split(PIECE):
                    dist.recv(piece, rank, group=self.group)
            elif self.sharding.rank == rank:
                for piece in used.split(PIECE):
                    dist.send(piece, 0, group=self.group)


def plain_size(weights: dict[str, nn.Parameter]) -> int:
    """P, the elements of the plain flat tensor of these weights."""
    return sum(aligned(weight.shape) for weight in weights.values())


def aligned(shape: torch.Size) -> int:
    """The elements of a weight, with the gap after it."""
    return shape.numel() + -shape.numel() % ALIGNMENT


def collective(name: str, older_name: str) -> object:
    """A function of torch.distributed. Newer versions of torch have another name, and warn of the older one."""
    return getattr(dist, name, None) or getattr(dist, older_name)
