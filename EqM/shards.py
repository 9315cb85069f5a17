"""Writing the shards of a pack."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cli import UserError
from files import write_whole
from pack import Encode
from pack_settings import Settings, shard_path, write_json

CHUNK_FRAMES, CHUNK_BYTES = 32, 2**26  # frames held in memory and encoded together: at most both


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Makes a full disk, or one that cannot be written, a line for people."""
    try:
        yield
    except ConnectionError:
        raise  # of a pipe to another process, not of the disk
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}: make room and run the same command again,"
            " which keeps the finished shards"
        ) from None


def write_shard(
    folder: Path, number: int, settings: Settings, encode: Encode | None, fill: Callable[["ShardWriter"], None]
) -> None:
    """Writes what `fill` adds to a shard, whole or, where an error ends it, not at all.

    Raises:
        UserError: the disk is full, or cannot be written.
    """
    path, record = shard_path(folder, number), {}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            writer = ShardWriter(file, settings, encode)
            fill(writer)
            record.update(writer.finish())

    with disk_errors(folder):
        write_whole(path, write)
        # Last, since a shard counts once its items lie beside it.
        write_json(path.with_suffix(".json"), record | {"mtime_ns": path.stat().st_mtime_ns})


class ShardWriter:
    """Writes the frames of one shard to an open file, and collects what is to lie beside it.

    Frames are written in chunks, whatever the length of an item. With `encode` a chunk becomes
    latents, of the frames and of their mirrored copies.
    """

    def __init__(self, file: BinaryIO, settings: Settings, encode: Encode | None):
        self.file, self.settings, self.encode = file, settings, encode
        side = settings.image_size
        chunk = max(1, min(CHUNK_FRAMES, CHUNK_BYTES // (side * side * 3)))
        self.waiting, self.num_waiting = np.empty((chunk, side, side, 3), np.uint8), 0
        self.num_frames, self.checksum = 0, 0
        self.items: dict[str, list] = {name: [] for name in ("path", "label", "frames", "frames_per_second", "offset")}
        self.unreadable: list[tuple[str, str]] = []

    def add_item(self, path: str, label: int, frames_per_second: float, frames: Iterable[np.ndarray]) -> None:
        """Appends an item.

        Args:
            path: relative to the source.
            frames_per_second: 0 for an image.
            frames: (H, W, 3) uint8 each, in display order; an image is one.
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
        """Notes a file, relative to the source, that the shard goes without."""
        self.unreadable.append((path, reason))

    def write_waiting(self) -> None:
        frames = self.waiting[: self.num_waiting]  # (N, H, W, 3)
        if self.encode and len(frames):
            mirrored = np.ascontiguousarray(frames[:, :, ::-1])
            latents = np.stack([self.encode(frames), self.encode(mirrored)], axis=1)  # (N, 2, 2, C, h, w)
            frames = np.ascontiguousarray(latents, self.settings.dtype)
        self.file.write(frames.data)
        self.checksum = zlib.crc32(frames.data, self.checksum)
        self.num_waiting = 0

    def finish(self) -> dict:
        """Writes the last frames; what is to lie beside them, but for the file's time."""
        self.write_waiting()
        num_bytes = self.num_frames * self.settings.frame_bytes
        return {"bytes": num_bytes, "crc32": self.checksum, "items": self.items, "unreadable": self.unreadable}
