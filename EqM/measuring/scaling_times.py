"""How training grows with the number of ranks: speed, time lost to their exchange, memory; for the benchmark."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from compiled import WARMUP_CALLS_DISTRIBUTED
from measuring.workloads import BASE, LARGE, RECIPE, SMALL, TINY, Training, Work, seconds_a_call, start_over
from precision import Precision
from runtime import distributed
from runtime.distributed import FirstRanks
from step import Recipe

COLUMNS = ("work", "scaling", "ranks", "batch a rank", "ms a step", "samples/s", "efficiency", "communication", "GB")


@dataclass(frozen=True)
class Scaled:
    """Work whose batch each rank has, for weak scaling, and a global batch that they share, for strong scaling.

    Of its share a rank takes at most `micro_batch` samples at a time, so that one rank has memory for all.
    """

    work: Work
    global_batch: int
    micro_batch: int

    def of_rank(self, scaling: str, ranks: int) -> tuple[Work, Recipe]:
        """What one of the ranks does, of which the number divides the global batch."""
        if scaling == "weak":
            return self.work, replace(RECIPE, micro_batch=self.work.batch)
        batch = self.global_batch // ranks
        return replace(self.work, batch=batch), replace(RECIPE, micro_batch=min(batch, self.micro_batch))


SCALED = {"small": Scaled(SMALL, 256, 256), "base": Scaled(BASE, 256, 32), "large": Scaled(LARGE, 256, 64)}
SCALED_QUICK = {"tiny": Scaled(replace(TINY, batch=4), 8, 2)}


@dataclass(frozen=True)
class ScalingRow:
    """A measurement.

    Attributes:
        scaling: "weak" or "strong".
        batch, micro_batch: samples a rank, of a step and at a time.
        ms: a step's, of the slowest rank.
        efficiency: samples a second over those of one rank times the number of ranks.
        communication: the share of a step's time that it takes longer than where no rank waits for another.
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


def scaling_times(
    scaled: Scaled, precision: Precision, device: torch.device, groups: list[FirstRanks]
) -> Iterator[ScalingRow]:
    """Rows of weak and then strong scaling over groups of ranks, of which the first is one rank alone.

    Every rank must take all rows, which are the same on all.
    """
    for scaling in ("weak", "strong"):
        rate_of_one = None
        for group in groups:
            work, recipe = scaled.of_rank(scaling, group.count)
            seconds, apart, gigabytes = group.call(partial(measure, work, recipe, precision, device))
            rate = group.count * work.batch / seconds
            rate_of_one = rate_of_one or rate
            yield ScalingRow(
                work.name,
                scaling,
                group.count,
                work.batch,
                recipe.micro_batch,
                seconds * 1e3,
                rate,
                rate / (group.count * rate_of_one),
                1 - apart / seconds,
                gigabytes,
            )


def measure(
    work: Work, recipe: Recipe, precision: Precision, device: torch.device
) -> tuple[float, float, float | None]:
    """Seconds a step, the same where each rank trains by itself, at the same time, and the most memory of a GPU.

    The difference is what the exchange of gradients adds to a step: what runs beside the backward pass adds nothing.
    """
    ready = partial(ready_step, work, recipe, precision, device)
    apart = slowest(lambda: distributed.alone(ready), device) if distributed.is_group() else None
    together = slowest(ready, device)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return together, apart or together, memory and max(distributed.gather(memory))


def ready_step(work: Work, recipe: Recipe, precision: Precision, device: torch.device) -> Training:
    """A step that has been compiled and recorded, if it can be on the device."""
    fast = device.type == "cuda"
    step = Training(work, precision, fast, device, recipe=recipe)
    for _ in range(WARMUP_CALLS_DISTRIBUTED + 2 if fast else 1):
        step()
    return step


def slowest(make: Callable[[], Training], device: torch.device) -> float:
    """Seconds a step of the slowest rank."""
    start_over(device)
    step = make()
    return max(distributed.gather(seconds_a_call(step, device)))
