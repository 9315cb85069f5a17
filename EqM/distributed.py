"""Processes and ranks: start, end, rank 0's part, and exchanges. One process needs no launcher."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cli import UserError

T = TypeVar("T")


def start() -> torch.device:
    """Joins the other ranks, if a launcher started any, and returns this rank's device.

    Raises:
        UserError: there are more local ranks than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        local_ranks = os.environ["LOCAL_WORLD_SIZE"]
        raise UserError(f"--nproc_per_node={local_ranks} wants a GPU a process, and this machine has {gpus}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        # All work goes to a stream of its own: the default one cannot be captured in CUDA graphs.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The others wait while rank 0 checks files or packs images, which may take long.
        timeout = timedelta(hours=2)
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timeout, device_id=device if gpus else None)
    return device


def stop() -> None:
    """Leaves the group, once every rank has come this far."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_group() -> bool:
    """True where a launcher started several processes."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. The value must pickle."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 alone and returns its result on every rank.

    A UserError on rank 0 is raised on every rank, so that none waits for one that has gone.
    """
    outcome: list[tuple] = [(None, None)]
    if is_main():
        try:
            outcome = [(function(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome[0]
    if problem is not None:
        raise UserError(problem)
    return result


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, on every rank."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def data_parallel(network: nn.Module) -> nn.Module:
    """The network itself in one process, else one that averages gradients over the ranks."""
    if not dist.is_initialized():
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
