"""The index of a folder: what opening its files found. It is kept between runs, so that a start opens what changed.

An index is an .npz in the cache folder. Nothing but time is lost with it: the files are then opened again.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED

import av
import numpy as np
import PIL

from data.disk_calls import DiskCalls
from data.file_list import VIDEO, Names, Videos
from data.opening import READABLE, UNREADABLE, Results, open_files
from data.untrusted import MAX_FRAMES
from runtime.errors import shown
from runtime.files import leftovers, open_regular, write_whole
from runtime.logs import log

FORMAT = "EqM index 1"
# Other versions of the readers may find something else in the same file. The last number is raised when what
# data/images.py, data/video.py or data/untrusted.py find changes.
READERS = f"PyAV {av.__version__}, Pillow {PIL.__version__}, 1"
SAVE_S = 15.0  # seconds of work that an interrupted scan loses, unless saving takes long
SAVE_SHARE = 0.05  # of a scan's time goes into saving it, at most
ABANDONED_S = 3600.0  # age of a temporary file that no process still writes
ARRAYS = {"about": "u1", "names": "u1", "ends": "i8", "stats": "i8", "codes": "i4", "rows": VIDEO, "times": "i8"}
NO_STAT = (-1, -1)  # of a file that is not there


class WrongIndex(ValueError):
    """An index that cannot be used. The text says why."""


@dataclass(frozen=True, eq=False)
class Known:
    """What an index says of N files.

    Attributes:
        names: their paths below the folder.
        stats: size in bytes and time of the last change in ns, (N, 2) int64.
    """

    names: Names
    stats: np.ndarray
    results: Results

    def of(self, names: Names, stats: np.ndarray) -> Results:
        """The results of files whose name, size and time are as they were; the others are not opened."""
        rows = self.rows_of(names)  # (N,)
        found = np.flatnonzero(rows >= 0)
        same = (self.stats[rows[found]] == stats[found]).all(1) & (stats[found, 0] >= 0)
        rows[found[~same]] = -1
        return self.results.take(rows)

    def rows_of(self, names: Names) -> np.ndarray:
        """The place of each name here, -1 if it is new, (N,) int64."""
        if np.array_equal(names.ends, self.names.ends) and np.array_equal(names.bytes, self.names.bytes):
            return np.arange(len(names))
        if not len(self.names):
            return np.full(len(names), -1)
        ours, theirs = hashes(self.names), hashes(names)
        order = np.argsort(ours)
        places = np.searchsorted(ours, theirs, sorter=order).clip(max=len(ours) - 1)
        return np.where(ours[order[places]] == theirs, order[places], -1)


def hashes(names: Names) -> np.ndarray:
    """Python's own hash of each name, which has 64 bits, (N,) int64."""
    return np.fromiter(map(hash, names.encoded()), np.int64, len(names))


def stats_of(paths: Names) -> np.ndarray:
    """Size in bytes and time of the last change in ns of each file, or of what its link leads to, (N, 2) int64."""

    def look(path: bytes) -> tuple[int, int]:
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            return NO_STAT
        return status.st_size, status.st_mtime_ns

    with DiskCalls() as calls:
        return np.fromiter(calls.map_short(look, paths.encoded()), np.dtype((np.int64, 2)), len(paths))


