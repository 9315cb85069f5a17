"""How training scales with the number of ranks: speed, time lost to communication, memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from compiled import default_speed
from graphs import WARMUP_CALLS
from measuring.workloads import BASE, LARGE, RECIPE, SMALL, TINY, Training, Work, seconds_a_call, start_over
from precision import Precision
from runtime import distributed

SCALING_COLUMNS = (
    "work",
    "scaling",
    "ranks",
    "batch a rank",
    "ms a step",
    "samples/s",
    "efficiency",
    "communication",
    "GB",
)


class Share(NamedTuple):
    """The samples of one rank: in a step, and in one forward and backward pass."""

    batch: int
    micro_batch: int


@dataclass(frozen=True)
class Scaled:
    """Work to scale. Weak: each rank has the work's batch. Strong: the ranks share `global_batch`.

    In strong scaling a rank takes at most `micro_batch` samples at a time. So one rank has memory for the whole batch.
    """

    work: Work
    global_batch: int
    micro_batch: int

    def share(self, scaling: str, ranks: int) -> Share:
        """The share of each rank. The number of ranks must divide the global batch."""
        if scaling == "weak":
            return Share(self.work.batch, self.work.batch)
        batch = self.global_batch // ranks
        return Share(batch, min(batch, self.micro_batch))

    def shares(self, numbers: Sequence[int]) -> list[Share]:
        """All different shares for these numbers of ranks."""
        return list(dict.fromkeys(self.share(scaling, ranks) for scaling in ("weak", "strong") for ranks in numbers))


SCALED = {"small": Scaled(SMALL, 256, 256), "base": Scaled(BASE, 256, 32), "large": Scaled(LARGE, 256, 64)}
SCALED_QUICK = {"tiny": Scaled(replace(TINY, batch=4), 8, 2)}


@dataclass(frozen=True)
class ScalingRow:
    """A measurement.

    Attributes:
        scaling: "weak" or "strong".
        batch, micro_batch: samples of one rank, in a step and at a time.
        ms: a step of the slowest rank.
        efficiency: samples a second, divided by (number of ranks × samples a second of one rank).
        communication: 1 − t₁/t, with the step's time t, and t₁ of one rank by itself with the same share.
        gigabytes: the most memory allocated on a GPU, 10⁹ bytes; None on a CPU.
    """

    work: str
    scaling: str
    ranks: int
    batch: int
    micro_batch: int
    ms: float
    samples_per_second: float
    efficiency: float
    communication: float
    gigabytes: float | None

    def cells(self) -> list[str]:
        batch = f"{self.batch}" if self.micro_batch == self.batch else f"{self.batch}, {self.micro_batch} at a time"
        shares = [f"{self.efficiency:.3f}", f"{self.communication:.1%}"]
        memory = "–" if self.gigabytes is None else f"{self.gigabytes:.2f}"
        speeds = [f"{self.ms:.2f}", f"{self.samples_per_second:,.0f}"]
        return [self.work, self.scaling, str(self.ranks), batch, *speeds, *shares, memory]


def scaling_rows(
    scaled: Scaled, ranks: int, share: Share, seconds: float, gigabytes: float | None, alone: dict[Share, float]
) -> Iterator[ScalingRow]:
    """The rows for one time of this many ranks: one, two if weak and strong shares are equal, or none.

    Args:
        alone: seconds a step of one rank by itself, for each share of one and of more ranks.
    """
    for scaling in ("weak", "strong"):
        if scaled.share(scaling, ranks) != share:
            continue
        whole = scaled.share(scaling, 1)
        rate, rate_of_one = ranks * share.batch / seconds, whole.batch / alone[whole]
        yield ScalingRow(
            scaled.work.name,
            scaling,
            ranks,
            share.batch,
            share.micro_batch,
            seconds * 1e3,
            rate,
            rate / (ranks * rate_of_one),
            1 - alone[share] / seconds,
            gigabytes,
        )


def measure_share(work: Work, share: Share, precision: Precision, device: torch.device) -> tuple[float, float | None]:
    """Seconds a step of the slowest rank, and the most memory of a GPU in 10⁹ bytes (None on a CPU).

    All ranks must call it together. Each rank trains on a share of this size.
    """
    start_over(device)
    on_gpu = device.type == "cuda"
    recipe = replace(RECIPE, micro_batch=share.micro_batch)
    step = Training(replace(work, batch=share.batch), precision, default_speed(device.type), device, recipe=recipe)
    # On a GPU the step is recorded in these calls.
    for _ in range(WARMUP_CALLS + 2 if on_gpu else 1):
        step()
    seconds = max(distributed.gather(seconds_a_call(step, device)))
    return seconds, max(distributed.gather(torch.cuda.max_memory_allocated(device))) / 1e9 if on_gpu else None
