"""Standard streams that never end a command: what cannot be written to them is dropped."""

import io
import os
import sys
from typing import TextIO

STANDARD = range(3)  # stdin, stdout, stderr


class LossyFile(io.FileIO):
    """An open descriptor on which every write succeeds. `lost` is the first error of one that did not.

    The reader of a pipe has gone, a disk is full, a terminal was closed: work that makes files goes on.
    """

    lost: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            written = None
        return len(data) if written is None else written


def make_output_lossy() -> None:
    """Replaces stdout and stderr of the whole process: writes are dropped if they fail, lines are written at once.

    Letters that the terminal's encoding lacks are escaped. A stream that was closed before the start is /dev/null.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened becomes this stream, and gets what libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)


def lossy(stream: TextIO | None) -> TextIO:
    """A text stream that drops what cannot be written to `stream`. One without a descriptor stays as it is."""
    try:
        number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
    except io.UnsupportedOperation:
        return stream
    file = io.BufferedWriter(LossyFile(number, "w", closefd=False))
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=True)


def lost_output() -> OSError | None:
    """Why something that was printed on stdout is lost; None if nothing is."""
    sys.stdout.flush()
    return getattr(getattr(sys.stdout.buffer, "raw", None), "lost", None)
