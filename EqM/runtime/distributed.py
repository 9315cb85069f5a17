"""Processes and ranks: start, end, work of rank 0 alone, and exchanges. One process needs no launcher."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# The defaults of its functions are the group of this moment, and torch imports it at some time, with its compiler for
# example. Imported here it finds no group. Later it would keep the ended group and its threads until the process ends,
# which then aborts now and then.
import torch.distributed.nn.functional
from torch import Tensor

from runtime import environment
from runtime.errors import UserError
from runtime.meeting import meet

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # long, because the others wait while rank 0 checks files, packs images or saves

_host_group: dist.ProcessGroup | None = None  # exchanges what is not on a GPU; None: the default group does


def start() -> torch.device:
    """Joins the other ranks, if a launcher started any, and returns this rank's device.

    Raises:
        UserError: the launcher's variables cannot be right, there are more local ranks than GPUs, or other ranks did
            not come in time.
    """
    global _host_group
    try:
        place = environment.place()
    except ValueError as error:
        raise UserError(str(error)) from None
    gpus = torch.cuda.device_count()
    if gpus and place.local_rank >= gpus:
        raise UserError(
            f"--nproc_per_node={max(environment.local_ranks(), place.local_rank + 1)} needs one GPU a process, and this"
            f" machine has {gpus}"
        )
    device = torch.device("cuda", place.local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        # CUDA graphs cannot capture the default stream, so all work goes to another one.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    if place.ranks > 1:
        store = meet(place)
        store.set_timeout(TIMEOUT)
        backend, device_id = ("nccl", device) if gpus else ("gloo", None)
        there = {"rank": place.rank, "world_size": place.ranks, "timeout": TIMEOUT}
        dist.init_process_group(backend, store=store, device_id=device_id, **there)
        _host_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if gpus else None
    return device


def stop() -> None:
    """Waits for every rank, then leaves the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_group() -> bool:
    """True if a launcher started several processes."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_group() else 0


def world_size() -> int:
    return dist.get_world_size() if is_group() else 1


def is_main() -> bool:
    return rank() == 0


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. The value must pickle."""
    if not is_group():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 alone and returns its result on every rank.

    Raises an error of rank 0 on every rank, so that none waits for an ended one. The other ranks raise it as UserError.
    """
    outcome: list[tuple] = [(None, None)]
    failure = None
    if is_main():
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome, failure = [(None, str(error) or type(error).__name__)], error
    if is_group():
        dist.broadcast_object_list(outcome, src=0, group=_host_group)
    if failure:
        raise failure
    result, problem = outcome[0]
    if problem is not None:
        raise UserError(problem)
    return result


def together(function: Callable[[], T]) -> T:
    """Calls the function on every rank, and returns this rank's result once all have theirs.

    Raises an error of any rank on every rank, so that none waits for an ended one: UserError, which names the ranks.
    A rank whose error is of another type raises that.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    problems = gather(failure and (str(failure) or type(failure).__name__))
    if failure and (not is_group() or not isinstance(failure, UserError)):
        raise failure
    for problem in problems:
        if problem is not None:
            ranks = [rank for rank, other in enumerate(problems) if other == problem]
            raise UserError(problem if len(ranks) == world_size() else f"{in_words(ranks)}: {problem}")
    return result


def in_words(ranks: list[int]) -> str:
    """Ranks by number."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def check_same_flags(flags: dict[str, object]) -> None:
    """Raises UserError on every rank, with both values, if a rank has other flags than rank 0."""
    known = gather({name: str(value) for name, value in flags.items()})
    for name, value in known[0].items():
        others = [rank for rank, theirs in enumerate(known) if theirs.get(name) != value]
        if others:
            flag, theirs = name.replace("_", "-"), known[others[0]].get(name)
            raise UserError(
                f"{in_words(others)} has --{flag} {theirs}, and rank 0 has {value}: give all the same flags"
            )


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, on every rank."""
    if is_group():
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, on every rank."""
    return total(value) / world_size()


class SharedFlag:
    """A flag that any rank may raise. All ranks see it one call later: a call waits only for the call before."""

    def __init__(self):
        # On the host, so that nothing waits for a GPU.
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self.exchange: tuple[dist.Work, Tensor] | None = None

    def raised(self, mine: bool) -> bool:
        """Whether any rank raised it at the call before. In one process, whether it is raised now."""
        if self.group is None:
            return mine
        seen, value = self.wait(), torch.tensor([mine], dtype=torch.int32)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.exchange = work, value
        return seen

    def wait(self) -> bool:
        """Waits for the exchange of the call before, if there was one, and returns whether a rank raised the flag."""
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
