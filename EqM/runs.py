"""A training run's folder, its log and its metrics."""

import json
import logging
import re
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import distributed
from cli import UserError
from precision import Precision

log = logging.getLogger("EqM")


def create_run_folder(results_dir: Path, model: str) -> Path:
    """Makes and returns the next numbered folder, as 027-EqM-S-4-Linear-velocity-None.

    Making a folder is atomic: of two runs that start at once, one gets the next number.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = [int(n[0]) for path in results_dir.iterdir() if (n := re.findall(r"^\d+(?=-)", path.name))]
            name = f"{max(numbers, default=-1) + 1:03d}-{model.replace('/', '-')}-Linear-velocity-None"
            try:
                (results_dir / name).mkdir()
            except FileExistsError:
                continue
            (results_dir / name / "checkpoints").mkdir()
            return results_dir / name
    except OSError as error:
        raise UserError(f"--results-dir {results_dir} cannot be written: {error.strerror}") from None


def start_log(file: Path | None = None, level: int = logging.INFO) -> None:
    """Sends the log of rank 0 to the screen, and to a file if one is given; other ranks stay silent."""
    if not distributed.is_main():
        log.addHandler(logging.NullHandler())
        log.propagate = False
        return
    log.setLevel(level)
    handlers = [logging.StreamHandler(sys.stdout)] + ([logging.FileHandler(file)] if file else [])
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"


def log_precision(precision: Precision) -> None:
    """Says what a run computes in: a warning, with the reason, where that is not what was asked for."""
    log.log(logging.WARNING if precision.reason else logging.INFO, "precision: %s", precision)


class Metrics:
    """Writes the lines of metrics.jsonl and of the log."""

    def __init__(self, folder: Path, device: torch.device, samples: int):
        self.path, self.device = folder / "metrics.jsonl", device
        self.start = self.since = time.perf_counter()
        self.samples = samples

    def write(self, means: Tensor, samples: int, waiting_s: float, **counters: float) -> float:
        """Averages over the ranks, and writes the result.

        Every rank must call it. `means` (2,) is this rank's loss and gradient norm, `samples` those
        of all ranks so far, `waiting_s` how long this rank has waited for data since the last line;
        `counters` (step, epoch, …) go into the line as they are.

        Returns:
            Minutes since the start, the same on all ranks.
        """
        now = time.perf_counter()
        times = means.new_tensor([(now - self.start) / 60, waiting_s / (now - self.since)])
        loss, grad_norm, minutes, waiting = distributed.mean(torch.cat([means, times])).tolist()
        row = counters | {
            "minutes": round(minutes, 3),
            "loss": loss,
            "grad_norm": grad_norm,
            "samples_per_second": round((samples - self.samples) / (now - self.since), 2),
            "waiting_for_data": round(waiting, 4),
            "memory_gb": round(peak_memory_gb(self.device), 3),
        }
        if distributed.is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        log.info(
            "step {step}: loss {loss:.4f}, gradient norm {grad_norm:.3f}, "
            "{samples_per_second:.1f} samples/s, {memory_gb:.2f} GB".format(**row)
        )
        self.samples, self.since = samples, now
        return minutes


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10⁹ bytes: the GPU's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
