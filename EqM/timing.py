"""How long a call takes, on whatever device, for the benchmark."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

import distributed

GROUPS, GROUP_SECONDS = 3, 0.5  # a time is the median of three groups of calls of so long


def start_over(device: torch.device) -> None:
    """Frees what the last measurement left."""
    gc.unfreeze()  # what compiling left behind
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    """The median over groups of calls, which follow one another without waiting for the device.

    Every rank must call it: all make as many calls, and begin to measure together.
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
