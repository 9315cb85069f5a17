"""One training step, and the state that it changes: weights, their average, optimizer, scaler, counters.

All weights lie in one flat tensor, so that the optimizer's update, the average and the working copy in the training
precision take one kernel each. The step reads nothing back from the device. So the host never waits for it, and a GPU
can replay it as one CUDA graph.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compiled import Graphed, compile_network, copy_all, data_parallel, forget_half_step, skip_update_if
from models import load_weights
from objective import Objective, drop_labels
from precision import Precision
from runtime import cli, distributed
from runtime.draws import seed_draws
from runtime.errors import UserError

# Each weight begins at a multiple of so many elements of the flat tensor. That is 128 bytes in 16 bits, so that matrix
# products find every weight aligned.
ALIGNMENT = 64


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training step.

    Attributes:
        lr: AdamW's learning rate after the warm-up.
        warmup_steps: updates of linear warm-up.
        grad_clip: largest gradient norm; 0 clips nothing.
        ema_decay: of the averaged weights, after its own warm-up.
        micro_batch: samples of one forward and backward pass; None: the rank's whole batch.
    """

    lr: float
    warmup_steps: int
    grad_clip: float
    ema_decay: float
    micro_batch: int | None = None
    objective: Objective = Objective()

    def lr_at(self, step: Tensor) -> Tensor:
        """The learning rate of update `step` (the first is 0): linear warm-up, then constant."""
        return self.lr * ((step + 1) / max(self.warmup_steps, 1)).clamp(max=1)

    def ema_decay_at(self, step: Tensor) -> Tensor:
        """The decay at update `step`. It warms up, so that a short run's average does not hold its initial weights."""
        return ((1 + step) / (10 + step)).clamp(max=self.ema_decay)


def add_recipe_args(group: argparse._ActionsContainer) -> None:
    """Adds the flags of a Recipe."""
    cli.add_kept(
        group,
        "--micro-batch-size",
        type=cli.positive_int,
        help="samples of a rank at a time; their gradients add up; default all",
    )
    cli.add_kept(group, "--lr", 1e-4, type=cli.positive_float, help="AdamW's learning rate")
    cli.add_kept(group, "--warmup-steps", 0, type=cli.non_negative_int, help="steps of linear warm-up")
    cli.add_kept(group, "--grad-clip", 0.0, type=cli.non_negative_float, help="largest gradient norm; 0: no limit")
    cli.add_kept(group, "--ema-decay", 0.9999, type=cli.fraction, help="of the averaged weights")


def recipe_of(args: argparse.Namespace, objective: Objective) -> Recipe:
    """The recipe that the flags ask for."""
    return Recipe(args.lr, args.warmup_steps, args.grad_clip, args.ema_decay, args.micro_batch_size, objective)


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

    def load_state_dict(self, saved: dict, source: str | Path) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            UserError: the weights or the optimizer's state belong to another network; they came from `source`.
        """
        load_weights(self.network, saved["model"], source)
        load_weights(self.ema, saved["ema"], source)
        for name in ("exp_avg", "exp_avg_sq") if saved["opt"] else ():
            if getattr(saved["opt"].get(name), "shape", None) != self.weights.shape:
                raise UserError(f"{source} holds another optimizer's state: it can be sampled, but not trained on")
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


@torch.no_grad()
def flatten(weights: list[nn.Parameter]) -> Tensor:
    """Moves weights into one flat tensor, (P,). They become views of it."""
    flat = weights[0].new_zeros(sum(weight.numel() + -weight.numel() % ALIGNMENT for weight in weights))
    for weight, view in zip(weights, pieces(flat, weights)[0], strict=True):
        weight.data = view.copy_(weight)
    return flat


def draw_random_numbers(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A step's noise in x's shape, γ (N,), and a uniform number per label (N,)."""
    n = x.shape[0]
    return (
        torch.randn(x.shape, device=x.device, generator=generator),
        torch.rand(n, device=x.device, generator=generator),
        torch.rand(n, device=x.device, generator=generator),
    )


def network_loss(
    network: nn.Module,
    objective: Objective,
    x: Tensor,
    noise: Tensor,
    gamma: Tensor,
    y: Tensor,
    seconds_per_frame: Tensor,
) -> Tensor:
    """The loss of a network on x, a float32 scalar."""

    def field(x_gamma: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return network(x_gamma, gamma, y, seconds_per_frame, with_tokens=True)

    return objective.loss(field, x, noise, gamma)


def train_step(state: TrainingState, recipe: Recipe, x: Tensor, y: Tensor, seconds_per_frame: Tensor) -> Tensor:
    """One forward pass, backward pass and update. It never waits for the device.

    If gradients are not finite, the update is skipped: weights, their average and the count of updates stay as they
    were. A loss that is not finite makes such gradients.

    Args:
        x: data in [−1, 1], (N, C, H, W) or (N, C, T, H, W).
        y: class labels, (N,).
        seconds_per_frame: (N,).

    Returns:
        This rank's loss, and the norm of the gradients before clipping, (2,).
    """
    noise, gamma, label_uniform = draw_random_numbers(x, state.generator)
    y = drop_labels(y, label_uniform, state.network.num_classes)  # (N,)
    micro_batch = recipe.micro_batch or len(x)
    loss, state.weights.grad = torch.zeros_like(state.lr), None
    for part in zip(*(values.split(micro_batch) for values in (x, noise, gamma, y, seconds_per_frame)), strict=True):
        part_loss = network_loss(state.parallel, recipe.objective, *part) * (micro_batch / len(x))
        state.scaler.scale(part_loss).backward()
        gradients = state.take_gradients()  # (P,)
        state.weights.grad = gradients if state.weights.grad is None else state.weights.grad.add_(gradients)
        loss += part_loss.detach()

    state.scaler.unscale_(state.optimizer)
    grad_norm = torch.linalg.vector_norm(state.weights.grad)
    if recipe.grad_clip:
        nn.utils.clip_grads_with_norm_([state.weights], recipe.grad_clip, grad_norm)
    state.lr.copy_(recipe.lr_at(state.updates))
    skip_update_if(~grad_norm.isfinite(), state.optimizer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.weights.grad = None
    state.finish_update(recipe.ema_decay_at(state.updates), loss, grad_norm)
    return torch.stack([loss, grad_norm])


@dataclass(frozen=True)
class SeededStep:
    """A step as a function of x, y and seconds_per_frame, with random numbers of its own.

    They follow from (seed, samples drawn before, rank) alone, so that a resumed run repeats them.
    """

    launch: Callable[[Tensor, Tensor, Tensor], Tensor]
    state: TrainingState
    seed: int

    def __call__(self, x: Tensor, y: Tensor, seconds_per_frame: Tensor) -> Tensor:
        seed_draws(self.state.generator, self.seed, self.state.samples, distributed.rank())
        return self.launch(x, y, seconds_per_frame)


def training_step(state: TrainingState, recipe: Recipe, batch: int, seed: int, fast: bool) -> SeededStep:
    """`train_step` for batches of one size on each rank, compiled and replayed as a CUDA graph if it is `fast`."""
    step = partial(train_step, state, recipe)
    if fast:
        compile_network(state.working, recipe.micro_batch or batch, training=True)
        if state.device.type == "cuda":
            step = Graphed(step, state.generator, state.drop_half_step, together=True)
    return SeededStep(step, state, seed)
