"""Reads frames from the shards of a pack while it is used: one that is cut or replaced is an error, never a crash."""

import ctypes
import errno
import mmap
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from data.packs.pack import Pack
from runtime.errors import UserError
from runtime.files import file_checksum, open_regular

MAX_OPEN = 256  # shards that a process holds open; each takes two file descriptors
CHECK_S = 1.0  # between looks at the open shards: a look at each in every batch would take a quarter of the time
MAX_PARTS, MAX_BYTES = 1024, 2**30  # that Linux copies in one call
NOT_ALLOWED = (errno.EPERM, errno.ENOSYS)  # by the rules of some containers, or by an old kernel

# Copies parts of a process's memory. Where a mapped file has been cut, it fails. Reading the memory would end the
# process by SIGBUS. A system call for each frame takes up to three times as long.
_copy = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
if _copy:
    _copy.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p, ctypes.c_ulong], ctypes.c_ulong]
    _copy.restype = ctypes.c_ssize_t


class LostPack(UserError):
    """A pack has been changed or removed since it was checked."""


@dataclass(frozen=True)
class Shard:
    """An open shard, its contents in memory, (bytes,) uint8, and the address of these."""

    file: BinaryIO
    memory: np.ndarray
    address: int


class Shards:
    """The shards of a pack. Each process opens a shard when it first uses it.

    A shard must have the size and time that it has when this object is made. With another time, its checksum decides.
    A file that is cut is noticed at once, and one that is written over within CHECK_S.
    """

    def __init__(self, pack: Pack):
        self.pack = pack
        self.times: dict[int, int] = {}  # of the shards' files, as trusted
        self.checked_at = time.monotonic()
        for number, path in enumerate(pack.shard_files):
            try:
                self.times[number] = path.stat().st_mtime_ns
            except OSError as error:
                raise self.lost(number, f"cannot be read ({error.strerror})") from None
        self.opened = lru_cache(MAX_OPEN)(self.open)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "opened"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.opened = lru_cache(MAX_OPEN)(self.open)

    def read(self, shards: np.ndarray, offsets: np.ndarray, x: np.ndarray) -> None:
        """Fills a contiguous x (N, T, …) with the frames at byte offsets (N, T) of shards (N,).

        Raises:
            LostPack: a shard is missing, or has changed since this object was made.
        """
        numbers, which = np.unique(shards, return_inverse=True)
        if len(numbers) > MAX_OPEN:
            for some in (which < MAX_OPEN, which >= MAX_OPEN):
                part = x[some]
                self.read(shards[some], offsets[some], part)
                x[some] = part
            return
        while True:
            opened = [self.opened(number) for number in numbers.tolist()]
            whole, now = copy_frames([opened[i] for i in which.tolist()], offsets, x), time.monotonic()
            if whole and now < self.checked_at + CHECK_S:
                return
            self.checked_at = now
            changed = [
                n for n, shard in zip(numbers.tolist(), opened, strict=True) if not self.is_trusted(n, shard.file)
            ]
            if whole and not changed:
                return
            if not changed:
                raise self.lost(int(numbers[0]), "or another shard cannot be read")
            for number in changed:
                self.trust_again(number)
            self.opened.cache_clear()

    def open(self, number: int) -> Shard:
        """Opens a shard whose size and time are trusted. Raises as `read`."""
        try:
            file = open_regular(self.pack.shard_files[number], buffering=0)
            if not self.is_trusted(number, file):
                self.trust_again(number)
            memory = mmap.mmap(file.fileno(), self.size(number), prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: it is shorter than it was
            raise self.lost(number, f"cannot be read ({getattr(error, 'strerror', error)})") from None
        contents = np.frombuffer(memory, np.uint8)
        return Shard(file, contents, contents.ctypes.data)

    def size(self, number: int) -> int:
        return self.pack.shard_records[number]["bytes"]

    def is_trusted(self, number: int, file: BinaryIO) -> bool:
        status = os.fstat(file.fileno())
        return (status.st_size, status.st_mtime_ns) == (self.size(number), self.times[number])

    def trust_again(self, number: int) -> None:
        """Trusts a shard's new time if its size and checksum are right. Raises as `read`."""
        path = self.pack.shard_files[number]
        try:
            status = path.stat()
            if status.st_size != self.size(number):
                raise self.lost(number, f"has {status.st_size:,} bytes, not the {self.size(number):,} that it had")
            if file_checksum(path) != self.pack.shard_records[number]["crc32"]:
                raise self.lost(number, "has changed since the run began")
        except OSError as error:
            raise self.lost(number, f"cannot be read ({error.strerror})") from None
        self.times[number] = status.st_mtime_ns

    def lost(self, number: int, problem: str) -> LostPack:
        path = self.pack.shard_files[number]
        return LostPack(f"{path} {problem}: put the pack back, or run {self.pack.command(path)} again")


def copy_frames(shards: list[Shard], offsets: np.ndarray, x: np.ndarray) -> bool:
    """Copies the frames at offsets (N, T) of N shards to a contiguous x (N, T, …). False if one is not there."""
    if (np.diff(offsets) == x[0, 0].nbytes).all():
        offsets = offsets[:, :1]  # a clip of neighbours is one piece
    frames = x.reshape(offsets.size, -1).view(np.uint8)  # (N·T, bytes)
    try:
        return copy_mapped(np.array([shard.address for shard in shards])[:, None] + offsets, frames)
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
    files = np.repeat([shard.file.fileno() for shard in shards], offsets.shape[1])  # (N·T,)
    parts = zip(files.tolist(), frames, offsets.reshape(-1).tolist(), strict=True)
    return all(os.preadv(file, [frame], offset) == len(frame) for file, frame, offset in parts)


def copy_mapped(addresses: np.ndarray, frames: np.ndarray) -> bool:
    """Copies what stands at as many addresses of this process to frames (M, bytes). False if one is not there.

    Raises:
        OSError: the system has no such call, or does not allow it.
    """
    if not _copy:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    size = frames.shape[1]
    sources = np.stack([addresses.reshape(-1), np.full(len(frames), size)], axis=1)  # (M, 2)
    most = min(MAX_PARTS, max(1, MAX_BYTES // size))
    for first in range(0, len(frames), most):
        some = sources[first : first + most]
        target = np.array([frames[first:].ctypes.data, len(some) * size])
        copied = _copy(os.getpid(), target.ctypes.data, 1, some.ctypes.data, len(some), 0)
        if copied < 0 and ctypes.get_errno() in NOT_ALLOWED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if copied != len(some) * size:
            return False
    return True
