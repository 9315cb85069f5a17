"""Processes and ranks: start, end, rank 0's part, and exchanges. One process needs no launcher.

Within `FirstRanks` and `alone`, "all ranks" are those few, for everything here but the start, the end and SharedFlag.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 checks files, packs images or saves, which may take long
ALONE = "alone"
_scope: dist.ProcessGroup | str | None = None  # who "all ranks" are: a group of them, or this one ALONE; None: all


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
        store, rank, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # A launcher that restarts all ranks keeps its store, with the addresses of those that have gone.
        store = dist.PrefixStore(f"start{restarts()}", store)
        names = {"backend": "nccl" if gpus else "gloo", "device_id": device if gpus else None}
        dist.init_process_group(store=store, rank=rank, world_size=ranks, timeout=TIMEOUT, **names)
    return device


def restarts() -> int:
    """How often torchrun has started all ranks again, because one had gone."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def stop() -> None:
    """Leaves the group, once every rank has come this far."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_group() -> bool:
    """True where a launcher started several processes."""
    return dist.is_initialized() and _scope != ALONE


def rank() -> int:
    return dist.get_rank(_scope) if is_group() else 0


def world_size() -> int:
    return dist.get_world_size(_scope) if is_group() else 1


def is_main() -> bool:
    return rank() == 0


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. The value must pickle."""
    if not is_group():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_scope)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 alone and returns its result on every rank.

    An error on rank 0 is raised on every rank, on the others as UserError, so that none waits for one that has gone.
    """
    outcome: list[tuple] = [(None, None)]
    failure = None
    if is_main():
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome, failure = [(None, str(error) or type(error).__name__)], error
    if is_group():
        dist.broadcast_object_list(outcome, src=0, group=_scope)
    if failure:
        raise failure
    result, problem = outcome[0]
    if problem is not None:
        raise UserError(problem)
    return result


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, on every rank."""
    if is_group():
        value = value.clone()
        dist.all_reduce(value, group=_scope)
        value /= world_size()
    return value


@contextmanager
def _within(scope: dist.ProcessGroup | str | None) -> Iterator[None]:
    global _scope
    outer, _scope = _scope, scope
    try:
        yield
    finally:
        _scope = outer


def alone(function: Callable[[], T]) -> T:
    """What the function returns on each rank by itself, as if it were the only one."""
    with _within(ALONE):
        return function()


class FirstRanks:
    """The first `count` of all ranks, for as long as they are to be all that there are.

    All ranks make the same ones, in the same order. They last until `stop`.
    """

    def __init__(self, count: int):
        self.count, self.everyone = count, None
        self.scope = ALONE if count == 1 else None
        if dist.is_initialized():
            if 1 < count < dist.get_world_size():
                self.scope = dist.new_group(range(count), timeout=TIMEOUT)
            # On the host: who waits through NCCL keeps a GPU busy.
            self.everyone = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def call(self, function: Callable[[], T]) -> T:
        """Calls the function on these ranks alone, and returns rank 0's result on every rank, once all have ended.

        The result must pickle.
        """
        result: Any = None
        if self.everyone is None or dist.get_rank() < self.count:
            with _within(self.scope):
                result = function()
        results = [result]
        if self.everyone is not None:
            results = [None] * dist.get_world_size()
            dist.all_gather_object(results, result, group=self.everyone)
        return results[0]


class SharedFlag:
    """A flag that any rank may raise, and all see raised one call later: a call waits for the one before alone."""

    def __init__(self):
        # On the host, so that nothing waits for a GPU.
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self.exchange: tuple[dist.Work, Tensor] | None = None

    def raised(self, mine: bool) -> bool:
        """Whether any rank had raised it at the call before; in one process, whether it is raised now."""
        if self.group is None:
            return mine
        seen, value = self.wait(), torch.tensor([mine], dtype=torch.int32)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.exchange = work, value
        return seen

    def wait(self) -> bool:
        """Ends the exchange under way, if there is one."""
        if not self.exchange:
            return False
        (work, value), self.exchange = self.exchange, None
        work.wait()
        return bool(value.item())


def batches_of_rank(num_samples: int, global_batch: int) -> list[range]:
    """The sample indices of this rank, cut into batches of nearly the same size."""
    own, ranks = rank(), world_size()
    if global_batch % ranks:
        raise UserError(f"--global-batch-size {global_batch} is not a multiple of the {ranks} processes")
    indices = range(own, num_samples, ranks)
    num_batches = -(-len(indices) * ranks // global_batch)
    share = -(-len(indices) // max(num_batches, 1))
    return [indices[i * share : (i + 1) * share] for i in range(num_batches)]
