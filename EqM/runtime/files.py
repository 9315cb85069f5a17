"""Files that are whole or absent, whatever happens while they are written."""

import errno
import fcntl
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.errors import UserError

READ_BYTES = 2**22  # at a time


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a temporary file beside `path`, flushes it to the disk, and renames it to `path`.

    Raises:
        OSError: the disk; and whatever `write` raises. No temporary file is left behind then.
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
    """What `write_whole` left of files whose names fit a pattern, where a program was killed."""
    return folder.glob(f"{names}.*.tmp")


def lock(folder: Path) -> bool:
    """Locks a folder until this process and those that it forks end; False where another process has locked it.

    Network disks that have no locks on folders let everyone in.
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
        if error.errno != errno.EINVAL:  # network disks may have nothing to flush a folder's names with
            raise
    finally:
        os.close(descriptor)


def file_checksum(path: Path, end: int | None = None) -> int:
    """CRC-32 over a file's bytes, or over those before `end`."""
    checksum, block, left = 0, memoryview(bytearray(READ_BYTES)), path.stat().st_size if end is None else end
    with path.open("rb", buffering=0) as file:
        while left > 0 and (size := file.readinto(block[:left])):
            checksum, left = zlib.crc32(block[:size], checksum), left - size
    return checksum


def check_writable(flag: str, path: Path) -> None:
    """Makes the folder of a file; raises UserError where the file could not be written."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


def write_json(path: Path, contents: dict) -> None:
    """Writes a JSON file with a checksum of what it says, whole or not at all.

    Raises:
        OSError: the disk is full, or cannot be written.
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
    """Any JSON file; raises as `read_json`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def without_checksum(contents: object) -> dict:
    """Takes the checksum off what a file of `write_json` holds; raises ValueError where it is not right."""
    if not isinstance(contents, dict):
        raise ValueError("no JSON object")
    contents = dict(contents)
    checksum = contents.pop("checksum", None)
    if checksum != contents_checksum(contents):
        raise ValueError("not with its checksum")
    return contents


def contents_checksum(contents: dict) -> int:
    return zlib.crc32(json.dumps(contents).encode())
