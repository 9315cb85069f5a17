"""One training step: forward, backward, update, average.

The step reads nothing back from the device. So the host never waits for it, and a GPU can replay it as one CUDA graph.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from compiled import Speed, compile_network, compiled_or_eager
from graphs import Graphed
from muon import MuonUpdate
from objective import CLASS_DROPOUT, Objective, drop_labels
from optimizer import LR_SCHEDULES, OPTIMIZERS, Rates, Share, update, update_in_one_kernel
from runtime import cli, distributed
from runtime.errors import UserError
from runtime.random_numbers import seed_draws
from state import TrainingState

DECAY_SHARE = 0.4  # of a run: how long the learning rate falls, unless a flag says it
BEGUN_SHARE = 0.5  # of the clips whose frames have levels of their own: those that begin with clean frames


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training step.

    Attributes:
        lr: the learning rate after the warm-up.
        warmup_steps: updates of linear warm-up.
        schedule: one of LR_SCHEDULES: how the rate falls to 0 in the end.
        decay_from, decay_to: the updates between which it falls.
        grad_clip: largest gradient norm; 0 clips nothing.
        ema_decay: of the averaged weights, after its own warm-up.
        micro_batch: samples of one forward and backward pass; None: the rank's whole batch.
        optimizer: one of OPTIMIZERS, for the matrices of the blocks. The other weights have AdamW.
        class_dropout: share of the samples whose label is replaced by the null class.
        stretch: rows and columns are up to so many times as far apart, as `draw_spacing` says.
    """

    lr: float
    warmup_steps: int
    grad_clip: float
    ema_decay: float
    micro_batch: int | None = None
    objective: Objective = Objective()
    schedule: str = "constant"
    decay_from: float = 0.0
    decay_to: float = 1.0
    optimizer: str = "adamw"
    class_dropout: float = CLASS_DROPOUT
    stretch: float = 1.0

    def lr_at(self, step: Tensor) -> Tensor:
        """The learning rate of update `step` (the first is 0): linear warm-up, constant, then a decay."""
        rate = self.lr * ((step + 1) / max(self.warmup_steps, 1)).clamp(max=1)
        if self.schedule == "constant":
            return rate
        gone = ((step - self.decay_from) / (self.decay_to - self.decay_from)).clamp(0, 1)  # of the decay
        return rate * (1 - gone if self.schedule == "linear" else (1 + (math.pi * gone).cos()) / 2)

    def ema_decay_at(self, step: Tensor) -> Tensor:
        """The decay at update `step`. It warms up, so that a short run's average does not hold its initial weights."""
        return ((1 + step) / (10 + step)).clamp(max=self.ema_decay)


def add_recipe_args(group: argparse._ActionsContainer) -> None:
    """Adds the flags of a Recipe."""
    cli.add_kept(
        group,
        "--micro-batch-size",
        type=cli.count,
        help="samples of a rank at a time; their gradients add up; default all",
    )
    cli.add_kept(
        group,
        "--optimizer",
        "adamw",
        choices=OPTIMIZERS,
        help="of the blocks' matrices; all other weights have AdamW",
    )
    cli.add_kept(group, "--lr", 1e-4, type=cli.positive_float, help="learning rate, of Muon too")
    cli.add_kept(group, "--warmup-steps", 0, type=cli.non_negative_int, help="steps of linear warm-up")
    cli.add_kept(
        group,
        "--lr-schedule",
        "constant",
        choices=LR_SCHEDULES,
        help="how the learning rate falls to 0 at the end of the run, which --max-steps or --epochs sets",
    )
    decay = "steps of that fall; default 40%% of all"
    cli.add_kept(group, "--decay-steps", type=cli.positive_int, help=decay)
    cli.add_kept(group, "--grad-clip", 0.0, type=cli.non_negative_float, help="largest gradient norm; 0: no limit")
    cli.add_kept(group, "--ema-decay", 0.9999, type=cli.fraction, help="of the averaged weights")
    dropped = "share of samples that are shown under the null class, for guidance and --class none"
    cli.add_kept(group, "--class-dropout", CLASS_DROPOUT, type=cli.fraction, help=dropped)
    stretch = "rows and columns of half the samples are up to S times as far apart, by chance: for larger samples later"
    cli.add_kept(group, "--position-stretch", 1.0, type=cli.stretch, metavar="S", help=f"{stretch} (rotary positions)")


