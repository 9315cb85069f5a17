"""Writing the shards of a pack."""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cli import UserError
from pack import Encode, Settings, shard_path, write_json

CHUNK_FRAMES, CHUNK_BYTES = 32, 2**26  # frames held in memory and encoded together: at most both


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Makes a full disk, or one that cannot be written, a line for people."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}: make room and run the same command again,"
            " which keeps the finished shards"
        ) from None


class ShardWriter:
    """Writes one shard, to use in `with`: whole or, where an error ends it, not at all.

    Frames are written in chunks, whatever the length of an item. With `encode` a chunk becomes
    latents, of the frames and of their mirrored copies.
    """

    def __init__(self, folder: Path, number: int, settings: Settings, encode: Encode | None = None):
        self.folder, self.path, self.settings, self.encode = folder, shard_path(folder, number), settings, encode
        self.temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        side = settings.image_size
        chunk = max(1, min(CHUNK_FRAMES, CHUNK_BYTES // (side * side * 3)))
        self.waiting, self.num_waiting = np.empty((chunk, side, side, 3), np.uint8), 0
        self.num_frames, self.checksum = 0, 0
        self.items: dict[str, list] = {name: [] for name in ("path", "label", "frames", "frames_per_second", "offset")}
        self.unreadable: list[tuple[str, str]] = []

    def __enter__(self) -> "ShardWriter":
        with disk_errors(self.folder):
            self.file = self.temporary.open("wb")
        return self

    def __exit__(self, error_type: type | None, *error: object) -> None:
        try:
            if error_type is None:
                self.finish()
        finally:
            with suppress(OSError):  # of bytes that are given up, after the error that is told
                self.file.close()
            self.temporary.unlink(missing_ok=True)

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
        with disk_errors(self.folder):
            self.file.write(frames.data)
        self.checksum = zlib.crc32(frames.data, self.checksum)
        self.num_waiting = 0

    def finish(self) -> None:
        """Puts the frames on the disk under their name, then the items beside them."""
        self.write_waiting()
        with disk_errors(self.folder):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            status = self.temporary.stat()
            self.temporary.replace(self.path)
            contents = {"bytes": status.st_size, "crc32": self.checksum, "mtime_ns": status.st_mtime_ns}
            contents |= {"items": self.items, "unreadable": self.unreadable}
            write_json(self.path.with_suffix(".json"), contents)
