"""Loading processes: the batches that they make, and what happens when one is lost."""

import atexit
import gc
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from torch.utils.data import DataLoader

from runtime import distributed
from runtime.errors import UserError

# Batches that a rank holds beyond the current one. All ranks see a flag one step after one raised it, and that step
# needs a batch of every rank. So a rank that runs out must know it before the step before.
NOTICE = 2
DEATH_S = 2.0  # a process that an exchange has missed may take a moment until its end shows


class LoadedBatches:
    """The batches of a loader, in order, to the end or to a problem. Every rank must iterate.

    Args:
        check: takes each batch as soon as it is loaded. A UserError from it is a problem.

    Attributes:
        problem: why no more batches come although the end is not reached, or an empty text. In a group it is there
            NOTICE batches early, so that all ranks can stop after the same step.
    """

    def __init__(self, loader: DataLoader, check: Callable[[dict], None]):
        self.loader, self.check, self.problem = loader, check, ""
        self.processes: list[BaseProcess] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        batches, waiting = self.start(), deque()
        wanted = 1 + (NOTICE if distributed.is_group() else 0)
        self.fill(waiting, batches, wanted)
        problems = distributed.gather(self.problem)  # before the first step no rank has given notice
        if any(problems):
            self.problem = self.problem or "another process has no batches"
            return
        while waiting:
            yield waiting.popleft()
            self.fill(waiting, batches, wanted)

    def start(self) -> Iterator[dict]:
        """Starts the loading processes. They end with this process, whatever ends it.

        If there are any, Python's garbage collector spares from now on all objects that there are.
        """
        if self.loader.num_workers:
            # A collection writes into every object that it looks at. The system then copies the memory that this
            # process and its forks share, 80 MB for each of them. So none may look at these objects, in any of them,
            # and what is garbage by now goes first. Objects that compiling froze stay frozen.
            gc.collect()
            gc.freeze()
        others, before = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        batches = iter(self.loader)
        if self.loader.num_workers:
            # torch would raise the error of a lost process anywhere, for example in the midst of an update.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
            self.processes = [process for process in multiprocessing.active_children() if process not in others]
            # multiprocessing itself asks by SIGTERM at the end, which they ignore, and waits for ever.
            atexit.register(end, self.processes)
        return batches

    def fill(self, waiting: deque[dict], batches: Iterator[dict], wanted: int) -> None:
        """Loads batches until `wanted` of them wait, or no more come."""
        while len(waiting) < wanted and not self.problem:
            try:
                self.problem = self.lost()
                batch = None if self.problem else next(batches, None)
                if batch is None:
                    return
                self.check(batch)
            except UserError as error:
                self.problem = str(error)
            except Exception:
                # An exchange with a lost process fails with errors of many types.
                self.problem = self.lost(DEATH_S)
                if not self.problem:
                    raise
            else:
                waiting.append(batch)

    def lost(self, patience_s: float = 0) -> str:
        """Which loading process has ended within this time, and what to do; an empty text if none has."""
        ended = connection.wait([process.sentinel for process in self.processes], patience_s) if self.processes else []
        lost = next((process for process in self.processes if process.sentinel in ended), None)
        if not lost:
            return ""
        lost.join()
        how = signal.Signals(-lost.exitcode).name if lost.exitcode < 0 else f"status {lost.exitcode}"
        if lost.exitcode == -signal.SIGBUS:
            return (
                f"a loading process ended ({how}), probably because /dev/shm is full: enlarge it or lower --num-workers"
            )
        return (
            f"a loading process ended ({how}), probably because memory ran out:"
            " lower --num-workers, --global-batch-size or --image-size"
        )

    def raise_problem(self) -> None:
        """Raises UserError if any rank has a problem. Every rank must call it, once the state is saved."""
        for rank, problem in enumerate(distributed.gather(self.problem)):
            if problem:
                where = f"rank {rank}: " if distributed.is_group() else ""
                raise UserError(f"{where}{problem} (the state is saved, and --resume goes on)")


def end(processes: list[BaseProcess]) -> None:
    """Ends processes at once."""
    for process in processes:
        process.kill()