def check_decay(args: argparse.Namespace, last_step: float) -> None:
    """Raises UserError if --decay-steps has no meaning in a run that ends at `last_step`, or is longer than it."""
    if args.decay_steps and args.lr_schedule == "constant":
        raise UserError("--decay-steps needs --lr-schedule linear or cosine: add it")
    if args.decay_steps and args.decay_steps > last_step:
        raise UserError(f"--decay-steps {args.decay_steps} is more than the run's {last_step} steps: lower it")


def recipe_of(args: argparse.Namespace, objective: Objective, last_step: float) -> Recipe:
    """The recipe that the flags ask for, of a run that ends at `last_step`.

    Raises:
        UserError: --decay-steps has no meaning, or is longer than the run.
    """
    check_decay(args, last_step)
    decay = args.decay_steps or max(1, round(DECAY_SHARE * last_step))
    numbers = args.lr, args.warmup_steps, args.grad_clip, args.ema_decay, args.micro_batch_size
    decays = args.lr_schedule, last_step - decay, last_step
    return Recipe(*numbers, objective, *decays, args.optimizer, args.class_dropout, args.position_stretch)


def draw_random_numbers(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A step's noise in x's shape, and uniform numbers for γ (N,) and for labels (N,)."""
    n = x.shape[0]
    return (
        torch.randn(x.shape, device=x.device, generator=generator),
        torch.rand(n, device=x.device, generator=generator),
        torch.rand(n, device=x.device, generator=generator),
    )


def draw_frame_levels(
    gamma: Tensor, frames: int, temporal_patch: int, share: float, generator: torch.Generator
) -> Tensor:
    """γ of each frame, (N, T), from those of samples, (N,). It is the same for all frames of a token's time.

    In a share of the samples each time has a γ of its own. In BEGUN_SHARE of these the first times, at least one and
    not all, are clean: γ = 1. Such a beginning is what a sampler holds when frames are given.

    Independent levels by frame are those of Chen et al. 2024 (Diffusion Forcing, arXiv 2407.01392). A field that is not
    told γ needs no change for them.
    """
    n, times = len(gamma), frames // temporal_patch
    uniform = torch.rand(n, times + 3, device=gamma.device, generator=generator)
    own, begun, length = uniform[:, times:, None].unbind(1)  # (N, 1) each
    clean = (1 + (length * (times - 1)).floor()).clamp(max=times - 1)  # (N, 1) times at the start
    is_clean = (torch.arange(times, device=gamma.device) < clean) & (begun < BEGUN_SHARE)  # (N, T')
    levels = torch.where(is_clean, 1.0, uniform[:, :times])  # (N, T')
    return torch.where(own < share, levels, gamma[:, None]).repeat_interleave(temporal_patch, dim=1)


def draw_spacing(x: Tensor, stretch: float, generator: torch.Generator) -> Tensor:
    """The spacing of the rows and of the columns of samples x, in patches, (N, 2).

    In half of the cases it is 1, in the others up to `stretch`, evenly in its logarithm. So a network sees places as
    far apart as those of a larger picture, as in Ruoss et al. 2023 (arXiv 2305.16843), who draw positions from a
    longer range than any training text has.
    """
    uniform = torch.rand(len(x), 2, device=x.device, generator=generator)
    return stretch ** (2 * uniform - 1).clamp(min=0)


def network_loss(
    network: nn.Module,
    objective: Objective,
    x: Tensor,
    noise: Tensor,
    gamma: Tensor,
    y: Tensor,
    seconds_per_frame: Tensor,
    spacing: Tensor | None = None,
) -> Tensor:
    """The loss of a network on x, a float32 scalar."""

    def field(x_gamma: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return network(x_gamma, gamma, y, seconds_per_frame, with_tokens=True, spacing=spacing)

    return objective.loss(field, x, noise, gamma)


@torch.no_grad()
def prepare_update(state: TrainingState, recipe: Recipe, loss: Tensor, grad_norm: Tensor, scale: Tensor) -> Rates:
    """The rates of this batch's update. Counts the batch."""
    updated, before = grad_norm.isfinite(), state.updates.clone()
    state.lr.copy_(recipe.lr_at(before))
    excess = (grad_norm / recipe.grad_clip).clamp(min=1) if recipe.grad_clip else 1
    state.count(updated, loss, grad_norm)
    return Rates.of(updated, before + 1, state.lr, scale * excess, recipe.ema_decay_at(before))


@dataclass(frozen=True)
class Update:
    """The two parts of an update: its rates, and its change of the weights.

    If compiled, the rates are one kernel, and so is AdamW's change.
    """

    prepare: Callable[[TrainingState, Recipe, Tensor, Tensor, Tensor], Rates]
    apply: Callable[[Share, Tensor, Rates], None]

    @staticmethod
    def of(optimizer: str, state: TrainingState, compiles: bool) -> "Update":
        """The update that an optimizer of OPTIMIZERS makes."""
        prepare = compiled_or_eager(prepare_update) if compiles else prepare_update
        if optimizer == "muon":
            return Update(prepare, MuonUpdate.of(state.sharding, state.device, compiles))
        return Update(prepare, compiled_or_eager(update_in_one_kernel, update) if compiles else update)


def train_step(
    state: TrainingState,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    seconds_per_frame: Tensor,
    update: Update | None = None,
) -> Tensor:
    """One forward pass, backward pass and update. It never waits for the device.

    If gradients are not finite, the update is skipped: weights, their average and the count of updates stay as they
    were. A loss that is not finite makes such gradients.

    Args:
        x: data in [−1, 1], (N, C, H, W) or (N, C, T, H, W).
        y: class labels, (N,).
        seconds_per_frame: (N,).
        update: that of the recipe's optimizer; None makes one that is not compiled.

    Returns:
        This rank's loss, and the norm of the gradients before clipping, (2,).
    """
    noise, gamma, label_uniform = draw_random_numbers(x, state.generator)
    y = drop_labels(y, label_uniform, state.working.num_classes, recipe.class_dropout)  # (N,)
    if recipe.objective.by_frame:
        gamma = draw_frame_levels(
            gamma, x.shape[2], state.working.patch[0], recipe.objective.by_frame, state.generator
        )  # (N, T)
    gamma = recipe.objective.drawn_gamma(gamma)  # (N,) or (N, T): clean frames, γ = 1, stay clean
    drawn = [x, noise, gamma, y, seconds_per_frame]
    if recipe.stretch > 1:
        drawn.append(draw_spacing(x, recipe.stretch, state.generator))  # (N, 2)
    micro_batch, ranks = recipe.micro_batch or len(x), distributed.world_size()
    loss, gradients = torch.zeros_like(state.lr), None
    for part in zip(*(values.split(micro_batch) for values in drawn), strict=True):
        part_loss = network_loss(state.working, recipe.objective, *part) * (micro_batch / len(x))
        # The exchange adds up the ranks' gradients: divided before, they overflow in fp16 no sooner than one rank's.
        (state.scaler.scale(part_loss) / ranks).backward()
        taken = state.take_gradients(state.precision.dtype if micro_batch >= len(x) else torch.float32)  # (R·S,)
        gradients = taken if gradients is None else gradients.add_(taken)
        loss += part_loss.detach()

    gradients, scaled_norm = state.exchange(gradients)  # (S,), scalar
    grad_norm, scale = state.unscaled(scaled_norm)
    update = update or Update.of(recipe.optimizer, state, compiles=False)
    rates = update.prepare(state, recipe, loss, grad_norm, scale)
    update.apply(state.share, gradients, rates)
    state.sharding.fill_from_shares(state.working_weights)
    state.scaler.update()
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


def training_step(
    state: TrainingState, recipe: Recipe, batch: int, seed: int, speed: Speed, frames: Sequence[int] = ()
) -> SeededStep:
    """`train_step` for batches of one size on each rank, compiled and replayed as a CUDA graph as `speed` says.

    Args:
        frames: of the clips, if the network sees several lengths. Each has a graph; all share one memory.
    """
    size = recipe.micro_batch or batch
    compiles = speed.compiled and compile_network(state.working, size, training=True, frames=frames)
    on_gpu = state.device.type == "cuda"
    # On a CPU torch's kernels serve: they need no wait for the compiler.
    step = partial(train_step, state, recipe, update=Update.of(recipe.optimizer, state, compiles and on_gpu))
    if speed.fast and on_gpu:
        step = Graphed(step, state.generator, state.drop_half_step, together=True, kinds=len(frames) or 1)
    return SeededStep(step, state, seed)
