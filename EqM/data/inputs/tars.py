"""Tar shards as WebDataset writes them: each sample is a media file and a label with the same name but for the ending.

The package webdataset is not used: it reads a shard from its start to its end, runs addresses that begin with "pipe:"
in a shell, and loads members that are pickles.
"""

import json
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data.file_list import Names
from data.inputs.entries import Entries, Row, arranged, checked_label
from data.tables import brief
from data.untrusted import MAX_MEMBER, Contents, Unreadable
from data.walk import IMAGE_EXTENSIONS, MISTAKE, VIDEO_EXTENSIONS, listed
from runtime.errors import UserError, first_line, shown
from runtime.files import open_regular

Sample = tuple[int | str, str, int, int]  # label, name, first byte, bytes
LABELS = ("cls", "json", "txt")  # the first that a sample has is taken
MAX_LABEL = 2**20  # bytes of a label's file
MAX_HEADER = 2**20  # bytes of a member's names and times, which tarfile reads at once


class Headers:
    """An open tar that tarfile may read headers of, but nothing larger."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise ValueError(f"it has a header of {size:,} bytes")
        return self.file.read(size)


class Members(Sequence[Contents]):
    """Members of tar files. Each is read when it is asked for, from its place in the tar."""

    def __init__(self, tars: Sequence[Path], found: Sequence[Sequence[tuple[str, int, int]]]):
        members = [(i, *member) for i, of_one in enumerate(found) for member in of_one]
        self.tars, self.names = tars, Names(name for _, name, _, _ in members)
        self.places = np.array([(i, first, size) for i, _, first, size in members], np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Contents:
        tar, first, size = self.places[index].tolist()
        if size > MAX_MEMBER:
            raise Unreadable(f"it has {size:,} bytes, and a member may have {MAX_MEMBER:,}")
        try:
            with open_regular(self.tars[tar], buffering=0) as file:
                file.seek(first)
                data = file.read(size)
        except OSError as error:
            raise Unreadable(f"{self.tars[tar]} cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise Unreadable(f"{self.tars[tar]} has become shorter")
        return Contents(os.path.basename(self.names[index]), data)  # noqa: PTH119


def read_tars(tars: Sequence[Path], video: bool, field: str, stored: bool) -> Entries:
    """Finds the samples of tar files, from their headers and labels alone.

    Args:
        field: of a .json label, that holds the class.
        stored: keeps the order of the tars and of their members.

    Raises:
        UserError: a tar is damaged or holds a path that leads out of it; a sample has no label, a wrong one, or two
            media files; there is no sample.
    """
    read, processes = partial(samples_of, video=video, field=field), min(len(tars), len(os.sched_getaffinity(0)))
    # Processes, since a header is much work for Python and little for the disk.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        results = pool.map(read, tars) if len(tars) > 1 else map(read, tars)
        results = list(tqdm(results, "reading tars", len(tars), unit="tar", disable=len(tars) < 2))
    found, others = [samples for samples, _ in results], sum((left for _, left in results), Counter())
    rows = [
        Row(label, name, f"{tar.name}/{name}")
        for tar, of_one in zip(tars, found, strict=True)
        for label, name, _, _ in of_one
    ]
    kind, other = ("videos", "leave out --video") if video else ("images", "add --video")
    left = [f"{count} {ending}" for ending, count in sorted(others.items())]
    notes = [f"left out: {listed(left)} in the tars"] if left else []
    media = sum(others[ending] for ending in {*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS} & others.keys())
    if not rows:
        raise UserError(f"no {kind} in {tars[0]}" + f" and {len(tars) - 1} more" * (len(tars) > 1) + f": {other}?")
    if media:
        notes.append(f"{MISTAKE}{media} files are no {kind} and are left out: {other} to pack them in place of these")
    members = Members(tars, [[sample[1:] for sample in of_one] for of_one in found])
    return arranged(rows, members, notes, stored=stored)


def samples_of(tar: Path, video: bool, field: str) -> tuple[list[Sample], Counter]:
    """The samples of a tar, and how many other members there are of each ending. Raises UserError as `read_tars`."""
    others: Counter = Counter()
    try:
        with open_regular(tar) as file:
            media, labels = sorted_members(tar, file, video, others)
            return [
                (label_of(tar, file, name, labels.get(key, {}), field), name, first, size)
                for key, (name, first, size) in media.items()
            ], others
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror or error}") from None


def sorted_members(
    tar: Path, file: BinaryIO, video: bool, others: Counter
) -> tuple[dict[str, tuple[str, int, int]], dict[str, dict[str, tuple[int, int]]]]:
    """By sample: (name, first byte, bytes) of its media file; and by ending (first byte, bytes) of its labels."""
    media: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, tuple[int, int]]] = {}
    wanted = VIDEO_EXTENSIONS if video else IMAGE_EXTENSIONS
    for name, first, size in members_of(tar, file):
        # As WebDataset splits names: at the first dot of the last part.
        folder, base = os.path.split(name)
        stem, _, ending = base.partition(".")
        key, ending = f"{folder}/{stem}", ending.lower()
        if not stem or "__MACOSX" in name.split("/"):
            others["hidden"] += 1
        elif f".{ending}" in wanted:
            if key in media:
                raise UserError(shown(f"{tar}: {media[key][0]} and {name} are one sample: keep one of them"))
            media[key] = name, first, size
        elif ending in LABELS:
            labels.setdefault(key, {})[ending] = first, size
        else:
            others[f".{ending}"] += 1
    return media, labels


def label_of(tar: Path, file: BinaryIO, name: str, there: dict[str, tuple[int, int]], field: str) -> int | str:
    """The class of a media file, from one of the labels that are there. Raises UserError if there is none."""
    ending = next((ending for ending in LABELS if ending in there), None)
    if not ending:
        raise UserError(shown(f"{tar}: {name} has no label: give it a .cls, .json or .txt of the same name"))
    where, (first, size) = f"{tar}: {os.path.splitext(name)[0]}.{ending}", there[ending]  # noqa: PTH122
    if size > MAX_LABEL:
        raise UserError(shown(f"{where} has {size:,} bytes, which is no label"))
    file.seek(first)
    return parsed_label(file.read(size), ending, field, where)


def members_of(tar: Path, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yields (name, first byte, bytes) of each plain file in a tar.

    Raises:
        UserError: the tar is damaged or cut, or a path leads out of it.
    """
    try:
        archive = tarfile.TarFile(fileobj=Headers(file), mode="r")
        while member := archive.next():
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise UserError(f"{tar}: {brief(member.name)} leads out of the archive: make it again without")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
            archive.members.clear()  # else it keeps all of them
        file.seek(archive.offset)
        # tarfile takes a broken header behind the first one for the end.
        if any(file.read(tarfile.BLOCKSIZE) or b"cut"):
            raise UserError(f"{tar} is damaged or cut short: copy it again")
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"{tar} is damaged, cut short or no tar: {first_line(error)}") from None


def parsed_label(data: bytes, ending: str, field: str, where: str) -> int | str:
    """The class in a label's file. Raises UserError if there is none."""
    try:
        text = data.decode()
        value = json.loads(text) if ending == "json" else text.strip()
    except (ValueError, RecursionError) as error:
        raise UserError(shown(f"{where} cannot be read as a label: {first_line(error)}")) from None
    if ending != "json":
        return checked_label(int(value) if value.isdecimal() and len(value) < 20 else value, where)
    if not isinstance(value, dict) or field not in value:
        fields = f"has {listed(sorted(value))}" if isinstance(value, dict) else "is no object"
        raise UserError(shown(f"{where} has no {field!r}, and {fields}: name the class's with --label"))
    return checked_label(value[field], where)
