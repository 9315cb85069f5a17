"""The state that a training step changes: weights, their average, optimizer, scaler, counters.

All weights lie in one flat tensor. Each rank keeps, in float32, its share of the weights, of their average and of the
optimizer's moments. The network that computes is whole on every rank.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compiled import forget_half_step
from optimizer import Share
from precision import Precision
from runtime import distributed
from runtime.errors import UserError
from sharding import HostGather, Sharding, trainable

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Everything that a step changes and a checkpoint keeps. R ranks have shares of S elements.

    Attributes:
        working: the network that computes, in the training precision.
        working_weights: its weights, (R·S,).
        share: what this rank updates, (S,) each.
        launched: batches that the host has launched since the start of the first run.
        step: updates of the weights, as `read_counts` found them. Only the device knows which updates it skipped,
            because gradients were not finite.
        skipped: batches whose update was skipped, as `read_counts` found them.
        samples: samples that all ranks have drawn.
    """

    def __init__(self, network: nn.Module, precision: Precision, device: torch.device):
        self.precision, self.device = precision, device
        weights = trainable(network)
        self.sharding = Sharding.of(weights)
        self.host_gather = HostGather(self.sharding)
        self.constants = {name: value.clone() for name, value in network.state_dict().items() if name not in weights}
        self.skeleton = without_memory(network)
        self.working = precision.working_copy(network).to(device)
        whole = self.sharding.padded(weights.values(), torch.float32, device)  # (R·S,)
        self.working_weights = whole.to(precision.dtype)  # (R·S,), `whole` itself in fp32
        for weight, view in zip(self.working_parameters(), self.sharding.views(self.working_weights)[0], strict=True):
            weight.data = view
        working = self.working_weights[self.sharding.mine]  # (S,)
        mine = working if self.working_weights is whole else whole[self.sharding.mine].clone()  # (S,)
        self.share = Share(mine, mine.clone(), torch.zeros_like(mine), torch.zeros_like(mine), working)
        self.lr = torch.zeros((), device=device)
        self.scaler = precision.grad_scaler(device.type)
        # The scaler looks at the gradients of an optimizer's parameters. It is shown their norm.
        self.norm_holder = nn.Parameter(torch.zeros((), device=device))
        self.shown_to_scaler = torch.optim.SGD([self.norm_holder])
        self.generator = torch.Generator(device)
        self.launched = self.step = self.skipped = self.samples = 0
        self.updates = torch.zeros((), device=device, dtype=torch.int64)
        self.sums = torch.zeros(3, device=device)  # losses, gradient norms, updates since `take_means`
        self.largest_norm = torch.zeros((), device=device)  # since then
        self.bad_steps = torch.zeros(2, device=device)  # skipped in a row: now, and at most

    def working_parameters(self) -> list[nn.Parameter]:
        return list(trainable(self.working).values())

    def snapshot(self) -> dict:
        """What this rank gives to a checkpoint. The next step changes these same tensors."""
        moments = {name: getattr(self.share, name) for name in MOMENTS}
        return {
            "shares": {"model": self.share.weights, "ema": self.share.average} | moments,
            "scaler": self.scaler.state_dict(),
            "since_log": {"sums": self.sums, "largest_norm": self.largest_norm},
            "bad_steps": self.bad_steps,
            "step": self.step,
            "skipped": self.skipped,
            "samples": self.samples,
        }

    def assemble(self, snapshot: dict, problem: Exception | None = None) -> dict:
        """The contents of a checkpoint, with whole tensors, on rank 0; nothing on the other ranks.

        Every rank must call it, with its snapshot on the host, or with the problem that kept it from having one.

        Raises:
            MemoryError, RuntimeError: a rank has a problem.
        """
        plain = self.host_gather.collect(snapshot.get("shares", {}), problem)  # (P,) each
        if not plain:
            return {}
        model, ema = ({**self.constants, **self.sharding.named(plain[name])} for name in ("model", "ema"))
        order = self.skeleton.state_dict()
        others = {name: value for name, value in snapshot.items() if name != "shares"}
        return {
            "model": {name: model[name] for name in order},
            "ema": {name: ema[name] for name in order},
            "opt": {"step": torch.tensor(float(snapshot["step"]))} | {name: plain[name] for name in MOMENTS},
            **others,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Takes this rank's share of what `assemble` gave, of a network with the same settings."""
        for name in MOMENTS if saved["opt"] else ():
            self.sharding.take_part(saved["opt"][name], getattr(self.share, name))
        for name, share in (("model", self.share.weights), ("ema", self.share.average)):
            weights = (saved[name][key] for key in self.sharding.shapes)
            share.copy_(self.sharding.padded(weights, torch.float32, torch.device("cpu"))[self.sharding.mine])
        for name in self.constants:
            self.constants[name] = saved["model"][name]
            self.working.get_parameter(name).data.copy_(saved["model"][name])
        # A disabled scaler saved nothing, and an enabled one refuses an empty state.
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.skipped, self.samples = saved["step"], saved["skipped"], saved["samples"]
        self.launched = self.step + self.skipped
        self.updates.fill_(self.step)
        self.sums.copy_(saved["since_log"]["sums"])
        self.largest_norm.copy_(saved["since_log"]["largest_norm"])
        self.bad_steps.copy_(saved["bad_steps"])
        self.refresh_working_copy()

    def averaged_network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A network with all averaged weights, in this type and without gradients. Every rank must call it.

        It holds the weights of now for a short time only: the next step may change them.
        """
        network = copy.deepcopy(self.skeleton)
        constants = {name: value.to(self.device, dtype) for name, value in self.constants.items()}
        network.load_state_dict(constants | self.sharding.whole(self.share.average.to(dtype)), assign=True)
        return network

    @torch.no_grad()
    def refresh_working_copy(self) -> None:
        """Gives the working network, on every rank, the weights of all shares. Every rank must call it."""
        if self.share.working is not self.share.weights:
            self.share.working.copy_(self.share.weights)
        self.sharding.fill_from_shares(self.working_weights)

    def take_gradients(self, dtype: torch.dtype) -> Tensor:
        """The gradients of the working network, moved into one tensor of this type, (R·S,)."""
        gradients = [weight.grad for weight in self.working_parameters()]
        flat = self.sharding.padded(gradients, dtype, self.device)  # (R·S,)
        self.working.zero_grad(set_to_none=True)
        return flat

    def exchange(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the sum of all ranks' gradients (R·S,), and the norm of that sum: (S,), scalar."""
        share = self.sharding.sum_of_ranks(gradients, self.precision.dtype)  # (S,)
        squares = torch.linalg.vector_norm(share, dtype=torch.float32).square()
        return share, distributed.total(squares).sqrt()

    def unscaled(self, scaled_norm: Tensor) -> tuple[Tensor, Tensor]:
        """The norm without the scaler's factor, and that factor. Has the scaler note whether the norm is finite."""
        self.norm_holder.grad = scaled_norm
        self.scaler.unscale_(self.shown_to_scaler)
        norm, self.norm_holder.grad = self.norm_holder.grad, None
        return norm, self.scaler.scale(torch.ones_like(norm))

    @torch.no_grad()
    def count(self, updated: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """Counts a batch, whose update was made if the bool `updated` is true."""
        self.sums += torch.where(updated, torch.stack([loss, grad_norm, torch.ones_like(loss)]), 0)
        self.largest_norm.copy_(torch.where(updated, self.largest_norm.maximum(grad_norm), self.largest_norm))
        in_a_row = torch.where(updated, 0, self.bad_steps[0] + 1)
        self.bad_steps.copy_(torch.stack([in_a_row, self.bad_steps[1].maximum(in_a_row)]))
        self.updates += updated

    def advance(self, batch: int) -> None:
        """Counts a launched batch of so many samples over all ranks."""
        self.launched += 1
        self.samples += batch

    @property
    def expected_step(self) -> int:
        """The step, if no update was skipped since the last `read_counts`."""
        return self.launched - self.skipped

    def read_counts(self) -> int:
        """Waits for the device, and returns how many updates were skipped since the last call."""
        self.step = int(self.updates)
        skipped = self.launched - self.step - self.skipped
        self.skipped += skipped
        return skipped

    def has_unreported_steps(self) -> bool:
        """True if there were updates since the last `take_means`. Waits for the device."""
        return bool(self.sums[2] > 0)

    def take_means(self) -> Tensor:
        """This rank's mean loss, mean gradient norm and largest gradient norm since the last call, (3,)."""
        means = torch.cat([self.sums[:2] / self.sums[2], self.largest_norm[None]])
        self.sums.zero_()
        self.largest_norm.zero_()
        return means

    def drop_half_step(self) -> None:
        """Forgets a step that broke off: its gradients, and that the scaler has begun it."""
        self.working.zero_grad(set_to_none=True)
        self.norm_holder.grad = None
        forget_half_step(self.scaler)

    def check_gradients(self, max_bad_steps: int, advice: Callable[[], str]) -> None:
        """Raises UserError, with advice, if the run cannot recover from its gradients.

        In fp16 the scaler has halved its scale to below 1. In other precisions gradients were not finite in
        `max_bad_steps` steps in a row.
        """
        in_a_row = int(self.bad_steps[1])
        if self.scaler.is_enabled():
            if self.scaler.get_scale() < 1:
                raise UserError(
                    f"gradients overflow at step {self.step} however small the fp16 scale, {self.skipped} batches"
                    f" skipped; {advice()}: go on from there with a lower --lr, with --grad-clip, or in bf16 or fp32"
                )
        elif in_a_row >= max_bad_steps:
            raise UserError(
                f"gradients were not finite in {in_a_row} steps in a row, at step {self.step} in {self.precision.name};"
                f" {advice()}: go on from there with a lower --lr or with --grad-clip, or look at the data"
            )

    def check_finite(self, advice: Callable[[], str]) -> None:
        """Raises UserError, with advice, if weights are not finite: no checkpoint should hold them.

        Every rank must call it.
        """
        finite = bool(self.share.weights.isfinite().all() and self.share.average.isfinite().all())
        if not all(distributed.gather(finite)):
            raise UserError(
                f"weights are not finite at step {self.step} in {self.precision.name}, and were not saved; {advice()}:"
                " go on from there with a lower --lr, or with --grad-clip"
            )


def without_memory(network: nn.Module) -> nn.Module:
    """A copy of the network that has no memory for weights, for evaluation."""
    weights = {id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, weights).eval()
