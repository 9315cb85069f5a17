"""The state that a training step changes: weights, their average, optimizer, scaler, counters.

All weights lie in one flat tensor, so that the optimizer's update, the average and the working copy in the training
precision take one kernel each.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compiled import copy_all, data_parallel, forget_half_step
from precision import Precision
from runtime.errors import UserError

# Each weight begins at a multiple of so many elements of the flat tensor. That is 128 bytes in 16 bits, so that matrix
# products find every weight aligned.
ALIGNMENT = 64


class TrainingState:
    """Everything that a step changes and a checkpoint keeps.

    Attributes:
        network: the float32 weights.
        working: the network that computes: `network` itself, or its copy in the training precision.
        ema: the network with averaged weights.
        launched: batches that the host has launched since the start of the first run.
        step: updates of the weights, as `read_counts` found them. Only the device knows which updates it skipped,
            because gradients were not finite.
        skipped: batches whose update was skipped, as `read_counts` found them.
        samples: samples that all ranks have drawn.
    """

    def __init__(self, network: nn.Module, precision: Precision, device: torch.device):
        self.network = network.to(device)
        self.working = precision.working_copy(self.network)
        self.ema = copy.deepcopy(self.network).eval()
        self.ema_weights = flatten(trainable(self.ema))  # (P,)
        self.ema.requires_grad_(False)
        self.weights = nn.Parameter(flatten(trainable(self.network)))  # (P,)
        self.working_weights = self.weights if self.working is network else flatten(trainable(self.working))  # (P,)
        self.parallel = data_parallel(self.working)
        self.lr = torch.zeros((), device=device)
        capturable = device.type == "cuda"
        self.optimizer = torch.optim.AdamW([self.weights], self.lr, weight_decay=0, fused=True, capturable=capturable)
        self.scaler = precision.grad_scaler(device.type)
        self.generator = torch.Generator(device)
        self.precision, self.device = precision, device
        self.launched = self.step = self.skipped = self.samples = 0
        self.updates = torch.zeros((), device=device, dtype=torch.int64)
        self.sums = torch.zeros(3, device=device)  # losses, gradient norms, updates since `take_means`
        self.largest_norm = torch.zeros((), device=device)  # since then
        self.bad_steps = torch.zeros(2, device=device)  # skipped in a row: now, and at most

    def state_dict(self) -> dict:
        """The parts of a checkpoint that a step changes. The next step changes these same tensors."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": dict(self.optimizer.state[self.weights]),
            "scaler": self.scaler.state_dict(),
            "since_log": {"sums": self.sums, "largest_norm": self.largest_norm},
            "bad_steps": self.bad_steps,
            "step": self.step,
            "skipped": self.skipped,
            "samples": self.samples,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Takes back what `state_dict` gave, of a network with the same settings."""
        self.network.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.state[self.weights] = {name: value.to(self.device) for name, value in saved["opt"].items()}
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

    @torch.no_grad()
    def refresh_working_copy(self) -> None:
        if self.working is not self.network:
            self.working_weights.copy_(self.weights)

    def take_gradients(self) -> Tensor:
        """The gradients of the working copy, moved into one float32 tensor, (P,)."""
        weights = trainable(self.working)
        flat = torch.empty_like(self.weights)
        gradients, gaps = pieces(flat, weights)
        copy_all(gradients, [weight.grad for weight in weights])
        for gap in gaps:
            gap.zero_()
        self.working.zero_grad(set_to_none=True)
        return flat

    @torch.no_grad()
    def finish_update(self, decay: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """Updates the average, the working copy and the counters, unless the optimizer skipped."""
        updated = grad_norm.isfinite()
        self.ema_weights.lerp_(self.weights, (1 - decay) * updated)
        self.refresh_working_copy()
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
        self.weights.grad = None
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
        """Raises UserError, with advice, if weights are not finite: no checkpoint should hold them."""
        if not (self.weights.isfinite().all() and self.ema_weights.isfinite().all()):
            raise UserError(
                f"weights are not finite at step {self.step} in {self.precision.name}, and were not saved; {advice()}:"
                " go on from there with a lower --lr, or with --grad-clip"
            )


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def pieces(flat: Tensor, weights: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of a flat tensor (P,): one in the shape of each weight, and the gaps between them."""
    sizes = [size for weight in weights for size in (weight.numel(), -weight.numel() % ALIGNMENT)]
    parts = flat.split(sizes)
    views = [part.view(weight.shape) for part, weight in zip(parts[::2], weights, strict=True)]
    return views, [gap for gap in parts[1::2] if len(gap)]


def flat_size(weights: list[nn.Parameter]) -> int:
    """P, the elements of one tensor that holds the weights."""
    return sum(weight.numel() + -weight.numel() % ALIGNMENT for weight in weights)


@torch.no_grad()
def flatten(weights: list[nn.Parameter]) -> Tensor:
    """Moves weights into one flat tensor, (P,). They become views of it."""
    flat = weights[0].new_zeros(flat_size(weights))
    for weight, view in zip(weights, pieces(flat, weights)[0], strict=True):
        weight.data = view.copy_(weight)
    return flat
