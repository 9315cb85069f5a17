"""The log: one logger, on rank 0's screen and in a run's file."""

import io
import logging
import os
import sys
from pathlib import Path

import torch

from runtime import distributed
from runtime.errors import shown

log = logging.getLogger("EqM")


class LogFile(logging.FileHandler):
    """A log file. A line that cannot be written to it is still on the screen, and the run goes on."""

    failed = False

    def __init__(self, path: Path):
        super().__init__(path, delay=True, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> io.TextIOWrapper:
        # Never waits for the reader of a pipe.
        return open(  # noqa: PTH123
            self.baseFilename,
            "a",
            encoding=self.encoding,
            errors=self.errors,
            opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK, 0o666),
        )

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # from opening it
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            print(shown(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}"), file=sys.stderr)
        self.failed = True


class OneLine(logging.Formatter):
    """A record as one line. Names of files in it may hold newlines and control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = shown(record.message)
        return super().formatMessage(record)


def start_log(file: Path | None = None, level: int = logging.INFO) -> None:
    """Sends the log of rank 0 to the screen, and to a file if one is given. Other ranks stay silent."""
    if not distributed.is_main():
        log.addHandler(logging.NullHandler())
        log.propagate = False
        return
    log.setLevel(level)
    handlers = [logging.StreamHandler(sys.stdout)] + ([LogFile(file)] if file else [])
    for handler in handlers:
        handler.setFormatter(OneLine("[%(asctime)s] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def device_name(device: torch.device) -> str:
    """The device in words."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
