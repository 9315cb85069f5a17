"""Muon for the matrices of the blocks; the other weights of a share keep AdamW.

Muon moves a matrix along its momentum, made orthogonal: all singular values become nearly 1. Sources: Jordan et al.
2024, https://kellerjordan.github.io/posts/muon/; for the scale Liu et al. 2025, arXiv 2502.16982. There is no weight
decay.

torch.optim.Muon (2.9 to 2.14) does not serve here. It gives the rate to its kernels as a number of the host, so that a
CUDA graph would repeat the rate of its recording; it has no flag that skips an update; and it takes one matrix at a
time. Source: torch/optim/_muon.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled import compiled_or_eager, fused_adamw_
from optimizer import BETAS, EPSILON, Rates, Share
from precision import resolve_precision
from sharding import Sharding

MOMENTUM = 0.95
# So many iterations of a·s + b·s³ + c·s⁵ bring singular values of 0.0016 to 1 to between 0.68 and 1.21 (computed).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
RMS = 0.2  # of a change over the rate, about that of AdamW: so one rate serves both
LEAST_NORM = 1e-30  # keeps 0 / 0 from becoming NaN
# The matrices that Muon changes, and how many of them, one below the other, a weight holds. Queries, keys and values do
# different work, and each is made orthogonal by itself, as Jordan et al. advise.
KINDS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
NAME = re.compile(rf"blocks\.\d+\.({'|'.join(map(re.escape, KINDS))})\.weight")


@dataclass(frozen=True)
class Run:
    """Matrices of one kind in a share, one in each of several blocks, at a regular stride.

    Attributes:
        starts: where each begins in the share, in elements.
        rows, columns: of each.
    """

    starts: range
    rows: int
    columns: int

    def matrices(self, flat: Tensor) -> Tensor:
        """A view of a share (S,), as wide as high or wider: (M, rows, columns), or their transposes."""
        sizes = len(self.starts), self.rows, self.columns
        found = flat[self.starts.start :].as_strided(sizes, (self.starts.step, self.columns, 1))
        return found.mT if self.rows > self.columns else found

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrices that `matrices` returns."""
        return min(self.rows, self.columns), max(self.rows, self.columns)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where each matrix begins and ends in the share."""
        return [(start, start + self.rows * self.columns) for start in self.starts]


def runs_of_share(sharding: Sharding) -> list[Run]:
    """Where the matrices of the blocks lie in this rank's share. It may have none.

    Raises:
        ValueError: the blocks differ from one another.
    """
    starts: dict[tuple[str, int], list[int]] = {}
    shapes = {}
    for name, start in sharding.held().items():
        if match := NAME.fullmatch(name):
            kind, (rows, columns) = match[1], sharding.shapes[name]
            rows //= KINDS[kind]
            for part in range(KINDS[kind]):
                starts.setdefault((kind, part), []).append(start + part * rows * columns)
                shapes.setdefault((kind, part), set()).add((rows, columns))
    runs = []
    for key, found in starts.items():
        regular = range(found[0], found[-1] + 1, found[1] - found[0] if len(found) > 1 else 1)
        if list(regular) != found or len(shapes[key]) > 1:
            raise ValueError(f"the blocks' {key[0]} differ in size or order")
        runs.append(Run(regular, *shapes[key].pop()))
    return runs


@dataclass(frozen=True)
class Matrices:
    """The matrices in a rank's share.

    Attributes:
        is_matrix: whether an element belongs to one, (S,).
    """

    runs: list[Run]
    is_matrix: Tensor

    @staticmethod
    def of(sharding: Sharding, device: torch.device) -> "Matrices":
        runs, is_matrix = runs_of_share(sharding), torch.zeros(sharding.share, dtype=torch.bool, device=device)
        for run in runs:
            run.matrices(is_matrix).fill_(True)
        return Matrices(runs, is_matrix)

    @property
    def others(self) -> list[slice]:
        """The parts of the share between matrices."""
        places = sorted(place for run in self.runs for place in run.places)
        edges = [0, *(edge for place in places for edge in place), len(self.is_matrix)]
        return [slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors, and singular values near 1: (M, r, c), where r ≤ c.

    Source: the Newton–Schulz iterations of Jordan et al. 2024.

    Args:
        matrices: (M, r, c), each of Frobenius norm 1 or 0.
    """
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = torch.bmm(matrices, matrices.mT)  # (M, r, r)
        factors = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)  # (M, r, r)
        matrices = torch.baddbmm(matrices, factors, matrices, beta=a)  # (M, r, c)
    return matrices


