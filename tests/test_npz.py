"""An .npz that is damaged or made to do harm is refused in one line."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.npz import read_npz
from runtime.errors import UserError


def archive(path: Path, member: bytes, name: str = "arr_0.npy", compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, member)


def saved(shape: str = "(2, 4, 4, 3)") -> bytes:
    """An .npy of eight grey values whose header names a shape."""
    file = io.BytesIO()
    np.save(file, np.zeros((2, 4, 4, 3), np.uint8))
    header, magic = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", file.getvalue()[:8]
    return magic + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n" + bytes(96)


def encrypt(path: Path) -> None:
    archive(path, saved())
    data = bytearray(path.read_bytes())
    for place in (6, data.index(b"PK\1\2") + 8):  # the flags of the member, and of its entry in the list
        data[place] |= 1
    path.write_bytes(data)


def change_method(path: Path) -> None:
    archive(path, saved())
    data = bytearray(path.read_bytes())
    for place in (8, data.index(b"PK\1\2") + 10):
        data[place : place + 2] = (9).to_bytes(2, "little")  # Deflate64, which Python does not know
    path.write_bytes(data)


def damage_lzma(path: Path) -> None:
    archive(path, saved(), compression=zipfile.ZIP_LZMA)
    data = bytearray(path.read_bytes())
    data[60:80] = bytes(20)
    path.write_bytes(data)


def bare_array(path: Path) -> None:
    path.write_bytes(saved())


HOSTILE: dict[str, Callable[[Path], None]] = {
    "encrypted": encrypt,
    "another compression": change_method,
    "damaged lzma": damage_lzma,
    "a size beyond an int": lambda path: archive(path, saved(f"({2**70}, 4, 4, 3)")),
    "a size that overflows": lambda path: archive(path, saved(f"({2**62}, 4, 4, 3)")),
    "a size beyond memory": lambda path: archive(path, saved(f"({2**44}, 4, 4, 3)")),
    "a negative size": lambda path: archive(path, saved("(-2, 4, 4, 3)")),
    "a header that does not end": lambda path: archive(path, saved("((((")),
    "a member that is no array": lambda path: archive(path, b"text"),
    "one array without an archive": bare_array,
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_npz_is_one_line(tmp_path, kind):
    HOSTILE[kind](tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"a\.npz") as error:
        read_npz(tmp_path / "a.npz")
    assert len(str(error.value).splitlines()) == 1


def test_an_npz_that_is_compressed_is_read(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        path = tmp_path / f"{compression}.npz"
        archive(path, saved(), compression=compression)
        assert read_npz(path).shape == (2, 4, 4, 3)
