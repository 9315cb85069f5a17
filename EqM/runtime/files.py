"""Writes files that are whole or absent, even after a crash. Also opens and checks files, and locks folders."""

import errno
import fcntl
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError

READ_BYTES = 2**22  # at a time


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a temporary file beside `path`, flushes it to the disk, and renames it to `path`.

    Raises:
        OSError: the disk is full or fails. Other errors are those of `write`. No temporary file is left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path, names: str) -> Iterator[Path]:
    """Temporary files that a killed `write_whole` left of files whose names fit a pattern."""
    return folder.glob(f"{names}.*.tmp")


def lock(folder: Path) -> bool:
    """Locks a folder until this process and its forks end. False if another process has locked it.

    Network disks without locks on folders let everyone in.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        os.close(descriptor)
    return True


def flush(path: Path) -> None:
    """Waits until a file's contents, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def open_regular(path: Path, buffering: int = -1, append: bool = False) -> BinaryIO:
    """Opens a file to read its bytes, or to append some. Never waits, as opening a pipe does, or opens a device.

    Raises:
        OSError: it is missing, may not be read, or is a folder, a pipe or a device; `strerror` says which.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT if append else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, and no file", str(path))
    return open(descriptor, "ab" if append else "rb", buffering)  # noqa: PTH123, SIM115


def file_checksum(path: Path, end: int | None = None) -> int:
    """CRC-32 of a file's bytes, or of its first `end` bytes. Raises OSError as `open_regular`."""
    checksum, block = 0, memoryview(bytearray(READ_BYTES))
    with open_regular(path, buffering=0) as file:
        left = os.fstat(file.fileno()).st_size if end is None else end
        while left > 0 and (size := file.readinto(block[:left])):
            checksum, left = zlib.crc32(block[:size], checksum), left - size
    return checksum


def check_writable(flag: str, path: Path) -> None:
    """Makes the folder of a file. Raises UserError if the file could not be written there."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


def write_json(path: Path, contents: dict) -> None:
    """Writes a JSON file with a checksum of its contents, whole or not at all.

    Raises:
        OSError: the disk is full or fails.
    """
    text = json.dumps(contents | {"checksum": contents_checksum(contents)})
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """What `write_json` wrote.

    Raises:
        OSError: it is missing or may not be read.
        ValueError: it is damaged.
    """
    return without_checksum(parse_json(path))


def parse_json(path: Path) -> object:
    """The contents of any JSON file. Raises as `read_json`."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read().decode())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def without_checksum(contents: object) -> dict:
    """The contents of a file of `write_json` without their checksum. Raises ValueError if it is wrong."""
    if not isinstance(contents, dict):
        raise ValueError("it is no JSON object")
    contents = dict(contents)
    checksum = contents.pop("checksum", None)
    if checksum != contents_checksum(contents):
        raise ValueError("its checksum is wrong")
    return contents


def contents_checksum(contents: dict) -> int:
    return zlib.crc32(json.dumps(contents).encode())
