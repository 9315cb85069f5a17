"""Samples of a network in training, from the same noise each time: a contact sheet and, of clips, videos.

They come from the averaged weights, by the sampler's descent, and leave the run as it was: the
noise has generators of its own, and the network that is sampled is not the one that the step
compiles and records. It runs eagerly: compiling it would take longer than most runs' previews.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.latents import to_pixels
from data.source import Source
from drawing.pictures import contact_sheet, write_png
from models import EqM
from objective import Objective
from runs.signals import StopSignals
from runs.trackers import Preview, Trackers
from runtime import cli, distributed
from runtime.distributed import batches_of_rank
from runtime.errors import is_out_of_memory
from runtime.logs import log
from runtime.transfers import to_device
from sampling.descent import MU, STEPS, STEPSIZE
from sampling.fields import conditioned_field
from sampling.outputs import Output
from sampling.plan import Plan
from sampling.sampler import sample_batch
from sampling.starts import Starts
from step import TrainingState

SAMPLES = 16
# The sampler's default: with the same settings it makes the same samples of the step's checkpoint.
SEED = 0


def add_preview_args(parser: argparse._ActionsContainer) -> None:
    """Adds --sample-every, and how to sample."""
    parser.add_argument(
        "--sample-every",
        type=cli.positive_int,
        metavar="N",
        help=f"steps between contact sheets of {SAMPLES} samples of the averaged weights; the end has one too",
    )
    parser.add_argument("--sample-steps", type=cli.positive_int, default=STEPS, help="updates of those samples")
    parser.add_argument("--sample-stepsize", type=cli.positive_float, default=STEPSIZE, help="of their updates")
    parser.add_argument("--sample-cfg-scale", type=cli.non_negative_float, default=1.0, help="guidance; 1: none")


@dataclass(frozen=True)
class Sample:
    """A sample's frames, (T, H, W, 3) uint8; one that is not `finite` is grey."""

    frames: np.ndarray
    finite: bool


class Previews:
    """Samples the averaged weights of a state into a run's folder, and shows them to the trackers.

    Args:
        batch: a step's samples over all ranks; the network never sees more at once than a step shows it.
        config: the run's.

    Raises:
        UserError: the VAE that decodes the samples cannot be loaded.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        state: TrainingState,
        source: Source,
        batch: int,
        config: dict,
        folder: Path,
        trackers: Trackers,
    ):
        self.args, self.state, self.config, self.trackers = args, state, config, trackers
        self.folder, self.classes = folder / "samples", source.found.classes
        rows = 1 if args.sample_cfg_scale == 1 else 2  # of the network's batch, a sample
        at_once = max(1, (args.micro_batch_size or batch // distributed.world_size()) // rows)
        self.batches = batches_of_rank(SAMPLES, at_once * distributed.world_size())
        self.vae = source.decoder(state.device, state.precision) if args.sample_every else None

    def due(self, step: int) -> bool:
        """Whether a step is to be shown."""
        return self.args.sample_every is not None and step % self.args.sample_every == 0

    def show(self, signals: StopSignals) -> float:
        """Samples and writes, if that was asked for; returns the seconds that it took. Every rank must call it.

        What keeps samples from being made or written is logged, and training goes on. A signal to stop
        breaks sampling off, which on a CPU may take longer than a scheduler waits.
        """
        if not self.args.sample_every:
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
        """This rank's samples by index; after a signal to stop, what it has come to."""
        # Made anew each time: a copy that stayed would take memory from the step.
        network = self.state.precision.working_copy(self.state.ema)
        total, samples = sum(map(len, self.batches)) * self.args.sample_steps, {}
        hidden = not distributed.is_main()
        with tqdm(total=total, desc="sampling", unit="evaluation", leave=False, disable=hidden) as bar:
            for indices in self.batches:
                steps = takewhile(lambda _: not signals.received, range(self.args.sample_steps))
                x = self.descend(network, indices, steps, bar)  # (N, C, H, W) or (N, C, T, H, W)
                x = self.vae.decode(x) if self.vae else x
                finite = x.isfinite().flatten(1).all(1)  # (N,)
                x = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, 0)
                clips = to_pixels(x if network.is_video else x[:, :, None]).permute(0, 2, 3, 4, 1)  # (N, T, H, W, C)
                samples |= zip(indices, map(Sample, clips.cpu().numpy(), finite.tolist()), strict=True)
        return samples

    def descend(self, network: EqM, indices: Sequence[int], steps: Iterable, bar: tqdm) -> Tensor:
        """What the network makes of the noise of indices, under the classes in turn: (N, …) float32."""
        seconds_per_frame = 1 / self.config["frames_per_second"] if network.is_video else 0.0
        conditioned = conditioned_field(network, len(indices), seconds_per_frame, fast=False)
        starts = Starts(SEED, network.input_shape, objective=Objective(**self.config["objective"]))
        plan = Plan(list(range(len(self.classes))), [], starts)
        method = argparse.Namespace(
            sampler="ngd" if network.uncond else "euler",
            stepsize=self.args.sample_stepsize,
            mu=MU,
            num_sampling_steps=self.args.sample_steps,
            cfg_scale=self.args.sample_cfg_scale,
            cfg_channels="all",
        )
        x = to_device(starts(indices), network.pos_embed.device)  # (N, …)
        return sample_batch(method, network, conditioned, plan, indices, x, steps, lambda *_: bar.update(len(indices)))

    def report(self, samples: list[Sample], problem: str, start: float) -> None:
        """Writes and shows all ranks' samples, or says what was in the way.

        Args:
            problem: of making them; or an empty text.
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
        """Writes the contact sheet of samples (T, H, W, 3) uint8 and, of clips, a video of each; returns them.

        Raises:
            OSError: the folder cannot be written; or av.FFmpegError.
        """
        step, names = self.state.step, [self.classes[i % len(self.classes)] for i in range(len(clips))]
        self.folder.mkdir(exist_ok=True)
        sheet = contact_sheet(clips, names)  # (H, W, 3)
        write_png(self.sheet_path(), sheet)
        if not self.state.network.is_video:
            return Preview(step, sheet, names, [], [], None)
        output = Output(self.folder / f"{step:07d}", ".mp4", self.config["frames_per_second"])
        output.folder.mkdir(exist_ok=True)
        for i, clip in enumerate(clips):
            output.write(i, clip)
        return Preview(step, sheet, names, clips, [output.path(i) for i in range(len(clips))], output.frames_per_second)
