"""One training step, and all that it changes: weights, their average, optimizer, scaler, counters."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import distributed
from checkpoint import load_weights
from objective import drop_labels, eqm_loss
from precision import Precision


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training step."""

    lr: float
    warmup_steps: int
    grad_clip: float  # largest gradient norm; 0 clips nothing
    ema_decay: float

    def lr_at(self, step: int) -> float:
        """The learning rate of update `step` (the first is 0): linear warm-up, then constant."""
        return self.lr * min(1.0, (step + 1) / max(self.warmup_steps, 1))

    def ema_decay_at(self, step: int) -> float:
        """Warmed up, so that a short run's average does not hold its initial weights."""
        return min(self.ema_decay, (1 + step) / (10 + step))


class TrainingState:
    """Everything that a step changes and a checkpoint keeps.

    `step` counts updates of the weights, `skipped` the batches whose update the fp16 scaler
    skipped, `samples` the samples drawn by all ranks.
    """

    def __init__(self, network: nn.Module, precision: Precision, device: torch.device):
        self.network = network.to(device)
        self.parallel = distributed.data_parallel(self.network)
        self.ema = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=0, fused=fused)
        self.scaler = precision.grad_scaler(device.type)
        self.precision, self.device = precision, device
        self.step = self.skipped = self.samples = 0

    def state_dict(self) -> dict:
        """The parts of a checkpoint that a step changes."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "samples": self.samples,
        }

    def load_state_dict(self, saved: dict, source: str | Path) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            UserError: the weights, which came from `source`, are another network's.
        """
        load_weights(self.network, saved["model"], source)
        load_weights(self.ema, saved["ema"], source)
        fused = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(saved["opt"])
        # The saved groups carry the saving device's choice, which the scaler's step must not see.
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        for values in self.optimizer.state.values():
            values["step"] = values["step"].to(self.device if fused else "cpu")
        # A scaler that was not on saved nothing, and one that is on refuses nothing.
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.skipped, self.samples = saved["step"], saved["skipped"], saved["samples"]

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - decay)


@dataclass(frozen=True)
class Draws:
    """A step's random numbers: noise in x's shape, γ (N,) and a uniform draw per label (N,)."""

    noise: Tensor
    gamma: Tensor
    label_uniform: Tensor


def draw_random_numbers(x: Tensor, seed: int, samples: int, rank: int) -> Draws:
    """A step's random numbers, from (seed, samples drawn before, rank) alone: a resumed run repeats them."""
    state = np.random.SeedSequence([seed, samples, rank]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(x.device).manual_seed(int(state))
    n = x.shape[0]
    return Draws(
        torch.randn(x.shape, device=x.device, generator=generator),
        torch.rand(n, device=x.device, generator=generator),
        torch.rand(n, device=x.device, generator=generator),
    )


def train_step(
    state: TrainingState, recipe: Recipe, x: Tensor, y: Tensor, seconds_per_frame: Tensor, draws: Draws
) -> tuple[bool, Tensor, Tensor]:
    """One forward, backward and update; reads the same in every precision.

    An update that the fp16 scaler skips, because gradients overflowed, leaves weights, EMA and
    step count as they were.

    Args:
        x: data in [−1, 1], (N, C, H, W) or (N, C, T, H, W).
        y: class labels, (N,).
        seconds_per_frame: (N,).

    Returns:
        Whether the weights were updated; this rank's loss and the gradients' norm before
        clipping, scalars.
    """
    y = drop_labels(y, draws.label_uniform, state.network.num_classes)  # (N,)

    def field(x_gamma: Tensor, gamma: Tensor) -> Tensor:
        with state.precision.autocast(state.device.type):
            return state.parallel(x_gamma, gamma, y, seconds_per_frame)

    loss = eqm_loss(field, x, draws.noise, draws.gamma)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.trained, recipe.grad_clip or float("inf"))
    state.optimizer.param_groups[0]["lr"] = recipe.lr_at(state.step)
    scale_before = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    # The scale falls where an update was skipped, and cannot fall further at 0.
    updated = state.scaler.get_scale() >= scale_before > 0
    if updated:
        state.update_ema(recipe.ema_decay_at(state.step))
        state.step += 1
    else:
        state.skipped += 1
    return updated, loss.detach(), grad_norm
