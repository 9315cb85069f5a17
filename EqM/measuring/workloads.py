"""Training and sampling steps of networks on random inputs, for measuring and comparing."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiled import COMPILED, EAGER, GRAPHS, Speed, forget_compiled, freeze_garbage_collector
from models import EqM
from network_settings import NetworkSettings
from precision import Precision
from runtime import distributed
from sampling.descent import gradient_descent
from sampling.fields import Composition, conditioned_field
from state import TrainingState
from step import Recipe, training_step

NUM_CLASSES = 101
GUIDANCE, STEPSIZE = 1.5, 0.0017
RECIPE = Recipe(lr=1e-4, warmup_steps=0, grad_clip=0, ema_decay=0.9999)

MODES = {"fast": COMPILED, "graphs": GRAPHS, "eager": EAGER}
FAST = (("fp32", "fast"), ("tf32", "fast"), ("bf16", "fast"), ("fp16", "fast"))
FAST_AND_EAGER = (("fp32", "eager"), ("bf16", "eager"), ("bf16", "graphs"), *FAST)
FP32_AND_BF16 = (("fp32", "fast"), ("bf16", "fast"))
ON_CPU = (("fp32", "eager"), ("fp32", "fast"))


@dataclass(frozen=True)
class Work:
    """A network and a batch, for training or guided sampling. `ways` are the (precision, mode) pairs to measure."""

    name: str
    kind: str  # "train" or "sample"
    model: str
    input_size: int | tuple[int, int] | tuple[int, int, int]
    batch: int
    in_channels: int = 4
    temporal_patch: int = 1
    grad_checkpoint: bool = False
    energy: str = "none"
    positions: str = "fixed"
    ways: tuple[tuple[str, str], ...] = FAST

    def build(self, device: torch.device | str) -> EqM:
        torch.manual_seed(0)
        sizes = self.input_size, self.in_channels, NUM_CLASSES, self.temporal_patch
        settings = NetworkSettings(self.model, *sizes, energy=self.energy, positions=self.positions)
        with torch.device(device):
            return settings.build()


LATENT_CLIP = (4, 32, 32)
GUIDE = Work("guide's command: S/4, 4 frames of 64 px", "train", "EqM-S/4", (4, 64, 64), 256, 3, 2)
SMALL = Work("S/4, 4 frames, 64 tokens", "train", "EqM-S/4", LATENT_CLIP, 64, temporal_patch=4, ways=FAST_AND_EAGER)
BASE = Work("B/2, 16 frames, 2,048 tokens", "train", "EqM-B/2", (16, 32, 32), 8, temporal_patch=2)
LARGE = Work("XL/2, 256 tokens", "train", "EqM-XL/2", 32, 64, ways=FAST_AND_EAGER)
ENERGY = Work("EqM-E dot B/2, 256 tokens", "train", "EqM-B/2", 32, 32, energy="dot", ways=FAST_AND_EAGER)
MIDDLE = Work("B/2, 256 tokens", "sample", "EqM-B/2", 32, 64)
SAMPLE = Work("sampling XL/2, 256 tokens", "sample", "EqM-XL/2", 32, 1)
CLIPS = [
    Work(f"S/4, {t} frames, {32 * t} tokens", "train", "EqM-S/4", (t, 32, 32), 64, temporal_patch=2, ways=FP32_AND_BF16)
    for t in (4, 8, 16, 32)
]
FULL = {
    "guide": [GUIDE],
    "small": [SMALL, replace(SMALL, batch=256)],
    "base": [BASE],
    "large": [LARGE],
    "sampling": [SAMPLE, replace(SAMPLE, batch=32)],
    "energy": [ENERGY],
    "clips": [*CLIPS, replace(CLIPS[-1], name=CLIPS[-1].name + ", --grad-checkpoint", grad_checkpoint=True)],
}
# What --optimizer muon is measured on: many tokens for its network's size, and a large network with few.
OPTIMIZED = [
    Work("S/4, 8 frames of 64 px, 1,024 tokens", "train", "EqM-S/4", (8, 64, 64), 32, 3, 2),
    LARGE,
]
TINY = Work("Ti/2, 4 frames of 16 px", "train", "EqM-Ti/2", (4, 16, 16), 16, 3, 4, ways=FAST_AND_EAGER)
QUICK = {"tiny": [TINY], "sampling": [replace(TINY, name="sampling Ti/2, 4 frames of 16 px", kind="sample", batch=4)]}


def part_of_rank(batch: int) -> slice:
    """The place of this rank's samples among those of all ranks, if each rank has `batch` samples."""
    return slice(distributed.rank() * batch, (distributed.rank() + 1) * batch)


class Training:
    """Training on one random batch, the same at every step. A call is a step, and returns loss and gradient norm, (2,).

    Each rank has the work's batch. It is a part of a global batch that does not depend on how many ranks share it.
    """

    def __init__(
        self,
        work: Work,
        precision: Precision,
        speed: Speed,
        device: torch.device,
        seed: int = 0,
        recipe: Recipe = RECIPE,
    ):
        self.state = TrainingState(work.build(device), precision, device)
        self.state.working.grad_checkpoint = work.grad_checkpoint
        # Before compilation, which may draw random numbers too; how many depends on the rank's share.
        samples, mine = work.batch * distributed.world_size(), part_of_rank(work.batch)
        self.x = torch.randn(samples, *self.state.working.input_shape, device=device)[mine].clone()
        self.y = torch.arange(samples, device=device)[mine] % NUM_CLASSES
        self.seconds_per_frame = torch.full((work.batch,), 0.1, device=device)
        self.step = training_step(self.state, recipe, work.batch, seed, speed)
        if speed.fast:
            freeze_garbage_collector()

    def __call__(self) -> Tensor:
        result = self.step(self.x, self.y, self.seconds_per_frame)
        self.state.advance(len(self.x) * distributed.world_size())
        return result


class Sampling:
    """Guided gradient descent of x from random noise. A call is a step."""

    def __init__(
        self, work: Work, precision: Precision, speed: Speed, device: torch.device, network: EqM | None = None
    ):
        network = copy.deepcopy(network) if network else work.build(device)
        network = network.requires_grad_(False).eval().to(precision.dtype)

        conditioned = conditioned_field(network, 2 * work.batch, 0.1, speed.fast, compiled=speed.compiled)
        if speed.fast:
            freeze_garbage_collector()
        y = torch.arange(work.batch) % NUM_CLASSES  # (N,)
        self.field = Composition([1.0], network.num_classes, GUIDANCE, device).field(conditioned, y[None])
        generator = torch.Generator(device).manual_seed(1)
        self.x = torch.randn(work.batch, *network.input_shape, device=device, generator=generator)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.x = gradient_descent(self.field, self.x, STEPSIZE, range(1))
        return self.x


GROUPS, GROUP_SECONDS = 3, 0.5  # a time is the median over groups of calls, each this long


def start_over(device: torch.device) -> None:
    """Frees what the last measurement left."""
    forget_compiled()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    """The median over groups of calls. Within a group the host does not wait for the device.

    All ranks must call it together. All make the same number of calls.
    """

    def group(size: int) -> float:
        start = time.perf_counter()
        for _ in range(size):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / size

    synchronize(device)
    size = distributed.gather(max(1, round(GROUP_SECONDS / group(2))))[0]
    return statistics.median(group(size) for _ in range(GROUPS))
