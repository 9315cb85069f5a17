"""Which form a data set has, and its files in the order of a pack."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path

import numpy as np

from data.file_list import Names
from data.inputs.class_lists import read_listed
from data.inputs.entries import Entries, Frames, Row, arranged, checked_label
from data.inputs.parquet import read_parquet
from data.inputs.tars import read_tars
from data.npz import npz_labels, read_npz
from data.scan import SPLIT_NAMES, find_files
from runtime.cli import MAX_COUNT
from runtime.errors import UserError

BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<names>[^{}]*,[^{}]*))\}")
ARCHIVES = (".tar", ".parquet")


@dataclass(frozen=True)
class Reading:
    """How the files of a set and their classes are found, where there is a choice.

    Attributes:
        labels: a list of files and classes; None: the set itself gives the classes.
        label: the field of .json labels, or the column of parquet, that holds classes.
        column: the column of parquet that holds files; None: `image` or `video`.
        frames_per_second: of the clips of an .npz.
        stored: keeps the order of an archive, in place of that of class folders.
    """

    labels: Path | None = None
    label: str = "label"
    column: str | None = None
    frames_per_second: float = 25.0
    stored: bool = False

    def words(self) -> list[str]:
        """The flags of prepare.py that ask for it."""
        words = ["--labels", str(self.labels)] if self.labels else []
        words += ["--label", self.label] if self.label != Reading.label else []
        words += ["--column", self.column] if self.column else []
        if self.frames_per_second != Reading.frames_per_second:
            words += ["--fps", f"{self.frames_per_second:g}"]
        return words + ["--order", "stored"] * self.stored


BY_DEFAULT = Reading()


def find_entries(source: Path, video: bool, reading: Reading) -> Entries:
    """The files of a folder, of tar shards, of parquet files or of an .npz. Opens no image and no video.

    Raises:
        UserError: there are none, or no classes for them; an archive is damaged; or a label is wrong.
    """
    if reading.labels:
        return read_listed(source, reading.labels, video)
    if source.suffix == ".npz" and not source.is_dir():
        return read_samples(source, video, reading.frames_per_second)
    archives = find_archives(source)
    if archives and archives[0].suffix == ".tar":
        return read_tars(archives, video, reading.label, reading.stored)
    if archives:
        column = reading.column or ("video" if video else "image")
        return read_parquet(archives, column, reading.label, reading.stored)
    listing = find_files(source, video)
    paths, labels = [path for path, _ in listing.samples], [label for _, label in listing.samples]
    names = Names(name_in(source, path) for path in paths)
    places = np.arange(len(paths))
    return Entries(listing.classes, names, np.array(labels, np.int64), paths, places, listing.notes)


def name_in(source: Path, path: str) -> str:
    """A file's path relative to the source. The path may begin with the source or with what its links lead to."""
    # Not os.path.relpath: it shortens a/.. to nothing, which is another folder if a is a link.
    root = source if Path(path).is_relative_to(source) else source.resolve()
    return str(Path(path).relative_to(root))


def find_archives(source: Path) -> list[Path]:
    """The tar or parquet files of a folder without folders, or those that a path names, with braces or stars.

    Raises:
        UserError: one that is named is missing, or they are of two kinds or of several splits.
    """
    if source.is_dir():
        inside = [path for path in source.iterdir() if not path.name.startswith(".")]
        archives = [] if any(path.is_dir() for path in inside) else inside
        archives = sorted(path for path in archives if path.suffix in ARCHIVES)
    elif source.suffix in ARCHIVES:
        archives = [Path(name) for pattern in expanded(str(source)) for name in matching(pattern)]
        missing = [path for path in archives if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is not a file: correct the pattern {source}")
    else:
        return []
    if len({path.suffix for path in archives}) > 1:
        raise UserError(f"{source} holds tar and parquet files: name those of one kind, as {source}/*.tar")
    splits = sorted({split for path in archives if (split := re.split(r"[-_.\d]", path.name)[0]) in SPLIT_NAMES})
    if len(splits) > 1:
        name = source / f"{splits[-1]}*{archives[0].suffix}" if source.is_dir() else source
        raise UserError(f"{source} holds several splits ({', '.join(splits)}): name one, as {shlex.quote(str(name))}")
    return archives


def expanded(pattern: str) -> Iterator[str]:
    """A pattern's texts, as a shell makes them of braces: a{00..12}b has numbers, a{x,y}b has names."""
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    if found["names"] is not None:
        parts: Sequence[str] = found["names"].split(",")
    else:
        first, last = int(found["first"]), int(found["last"])
        if not 0 <= last - first < MAX_COUNT:
            raise UserError(f"{pattern}: {found[0]} names no files, or too many")
        width = len(found["first"]) if found["first"].startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    for part in parts:
        yield from expanded(f"{before}{part}{after}")


def matching(pattern: str) -> list[str]:
    """The files that a pattern with stars names, sorted, or the pattern if it has none."""
    if pattern == escape(pattern):
        return [pattern]
    found = sorted(glob(pattern))  # noqa: PTH207
    if not found:
        raise UserError(f"no file fits {pattern}")
    return found


class Samples:
    """The samples of an .npz. Each process reads the file once."""

    def __init__(self, path: Path, frames_per_second: float):
        self.path, self.frames_per_second = path, frames_per_second

    def __getitem__(self, index: int) -> Frames:
        return Frames(read_npz(self.path)[index], self.frames_per_second)


def read_samples(path: Path, video: bool, frames_per_second: float) -> Entries:
    """The samples of an .npz, and their classes in `labels`; without these, all are of one class, named as the file.

    Raises:
        UserError: as `read_npz` and `npz_labels`, or it holds clips where images are wanted, or the reverse.
    """
    samples = read_npz(path)
    if (samples.ndim == 5) != video:
        holds, flag = ("clips", "add --video") if samples.ndim == 5 else ("images", "leave out --video")
        raise UserError(f"{path} holds {holds}: {flag}")
    labels = npz_labels(path)
    values = [path.stem] * len(samples) if labels is None else labels.tolist()
    if len(values) != len(samples):
        raise UserError(f"{path} has {len(values)} labels for {len(samples)} samples")
    checked = [checked_label(value, f"{path}, sample {i}") for i, value in enumerate(values)]
    rows = [Row(label, f"{i:09d}", f"{path.name}[{i}]") for i, label in enumerate(checked)]
    return arranged(rows, Samples(path, frames_per_second), [])
