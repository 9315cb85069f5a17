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


def start_log(file: Path | None = None) -> None:
    """Sends the log of rank 0 to the screen, and to a file if one is given; other ranks stay silent."""
    if not distributed.is_main():
        log.addHandler(logging.NullHandler())
        log.propagate = False
        return
    log.setLevel(logging.INFO)
    handlers = [logging.StreamHandler(sys.stdout)] + ([logging.FileHandler(file)] if file else [])
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def log_precision(precision: Precision) -> None:
    """Says what a run computes in: a warning, with the reason, where that is not what was asked for."""
    log.log(logging.WARNING if precision.reason else logging.INFO, "precision: %s", precision)


class Metrics:
    """Sums up the steps between two log lines, without waiting for the device, and writes the lines."""

    def __init__(self, folder: Path, device: torch.device):
        self.path, self.device, self.start = folder / "metrics.jsonl", device, time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self.losses: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.samples, self.since = 0, time.perf_counter()

    def add(self, loss: Tensor, grad_norm: Tensor, samples: int) -> None:
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.samples += samples

    def write(self, **counters: float) -> float:
        """Averages over the steps since the last line and over the ranks, and writes the result.

        Every rank must call it. `counters` (step, epoch, …) go into the line as they are.

        Returns:
            Minutes since the start, the same on all ranks.
        """
        now = time.perf_counter()
        loss, grad_norm = torch.stack(self.losses).mean(), torch.stack(self.grad_norms).mean()
        minutes = loss.new_tensor((now - self.start) / 60)
        loss, grad_norm, minutes = distributed.mean(torch.stack([loss, grad_norm, minutes])).tolist()
        row = counters | {
            "minutes": round(minutes, 3),
            "loss": loss,
            "grad_norm": grad_norm,
            "samples_per_second": round(self.samples / (now - self.since), 2),
            "memory_gb": round(peak_memory_gb(self.device), 3),
        }
        if distributed.is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        log.info(
            "step {step}: loss {loss:.4f}, gradient norm {grad_norm:.3f}, "
            "{samples_per_second:.1f} samples/s, {memory_gb:.2f} GB".format(**row)
        )
        self.restart()
        return minutes


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10⁹ bytes: the GPU's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
