"""What sampling leaves on disk: a folder of videos or images, their table, an .npz and a contact sheet."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from data.latents import VAE, to_pixels
from data.video import write_video
from drawing.pictures import contact_sheet, read_png, write_gif, write_png
from runtime.errors import UserError
from runtime.files import check_takes_files, leftovers, lock, write_csv, write_output
from runtime.transfers import read_later
from sampling.descent import TRACED, Finished
from sampling.method import Method
from sampling.plan import Plan

SHEET_SAMPLES = 24  # the contact sheet shows so many of the first samples
# Of the files beside the folder.
ENDINGS = (".npz", "-sheet.png", ".html", "-trace.csv", "-trace-norm.png", "-trace-energy.png", "-evaluations.png")
WRITERS = 4  # threads; each encodes and writes one sample at a time
# So many groups of samples may wait to be read, and to be written, while more are made.
GROUPS_READ, GROUPS_WRITTEN = 1, 2


def decode(x: Tensor, vae: VAE | None) -> Tensor:
    """What the network made, (N, C, [t,] h, w), as pixels about in [−1, 1]: (N, 3, [T,] H, W)."""
    return vae.decode(x) if vae else x


def to_frames(pixels: Tensor) -> Tensor:
    """Pixels in [−1, 1], (N, 3, H, W) or (N, 3, T, H, W), as frames (N, T, H, W, 3) uint8. An image is one frame."""
    clips = pixels if pixels.dim() == 5 else pixels[:, :, None]  # (N, 3, T, H, W)
    return to_pixels(clips).permute(0, 2, 3, 4, 1)


@dataclass(frozen=True)
class Output:
    """Where samples go, and how a file is named and written.

    Attributes:
        suffix: ".mp4", ".gif" or ".png".
        frames_per_second: of videos; None for images.
    """

    folder: Path
    suffix: str
    frames_per_second: float | None

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}{self.suffix}"

    @property
    def table(self) -> Path:
        return self.folder / "samples.csv"

    def beside(self, ending: str) -> Path:
        """A file about all samples, beside their folder."""
        return self.folder.with_name(self.folder.name + ending)

    def prepare(self, num_samples: int) -> None:
        """Makes the folder, locks it until the end of the process, and removes what describes earlier samples.

        Raises:
            UserError: it cannot be written, another process samples into it, or it holds other samples, which this run
                would not replace.
        """
        try:
            for folder in (self.folder, self.folder.parent):  # the sheet and the .npz lie beside it
                check_takes_files(folder)
            if not lock(self.folder):
                raise UserError(f"another process samples into {self.folder}: wait for it, or name another --folder")
            ours = {self.path(i).name for i in range(num_samples)}
            for path in sorted(self.folder.iterdir()):
                if path.suffix in (".mp4", ".gif", ".png") and path.name not in ours:
                    raise UserError(f"{path} is not one of these samples: empty the folder, or name another --folder")
            beside = [self.beside(ending) for ending in ENDINGS if ending != ".npz" or self.suffix == ".png"]
            for path in [self.table, *beside, *leftovers(self.folder, f"*{self.suffix}")]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--folder {self.folder} cannot be written: {error.strerror}") from None

    def write(self, index: int, frames: np.ndarray) -> None:
        """Writes one sample, (T, H, W, 3) uint8."""
        path = self.path(index)
        if self.suffix == ".png":
            write_png(path, frames[0])
        elif self.suffix == ".gif":
            write_gif(path, frames, self.frames_per_second)
        else:
            write_video(path, frames, self.frames_per_second)


@dataclass
class SampleLog:
    """What is known of samples, by their index.

    Attributes:
        shown: frames (T, H, W, 3) uint8 for the contact sheet.
        descents: number of evaluations of the field, and its norm at the last.
        traces: of the first samples, one row per evaluation that was measured.
    """

    shown: dict[int, np.ndarray] = field(default_factory=dict)
    descents: dict[int, tuple[int, float]] = field(default_factory=dict)
    traces: dict[int, list[list[float]]] = field(default_factory=dict)

    def add(self, sample: Finished, frames: np.ndarray) -> None:
        self.descents[sample.index] = sample.evaluations, sample.final_norm
        if sample.index < SHEET_SAMPLES:
            self.shown[sample.index] = frames.copy()  # a copy, so that the pinned memory of the group can go
        if sample.index < TRACED:
            self.traces[sample.index] = sample.measured

    @staticmethod
    def of_all(logs: Sequence["SampleLog"]) -> "SampleLog":
        """One log from the logs of several ranks."""
        whole = SampleLog()
        for part in logs:
            whole.shown |= part.shown
            whole.descents |= part.descents
            whole.traces |= part.traces
        return whole


class Writer:
    """Reads samples from the device and writes them, in threads, while the next samples descend."""

    at_once = GROUPS_WRITTEN  # groups that may be written while another one begins

    def __init__(self, output: Output):
        self.output, self.log, self.pool = output, SampleLog(), ThreadPoolExecutor(WRITERS)
        self.reading: deque[tuple[list[Finished], Callable[[], Tensor], Callable[[], Tensor]]] = deque()
        self.writing: deque[Iterator[None]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def take(self, group: list[Finished], x: Tensor, clips: Tensor) -> None:
        """Starts to read and write a group of samples. May wait for earlier groups.

        Args:
            x: the samples, (N, …).
            clips: their frames, (N, T, H, W, 3) uint8.

        Raises:
            UserError: earlier samples are not finite, or cannot be written.
        """
        self.reading.append((group, read_later(x.isfinite().all()), read_later(clips)))
        self.go_on(GROUPS_READ, GROUPS_WRITTEN)

    def finish(self) -> SampleLog:
        """Waits until all samples are written, and returns the log of all. Raises as `take`."""
        self.go_on(0, 0)
        return self.log

    def go_on(self, reading: int, writing: int) -> None:
        """Waits until at most so many groups are still to be read, and to be written. Raises as `take`."""
        while len(self.reading) > reading:
            group, finite, clips = self.reading.popleft()
            if not finite():
                raise UserError("samples are not finite: lower --stepsize or --cfg-scale, or sample in fp32")
            frames = clips().numpy()
            self.wait(self.at_once)
            for sample, shown in zip(group, frames, strict=True):
                self.note(sample, shown)
            places = [(sample.index, sample.window) for sample in group]
            self.writing.append(self.pool.map(self.write, places, frames))
        self.wait(writing)

    def note(self, sample: Finished, frames: np.ndarray) -> None:
        """Takes down what is known of a sample."""
        self.log.add(sample, frames)

    def write(self, place: tuple[int, int], frames: np.ndarray) -> None:
        """Writes a sample, (T, H, W, 3) uint8, by its index and its window."""
        self.output.write(place[0], frames)

    def wait(self, writing: int) -> None:
        """Waits until at most so many groups are still to be written. Raises UserError as `take`."""
        while len(self.writing) > writing:
            try:
                list(self.writing.popleft())
            except (OSError, av.FFmpegError) as error:
                raise UserError(f"samples cannot be written to {self.output.folder}: {error.strerror}") from None


def write_table(output: Output, plan: Plan, method: Method, log: SampleLog, precision: str, checkpoint: Path) -> None:
    """Writes samples.csv: for each file, what it shows and how it was made."""
    kept = plan.starts.kept
    settings = {
        "seed": plan.starts.seed,
        "sampler": method.sampler,
        **method.step_settings,
        "steps": method.steps,
        "adaptive": method.threshold,
        "cfg_scale": method.cfg_scale,
        "cfg_channels": method.guided_channels or "all",
        "init_noise": plan.starts.noise,
        "keep_frames": kept.frames if kept else "",
        "keep_mask": kept.picture if kept else "",
        "frames": plan.windows.total if plan.windows else "",
        "overlap": plan.windows.overlap if plan.windows else "",
        "precision": precision,
        "frames_per_second": output.frames_per_second,
        "checkpoint": checkpoint,
    }
    rows = [["file", "index", "class", "class_name", "init", "evaluations", "final_norm", *settings]]
    for index, (evaluations, norm) in sorted(log.descents.items()):
        label = plan.label(index)
        known = label if label < len(plan.names) - 1 else ""
        start = plan.starts.item(index).path if plan.starts.items else ""
        about = [output.path(index).name, index, known, plan.caption(index), start, evaluations, f"{norm:.4g}"]
        rows.append([*about, *settings.values()])
    write_csv(output.table, rows)


def write_npz(output: Output, num_samples: int) -> Path:
    """Writes all images, (N, H, W, 3) uint8, as `arr_0` of a file beside the folder."""
    path, images = output.beside(".npz"), np.stack([read_png(output.path(i)) for i in range(num_samples)])

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # to a file without this suffix, numpy adds it
            np.savez(file, arr_0=images)

    write_output(path, write)
    return path


def write_sheet(output: Output, plan: Plan, shown: dict[int, np.ndarray]) -> Path:
    """Draws a contact sheet of samples, with their captions, beside the folder, and returns its path.

    A sample that starts from a file stands behind what the file shows, or below it if parts of it are held.

    Args:
        shown: frames (T, H, W, 3) uint8 by index.
    """
    path = output.beside("-sheet.png")
    starts, strips, above = plan.starts, [], []
    for index, frames in sorted(shown.items()):
        caption, name = plan.caption(index), Path(starts.item(index).path).name if starts.items else ""
        if starts.kept:
            above.append(starts.given(index))
            caption = f"{caption}, {name}"
        elif starts.items:
            strips.append((starts.given(index), f"from {name}"))
        strips.append((frames, caption))
    sheet = contact_sheet(*zip(*strips, strict=True), above)  # (H, W, 3)
    write_output(path, lambda temporary: write_png(temporary, sheet))
    return path
