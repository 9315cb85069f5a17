"""What training on a set of files would cost on this machine: some files are decoded, and some steps are timed."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from compiled import Speed
from data.clips import read_sample
from data.file_list import Item
from data.form import Form
from data.images import probe_image
from data.latents import LatentSpace
from data.scan import find_files
from data.untrusted import Unreadable
from data.video import probe_video, read_frames
from measuring.throughput import forward_flops
from measuring.workloads import Training, Work, seconds_a_call, start_over
from precision import Precision
from runs.record import process_memory_gb
from runtime.errors import UserError, shown
from runtime.logs import device_name
from runtime.size import sides

FILES = 64  # that are opened
DECODE_S = 8.0  # of computing, for clips and for whole files each
WHOLE_FRAMES = 200  # of a video at most, to know what a frame costs when all are packed
CPU_STEP_S = 1.0  # a step on a CPU is timed with as many samples as would take so long at the speed of products
MOST_SAMPLE_S = 10.0  # a sample that would take longer there is not timed
PRODUCT_SIDE = 1024  # of the float32 matrices that tell this speed
LOADER_GB = 0.1  # a loading process's own memory, without what it shares with its trainer
STATE_BYTES = 16  # a parameter: weights, average and two moments, as a checkpoint holds them


@dataclass(frozen=True)
class DataCosts:
    """A set of files, as far as a sample of them tells.

    Attributes:
        files, classes: of the whole set.
        opened, unreadable: files of the sample.
        frames: mean frames of a file; 1 for images.
        sample_s: a core's seconds to decode a training sample.
        frame_s: the same for a frame, if all frames of a file are decoded.
        pack_bytes: bytes of a pack, by what it holds: "pixels" and, with a VAE, "latents".
    """

    files: int
    classes: int
    opened: int
    unreadable: int
    frames: float
    sample_s: float
    frame_s: float
    pack_bytes: dict[str, float]


@dataclass(frozen=True)
class StepCosts:
    """A training step on one device.

    Attributes:
        samples: of the step, on this device.
        timed: samples with which it was timed, and then multiplied. 0: computed from the speed of products alone.
        device_bytes: the most memory that torch took on a GPU; None on a CPU.
        host_gb: the most memory that the process took, 10⁹ bytes.
    """

    seconds: float
    samples: int
    timed: int
    parameters: int
    device_bytes: int | None
    host_gb: float


@dataclass(frozen=True)
class Machine:
    """What is there, in bytes. `devices` are GPUs, or 1 for the CPU."""

    device: torch.device
    devices: int
    cores: int
    memory: int
    free_disk: int


def this_machine(device: torch.device, devices: int, data: Path) -> Machine:
    """The machine, and the free room of the disk that holds the data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(device, devices, cores, memory, shutil.disk_usage(data).free)


def seconds_each(work: Callable[[Item], int], items: Sequence[Item]) -> float:
    """A core's mean seconds for one unit of work. An item that turns out to be damaged counts as none.

    Args:
        work: does one item, and returns how many units that was.

    Raises:
        UserError: no item can be decoded.
    """
    start, units, problem = time.thread_time(), 0, ""
    for item in items:
        try:
            units += work(item)
        except Unreadable as error:
            problem = f"{shown(item.path)}: {error}"
        if time.thread_time() - start > DECODE_S:
            break
    if not units:
        raise UserError(f"no file of the sample can be decoded, for example {problem}")
    return (time.thread_time() - start) / units


def look_at(source: Path, form: Form, space: LatentSpace | None) -> DataCosts:
    """Opens and decodes a sample of the files, evenly spread over the set, in some seconds.

    Raises:
        UserError: there are no files, or none of the sample can be read.
    """
    listing = find_files(source, form.video)
    samples = listing.samples
    files = len(samples)
    items, problem, opened = [], "", sorted({int(i) for i in np.linspace(0, files - 1, min(files, FILES))})
    for path, label in (samples[i] for i in opened):
        try:
            info = probe_video(path) if form.video else None
            if not info:
                probe_image(path)
            items.append(Item(path, label, info))
        except Unreadable as error:
            problem = f"{path}: {error}"
    if not items:
        raise UserError(f"no file of the sample can be read, for example {shown(problem)}")
    frames = float(np.mean([len(item.video.times) for item in items])) if form.video else 1.0
    uniforms = iter(np.random.default_rng(0).random(len(items)))

    def one_sample(item: Item) -> int:
        read_sample(item, form, float(next(uniforms)))
        return 1

    def all_frames(item: Item) -> int:
        count = min(len(item.video.times), WHOLE_FRAMES)
        read_frames(item.path, item.video, range(count), form.image_size)
        return count

    mixed = [items[i] for i in np.random.default_rng(1).permutation(len(items))]
    sample_s = seconds_each(one_sample, mixed)
    frame_s = seconds_each(all_frames, mixed) if form.video else sample_s
    frame_bytes = {"pixels": 3 * math.prod(sides(form.image_size))}
    if space:  # of a frame and of its mirrored copy: means and deviations, of 2 bytes each
        frame_bytes["latents"] = 2 * 2 * 2 * space.channels * math.prod(sides(space.size(form.image_size)))
    packs = {name: size * files * frames for name, size in frame_bytes.items()}
    unreadable = len(opened) - len(items)
    return DataCosts(files, len(listing.classes), len(opened), unreadable, frames, sample_s, frame_s, packs)


