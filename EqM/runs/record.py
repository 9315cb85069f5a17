"""The record of a run: the lines of metrics.jsonl, and memory."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtime import distributed
from runtime.errors import UserError
from runtime.files import open_regular, write_whole
from runtime.logs import log

FLOAT32_MAX = torch.finfo(torch.float32).max


class Metrics:
    """Writes the lines of metrics.jsonl and of the log. On rank 0, `also` gets the values of each line.

    Args:
        began: when the training began, if that was earlier than now: compiling is a part of it.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        samples: int,
        step: int,
        also: Callable[[dict], None] = lambda row: None,
        began: float | None = None,
    ):
        self.path, self.device, self.also = folder / "metrics.jsonl", device, also
        if distributed.is_main() and self.path.exists():
            try:
                self.cut(step)
            except OSError as error:
                log.error("%s keeps the lines after step %d: %s", self.path, step, error.strerror)
        self.start = self.since = time.perf_counter()
        self.began = self.start if began is None else began
        self.samples = samples

    def write(self, means: Tensor, samples: int, waiting_s: float, **counters: float) -> float:
        """Averages over the ranks, and writes a line. Every rank must call it.

        Args:
            means: loss, gradient norm and largest gradient norm of this rank since the last line, (3,).
            samples: samples of all ranks so far.
            waiting_s: seconds for which this rank has waited for data since the last line.
            counters: step, epoch, … They go into the line unchanged.

        Returns:
            Minutes since the start, the same on all ranks.
        """
        now = time.perf_counter()
        times = means.new_tensor([(now - self.start) / 60, waiting_s / (now - self.since)])
        loss, grad_norm, largest_grad_norm, minutes, waiting = distributed.mean(torch.cat([means, times])).tolist()
        row = counters | {
            "minutes": round(minutes, 3),
            "training_seconds": round(now - self.began, 3),
            "loss": loss,
            "grad_norm": grad_norm,
            "largest_grad_norm": largest_grad_norm,
            "samples_per_second": round((samples - self.samples) / (now - self.since), 2),
            "waiting_for_data": round(waiting, 4),
            "memory_gb": round(peak_memory_gb(self.device), 3),
        }
        if distributed.is_main():
            self.append(row)
            self.also(row)
        log.info(
            "step {step}: loss {loss:.4f}, gradient norm {grad_norm:.3f} (largest {largest_grad_norm:.3f}), "
            "{samples_per_second:.1f} samples/s, {memory_gb:.2f} GB".format(**row)
        )
        self.samples, self.since = samples, now
        return minutes

    def leave_out(self, seconds: float) -> None:
        """Keeps seconds in which no step ran out of the samples a second, the share of waiting and training_seconds."""
        self.since += seconds
        self.began += seconds

    def append(self, row: dict) -> None:
        try:
            with open_regular(self.path, append=True) as file:
                file.write((json.dumps(row) + "\n").encode())
        except OSError as error:
            log.error("%s lacks the line of step %d: %s", self.path, row["step"], error.strerror)

    def cut(self, step: int) -> None:
        """Removes the lines after the step from which a run goes on, and damaged lines."""
        lines = read_lines(self.path)
        rows = [numbers_of(line, ["step"]) for line in lines]
        kept = [line for line, row in zip(lines, rows, strict=True) if row and row["step"] <= step]
        if None in rows:
            log.warning("%s: damaged lines are removed: %d", self.path, rows.count(None))
        if kept != lines:
            write_whole(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))


def lowest_held_out(folder: Path) -> tuple[int, float] | None:
    """The step and the value of the lowest held-out loss of a run; None: it has none."""
    try:
        rows = [numbers_of(line, ["step", "held_out_loss"]) for line in read_lines(folder / "metrics.jsonl")]
    except OSError:
        return None
    lowest = min(filter(None, rows), key=lambda row: row["held_out_loss"], default=None)
    return (int(lowest["step"]), lowest["held_out_loss"]) if lowest else None


def read_lines(path: Path) -> list[bytes]:
    """The lines of metrics. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.readlines()


def numbers_of(line: bytes, names: Sequence[str], sometimes: Sequence[str] = ()) -> dict[str, float] | None:
    """The named numbers of a line of metrics; None for a line that is damaged, half-written or without them.

    The names in `sometimes` may be missing.
    """
    try:
        row = json.loads(line)
        names = [*names, *(name for name in sometimes if name in row)]
        numbers = {name: float(row[name]) for name in names if not isinstance(row[name], str | bool)}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    whole = line.endswith(b"\n") and len(numbers) == len(names) and 0 <= numbers["step"] < 2**63
    # A run computes in float32. What is larger comes from elsewhere, and cannot be drawn.
    return numbers if whole and not any(FLOAT32_MAX < abs(value) < math.inf for value in numbers.values()) else None


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10⁹ bytes: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return process_memory_gb()


def process_memory_gb() -> float:
    """The most memory that this process has used, in 10⁹ bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    # Linux's getrusage also counts the memory of the program that started this one.
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def read_metrics(run: Path, names: Sequence[str], sometimes: Sequence[str] = ()) -> list[dict[str, float]]:
    """The named numbers of each line of a run's metrics. Damaged or half-written lines are left out, with a warning.

    The names in `sometimes` may be missing.

    Raises:
        UserError: this is not the folder of a run, or it has no whole line.
    """
    path, rows, damaged = run / "metrics.jsonl", [], []
    try:
        lines = read_lines(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} is not a run's folder: it has no metrics.jsonl") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        row = numbers_of(line, names, sometimes)
        if row:
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        log.warning("%s: damaged lines are left out: %d, the first is line %d", path, len(damaged), damaged[0])
    if not rows:
        raise UserError(f"{path} has no whole line: wait for the first line of the run, or give another run")
    return rows