def cache_folder() -> Path:
    """The folder of indexes: EQM_CACHE, or `eqm` in the user's cache folder.

    Raises:
        OSError: this user has no home folder.
    """
    if os.environ.get("EQM_CACHE"):
        return Path(os.environ["EQM_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # noqa: PTH117
        base = os.path.expanduser("~/.cache")  # noqa: PTH111
    if not os.path.isabs(base):  # noqa: PTH117
        raise OSError(0, "this user has no home folder")
    return Path(base) / "eqm"


class Index:
    """The index of the videos, or of the images, in a folder. Several processes may use it at once."""

    def __init__(self, root: Path, video: bool):
        self.root, self.video = str(root.resolve()), video
        self.warned = False

    def path(self) -> Path:
        """Where it lies. Raises OSError if there is no cache folder."""
        key = os.fsencode(f"{'videos' if self.video else 'images'} {self.root}")
        return cache_folder() / f"{hashlib.sha256(key).hexdigest()[:32]}.npz"

    def read(self) -> Known:
        """What the index says; nothing if there is none, or, with a word in the log, if it cannot be used."""
        try:
            with open_regular(self.path()) as file:
                arrays = read_arrays(file)
            return self.known(arrays)
        except FileNotFoundError:
            pass
        except WrongIndex as error:
            log.warning("%s", shown(f"the index {self.path()} {error}: it is made anew"))
        except OSError as error:
            self.warn(error)
        return Known(Names(()), np.empty((0, 2), np.int64), Results(0, self.video))

    def known(self, arrays: dict[str, np.ndarray]) -> Known:
        """What the arrays of an index say. Raises WrongIndex if it is of another folder or damaged."""
        try:
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != FORMAT or about["readers"] != READERS:
                raise WrongIndex(f"was made by {about['format']}, {about['readers']}")
            if about["root"] != self.root or about["video"] != self.video:
                raise WrongIndex(f"is of another set, {about['root']}")
            outcomes = {(kind, tuple(map(str, texts))): code for code, (kind, texts) in enumerate(about["outcomes"])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise error if isinstance(error, WrongIndex) else WrongIndex("is damaged") from None
        names, results = Names.of_arrays(arrays["names"], arrays["ends"]), Results(0, video=False)
        results.codes, results.outcomes = arrays["codes"], outcomes
        results.videos = Videos.of_arrays(arrays["rows"], arrays["times"]) if self.video else None
        check_arrays(arrays, results, len(about["outcomes"]))
        return Known(names, arrays["stats"], results)

    def write(self, names: Names, stats: np.ndarray, results: Results) -> None:
        """Keeps what may be kept of the results. A cache folder that takes no files is a warning, once."""
        kept = results.are(READABLE, UNREADABLE)
        names, rows = names.where(kept), np.flatnonzero(kept)
        used, codes = np.unique(results.codes[rows], return_inverse=True)  # (N,)
        outcomes = list(results.outcomes)
        videos = Videos(()) if results.videos is None else results.videos.take(rows)
        about = {"format": FORMAT, "readers": READERS, "root": self.root, "video": self.video}
        text = json.dumps(about | {"outcomes": [outcomes[code] for code in used]}).encode()
        contents = (np.frombuffer(text, np.uint8), names.bytes, names.ends, stats[rows], codes.astype(np.int32))
        arrays = dict(zip(ARRAYS, (*contents, videos.rows, videos.times), strict=True))

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            write_whole(self.path(), save, replaces_streams=True)
            for left in leftovers(cache_folder(), self.path().name):
                with suppress(FileNotFoundError):  # another process has renamed its file
                    if time.time() - left.stat().st_mtime > ABANDONED_S:
                        left.unlink()
        except OSError as error:
            self.warn(error)

    def warn(self, error: OSError) -> None:
        """Says once that the cache folder cannot be used, and why."""
        if not self.warned:
            why = (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")
            advice = "every start opens all its files; EQM_CACHE names another cache folder"
            log.warning("%s", shown(f"no index of {self.root} is kept ({why}): {advice}"))
        self.warned = True


def read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of an index, whose checksums are right. Raises WrongIndex if they are damaged."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            members = archive.zip.infolist()
            if any(member.compress_type != ZIP_STORED for member in members):  # it may be larger than it looks
                raise WrongIndex("is compressed")
            arrays = {name: archive[name] for name in ARRAYS}
    except WrongIndex:
        raise
    except Exception:  # archives that are damaged or made to do harm raise errors of many types
        raise WrongIndex("is damaged") from None
    if any(array.dtype != ARRAYS[name] or array.ndim != 1 + (name == "stats") for name, array in arrays.items()):
        raise WrongIndex("is damaged (arrays of another kind)")
    return arrays


def check_arrays(arrays: dict[str, np.ndarray], results: Results, outcomes: int) -> None:
    """Raises WrongIndex if the numbers of an index cannot be right."""
    ends, codes, rows, times = (arrays[name] for name in ("ends", "codes", "rows", "times"))
    count = len(codes)
    right = len(ends) == count + 1 and arrays["stats"].shape == (count, 2)
    right = right and ends[0] == 0 and ends[-1] == len(arrays["names"]) and bool((np.diff(ends) >= 0).all())
    right = right and len(results.outcomes) == outcomes and bool(((codes >= 0) & (codes < outcomes)).all())
    right = right and all(
        kind == READABLE or (kind == UNREADABLE and len(texts) == 1) for kind, texts in results.outcomes
    )
    if right and results.videos is not None:
        length, place, uneven = rows["length"], rows["place"], (rows["step"] == 0) & (rows["length"] > 0)
        limits = [length >= 0, length <= MAX_FRAMES, rows["step"] >= 0, rows["margin"] >= 0, np.isfinite(rows["rate"])]
        right = len(rows) == count and all(bool(limit.all()) for limit in limits)
        right = right and bool(((length > 0) == results.are(READABLE)).all() and (rows["rate"] > 0)[length > 0].all())
        right = right and bool(((place >= 0) & (place <= len(times) - length))[uneven].all())
    if not right:
        raise WrongIndex("is damaged (numbers out of range)")


def check_known(root: Path, paths: Names, video: bool, show_progress: bool) -> Results:
    """`check_files` for files of a folder. Opens those that its index does not know as they are, and keeps an index."""
    index, names, stats = Index(root, video), paths.below(str(root)), stats_of(paths)
    known = index.read()
    results, before = known.of(names, stats), len(known.names)
    del known  # it takes as much memory as the results
    new = results.codes < 0
    saved, seconds = time.monotonic(), 0.0

    def save() -> None:
        nonlocal saved, seconds
        start = time.monotonic()
        if start - saved >= max(SAVE_S, seconds / SAVE_SHARE):
            index.write(names, stats, results)
            saved = time.monotonic()
            seconds = saved - start

    open_files(paths, results, video, show_progress, report=save)
    kept = results.are(READABLE, UNREADABLE)
    if kept[new].any() or kept.sum() != before:
        index.write(names, stats, results)
    return results
