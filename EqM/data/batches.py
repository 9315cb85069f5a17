"""Batches in an order and with random choices that follow from (seed, epoch, index) alone."""

import signal
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.clips import MAX_TRIES
from data.scan import MAX_UNREADABLE, Found
from runtime import distributed
from runtime.errors import UserError
from runtime.transfers import to_device

MAX_AHEAD = 3  # batches on the device that it has not come to: each takes memory


class EpochStream(Sampler[list[tuple[int, int]]]):
    """This rank's batches of keys (epoch, index), from a given place in an endless shuffled stream.

    Each epoch is a new order of the whole set, from (seed, epoch); epochs follow without a gap,
    so a batch may span several. The ranks' parts of a batch make up the same global batch
    whatever their number.
    """

    def __init__(
        self, num_items: int, global_batch: int, num_batches: int, seed: int, first: int, rank: int, ranks: int
    ):
        self.num_items, self.num_batches, self.first, self.seed = num_items, num_batches, first, seed
        self.global_batch, self.share, self.rank = global_batch, global_batch // ranks, rank
        self.order = lru_cache(maxsize=2)(self.shuffled)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.num_batches):
            start = self.first + batch * self.global_batch + self.rank * self.share
            yield [self.key(place) for place in range(start, start + self.share)]

    def key(self, place: int) -> tuple[int, int]:
        epoch, within = divmod(place, self.num_items)
        return epoch, int(self.order(epoch)[within])

    def shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_items)


def make_loader(samples: Dataset, stream: EpochStream, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader of batches as dicts of tensors, in the stream's order."""
    collate = as_it_is if hasattr(samples, "__getitems__") else None
    return DataLoader(
        samples,
        batch_sampler=stream,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_the_trainer,
    )


def leave_signals_to_the_trainer(worker: int) -> None:
    """A terminal or a scheduler signals every process; workers end when the one that they serve does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(batch: dict) -> dict:
    """Collates what is a batch already."""
    return batch


class DeviceLoader:
    """A loader's batches with their tensors on the device, which copies the next while it computes.

    It also measures for how long the device has stood idle between one batch's work and the next's.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device
        self.on_gpu = device.type == "cuda"
        self.gaps: list[tuple] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        batches, ended = iter(self.loader), self.now()
        while (batch := next(batches, None)) is not None:
            moved = {
                name: to_device(value, self.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            self.gaps.append((ended, self.now()))
            if self.on_gpu and len(self.gaps) > MAX_AHEAD:
                self.gaps[-1 - MAX_AHEAD][1].synchronize()
            yield moved
            ended = self.now()

    def now(self) -> float | torch.cuda.Event:
        """The host's clock in seconds, or, on a GPU, the moment at which it gets here."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def take_idle_seconds(self) -> float:
        """Seconds of waiting since the last call; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            gaps = [ended.elapsed_time(began) / 1000 for ended, began in self.gaps]
        else:
            gaps = [began - ended for ended, began in self.gaps]
        self.gaps = []
        return sum(gaps)


class UnreadableLog:
    """Counts the files that cannot be read, those that the scan found included."""

    def __init__(self, found: Found):
        self.total = len(found.items) + len(found.unreadable)
        self.known = {path for path, _ in found.unreadable}
        self.new: set[str] = set()

    def add(self, reports: list[str]) -> None:
        """Takes a batch's `unreadable`.

        Raises:
            UserError: no file could be found in place of an unreadable one.
        """
        self.new |= {path for report in reports for path in report.split("\n") if path}
        if any(report.count("\n") + 1 >= MAX_TRIES for report in reports):
            self.give_up(self.new)

    def share(self) -> list[str]:
        """The paths that any rank met since the last call and none had met before; every rank must call it.

        Raises:
            UserError: too much of the set cannot be read any more.
        """
        new = set().union(*distributed.gather(self.new)) - self.known
        self.known |= new
        self.new = set()
        if new and len(self.known) > MAX_UNREADABLE * self.total:
            self.give_up(new)
        return sorted(new)

    def give_up(self, paths: set[str]) -> NoReturn:
        count = len(self.known | paths)
        raise UserError(
            f"{count} of {self.total} files cannot be read any more, as {min(paths)}:"
            " check the disk, then go on with --resume"
        )
