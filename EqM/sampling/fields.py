"""The field that samples follow: the field of a network under labels, guided, and sums of such fields."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from compiled import compile_network
from graphs import replayed
from models import EqM
from runtime.transfers import to_device
from sampling.descent import Field

UNKNOWN = 2**62  # no table has this row, so looking it up fails


def conditioned_field(
    network: EqM,
    batch: int,
    seconds_per_frame: float,
    fast: bool,
    recorded: bool = True,
    compiled: bool = True,
) -> Callable[..., Field]:
    """The network as a function that gives a field from labels (N,), and from γ if the network sees it.

    Args:
        batch: the one batch size that the field is for.
        fast: the field is for speed, as the two next say. False: it is eager.
        recorded: with `fast`, a GPU replays each evaluation as a CUDA graph. Set it to False if the caller records
            the evaluation itself: a recording cannot contain another.
        compiled: with `fast`, the network is compiled.
    """
    field = partial(network.field, seconds_per_frame=seconds_per_frame)
    if fast and compiled:
        compile_network(network, batch, training=False, seconds_per_frame=seconds_per_frame)
    if recorded:
        field = replayed(field, fast, network.device)

    modulations = Modulations(network)

    def conditioned(labels: Tensor, gamma: float = 0.0) -> Field:
        blocks, final = modulations(labels, gamma)  # (depth, N, 6D), (N, 2D)
        return lambda x: field(x, blocks, final)

    return conditioned


class Modulations:
    """What labels (N,) do to the blocks of a network, (depth, N, 6D), and to its last layer, (N, 2D).

    It is computed once for each label, and again when γ changes. After that a batch is a look into a table.
    Nothing waits for the device. Labels on a GPU must be known before: call this once with the same labels on the host.
    """

    def __init__(self, network: EqM):
        self.network = network
        self.gamma = 0.0
        self.known: set[int] = set()  # labels
        self.rows = torch.full((network.num_classes + 1,), UNKNOWN, device=network.device)  # by label
        self.firsts = torch.arange(len(network.blocks), device=self.rows.device)  # (depth,)
        self.blocks: Tensor | None = None  # (depth, rows, 6D)
        self.final: Tensor | None = None  # (rows, 2D)

    def __call__(self, labels: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        if gamma != self.gamma and not self.network.uncond:
            self.gamma, self.known = gamma, set()
        if not labels.is_cuda:
            new = [label for label in dict.fromkeys(labels.tolist()) if label not in self.known]
            labels = to_device(labels, self.rows.device)  # (N,)
            if new:
                self.add(torch.tensor(new))
        rows = self.rows[labels]  # (N,)
        depth, known = self.blocks.shape[:2]
        each = (self.firsts[:, None] * known + rows).flatten()  # (depth·N,)
        # index_select over the second of three axes would take more than twice as long.
        blocks = self.blocks.flatten(0, 1).index_select(0, each).unflatten(0, (depth, len(rows)))  # (depth, N, 6D)
        return blocks, self.final.index_select(0, rows)

    def add(self, labels: Tensor) -> None:
        y, first = to_device(labels, self.rows.device), len(self.known)  # (n,)
        parts, final = self.network.modulations(torch.full_like(y, self.gamma, dtype=torch.float32), y)
        blocks = torch.stack(parts)  # (depth, n, 6D)
        self.blocks = torch.cat([self.blocks, blocks], dim=1) if first else blocks
        self.final = torch.cat([self.final, final]) if first else final
        self.rows[y] = torch.arange(first, first + len(y), device=y.device)
        self.known.update(labels.tolist())


class Composition:
    """Sums Σ wₖ·gₖ of the guided fields gₖ = u + s·(cₖ − u) of classes, each in one batched call.

    Fields are gradients of energies. So the sum of fields is the gradient of the sum of energies (Du, Li & Mordatch
    2020, arXiv 2004.06030). The unconditional field u is the same for all classes: it takes one more row of labels.

    Args:
        weights: wₖ, one for each class of a sum.
        null_class: the label of u.
        scale: s of classifier-free guidance, for all channels or for each. If all are 1, u is not evaluated.
        device: where the fields are.

    Attributes:
        rows: evaluations of the network for one evaluation of the sum.
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
        """The field of N samples with classes y (K, N).

        Args:
            conditioned: gives the field of a batch from its labels.
        """
        if self.is_plain:
            return conditioned(y[0])
        rows = torch.cat([y, torch.full_like(y[:1], self.null_class)]) if self.guides else y  # (R, N)
        every = conditioned(rows.flatten())  # of a batch of RN

        def field(x: Tensor) -> Tensor:
            fields = every(torch.cat([x] * len(rows))).float().unflatten(0, rows.shape)  # (R, N, C, …)
            return (fields * self.coefficients.view(len(rows), 1, -1, *[1] * (x.dim() - 2))).sum(0)  # (N, C, …)

        return field
