"""The files of a data set, in arrays: loading processes share arrays without copying them."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise

import numpy as np

from data.video import VideoInfo
from data.walk import MISTAKE, listed

AT_ONCE = 4096  # names that are strings at a time
# A video in `Videos`: frames, frames a second, VideoInfo's seekable and seek_margin, the first frame's time, the time
# from a frame to the next or 0 for uneven times, and where these begin.
VIDEO = np.dtype(
    [("length", "i8"), ("rate", "f8"), ("seekable", "?"), ("margin", "i8"), ("first", "i8"), ("step", "i8")]
    + [("place", "i8")]
)


@dataclass(frozen=True)
class Item:
    """One file, its class index and, for a video, its frame times."""

    path: str
    label: int
    video: VideoInfo | None


class Names(Sequence[str]):
    """File names in one array of bytes."""

    def __init__(self, names: Iterable[str | bytes]):
        data, ends = bytearray(), array("q", [0])
        for name in names:
            data += os.fsencode(name)
            ends.append(len(data))
        self.bytes = np.frombuffer(bytes(data), np.uint8)
        self.ends = np.frombuffer(ends, np.int64)  # (N + 1,)

    @staticmethod
    def of_arrays(data: np.ndarray, ends: np.ndarray) -> "Names":
        """Names whose bytes follow one another in `data`, (bytes,) uint8, and end at `ends`, (N + 1,) int64, from 0."""
        names = Names(())
        names.bytes, names.ends = data, ends
        return names

    @staticmethod
    def of_lists(lists: Iterable[bytes]) -> "Names":
        """The names of several lists, each with a NUL between its names."""
        data = np.frombuffer(b"".join(each + b"\0" for each in lists), np.uint8)
        ends = np.flatnonzero(data == 0)  # (N,)
        return Names.of_arrays(data[data != 0], np.concatenate([[0], ends - np.arange(len(ends))]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def encoded(self) -> Iterator[bytes]:
        """The names as the system has them. Takes a fifth of the time of one by one."""
        for first in range(0, len(self), AT_ONCE):
            ends = self.ends[first : first + AT_ONCE + 1]
            data = self.bytes[ends[0] : ends[-1]].tobytes()
            yield from (data[start:end] for start, end in pairwise((ends - ends[0]).tolist()))

    def where(self, mask: np.ndarray) -> "Names":
        """The names at which a mask, (N,) bool, is True."""
        return self if mask.all() else Names(compress(self.encoded(), mask))

    def below(self, folder: str) -> "Names":
        """The names without the folder that they may begin with."""
        prefix = os.path.join(os.fsencode(folder), b"")  # noqa: PTH118
        return Names(name.removeprefix(prefix) for name in self.encoded())


class Videos(Sequence[VideoInfo]):
    """The frame times of many videos. Even times are stored as three numbers, uneven ones as one number a frame.

    Attributes:
        rows: a VIDEO for each, (N,). One of length 0 stands for a file that could not be read.
        times: uneven times, int64, where `rows` say.
    """

    def __init__(self, videos: Iterable[VideoInfo | None]):
        rows, times = [], array("q")
        for video in videos:
            if video is None:
                rows.append((0,) * len(VIDEO))
                continue
            even = isinstance(video.times, range)
            first, step = (video.times.start, video.times.step) if even else (video.times[0], 0)
            scalars = (len(video.times), video.frames_per_second, video.seekable, video.seek_margin)
            rows.append((*scalars, first, step, len(times)))
            times.extend(() if even else video.times)
        self.rows, self.times = np.array(rows, VIDEO), np.array(times, np.int64)

    @staticmethod
    def of_arrays(rows: np.ndarray, times: np.ndarray) -> "Videos":
        videos = Videos(())
        videos.rows, videos.times = rows, times
        return videos

    def take(self, rows: np.ndarray) -> "Videos":
        """The videos of some rows, in their order. A row of -1 is a file that could not be read."""
        taken = np.append(self.rows, np.zeros(1, VIDEO))[rows]
        uneven = np.flatnonzero((taken["step"] == 0) & (taken["length"] > 0))
        parts = [self.times[row["place"] : row["place"] + row["length"]] for row in taken[uneven]]
        taken["place"][uneven] = np.cumsum([0, *map(len, parts)])[:-1]
        return Videos.of_arrays(taken, np.concatenate([self.times[:0], *parts]))

    @property
    def lengths(self) -> np.ndarray:
        """Frames of each video, (N,) int64."""
        return self.rows["length"]

    @property
    def rates(self) -> np.ndarray:
        """Frames a second of each video, (N,) float64."""
        return self.rows["rate"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> VideoInfo:
        length, rate, seekable, margin, first, step, place = self.rows[index].item()
        if step:
            return VideoInfo(range(first, first + step * length, step), rate, seekable, margin)
        return VideoInfo(tuple(self.times[place : place + length].tolist()), rate, seekable, margin)


@dataclass(frozen=True, eq=False)
class Found:
    """The files of a folder or of a pack.

    Attributes:
        root: the folder.
        classes: names of the classes.
        paths: the readable files, N of them.
        labels: their class indices, (N,) int64.
        videos: their frame times; None for images.
        unreadable: the other files, as (path, reason).
        notes: lines for people: what is left out, what looks like a mistake, how pictures are read.
    """

    root: str
    classes: tuple[str, ...]
    paths: Names
    labels: np.ndarray
    videos: Videos | None
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of_items(
        root: str,
        classes: tuple[str, ...],
        items: Sequence[Item],
        unreadable: tuple[tuple[str, str], ...] = (),
        notes: tuple[str, ...] = (),
    ) -> "Found":
        """Collects one Item a file. All are videos, or all are images."""
        videos = [item.video for item in items if item.video]
        labels = np.array([item.label for item in items], np.int64)  # (N,)
        paths = Names(item.path for item in items)
        return Found(root, classes, paths, labels, Videos(videos) if videos else None, unreadable, notes)

    def without_empty_classes(self) -> "Found":
        """The same files, without the classes that have none: no network learns these. A set without files is kept."""
        used = np.unique(self.labels)
        if len(used) in (0, len(self.classes)):
            return self
        names = [self.classes[i] for i in used]
        empty = [name for name in self.classes if name not in set(names)]
        note = f"{MISTAKE}no readable file in {listed(empty)}: left out of the classes"
        labels = np.searchsorted(used, self.labels)  # (N,)
        return replace(self, classes=tuple(names), labels=labels, notes=(*self.notes, note))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return Item(self.paths[index], int(self.labels[index]), self.videos[index] if self.videos else None)

    def __iter__(self) -> Iterator[Item]:
        return map(self.__getitem__, range(len(self)))

    def mean_frame_rate(self) -> float:
        """Frames a second, averaged over the videos."""
        return float(np.mean(self.videos.rates))

    def shorter_than(self, frames: int) -> int:
        """The number of videos with fewer frames."""
        return int((self.videos.lengths < frames).sum())

    def count_by_class(self) -> list[int]:
        """The number of files of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()
