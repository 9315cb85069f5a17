"""How much slower a training step is while a checkpoint is written in the background."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compiled import Speed
from measuring.workloads import Training, Work, synchronize
from precision import Precision
from runs.checkpoint_writer import CheckpointWriter, checkpoints

STEPS_AHEAD = 4  # the host queues so many steps before it waits
USUAL_SECONDS = 2.0


def seconds_a_step(step: Training, goes_on: Callable[[], bool]) -> float:
    """The mean over all steps until `goes_on()` is False."""
    start, steps = time.perf_counter(), 0
    while goes_on():
        for _ in range(STEPS_AHEAD):
            step()
        synchronize(step.x.device)
        steps += STEPS_AHEAD
    return (time.perf_counter() - start) / steps


def saving_times(
    work: Work, precision: Precision, speed: Speed, device: torch.device, folder: Path
) -> dict[str, float]:
    """Milliseconds a step, usually and while a checkpoint is written to `folder`; seconds and megabytes of that."""
    step = Training(work, precision, speed, device)
    for _ in range(5):  # the graph is recorded at the fourth
        step()

    def save() -> None:
        step.state.read_counts()
        writer.save(step.state.snapshot() | {"config": {}})

    def usual() -> float:
        end = time.perf_counter() + USUAL_SECONDS
        return seconds_a_step(step, lambda: time.perf_counter() < end)

    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "checkpoints").mkdir()
        writer = CheckpointWriter(Path(name), 1, None, step.state.assemble)
        save()  # the first one allocates the host's memory
        writer.finish()
        before, start = usual(), time.perf_counter()
        save()
        saving = seconds_a_step(step, lambda: not writer.pending.done())
        seconds = time.perf_counter() - start
        writer.finish()
        size = checkpoints(Path(name))[0].stat().st_size
    after = usual()
    times = {"usual ms": 500 * (before + after), "ms while saving": 1000 * saving}
    return times | {"ratio": 2 * saving / (before + after), "seconds": seconds, "megabytes": size / 1e6}
