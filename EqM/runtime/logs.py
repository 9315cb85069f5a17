"""The log: one logger, on rank 0's screen and in a run's file."""

import logging
import sys
from pathlib import Path

import torch

from runtime import distributed

log = logging.getLogger("EqM")


class LogFile(logging.FileHandler):
    """A log file. A line that cannot be written to it is still on the screen, and the run goes on."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # from opening it
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
        self.failed = True


def start_log(file: Path | None = None, level: int = logging.INFO) -> None:
    """Sends the log of rank 0 to the screen, and to a file if one is given. Other ranks stay silent."""
    if not distributed.is_main():
        log.addHandler(logging.NullHandler())
        log.propagate = False
        return
    log.setLevel(level)
    handlers = [logging.StreamHandler(sys.stdout)] + ([LogFile(file, delay=True)] if file else [])
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def device_name(device: torch.device) -> str:
    """The device in words."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
