"""Packing shards in worker processes, which the main process gives work and, on a GPU, encodes for."""

import multiprocessing
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from data.clips import read_image
from data.packs.format import Settings, shard_path
from data.packs.pack import Encode
from data.scan import unreadable_errors
from data.video import iterate_frames, probe_video
from runtime.errors import UserError
from runtime.files import write_json, write_whole


@dataclass(frozen=True)
class Plan:
    """What to pack, the same on every rank: files as (path, class index), a shard's one after another."""

    folder: Path
    settings: Settings
    source: Path
    samples: list[tuple[str, int]]

    def shard(self, number: int) -> list[tuple[str, int]]:
        count = self.settings.items_per_shard
        return self.samples[number * count : (number + 1) * count]


def name_in(source: Path, path: str) -> str:
    """A file's path relative to the source, whose own path, or what that leads to by symbolic links, it begins with."""
    # Not os.path.relpath: it takes a/.. out, which is another folder where a is a link.
    root = source if Path(path).is_relative_to(source) else source.resolve()
    return str(Path(path).relative_to(root))


def read_source(path: str, video: bool, size: int) -> tuple[float, Iterator[np.ndarray]]:
    """A file's frames a second, 0 for an image, and its frames, (size, size, 3) uint8 each."""
    if not video:
        return 0.0, iter([read_image(path, size).permute(1, 2, 0).numpy()])
    info = probe_video(path)
    return info.frames_per_second, iterate_frames(path, info, size)


def pack_shard(plan: Plan, number: int, encode: Encode | None, item_done: Callable[[], None]) -> None:
    """Decodes the files of one shard and writes it; files that cannot be read are noted in it."""
    video, size = plan.settings.video, plan.settings.image_size

    def fill(writer: ShardWriter) -> None:
        for path, label in plan.shard(number):
            name = name_in(plan.source, path)
            try:
                rate, frames = read_source(path, video, size)
                first = next(frames)
            except unreadable_errors(video) as error:
                writer.add_unreadable(name, str(error))
            else:
                writer.add_item(name, label, rate, chain([first], frames))
            item_done()

    write_shard(plan.folder, number, plan.settings, encode, fill)


def work(main: Connection, others: list[Connection], plan: Plan, encode: Encode | None, encode_in_main: bool) -> None:
    """A worker process: packs the shards whose numbers come from the main process, until None comes."""
    torch.set_num_threads(1)  # the workers are as many as the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers Ctrl-C, and ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by way of the writer, which clears up
    # Copies of the main process's ends: with them open, its death would go unseen.
    for connection in others:
        connection.close()

    def ask_main(frames: np.ndarray) -> np.ndarray:
        main.send(("encode", frames))
        return main.recv()

    encode = ask_main if encode and encode_in_main else encode
    try:
        while (number := main.recv()) is not None:
            pack_shard(plan, number, encode, lambda: main.send(("item", None)))
            main.send(("shard", None))
    except UserError as error:
        main.send(("error", str(error)))
    except (EOFError, ConnectionError):
        pass  # the main process has gone


def pack_shards(
    plan: Plan, shards: list[int], num_workers: int, encode: Encode | None, encode_in_main: bool, bar: tqdm
) -> None:
    """Packs shards in worker processes; with `encode_in_main` they only decode, and this process encodes.

    Raises:
        UserError: the disk is full, or a process has ended.
    """
    context = multiprocessing.get_context("fork")
    waiting = shards[::-1]
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(num_workers, len(shards))):
            ours, theirs = context.Pipe()
            arguments = (theirs, [*workers, ours], plan, encode, encode_in_main)
            workers[ours] = context.Process(target=work, args=arguments, daemon=True)
            workers[ours].start()
            theirs.close()
            ours.send(waiting.pop())
        while workers:
            for connection in wait(list(workers)):
                if not answer(connection, workers[connection], waiting, encode, bar):
                    workers.pop(connection).join()
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def answer(connection: Connection, process: BaseProcess, waiting: list[int], encode: Encode | None, bar: tqdm) -> bool:
    """Does what a worker asks for; False where there is no more work for it."""
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise UserError(
            f"a packing process ended with status {process.exitcode}: run the same command again,"
            " with fewer --num-workers if memory ran out"
        ) from None
    if kind == "error":
        raise UserError(value)
    if kind == "item":
        bar.update()
    elif kind == "encode":
        connection.send(encode(value))
    elif kind == "shard":
        number = waiting.pop() if waiting else None
        connection.send(number)
        return number is not None
    return True


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