@torch.no_grad()
def orthogonalise(directions: Tensor, runs: list[Run], dtype: torch.dtype) -> None:
    """Replaces the matrices of a share (S,) by orthogonal ones of root mean square RMS.

    All matrices of one shape are one batch of products, in `dtype`.
    """
    for shape in dict.fromkeys(run.shape for run in runs):
        found = [run.matrices(directions) for run in runs if run.shape == shape]  # (Mᵢ, r, c) each
        batch = directions.new_empty(sum(map(len, found)), *shape, dtype=dtype)  # (M, r, c)
        places = batch.split([len(matrices) for matrices in found])
        for place, matrices in zip(places, found, strict=True):
            norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)  # (Mᵢ, 1, 1)
            torch.div(matrices, norms.clamp(min=LEAST_NORM), out=place)
        batch = orthogonal(batch) * (RMS * shape[1] ** 0.5)
        for matrices, part in zip(found, batch.split([len(matrices) for matrices in found]), strict=True):
            matrices.copy_(part)


@torch.no_grad()
def begin(share: Share, gradients: Tensor, rates: Rates, matrices: Matrices) -> Tensor:
    """Updates the weights that have AdamW, by torch's kernels, and the momentum of the matrices, which is in `exp_avg`.

    Returns:
        Nesterov's momentum of the matrices, and 0 for the other weights, (S,).
    """
    gradients, factors = gradients.float(), (rates.lr, BETAS, EPSILON, rates.step)
    directions = torch.where(matrices.is_matrix & rates.updated, gradients / rates.divisor, 0)  # (S,)
    flat = share.weights, gradients, share.exp_avg, share.exp_avg_sq
    others = ([tensor[span] for span in matrices.others] for tensor in flat)
    fused_adamw_(*others, *factors, divisor=rates.divisor, skip=~rates.updated)
    for run in matrices.runs:
        g, momentum = run.matrices(directions), run.matrices(share.exp_avg)  # (M, r, c)
        momentum.lerp_(g, (1 - MOMENTUM) * rates.updated)
        g.lerp_(momentum, MOMENTUM)
    return directions


@torch.no_grad()
def begin_in_one_kernel(share: Share, gradients: Tensor, rates: Rates, matrices: Matrices) -> Tensor:
    """As `begin`, written for the compiler. Without the compiler it is slow.

    Returns:
        Nesterov's momentum of the matrices, and AdamW's direction of the other weights, which it does not move, (S,).
    """
    if_updated = rates.updated.float()  # 1 or 0: a factor of each change
    g = torch.where(rates.updated, gradients.float() / rates.divisor, 0)  # (S,)
    new = torch.where(matrices.is_matrix, 1 - MOMENTUM, 1 - BETAS[0])  # (S,)
    exp_avg = share.exp_avg + new * if_updated * (g - share.exp_avg)  # (S,)
    kept = torch.where(rates.updated, BETAS[1], 1.0)
    exp_avg_sq = torch.where(matrices.is_matrix, 0, kept * share.exp_avg_sq + (1 - BETAS[1]) * g * g)  # (S,)
    adamw = exp_avg / rates.corrections[0] / ((exp_avg_sq / rates.corrections[1]).sqrt() + EPSILON)  # (S,)
    directions = torch.where(matrices.is_matrix, g + MOMENTUM * (exp_avg - g), adamw)  # (S,)
    share.exp_avg.copy_(exp_avg)
    share.exp_avg_sq.copy_(exp_avg_sq)
    return directions


@torch.no_grad()
def move(share: Share, directions: Tensor, rates: Rates) -> None:
    """Moves the weights against directions (S,). Their average and their working copy follow."""
    share.weights.sub_(directions * (rates.lr * rates.updated))
    share.average.lerp_(share.weights, (1 - rates.decay) * rates.updated)
    if share.working is not share.weights:
        share.working.copy_(share.weights)


@dataclass(frozen=True)
class MuonUpdate:
    """An update with Muon for some weights of a share, and AdamW for the others. A call makes one, as optimizer.update.

    Attributes:
        dtype: the type of the products.
        begin: from a share, its gradients, the rates and the matrices to directions, (S,): what precedes the products.
        end: `move`.
    """

    matrices: Matrices
    dtype: torch.dtype
    begin: Callable[[Share, Tensor, Rates, Matrices], Tensor] = begin
    end: Callable[[Share, Tensor, Rates], None] = move

    @staticmethod
    def of(sharding: Sharding, device: torch.device, compiles: bool) -> "MuonUpdate":
        """The update of this rank's share. The products are in bf16 on a GPU that has it, else in float32."""
        matrices, dtype = Matrices.of(sharding, device), resolve_precision("bf16", device.type).dtype
        if not compiles:
            return MuonUpdate(matrices, dtype)
        return MuonUpdate(matrices, dtype, compiled_or_eager(begin_in_one_kernel, begin), compiled_or_eager(move))

    def __call__(self, share: Share, gradients: Tensor, rates: Rates) -> None:
        directions = self.begin(share, gradients, rates, self.matrices)  # (S,)
        orthogonalise(directions, self.matrices.runs, self.dtype)
        self.end(share, directions, rates)
