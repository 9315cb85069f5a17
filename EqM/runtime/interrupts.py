"""Ctrl-C outside training: one line, status 130, and nothing half-made. It works before torch is there.

Python's own way raises KeyboardInterrupt wherever the program is. Libraries catch it, Python drops it in the midst of
a fork or a destructor, pools wait for all their work before it gets through, and imports end in a traceback.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from runtime import environment

STATUS = 130  # of a shell's command that Ctrl-C ended
_undoing: list[Callable[[], object]] = []


def end_at_ctrl_c() -> None:
    """Lets Ctrl-C end this process at once, from here on. A command that was started to ignore it goes on doing so."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    started = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == started:  # a fork ends silently: a terminal signals it too
            for undo in reversed(_undoing):
                with suppress(OSError):
                    undo()
            if environment.speaks():
                with suppress(OSError):
                    os.write(2, f"\n{Path(sys.argv[0]).name}: error: interrupted\n".encode())
        os._exit(STATUS)

    signal.signal(signal.SIGINT, end)
    # The last thing before Python takes itself apart: the work is done, and the status that is due stays.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def temporary_file(path: Path) -> Iterator[None]:
    """Removes a file at the end of the block, at an error and at Ctrl-C, if it is still there."""
    with undone_at_ctrl_c(partial(path.unlink, missing_ok=True)):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def undone_at_ctrl_c(undo: Callable[[], object]) -> Iterator[None]:
    """Within the block, Ctrl-C calls this function before it ends the process. An OSError of it is passed over."""
    _undoing.append(undo)
    try:
        yield
    finally:
        _undoing.remove(undo)
