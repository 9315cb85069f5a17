"""Writes one shard of a pack: decodes its files, encodes the frames if the pack is of latents, and keeps a record."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

from data.clips import centre_of, read_image
from data.frames import Crops
from data.inputs.entries import Frames
from data.packs.format import Settings, Windows, shard_path
from data.packs.latent_sums import LatentSums
from data.packs.packing import disk_errors
from data.packs.plan import PackPlan
from data.untrusted import File, Unreadable
from data.video import iterate_frames, probe_video
from runtime.errors import UserError
from runtime.files import contents_checksum, write_json, write_whole

CHUNK_FRAMES, CHUNK_BYTES = 32, 2**26  # frames held in memory and encoded together: at most both

# (N, [T,] H, W, 3) uint8 to (N, 2, C, [t,] h, w) float16: mean, deviation
Encode = Callable[[np.ndarray], np.ndarray]


def read_source(file: File | Frames, settings: Settings) -> tuple[float, Iterator[np.ndarray]]:
    """A file's frames a second, 0 for an image, and its frames, or windows, `settings.pixel_shape` uint8 each.

    Raises:
        Unreadable: it cannot be read.
    """
    video, size, windows = settings.video, settings.image_size, settings.windows
    if isinstance(file, Frames) and video:
        crop = Crops(None, size)
        frames = (crop(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))) for frame in file.pixels)
        count = len(file.pixels)
        return file.frames_per_second, windows_of(frames, count, windows) if windows else frames
    if not video:
        in_memory = isinstance(file, Frames)
        image = centre_of(Image.fromarray(file.pixels), size) if in_memory else read_image(file, size)
        return 0.0, iter([image.permute(1, 2, 0).numpy()])
    info = probe_video(file)
    frames = iterate_frames(file, info, size)
    return info.frames_per_second, windows_of(frames, len(info.times), windows) if windows else frames


def windows_of(frames: Iterable[np.ndarray], count: int, windows: Windows) -> Iterator[np.ndarray]:
    """The windows of a video, (T, H, W, 3) each, from its frames (H, W, 3) in order.

    The first window begins at the first frame, and the last one ends at the last. A short video has fewer. If it is
    shorter than a window, or ends early, the last frame is repeated.

    Args:
        count: of the frames.
    """
    span = (windows.clip_len - 1) * windows.frame_interval
    starts = np.unique(np.linspace(0, max(count - 1 - span, 0), windows.windows).round().astype(int)).tolist()
    open_ones: list[tuple[int, list[np.ndarray]]] = [(start, []) for start in starts]
    frame = None
    for place, frame in enumerate(frames):
        for start, taken in open_ones:
            if place >= start and (place - start) % windows.frame_interval == 0:
                taken.append(frame)
        while open_ones and len(open_ones[0][1]) == windows.clip_len:
            yield np.stack(open_ones.pop(0)[1])
    for start, taken in open_ones:
        if taken or start == starts[0]:
            yield np.stack(taken + [frame] * (windows.clip_len - len(taken)))


def pack_shard(plan: PackPlan, number: int, encode: Encode | None, advance: Callable[[int], None]) -> None:
    """Writes one shard and its record, whole or not at all. The record names the files that cannot be read.

    Args:
        advance: called often, with the number of items that were finished since. May raise, to end the shard.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    path, record = shard_path(plan.folder, number), {}
    with disk_errors(plan.folder):
        write_whole(
            path,
            lambda temporary: record.update(write_frames(temporary, plan, number, encode, advance)),
            replaces_streams=True,
        )
        # Last, since the record is what makes a shard count.
        made = {"mtime_ns": path.stat().st_mtime_ns, "settings_crc32": contents_checksum(plan.settings.identity())}
        write_json(path.with_suffix(".json"), record | made, replaces_streams=True)


def write_frames(
    path: Path, plan: PackPlan, number: int, encode: Encode | None, advance: Callable[[int], None]
) -> dict:
    """Decodes a shard's files into one file, and returns the shard's record without the file's time."""
    settings = plan.settings
    with path.open("wb") as file:
        writer = ShardWriter(file, settings, encode, advance)
        for index in plan.shard(number):
            name, label = plan.entries.names[index], int(plan.entries.labels[index])
            try:
                rate, frames = read_source(plan.entries.open(index), settings)
                first = next(frames)
            except Unreadable as error:
                writer.add_unreadable(name, str(error))
            else:
                writer.add_item(name, label, rate, chain([first], frames))
            advance(1)
        return writer.finish()


class ShardWriter:
    """Writes the frames of one shard to an open file, and collects the shard's record.

    Frames, or windows, are written in chunks of a fixed size, however long an item is. With `encode`, a chunk becomes
    the latents of its frames and of their mirrored copies.
    """

    def __init__(self, file: BinaryIO, settings: Settings, encode: Encode | None, advance: Callable[[int], None]):
        self.file, self.settings, self.encode, self.advance = file, settings, encode, advance
        chunk = max(1, min(CHUNK_FRAMES, CHUNK_BYTES // math.prod(settings.pixel_shape)))
        self.waiting, self.num_waiting = np.empty((chunk, *settings.pixel_shape), np.uint8), 0
        self.sums = LatentSums()
        self.num_frames, self.checksum = 0, 0
        self.items: dict[str, list] = {name: [] for name in ("path", "label", "frames", "frames_per_second", "offset")}
        self.unreadable: list[tuple[str, str]] = []

    def add_item(self, path: str, label: int, frames_per_second: float, frames: Iterable[np.ndarray]) -> None:
        """Appends an item.

        Args:
            path: the file, relative to the source.
            label: its class index.
            frames_per_second: 0 for an image.
            frames: (H, W, 3) uint8 each, in display order; one for an image; or windows (T, H, W, 3).
        """
        first = self.num_frames
        for frame in frames:
            self.waiting[self.num_waiting] = frame
            self.num_waiting += 1
            self.num_frames += 1
            if self.num_waiting == len(self.waiting):
                self.write_waiting()
        row = (path, label, self.num_frames - first, frames_per_second, first * self.settings.frame_bytes)
        for column, value in zip(self.items.values(), row, strict=True):
            column.append(value)

    def add_unreadable(self, path: str, reason: str) -> None:
        """Notes why a file is left out. The path is relative to the source."""
        self.unreadable.append((path, reason))

    def write_waiting(self) -> None:
        """Writes the frames that wait in memory."""
        self.advance(0)
        frames = self.waiting[: self.num_waiting]  # (N, [T,] H, W, 3)
        if self.encode and len(frames):
            mirrored = np.ascontiguousarray(frames[..., ::-1, :])
            latents = np.stack([self.encode(frames), self.encode(mirrored)], axis=1)  # (N, 2, 2, C, [t,] h, w)
            frames = np.ascontiguousarray(latents, self.settings.dtype)
            self.sums += LatentSums.of(frames, self.settings.space)
            if not all(map(math.isfinite, self.sums.squares)):
                raise UserError(
                    f"the VAE {self.settings.space.name} makes latents that are not finite: take another VAE"
                )
        self.file.write(frames.data)
        self.checksum = zlib.crc32(frames.data, self.checksum)
        self.num_waiting = 0

    def finish(self) -> dict:
        """Writes the last frames, and returns the shard's record without the file's time."""
        self.write_waiting()
        num_bytes = self.num_frames * self.settings.frame_bytes
        record = {"bytes": num_bytes, "crc32": self.checksum, "items": self.items, "unreadable": self.unreadable}
        return record | ({"latents": self.sums.as_dict()} if self.encode else {})
