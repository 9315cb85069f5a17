"""Asynchronous copies between host and GPU. A side waits only when it uses the result.

Copies have streams of their own: in the current stream, each would interrupt the work for longer than the copy takes.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Starts to copy values, pinned or not, to the device. Do not write to them before they are copied."""
    if device.type != "cuda":
        return values.to(device)
    beside, current = copy_stream(device, "to it"), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        copied = values.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded tensor cannot be pinned
    current.wait_stream(beside)
    copied.record_stream(current)
    return copied


def read_later(values: Tensor) -> Callable[[], Tensor]:
    """Starts to copy values to the host. The returned function waits for this copy. Do not write to the values."""
    if not values.is_cuda:
        return lambda: values
    beside, copied = copy_stream(values.device, "from it"), torch.cuda.Event()
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
def copy_stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """The stream for a device's copies in one direction. Copies to it must not wait behind copies of its results."""
    return torch.cuda.Stream(device)
