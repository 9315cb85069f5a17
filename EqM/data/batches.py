"""Training batches. (seed, samples drawn before) alone decides their order and random choices."""

import argparse
import signal
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data.clips import MAX_TRIES
from data.file_list import Found
from data.loading import LoadedBatches
from data.order import EpochStream, MixedStream
from data.scan import too_many
from data.source import Source
from runtime import cli, distributed
from runtime.errors import UserError, shown
from runtime.logs import log
from runtime.transfers import to_device

DEFAULT_BATCH, DEFAULT_WORKERS = {"cuda": 256, "cpu": 8}, {"cuda": 4, "cpu": 0}
DEFAULT_EPOCHS, NO_EPOCH_LIMIT = 80, 10**9
MAX_AHEAD = 3  # batches copied to the device before it needs them; each takes memory


def add_batch_args(group: argparse._ActionsContainer) -> None:
    """Adds the flags of the batch, the seed and the length of the run."""
    batch = f"samples a step, over all ranks; default {DEFAULT_BATCH['cuda']}, on a CPU {DEFAULT_BATCH['cpu']}"
    cli.add_kept(group, "--global-batch-size", type=cli.count, help=batch)
    cli.add_kept(group, "--global-seed", 0, type=cli.seed, help="of all random choices")
    epochs = f"default {DEFAULT_EPOCHS}; with --max-steps no limit"
    group.add_argument("--epochs", type=cli.positive_int, help=epochs)
    steps = "stop at this step, counted from the start of the first run"
    group.add_argument("--max-steps", type=cli.positive_int, help=steps)


def batch_of(args: argparse.Namespace, device_type: str) -> int:
    """Samples a step, over all ranks.

    Raises:
        UserError: the ranks, or a rank's micro-batches, do not divide it.
    """
    size, ranks = args.global_batch_size or DEFAULT_BATCH[device_type], distributed.world_size()
    if size % ranks:
        raise UserError(f"--global-batch-size {size} is not a multiple of the {ranks} processes")
    if size // ranks % (args.micro_batch_size or 1):
        raise UserError(f"--micro-batch-size {args.micro_batch_size} does not divide a rank's {size // ranks} samples")
    return size


def sample_limit(epochs: int | None, max_steps: int | None, items: int) -> int:
    """The most samples to draw, counted from the start of the first run."""
    return (epochs or (NO_EPOCH_LIMIT if max_steps else DEFAULT_EPOCHS)) * items


