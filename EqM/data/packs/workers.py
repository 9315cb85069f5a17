"""Packs many shards at once: in processes, or in threads if a VAE on a GPU has to encode in this process."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized

import numpy as np
import torch
from tqdm import tqdm

from data.packs.packing import PackPlan
from data.packs.writer import Encode, pack_shard
from runtime.errors import UserError

FORK = multiprocessing.get_context("fork")  # workers inherit the plan and the VAE, which need not pickle
REFRESH_S = 0.1  # how often the progress bar is updated
UNWIND_S = 5.0  # what a worker gets to remove its temporary file

_pack: Callable[[int], None]  # in a worker process: packs one shard


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
            if stopped.is_set():
                raise CancelledError
            return encode(frames)

    pack = partial(pack_shard, plan, encode=encode_in_turn, item_done=partial(count, done))
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
            pending = {pool.submit(pack, number) for number in shards}
            while pending:
                finished, pending = wait(pending, REFRESH_S, FIRST_COMPLETED)
                bar.update(done.get_obj().value - bar.n)  # a killed worker may have left it locked
                for future in finished:
                    future.result()
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise


def count(done: Synchronized) -> None:
    """Adds one."""
    with done.get_lock():
        done.value += 1


def start_worker(plan: PackPlan, encode: Encode | None, done: Synchronized, stopped: connection.Connection) -> None:
    """Prepares a new worker process."""
    global _pack
    _pack = partial(pack_shard, plan, encode=encode, item_done=partial(count, done))
    torch.set_num_threads(1)  # there are as many workers as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one stops the others
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=end_with_main, args=(stopped,), daemon=True).start()


def leave(*_: object) -> None:
    """Unwinds the main thread, once: a second SIGTERM does not interrupt the clearing up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def pack_in_worker(number: int) -> None:
    """Packs one shard, as the task of a worker process."""
    try:
        _pack(number)
    except SystemExit:  # SIGTERM came, and the temporary file is gone; the pool would take this for a result
        os._exit(1)


def end_with_main(stopped: connection.Connection) -> None:
    """Ends this worker process once `stopped` has a message or the main process is gone."""
    connection.wait([stopped, multiprocessing.parent_process().sentinel])
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    time.sleep(UNWIND_S)
    os._exit(1)  # the main thread is in a call that does not return
