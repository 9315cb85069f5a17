"""Opens files to check them, and keeps what was found in arrays."""

import ctypes
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.file_list import AT_ONCE, VIDEO, Names, Videos
from data.images import decode_image, probe_image
from data.untrusted import Unreadable, may_pass
from data.video import VideoInfo, decode_video, probe_video

READABLE, UNREADABLE, PASSING = "readable", "unreadable", "passing"  # passing: not readable, but maybe later
NOT_OPENED = -1
HANDED_OVER_S = 1.0  # seconds until what was found so far is handed over
# Gives freed memory back to the system, since readers leave it in small pieces: 0.5 GB after 100,000 short videos. Only
# GNU's C library has it.
_give_back_memory = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


@dataclass(frozen=True)
class Result:
    """What opening a file found.

    Attributes:
        kind: READABLE, UNREADABLE or PASSING.
        texts: remarks about how it is read, or the reason why it cannot be.
        video: its frame times; None for an image, and for what cannot be read.
    """

    kind: str
    texts: tuple[str, ...]
    video: VideoInfo | None = None


class Results:
    """The results of N files, in arrays. At first no file is opened.

    Attributes:
        codes: (N,) int32: NOT_OPENED, or the place of kind and texts in `outcomes`.
        outcomes: kind and texts of all files, each once.
        videos: their frame times; None for images.
    """

    def __init__(self, count: int, video: bool):
        self.codes = np.full(count, NOT_OPENED, np.int32)
        self.outcomes: dict[tuple[str, tuple[str, ...]], int] = {}
        self.videos = Videos.of_arrays(np.zeros(count, VIDEO), np.empty(0, np.int64)) if video else None

    def put(self, rows: np.ndarray, results: Sequence[Result]) -> None:
        """Sets the results of some rows."""
        outcomes = [(result.kind, result.texts) for result in results]
        self.codes[rows] = [self.outcomes.setdefault(outcome, len(self.outcomes)) for outcome in outcomes]
        if self.videos is not None:
            new, times = Videos(result.video for result in results), self.videos.times
            new.rows["place"] += len(times)
            self.videos.rows[rows] = new.rows
            if len(new.times):
                self.videos = Videos.of_arrays(self.videos.rows, np.concatenate([times, new.times]))

    def are(self, *kinds: str) -> np.ndarray:
        """Which files were found to be of these kinds, (N,) bool."""
        wanted = [kind in kinds for kind, _ in self.outcomes]
        return np.array([*wanted, False])[self.codes]  # NOT_OPENED is the last

    def take(self, rows: np.ndarray) -> "Results":
        """The results of some rows, in their order. A row of -1 is a file that is not opened."""
        taken = Results(0, video=False)
        taken.codes = np.append(self.codes, np.int32(NOT_OPENED))[rows]
        taken.outcomes = dict(self.outcomes)
        taken.videos = None if self.videos is None else self.videos.take(rows)
        return taken

    def unreadable(self, paths: Names) -> Iterator[tuple[str, str]]:
        """(path, reason) of the files that could not be read, in order."""
        outcomes = list(self.outcomes)
        for row in np.flatnonzero(~self.are(READABLE)).tolist():
            yield paths[row], outcomes[self.codes[row]][1][0]

    def remarks(self) -> Counter:
        """How many files each remark is about, in the order in which they come first."""
        outcomes, count = list(self.outcomes), Counter()
        codes, firsts, files = np.unique(self.codes, return_index=True, return_counts=True)
        for i in np.argsort(firsts):
            kind, texts = outcomes[codes[i]]
            count.update(dict.fromkeys(texts if kind == READABLE else (), int(files[i])))
        return count


def check_file(path: str, video: bool, decode: bool) -> Result:
    """Opens a file, and with `decode` decodes all of it."""
    try:
        info = probe_video(path) if video else None
        remarks = info.remarks if info else probe_image(path)
        if decode:
            decode_video(path, info) if info else decode_image(path)
        return Result(READABLE, remarks, info)
    except Unreadable as error:
        return Result(PASSING if may_pass(error) else UNREADABLE, (str(error),))


def open_files(
    paths: Names,
    results: Results,
    video: bool,
    show_progress: bool,
    decode: bool = False,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Opens the files without a result, on all cores, and puts their results in.

    Args:
        report: is called about every second, when new results are in.
    """
    title = "decoding files" if decode else "checking files"
    waiting = np.flatnonzero(results.codes == NOT_OPENED)
    hidden = not (show_progress and len(waiting))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc=title, total=len(waiting), unit="file", disable=hidden) as bar,
    ):
        for first in range(0, len(waiting), AT_ONCE):
            rows, found, start = waiting[first : first + AT_ONCE], [], time.monotonic()
            for result in pool.map(lambda row: check_file(paths[row], video, decode), rows.tolist()):
                found.append(result)
                bar.update()
                if len(found) == len(rows) or time.monotonic() > start + HANDED_OVER_S:
                    results.put(rows[: len(found)], found)
                    rows, found, start = rows[len(found) :], [], time.monotonic()
                    report()
            _give_back_memory(0)


def check_files(paths: Names, video: bool, show_progress: bool = True, decode: bool = False) -> Results:
    """Opens every file; with `decode` decodes all of each."""
    results = Results(len(paths), video)
    open_files(paths, results, video, show_progress, decode)
    return results