class TrainingBatches:
    """Yields (x, y, seconds_per_frame) on the device to the end of training, or to a `problem`.

    Every rank yields its part of a batch.

    Args:
        first: samples that all ranks drew before.
        last: samples to draw in all, counted from the start of the first run.
        batch: samples a step, over all ranks.
        workers: loading processes a rank; None: a default.
    """

    def __init__(
        self, source: Source, seed: int, first: int, last: int, batch: int, workers: int | None, device: torch.device
    ):
        self.source, self.seed, self.first, self.batch = source, seed, first, batch
        rank, ranks = distributed.rank(), distributed.world_size()
        stream = EpochStream(len(source.found), batch, -(-(last - first) // batch), seed, first, rank, ranks)
        form = source.form
        if form.is_mixed:
            stream = MixedStream(stream, form.lengths or (form.clip_len,), form.intervals or (form.frame_interval,))
        if workers is None:
            # On a CPU, loading processes would take cores from the step. Sending a pack's batch between processes
            # takes longer than gathering it.
            workers = 0 if source.pack else DEFAULT_WORKERS[device.type]
        self.unreadable = UnreadableLog(source.found)
        loader = make_loader(source.dataset(seed), stream, workers, device.type == "cuda")
        self.loaded = LoadedBatches(loader, self.check)
        self.loader = DeviceLoader(self.loaded, device)
        self.generator, self.rank = torch.Generator(device), rank

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x (N, C, H, W) or (N, C, T, H, W) float32, labels y (N,), seconds_per_frame (N,) of the frames in x."""
        for number, batch in enumerate(self.loader):
            drawn_before = self.first + number * self.batch
            x = self.source.to_input(batch, self.generator, self.seed, drawn_before, self.rank)
            yield x, batch["label"], batch["seconds_per_frame"] * self.source.time_factor

    def check(self, batch: dict) -> None:
        """Raises UserError for a batch that nothing can be trained on. Notes its unreadable files."""
        if "problem" in batch:
            raise UserError(batch["problem"])
        self.unreadable.add(batch["unreadable"])

    @property
    def problem(self) -> str:
        """Why this rank's batches end early, or an empty text. All ranks must then stop after the same step."""
        return self.loaded.problem

    def raise_problem(self) -> None:
        """Raises UserError if any rank's batches ended early. Every rank must call it, with the state saved."""
        self.loaded.raise_problem()

    def epoch(self, samples: int) -> int:
        """The epoch of the data after this many samples."""
        return samples // len(self.source.found)

    def log_unreadable(self) -> int:
        """Logs the files found unreadable since the last call; returns the count so far. Every rank must call it.

        Raises:
            UserError: too many of the files cannot be read.
        """
        for path, reason in self.unreadable.exchange():
            log.warning("skipped unreadable %s: %s", shown(path), shown(reason))
        return len(self.unreadable.known)

    def take_idle_seconds(self) -> float:
        """Seconds that the device waited for data since the last call. Waits for the device."""
        return self.loader.take_idle_seconds()


def make_loader(samples: Dataset, stream: Sampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader of batches as dicts of tensors, in the stream's order."""
    collate = as_it_is if hasattr(samples, "__getitems__") else collate_samples
    return DataLoader(
        samples,
        batch_sampler=stream,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # it shares the arrays of the files
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_the_trainer,
    )


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ignores the signals that terminals and schedulers send to every process. A worker ends with its trainer."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(batch: dict) -> dict:
    """Collates nothing: the data set returns whole batches."""
    return batch


def collate_samples(samples: list[dict]) -> dict:
    """One batch of samples. What could not be read stays a list, of a list for each sample."""
    batch = default_collate([{name: x for name, x in each.items() if name != "unreadable"} for each in samples])
    return batch | {"unreadable": [each["unreadable"] for each in samples]}


class DeviceLoader:
    """Yields a loader's batches with their tensors on the device, and copies the next one while the device computes.

    It also measures how long the device waits between the work of two batches.
    """

    def __init__(self, loader: LoadedBatches, device: torch.device):
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
        """The host's clock in seconds. On a GPU: an event at this place in its work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def take_idle_seconds(self) -> float:
        """Seconds that the device waited since the last call. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            gaps = [ended.elapsed_time(began) / 1000 for ended, began in self.gaps]
        else:
            gaps = [began - ended for ended, began in self.gaps]
        self.gaps = []
        return sum(gaps)


class UnreadableLog:
    """Collects the unreadable files: those that the scan found, and those that training meets."""

    def __init__(self, found: Found):
        self.total = len(found) + len(found.unreadable)
        self.known = {path for path, _ in found.unreadable}
        self.new: dict[str, str] = {}

    def add(self, reports: list[list[tuple[str, str]]]) -> None:
        """Takes a batch's `unreadable`: for each sample, (path, reason) of the files that could not be read for it.

        Raises:
            UserError: MAX_TRIES files in a row could not be read.
        """
        for report in reports:
            self.new.update(report)
        if any(len(report) >= MAX_TRIES for report in reports):
            self.give_up(self.new)

    def exchange(self) -> list[tuple[str, str]]:
        """(path, reason) of the files that any rank found unreadable since the last call. Every rank must call it.

        Raises:
            UserError: too many of the files cannot be read.
        """
        new: dict[str, str] = {}
        for of_rank in distributed.gather(self.new):
            new |= {path: reason for path, reason in of_rank.items() if path not in self.known}
        self.known |= new.keys()
        self.new = {}
        if new and too_many(len(self.known), self.total):
            self.give_up(new)
        return sorted(new.items())

    def give_up(self, new: dict[str, str]) -> NoReturn:
        count, (path, reason) = len(self.known | new.keys()), min(new.items())
        raise UserError(
            f"{count} of {self.total} files cannot be read, for example {shown(path)}: {shown(reason)}: check the disk,"
            " remove or replace what python EqM/check_data.py --decode lists, then go on with --resume"
        )
