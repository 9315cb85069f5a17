"""Sends a run's scalars, pictures and videos to TensorBoard and Weights & Biases.

Both are optional packages (requirements-track.txt). Only rank 0 sends.
"""

import argparse
import importlib
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from drawing.pictures import gif
from runtime import distributed
from runtime.errors import UserError, first_line
from runtime.files import open_regular
from runtime.logs import log


@dataclass(frozen=True)
class Preview:
    """Samples of one step. Pictures are uint8 RGB.

    Attributes:
        sheet: contact sheet of all samples, (H, W, 3).
        captions: one for each sample.
        clips, files: frames (T, h, w, 3) and file of each clip; both are empty for images.
    """

    step: int
    sheet: np.ndarray
    captions: list[str]
    clips: list[np.ndarray]
    files: list[Path]
    frames_per_second: float | None


class Tracker(Protocol):
    """Gets the lines of metrics and the samples of one run."""

    def log(self, row: dict) -> None: ...

    def show(self, preview: Preview) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files into the run's `tensorboard` folder, and hides what was logged after `step` before."""

    def __init__(self, folder: Path, step: int, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, row: dict) -> None:
        for name in row.keys() - {"step"}:
            self.writer.add_scalar(name, row[name], row["step"])
        self.writer.flush()

    def show(self, preview: Preview) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer.add_image("samples", preview.sheet, preview.step, dataformats="HWC")
        for i, (clip, caption) in enumerate(zip(preview.clips, preview.captions, strict=False)):
            # As a GIF, which TensorBoard animates: its add_video needs another package.
            data = gif(clip, preview.frames_per_second)
            picture = Summary.Image(height=clip.shape[1], width=clip.shape[2], colorspace=3, encoded_image_string=data)
            value = Summary.Value(tag=f"videos/{i:02d} {caption}", image=picture)
            self.writer.file_writer.add_summary(Summary(value=[value]), preview.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Logs to one run of Weights & Biases. The run has the folder's name, and the folder keeps its id."""

    def __init__(self, folder: Path, step: int, config: dict):
        import wandb

        self.wandb = wandb
        path = folder / "wandb-id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        with open_regular(path) as file:
            known = file.read(100).decode().strip()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "EqM"),
            name=folder.name,
            id=known,
            resume="allow",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(console="off"),
        )
        # Its own step count only rises: it would drop the steps that a resumed run repeats.
        self.run.define_metric("*", step_metric="step")

    def log(self, row: dict) -> None:
        self.run.log(row)

    def show(self, preview: Preview) -> None:
        media = {"step": preview.step, "samples": self.wandb.Image(preview.sheet)}
        videos = zip(preview.files, preview.captions, strict=False)
        shown = [self.wandb.Video(str(file), caption=caption, format="mp4") for file, caption in videos]
        self.run.log(media | ({"videos": shown} if shown else {}))

    def close(self) -> None:
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": WandB}  # by flag and package


def add_tracker_args(parser: argparse._ActionsContainer) -> None:
    """Adds --tensorboard and --wandb."""
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, in the run folder")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases; WANDB_MODE=offline: to a file")


def trackers_of(args: argparse.Namespace) -> list[str]:
    """The names of the trackers that the flags ask for.

    Raises:
        UserError: one of them is not installed.
    """
    names = [name for name in KINDS if getattr(args, name)]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"--{name} needs {name}: pip install -r requirements-track.txt") from None
    return names


class Trackers:
    """The trackers of a run. A tracker that fails gets nothing more, and training goes on."""

    def __init__(self):
        self.working: dict[str, Tracker] = {}

    def start(self, names: Sequence[str], folder: Path, step: int, config: dict) -> None:
        """Starts the named trackers at the step that a run goes on from.

        Raises:
            UserError: one cannot start.
        """
        for name in names:
            try:
                self.working[name] = KINDS[name](folder, step, config)
            except Exception as error:  # each package has its own error types
                advice = "; WANDB_MODE=offline logs to a file" if name == "wandb" else ""
                raise UserError(f"--{name} cannot start: {first_line(error).rstrip('.')}{advice}") from None

    def log(self, row: dict) -> None:
        """Sends a line of metrics."""
        self.each(lambda tracker: tracker.log(row))

    def show(self, preview: Preview) -> None:
        """Sends samples."""
        self.each(lambda tracker: tracker.show(preview))

    def close(self) -> None:
        """Waits until all is sent."""
        self.each(lambda tracker: tracker.close())

    def each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.working.items()):
            try:
                call(tracker)
            except Exception as error:  # a failing tracker must not end the run
                log.error("--%s has failed, and gets nothing more: %s", name, first_line(error).rstrip("."))
                del self.working[name]


def start_trackers(names: Sequence[str], folder: Path, step: int, config: dict) -> Trackers:
    """The named trackers on rank 0, and none on other ranks. Every rank must call it.

    Raises:
        UserError: one cannot start.
    """
    trackers = Trackers()
    distributed.on_main(lambda: trackers.start(names, folder, step, config))
    return trackers
