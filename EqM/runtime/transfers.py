"""Copies between the host and a GPU, for which neither waits until it wants what was copied.

They go beside the work of the current stream: in it, each would interrupt it for longer than the copy takes.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values from the host, pinned or not, on the device. Nobody may write to them before they are copied."""
    if device.type != "cuda":
        return values.to(device)
    beside, current = copies(device, "to it"), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        copied = values.pin_memory().to(device, non_blocking=True)
    current.wait_stream(beside)
    copied.record_stream(current)
    return copied


def read_later(values: Tensor) -> Callable[[], Tensor]:
    """Starts to copy values to the host; what it returns waits for this copy alone. Nobody may write to the values."""
    if not values.is_cuda:
        return lambda: values
    beside, copied = copies(values.device, "from it"), torch.cuda.Event()
    beside.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(beside):
        host = values.to("cpu", non_blocking=True)
        copied.record()
    values.record_stream(beside)

    def read() -> Tensor:
        copied.synchronize()
        return host

    return read


@cache
def copies(device: torch.device, direction: str) -> torch.cuda.Stream:
    """The stream of a device's copies: one for each direction, since those from it wait for its results."""
    return torch.cuda.Stream(device)
