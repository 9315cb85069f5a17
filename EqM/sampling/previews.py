"""Samples of a network in training, always from the same noise: a contact sheet and, for clips, videos.

They come from the averaged weights. Sampling leaves the run as it was: the noise has generators of its own, and the
network that is sampled is not the one that the step compiles and records. It runs eagerly, because compiling would
take longer than the previews of most runs.
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.latents import VAE
from drawing.pictures import contact_sheet, write_png
from objective import Objective
from runs.config import Config
from runs.signals import StopSignals
from runs.trackers import Preview, Trackers
from runtime import cli, distributed
from runtime.distributed import batches_of_rank
from runtime.errors import UserError, is_out_of_memory
from runtime.logs import log
from sampling.descent import STEPS
from sampling.method import AUTO, DEFAULT, Method, default_stepsize, steps_planned, stepsize
from sampling.outputs import Output, decode, to_frames
from sampling.plan import Plan
from sampling.sampler import Sampler
from sampling.starts import Starts
from state import TrainingState

SAMPLES = 16
# The default of sample_gd.py. With the same settings it makes the same samples from the checkpoint of the step.
SEED = 0


def add_preview_args(parser: argparse._ActionsContainer) -> None:
    """Adds --sample-every, and flags that say how to sample."""
    parser.add_argument(
        "--sample-every",
        type=cli.positive_int,
        metavar="N",
        help=f"every N steps, and at the end, sample the averaged weights: a contact sheet of {SAMPLES} samples",
    )
    parser.add_argument("--sample-steps", type=cli.count, default=STEPS, help="updates of those samples")
    text = f"step size of the updates, or {AUTO}; default {DEFAULT}"
    parser.add_argument("--sample-stepsize", type=stepsize, help=text)
    parser.add_argument("--sample-cfg-scale", type=cli.non_negative_float, default=1.0, help="guidance; 1: none")


def preview_method_of(args: argparse.Namespace, objective: Objective) -> Method | None:
    """How previews are sampled, as the flags say; None if the flags ask for none.

    Raises:
        UserError: --sample-stepsize auto has no meaning for the network.
    """
    if not args.sample_every:
        return None
    asked, steps = args.sample_stepsize, args.sample_steps
    if asked == AUTO and not args.uncond:
        raise UserError(f"--sample-stepsize {AUTO} plans gradient descent, which --no-uncond has none of: leave it out")
    return Method(
        sampler="ngd" if args.uncond else "euler",
        stepsize=asked if isinstance(asked, float) else default_stepsize(objective, steps),
        steps=steps,
        cfg_scale=args.sample_cfg_scale,
        planned=steps_planned(asked, objective, steps, None) if args.uncond else None,
    )


@dataclass(frozen=True)
class Sample:
    """The frames of a sample, (T, H, W, 3) uint8. If it is not `finite`, they are grey."""

    frames: np.ndarray
    finite: bool


def show_progress(bar: tqdm, samples: int, point: Tensor, value: Tensor) -> None:
    """Counts one evaluation of so many samples. With a bar and a number it is the `watch` of a descent."""
    bar.update(samples)


class Previews:
    """Samples the averaged weights into the folder of a run, and shows the samples to the trackers.

    Args:
        method: how to sample; None: there are no previews.
        at_once: samples that the network may see at once on this rank, as a step shows it. Guidance takes two places
            for a sample.
        vae: decodes samples that are latents.
        folder: of the run.
    """

    def __init__(
        self,
        method: Method | None,
        at_once: int,
        state: TrainingState,
        config: Config,
        vae: VAE | None,
        folder: Path,
        trackers: Trackers,
    ):
        self.method, self.at_once, self.state, self.config, self.vae = method, at_once, state, config, vae
        self.folder, self.trackers = folder / "samples", trackers
        starts = Starts(SEED, state.working.input_shape, objective=config.objective)
        self.plan = Plan(list(range(len(config.classes))), [], starts, config.classes)

    def show(self, signals: StopSignals) -> float:
        """Samples and writes, and returns the seconds that this took. Without a method it does nothing.

        Every rank must call it. If samples cannot be made or written, the log says so, and training goes on. A signal
        to stop ends sampling early, since on a CPU sampling may take longer than a scheduler waits.
        """
        if not self.method:
            return 0.0
        start, samples, problem = time.perf_counter(), {}, ""
        try:
            samples = self.sample(signals)
            problem = "the run was asked to stop" if signals.received else ""
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            problem = "out of memory"
        parts, problems = zip(*distributed.gather((samples, problem)), strict=True)
        if distributed.is_main():
            everyone = {index: part[index] for part in parts for index in part}
            self.report([everyone[i] for i in sorted(everyone)], "; ".join(sorted(set(filter(None, problems)))), start)
        return time.perf_counter() - start

    @torch.no_grad()
    def sample(self, signals: StopSignals) -> dict[int, Sample]:
        """The samples of this rank by index. After a signal to stop, they are as far as they were then."""
        rows = 1 if self.method.cfg_scale == 1 else 2
        batches = batches_of_rank(SAMPLES, max(1, self.at_once // rows) * distributed.world_size())
        # A copy that stayed would take memory from the step.
        network = self.state.averaged_network(self.state.precision.dtype)
        size = max(map(len, batches), default=1)
        sampler = Sampler(self.method, network, self.plan, self.config.seconds_per_frame, size)
        total, samples = sum(map(len, batches)) * self.method.steps, {}
        hidden = not distributed.is_main()
        with tqdm(total=total, desc="sampling", unit="evaluation", leave=False, disable=hidden) as bar:
            for indices in batches:
                steps = takewhile(lambda _: not signals.received, range(self.method.steps))
                watch = partial(show_progress, bar, len(indices))
                x = sampler.descend(indices, sampler.starts(indices), steps, watch)
                pixels = decode(x, self.vae)  # (N, 3, H, W) or (N, 3, T, H, W)
                finite = pixels.isfinite().flatten(1).all(1)  # (N,)
                pixels = torch.where(finite.view(-1, *[1] * (pixels.dim() - 1)), pixels, 0)
                frames = to_frames(pixels).cpu().numpy()  # (N, T, H, W, 3)
                samples |= zip(indices, map(Sample, frames, finite.tolist()), strict=True)
        return samples

    def report(self, samples: list[Sample], problem: str, start: float) -> None:
        """Writes and shows the samples of all ranks, or says what the problem was.

        Args:
            problem: with making them; or an empty text.
            start: when that began, by time.perf_counter.
        """
        step, lost = self.state.step, sum(not sample.finite for sample in samples)
        if lost:
            log.warning("step %d: %d of %d samples are not finite, and are shown grey", step, lost, len(samples))
        try:
            if not problem:
                preview = self.write([sample.frames for sample in samples])
        except (OSError, av.FFmpegError) as error:
            problem = f"{self.folder} cannot be written: {error.strerror}"
        if problem:
            log.warning("no samples of step %d: %s", step, problem)
            return
        self.trackers.show(preview)
        log.info("samples of step %d, in %.1f s: %s", step, time.perf_counter() - start, self.sheet_path())

    def sheet_path(self) -> Path:
        return self.folder / f"{self.state.step:07d}-sheet.png"

    def write(self, clips: list[np.ndarray]) -> Preview:
        """Writes the contact sheet of samples (T, H, W, 3) uint8 and, for clips, a video of each. Returns them.

        Raises:
            OSError, av.FFmpegError: the folder cannot be written.
        """
        step, captions = self.state.step, [self.plan.caption(i) for i in range(len(clips))]
        self.folder.mkdir(exist_ok=True)
        sheet = contact_sheet(clips, captions)  # (H, W, 3)
        write_png(self.sheet_path(), sheet)
        if not self.state.working.is_video:
            return Preview(step, sheet, captions, [], [], None)
        output = Output(self.folder / f"{step:07d}", ".mp4", self.config.frames_per_second)
        output.folder.mkdir(exist_ok=True)
        for i, clip in enumerate(clips):
            output.write(i, clip)
        files = [output.path(i) for i in range(len(clips))]
        return Preview(step, sheet, captions, clips, files, output.frames_per_second)
