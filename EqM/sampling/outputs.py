"""What sampling leaves on disk: a folder of videos or images, their table, an .npz and a contact sheet."""

import argparse
import csv
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from data.video import write_video
from drawing.pictures import contact_sheet, read_png, write_gif, write_png
from precision import Precision
from runtime.errors import UserError
from runtime.transfers import read_later
from sampling.descent import Finished
from sampling.starts import Starts
from sampling.traces import TRACED

SHEET_SAMPLES = 24  # how many of the first samples the contact sheet shows
WRITERS = 4  # threads that encode and write samples, one each
# Groups of samples that wait for either while more are made.
GROUPS_READ, GROUPS_WRITTEN = 1, 2


@dataclass(frozen=True)
class Output:
    """Where samples go and how a file is named and written."""

    folder: Path
    suffix: str
    frames_per_second: float | None

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}{self.suffix}"

    def prepare(self, num_samples: int) -> None:
        """Makes the folder.

        Raises:
            UserError: it cannot be written, or holds samples that this run would not replace.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.folder.parent):  # the sheet and the .npz lie beside the samples
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--folder {self.folder} cannot be written: {error.strerror}") from None
        ours = {self.path(i).name for i in range(num_samples)}
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".mp4", ".gif", ".png") and path.name not in ours:
                raise UserError(f"{path} is not one of these samples: empty the folder, or name another --folder")

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
class Report:
    """What there is to say of samples, by index.

    `shown` has the frames (T, H, W, 3) uint8 for the contact sheet, `descents` evaluations of the field
    and its norm at the last, `traces` what was measured of the first samples at each.
    """

    shown: dict[int, np.ndarray] = field(default_factory=dict)
    descents: dict[int, tuple[int, float]] = field(default_factory=dict)
    traces: dict[int, list[list[float]]] = field(default_factory=dict)

    def add(self, sample: Finished, frames: np.ndarray) -> None:
        self.descents[sample.index] = sample.evaluations, sample.final_norm
        if sample.index < SHEET_SAMPLES:
            self.shown[sample.index] = frames.copy()  # of a whole group's pinned memory, which can go then
        if sample.index < TRACED:
            self.traces[sample.index] = sample.measured

    @staticmethod
    def of_all(reports: Sequence["Report"]) -> "Report":
        """One report of what several ranks report."""
        whole = Report()
        for part in reports:
            whole.shown |= part.shown
            whole.descents |= part.descents
            whole.traces |= part.traces
        return whole


class Writer:
    """Reads samples from the device and writes them, in threads, while the next ones descend."""

    def __init__(self, output: Output):
        self.output, self.report, self.pool = output, Report(), ThreadPoolExecutor(WRITERS)
        self.reading: deque[tuple[list[Finished], Callable[[], Tensor], Callable[[], Tensor]]] = deque()
        self.writing: deque[Iterator[None]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def take(self, group: list[Finished], x: Tensor, clips: Tensor) -> None:
        """Writes samples x (N, …), shown as clips (N, T, H, W, 3) uint8, while it goes on.

        Raises:
            UserError: earlier ones are not finite, or cannot be written.
        """
        self.reading.append((group, read_later(x.isfinite().all()), read_later(clips)))
        self.go_on(GROUPS_READ, GROUPS_WRITTEN)

    def finish(self) -> Report:
        """Writes all that is left; returns what there is to say of all; raises as `take` does."""
        self.go_on(0, 0)
        return self.report

    def go_on(self, reading: int, writing: int) -> None:
        """Until no more groups than these are still to be read and to be written; raises as `take` does."""
        while len(self.reading) > reading:
            group, finite, clips = self.reading.popleft()
            if not finite():
                raise UserError("samples are not finite: lower --stepsize or --cfg-scale, or sample in fp32")
            indices, frames = [sample.index for sample in group], clips().numpy()
            for sample, shown in zip(group, frames, strict=True):
                self.report.add(sample, shown)
            self.writing.append(self.pool.map(self.output.write, indices, frames))
        while len(self.writing) > writing:
            try:
                list(self.writing.popleft())
            except (OSError, av.FFmpegError) as error:
                raise UserError(f"samples cannot be written to {self.output.folder}: {error.strerror}") from None


def write_table(
    args: argparse.Namespace,
    output: Output,
    classes: list[int],
    names: list[str],
    precision: Precision,
    starts: Starts,
    report: Report,
) -> None:
    """Writes samples.csv: what each file shows and how it was made.

    The last of the names is that of no class, or of a sum of classes.
    """
    settings = {
        "seed": args.global_seed,
        "sampler": args.sampler,
        "stepsize": args.stepsize if args.sampler != "euler" else "",
        "mu": args.mu if args.sampler == "ngd" else 0.0,
        "steps": args.num_sampling_steps,
        "adaptive": args.adaptive,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "init_noise": starts.noise,
        "precision": precision.name,
        "frames_per_second": output.frames_per_second,
        "checkpoint": args.ckpt,
    }
    with (output.folder / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "index", "class", "class_name", "init", "evaluations", "final_norm", *settings])
        for index in range(args.num_fid_samples):
            label = classes[index % len(classes)]
            known = label if label < len(names) - 1 else ""
            start = starts.item(index).path if starts.items else ""
            evaluations, norm = report.descents[index]
            about = [output.path(index).name, index, known, names[label], start, evaluations, f"{norm:.4g}"]
            writer.writerow([*about, *settings.values()])


def write_npz(output: Output, num_samples: int) -> Path:
    """Writes all images, (N, H, W, 3) uint8, as `arr_0` of a file beside the folder."""
    path = output.folder.with_name(output.folder.name + ".npz")
    np.savez(path, arr_0=np.stack([read_png(output.path(i)) for i in range(num_samples)]))
    return path


def write_sheet(
    output: Output, shown: dict[int, np.ndarray], classes: list[int], names: list[str], starts: Starts
) -> Path:
    """Draws samples, (T, H, W, 3) uint8 by index, with their classes' names, into a file beside the folder.

    Before a sample that starts from a file stands what the file shows.
    """
    path = output.folder.with_name(output.folder.name + "-sheet.png")
    strips = []
    for index, frames in sorted(shown.items()):
        if starts.items:
            strips.append((starts.given(index), f"from {Path(starts.item(index).path).name}"))
        strips.append((frames, names[classes[index % len(classes)]]))
    write_png(path, contact_sheet(*zip(*strips, strict=True)))
    return path
