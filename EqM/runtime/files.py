"""Writes files that are whole or absent, even after a crash. Also opens and checks files, and locks folders."""

import csv
import errno
import fcntl
import io
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError
from runtime.interrupts import temporary_file

READ_BYTES = 2**22  # at a time
TRIED_BYTES = 2**12  # a full disk may take an empty file


def write_whole(
    path: Path, write: Callable[[Path], object], durable: bool = True, replaces_streams: bool = False
) -> None:
    """Has `write` make a temporary file beside `path`, flushes it to the disk, and renames it to `path`.

    A link is followed: it stays, and what it leads to is replaced. A pipe and a character device, as /dev/null and
    /dev/stdout can be, are not replaced: they get the bytes of the temporary file.

    Args:
        write: is given the temporary file, whose name has another suffix.
        durable: False leaves the flushing to the system, where a file can be made again after a power cut.
        replaces_streams: replaces a pipe or a device, in a folder whose files nobody names.

    Raises:
        OSError: the disk is full or fails, a pipe has no reader, or a folder, a socket or a disk is there. Other
            errors are those of `write`. No temporary file is left.
    """
    if not replaces_streams and is_stream(path):
        write_stream(path, write)
        return
    with whole_file(path, durable) as temporary:
        write(temporary)


@contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside `path` to write to within the block; at its end it is renamed, as `write_whole` says.

    Raises:
        OSError: the disk is full or fails. No temporary file is left, at an error within the block neither.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")  # machines share disks
    with temporary_file(temporary):
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(path)
        if durable:
            flush(path.parent)


def is_stream(path: Path) -> bool:
    """True if a pipe or a character device is there, False for a regular file or nothing. Raises OSError for others."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, "it is a folder, a socket or a disk, not a file", str(path))
    return not stat.S_ISREG(mode)


def write_stream(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a temporary file, and copies it into a pipe or a device. Raises OSError as `write_whole`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)  # waits for no reader
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as stream, tempfile.TemporaryDirectory() as folder:  # noqa: PTH123
        temporary = Path(folder) / "whole"
        write(temporary)
        with temporary.open("rb") as file:
            shutil.copyfileobj(file, stream)


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, for a file that a person asked for.

    Raises:
        UserError: it cannot be written. Other errors are those of `write`.
    """
    try:
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, with bytes of names that are no UTF-8 escaped. Raises UserError as `write_output`."""
    write_output(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Writes rows as a CSV in UTF-8. Names of files keep their bytes. Raises UserError as `write_output`."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    text = file.getvalue()
    try:
        encoded = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a name that no file has, in a checkpoint of others
        encoded = text.encode(errors="backslashreplace")
    write_output(path, lambda temporary: temporary.write_bytes(encoded))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of `write_csv`, by the names of the columns. Names of files are as the system gives them.

    Raises:
        OSError: as `open_regular`.
        csv.Error: it is no CSV.
    """
    with io.TextIOWrapper(open_regular(path), sys.getfilesystemencoding(), "surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def leftovers(folder: Path, names: str) -> Iterator[Path]:
    """Temporary files that a killed `write_whole` left of files whose names fit a pattern."""
    return folder.glob(f"{names}.*.tmp")


def lock(folder: Path, shared: bool = False) -> bool:
    """Locks a folder until this process and its forks end. False if another process has locked it, or not as shared.

    Network disks without locks on folders let everyone in.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", str(path))
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
    """Makes the folder of a file. Raises UserError if `write_output` could not write the file, as on a full disk."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file")
    try:
        if is_stream(path):  # not opened: the reader of a pipe would see an end
            return
        check_takes_files(Path(os.path.realpath(path)).parent)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


def check_takes_files(folder: Path) -> None:
    """Makes a folder, and tries to write there. Raises OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIED_BYTES))


def write_json(path: Path, contents: dict, replaces_streams: bool = False) -> None:
    """Writes a JSON file with a checksum of its contents, whole or not at all, as `write_whole`.

    Raises:
        OSError: the disk is full or fails.
    """
    text = json.dumps(contents | {"checksum": contents_checksum(contents)})
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), replaces_streams=replaces_streams)


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
