"""Calls that ask a disk: one after another, or many at once."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = 16
AHEAD = 4 * THREADS  # calls that begin before the first of them has to end: one of them may take long
TOGETHER = 128  # short calls that are made as one: after them a network disk of a millisecond each is known to be slow
PATIENCE_S = 0.1  # seconds of waiting before threads start


class DiskCalls:
    """Calls functions that ask a disk: one after another, and in threads from when on they wait for the disk.

    While answers come from memory, threads take longer than one: they only fight for Python's lock. A network disk
    answers each call late, and many at once.

    A `with` statement ends the threads, and forgets the calls that have not begun.
    """

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0  # of all calls in the caller's thread
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "DiskCalls":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The function's result for each item, in order. Takes at most AHEAD items before their results are taken.

        Raises:
            Exception: what the function raises, in the place of its result.
        """
        begun = deque()
        for item in items:
            if not self.pool:
                yield self.timed(function, item)
                continue
            begun.append(self.pool.submit(function, item))
            if len(begun) == AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def map_short(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """As `map`, for calls that take microseconds if they need not wait: TOGETHER of them are made as one."""
        rest = iter(items)
        parts = iter(lambda: list(islice(rest, TOGETHER)), [])
        for results in self.map(lambda part: [function(item) for item in part], parts):
            yield from results

    def timed(self, function: Callable[[T], R], item: T) -> R:
        """Calls the function, and starts threads if the calls so far have waited for most of their time."""
        start, worked = time.perf_counter(), time.thread_time()
        result = function(item)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.waited += seconds - (time.thread_time() - worked)
        if self.waited > max(PATIENCE_S, self.seconds / 2):
            self.pool = ThreadPoolExecutor(THREADS)
        return result
