"""Packs many shards at once: in processes, or in threads if a VAE on a GPU has to encode in this process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized

import numpy as np
import torch
from tqdm import tqdm

from data.packs.plan import PackPlan
from data.packs.writer import Encode, pack_shard
from runtime.errors import UserError

FORK = multiprocessing.get_context("fork")  # workers inherit the plan and the VAE, which need not pickle
REFRESH_S = 0.1  # how often the progress bar is updated
CLEAR_UP_S = 5.0  # what a worker process gets to remove its temporary file

# Of a worker process: what packs one shard, who is at it, and whether to give up.
_pack: Callable[[int], None]
_busy, _stopped = threading.Lock(), threading.Event()


def pack_shards(
    plan: PackPlan, shards: list[int], num_workers: int, encode: Encode | None, encode_in_main: bool, bar: tqdm
) -> None:
    """Packs shards in worker processes. With `encode_in_main`, threads of this process decode and take turns to encode.

    Raises:
        UserError: the disk is full or cannot be written, or a worker process was killed.
    """
    if not shards:
        return
    pack_in = pack_in_threads if encode and encode_in_main else pack_in_processes
    pack_in(plan, shards, min(num_workers, len(shards)), encode, bar)


def pack_in_processes(plan: PackPlan, shards: list[int], num_workers: int, encode: Encode | None, bar: tqdm) -> None:
    done, (stopped, stop) = FORK.Value("q"), FORK.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_workers, FORK, start_worker, (plan, encode, done, stopped))
    try:
        # No worker reads the message, so all of them see it.
        follow(pool, pack_in_worker, shards, done, bar, stop=lambda: stop.send(None))
    except BrokenProcessPool:
        raise UserError(
            "a packing process ended too early: run the same command again, with fewer --num-workers if memory ran out"
        ) from None


def pack_in_threads(plan: PackPlan, shards: list[int], num_workers: int, encode: Encode, bar: tqdm) -> None:
    done, stopped, turn = FORK.Value("q"), threading.Event(), threading.Lock()
    # Each thread has its own current stream. The VAE's weights came through this thread's.
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def encode_in_turn(frames: np.ndarray) -> np.ndarray:
        with turn, torch.cuda.stream(stream):
            return encode(frames)

    pack = partial(pack_shard, plan, encode=encode_in_turn, advance=partial(advance, done, stopped))
    follow(ThreadPoolExecutor(num_workers), pack, shards, done, bar, stop=stopped.set)


def follow(
    pool: Executor,
    pack: Callable[[int], None],
    shards: list[int],
    done: Synchronized,
    bar: tqdm,
    stop: Callable[[], None],
) -> None:
    """Lets a pool pack shards, and shows how many items are `done`. Stops all workers at the first error or Ctrl-C."""
    with pool:
        try:
            with interrupts_wait() as asked:
                pending = {pool.submit(pack, number) for number in shards}
                while pending and not asked:
                    finished, pending = wait(pending, REFRESH_S, FIRST_COMPLETED)
                    bar.update(done.get_obj().value - bar.n)  # a killed worker may have left it locked
                    for future in finished:
                        future.result()
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def interrupts_wait() -> Iterator[list[bool]]:
    """Puts Ctrl-C off until the end of the block, and yields a list that is empty until it comes.

    Python ignores a KeyboardInterrupt during a fork. In `wait` it may leave a future locked, and the pool never ends.
    """
    asked: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)


def advance(done: Synchronized, stopped: threading.Event, items: int) -> None:
    """Adds to the count of items. Raises CancelledError, which ends the shard, if the worker is to stop."""
    if stopped.is_set():
        raise CancelledError
    with done.get_lock():
        done.value += items


def start_worker(plan: PackPlan, encode: Encode | None, done: Synchronized, stopped: connection.Connection) -> None:
    """Prepares a new worker process."""
    global _pack
    _pack = partial(pack_shard, plan, encode=encode, advance=partial(advance, done, _stopped))
    torch.set_num_threads(1)  # there are as many workers as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one stops the others
    # In a thread: an exception that a signal raises in the midst of a decoder may get lost there.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end_worker, daemon=True).start())
    threading.Thread(target=end_with_main, args=(stopped,), daemon=True).start()


def pack_in_worker(number: int) -> None:
    """Packs one shard, as the task of a worker process."""
    with _busy:
        _pack(number)


def end_with_main(stopped: connection.Connection) -> None:
    """Ends this worker process once `stopped` has a message or the main process is gone."""
    connection.wait([stopped, multiprocessing.parent_process().sentinel])
    end_worker()


def end_worker() -> None:
    """Ends this worker process once it has given up its shard, or after CLEAR_UP_S."""
    _stopped.set()
    _busy.acquire(timeout=CLEAR_UP_S)
    os._exit(1)
