"""The files of a data set, in arrays: loading processes share arrays without copying them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.video import VideoInfo
from data.walk import MISTAKE, listed


@dataclass(frozen=True)
class Item:
    """One file, its class index and, for a video, its frame times."""

    path: str
    label: int
    video: VideoInfo | None


class Names(Sequence[str]):
    """File names in one array of bytes."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])  # (N + 1,)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())


class Videos(Sequence[VideoInfo]):
    """The frame times of many videos. Even times are stored as three numbers, uneven ones as one number a frame.

    Attributes:
        lengths: frames of each video, (N,) int64.
        rates: frames a second, (N,) float64.
    """

    def __init__(self, videos: Iterable[VideoInfo]):
        videos = list(videos)
        self.lengths = np.array([len(video.times) for video in videos], np.int64)
        self.rates = np.array([video.frames_per_second for video in videos], np.float64)
        self.seekable = np.array([video.seekable for video in videos], bool)
        self.margins = np.array([video.seek_margin for video in videos], np.int64)
        self.firsts = np.array([video.times[0] for video in videos], np.int64)
        steps = [video.times.step if isinstance(video.times, range) else 0 for video in videos]
        self.steps = np.array(steps, np.int64)  # (N,), 0 for uneven times
        uneven = [video.times for video in videos if not isinstance(video.times, range)]
        self.times = np.array([time for times in uneven for time in times], np.int64)
        self.ends = np.cumsum(
            np.where(self.steps, 0, self.lengths)
        )  # (N,): where a video's uneven times end in `times`

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> VideoInfo:
        first, step, length = int(self.firsts[index]), int(self.steps[index]), int(self.lengths[index])
        if step:
            times = range(first, first + step * length, step)
        else:
            times = tuple(self.times[self.ends[index] - length : self.ends[index]].tolist())
        return VideoInfo(times, float(self.rates[index]), bool(self.seekable[index]), int(self.margins[index]))


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
