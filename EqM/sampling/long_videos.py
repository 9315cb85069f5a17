"""Writes long videos, window by window, so that no video is in memory as a whole."""

from contextlib import ExitStack, suppress

import av
import numpy as np

from data.video import encoder
from drawing.pictures import shown_places
from runtime.files import whole_file
from sampling.descent import Finished
from sampling.outputs import SHEET_SAMPLES, Output, Writer
from sampling.windows import Windows


class GrowingVideo:
    """A video that gets its frames part by part. Its file appears when it is whole.

    A GIF is written at the end: until then its frames are in memory.
    """

    def __init__(self, output: Output, index: int, size: tuple[int, int]):
        self.output, self.index, self.stack = output, index, ExitStack()
        self.waiting: list[np.ndarray] = []  # of a GIF
        if output.suffix == ".gif":
            self.add = lambda frames: self.waiting.append(frames.copy())
        else:
            temporary = self.stack.enter_context(whole_file(output.path(index), durable=False))
            self.add = self.stack.enter_context(encoder(temporary, size, output.frames_per_second))

    def finish(self) -> None:
        """Makes the file. Raises OSError or av.FFmpegError, as `Output.write`."""
        self.stack.close()
        if self.waiting:
            self.output.write(self.index, np.concatenate(self.waiting))

    def drop(self, error: BaseException) -> None:
        """Leaves no file."""
        with suppress(OSError, av.FFmpegError):  # such as the end of a file on a full disk
            self.stack.__exit__(type(error), error, error.__traceback__)


class LongWriter(Writer):
    """A Writer of samples that come window by window. Windows of a sample are written one after another."""

    at_once = 0

    def __init__(self, output: Output, windows: Windows):
        super().__init__(output)
        self.windows = windows
        self.videos: dict[int, GrowingVideo] = {}  # under way, by index
        self.places = shown_places(windows.total)  # of the frames on the contact sheet

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for video in self.videos.values():
            video.drop(error[1])

    def note(self, sample: Finished, frames: np.ndarray) -> None:
        """Keeps, of a window (T, H, W, 3), the frames that the contact sheet shows."""
        self.log.descents[sample.index] = sample.evaluations, sample.final_norm
        if sample.index < SHEET_SAMPLES:
            new, first = frames[self.windows.added(sample.window)], self.windows.first(sample.window)
            kept = new[[place - first for place in self.places if 0 <= place - first < len(new)]]
            before = [self.log.shown[sample.index]] if sample.window else []
            self.log.shown[sample.index] = np.concatenate([*before, kept])

    def write(self, place: tuple[int, int], frames: np.ndarray) -> None:
        """Adds a window (T, H, W, 3) to its video."""
        index, window = place
        if not window:
            self.videos[index] = GrowingVideo(self.output, index, frames.shape[1:3])
        self.videos[index].add(frames[self.windows.added(window)])
        if window == len(self.windows) - 1:
            self.videos.pop(index).finish()