def product_speed() -> float:
    """Operations a second of a dense float32 matrix product on the CPU, the best of three."""
    a, seconds = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE), math.inf
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * PRODUCT_SIDE**3 / seconds


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds * 1e3:,.3g} ms"


def time_steps(work: Work, precision: Precision, speed: Speed, device: torch.device) -> StepCosts:
    """Times steps on random inputs.

    On a CPU a step is timed with as few samples as the speed of products says, and not at all if one sample would take
    minutes.
    """
    timed, least_s = work.batch, 0.0
    if device.type == "cpu":
        least_s = 3 * forward_flops(work) / product_speed()  # of one sample
        timed = min(work.batch, round(CPU_STEP_S / least_s) or int(least_s < MOST_SAMPLE_S))
    parameters = sum(parameter.numel() for parameter in work.build("meta").parameters())
    if not timed:
        host_gb = process_memory_gb() + STATE_BYTES * parameters / 1e9
        return StepCosts(least_s * work.batch, work.batch, 0, parameters, None, host_gb)
    start_over(device)
    step = Training(replace(work, batch=timed), precision, speed, device)
    for _ in range(5 if speed.fast else 0):  # a graph is recorded at the fourth
        step()
    if timed > 1 or speed.fast:
        seconds = seconds_a_call(step, device)
    else:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    taken = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepCosts(seconds * work.batch / timed, work.batch, timed, parameters, taken, process_memory_gb())


@dataclass(frozen=True)
class Costs:
    """What training costs: all figures of a plan, from what was measured.

    Attributes:
        samples_per_second: that all devices train on, if nothing else limits them.
        decode_cores: that decoding files needs for that.
        memory: of the host, bytes.
    """

    data: DataCosts
    step: StepCosts
    machine: Machine

    @property
    def samples_per_second(self) -> float:
        return self.machine.devices * self.step.samples / self.step.seconds

    @property
    def decode_cores(self) -> float:
        return self.samples_per_second * self.data.sample_s

    @property
    def memory(self) -> float:
        gpu, ranks = self.machine.device.type == "cuda", self.machine.devices
        copy = STATE_BYTES * self.step.parameters * (2 if gpu else 1)  # pinned memory can take up to twice as much
        loaders = min(self.machine.cores, math.ceil(self.decode_cores)) if gpu else 0
        return ranks * self.step.host_gb * 1e9 + copy + loaders * LOADER_GB * 1e9

    def limit(self, packed: bool) -> str:
        """What limits training first, from files or from a pack."""
        machine = self.machine
        if self.memory > machine.memory:
            return "host memory: lower --batch, or choose a smaller --model"
        name, size = list(self.data.pack_bytes.items())[-1]
        if packed and size > machine.free_disk:
            return f"the disk: {size / 1e9:,.1f} GB of {name} do not fit; pack a part, smaller frames, or elsewhere"
        if not packed and self.decode_cores > machine.cores:
            share = machine.cores / self.decode_cores
            return f"decoding: {machine.cores} cores reach {share:.0%} of the speed; make a pack of {name}"
        return f"the arithmetic of {device_name(machine.device)}"

    def rows(self) -> Iterator[tuple[str, str]]:
        """The table, (what, how much)."""
        data, step, machine = self.data, self.step, self.machine
        speed, day = self.samples_per_second, 86_400
        each = f", about {data.frames:.0f} frames each" if data.frames != 1 else ""
        sampled = f"{data.opened} were opened, and {data.unreadable} of them cannot be read"
        yield "data", f"{data.files:,} files of {data.classes} classes{each} ({sampled})"
        timed = f", timed with {step.timed}" if step.timed else ", at the speed of products alone: expect twice this"
        timed = "" if step.timed == step.samples else timed
        where = f"{machine.devices} × {device_name(machine.device)}"
        yield "step", f"{duration(step.seconds)} for {machine.devices * step.samples} samples on {where}{timed}"
        yield "steps a day", f"{day / step.seconds:,.0f}"
        yield "epochs a day", f"{day * speed / data.files:,.3g} (an epoch takes one sample of each file)"
        rate = f"{speed:,.3g} samples a second, and a core decodes {1 / data.sample_s:,.3g}"
        yield "decoding", f"{self.decode_cores:,.2g} of {machine.cores} cores: training takes {rate}"
        for name, size in data.pack_bytes.items():
            work = duration(data.files * data.frames * data.frame_s / machine.cores)
            more = " and the VAE's time" if name == "latents" else ""
            free = f"{machine.free_disk / 1e9:,.1f} GB are free beside the data"
            yield f"pack of {name}", f"{size / 1e9:,.3g} GB ({free}); making it takes {work}{more}"
        yield "checkpoint", f"{STATE_BYTES * step.parameters / 1e9:,.3g} GB of disk each"
        if step.device_bytes is not None:
            total = torch.cuda.get_device_properties(machine.device).total_memory
            yield "GPU memory", f"{step.device_bytes / 1e9:,.3g} of {total / 1e9:,.3g} GB"
        yield "host memory", f"{self.memory / 1e9:,.3g} of {machine.memory / 1e9:,.3g} GB"
        yield "limits first, from files", self.limit(packed=False)
        yield "limits first, from a pack", self.limit(packed=True)
