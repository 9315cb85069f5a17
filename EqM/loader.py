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
from torchvision.transforms.v2 import functional as transforms

import distributed
from cli import UserError
from data import MAX_UNREADABLE, Found, Item, unreadable_errors
from transfers import to_device
from untrusted import open_image
from video import read_frames

MAX_TRIES = 20  # files tried in place of an unreadable one
MAX_AHEAD = 3  # batches on the device that it has not come to: each takes memory


class Samples(Dataset):
    """Samples as dicts, by key (epoch, index): the same key gives the same sample in any worker.

    `x` is uint8, (3, T, size, size) for videos and (3, size, size) for images; `label` an int;
    `seconds_per_frame` a float, 0 for images; `unreadable` the paths, a line each, that could
    not be read and were replaced by others of the set.
    """

    def __init__(self, found: Found, image_size: int, clip_len: int, frame_interval: int, flip: bool, seed: int):
        self.items = found.items
        self.image_size, self.clip_len, self.frame_interval = image_size, clip_len, frame_interval
        self.flip, self.seed = flip, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        _, index = key
        place, mirror = keyed_uniforms(self.seed, [key])[0]
        unreadable = []
        for _ in range(MAX_TRIES):
            item = self.items[index]
            try:
                x, seconds_per_frame = self.read(item, place)
                break
            except unreadable_errors(item.video is not None):
                unreadable.append(item.path)
                index = int(np.random.default_rng((self.seed, *key, len(unreadable))).integers(len(self.items)))
        else:
            # Not for training: `UnreadableLog` ends the run when it reads this many names.
            frames = (self.clip_len,) if item.video else ()
            x, seconds_per_frame = torch.zeros(3, *frames, self.image_size, self.image_size).byte(), 0.0
        if self.flip and mirror < 0.5:
            x = x.flip(-1)
        seconds = np.float32(seconds_per_frame)
        return {"x": x, "label": item.label, "seconds_per_frame": seconds, "unreadable": "\n".join(unreadable)}

    def read(self, item: Item, place: float) -> tuple[Tensor, float]:
        """One file's sample, (3, [T,] size, size) uint8, and its seconds per frame; `place` in [0, 1) tells where."""
        if item.video is None:
            return read_image(item.path, self.image_size), 0.0
        available = len(item.video.times)
        start = int(place * (max(available - window_length(self.clip_len, self.frame_interval), 0) + 1))
        places = [min(start + i * self.frame_interval, available - 1) for i in range(self.clip_len)]
        frames = torch.from_numpy(read_frames(item.path, item.video, places, self.image_size))  # (T, H, W, 3)
        return frames.permute(3, 0, 1, 2).contiguous(), self.frame_interval / item.video.frames_per_second


def keyed_uniforms(seed: int, keys: list[tuple[int, int]]) -> np.ndarray:
    """Two uniform numbers in [0, 1) for each key (epoch, index), (N, 2), from the seed and the key alone.

    SplitMix64's mixing function (Steele, Lea & Flood 2014) over seed, epoch and index: a generator
    for each sample would take longer than reading it from a pack.
    """
    golden, shifts = np.array([0x9E3779B97F4A7C15], np.uint64), [np.uint64(shift) for shift in (30, 27, 31, 11)]
    factors = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> shifts[0])) * factors[0]
        z = (z ^ (z >> shifts[1])) * factors[1]
        return z ^ (z >> shifts[2])

    state = np.array([seed], np.uint64)
    for part in np.array(keys, np.uint64).T:
        state = mix(state + golden) ^ part  # (N,)
    return np.stack([(mix(state + golden * np.uint64(i)) >> shifts[3]) * 2.0**-53 for i in (1, 2)], axis=1)


def read_image(path: str, size: int) -> Tensor:
    """An image resized so that its short side is `size`, and its centre: (3, size, size) uint8."""
    with open_image(path) as image:
        pixels = image.convert("RGB")
    image = transforms.resize(pixels, [size], antialias=True)
    return transforms.pil_to_tensor(transforms.center_crop(image, [size]))


def window_length(clip_len: int, frame_interval: int) -> int:
    """Frames of the file from a clip's first to its last."""
    return 1 + (clip_len - 1) * frame_interval


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


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 pixels to float32 in [−1, 1], any shape."""
    return x.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Values in [−1, 1], clipped, to uint8 pixels, any shape."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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
