"""Ends a run when somebody asks for it: on every rank after the same step, or at once before the first has ended."""

import os
import signal
import time
from types import FrameType

from runtime.distributed import SharedFlag
from runtime.logs import log

# Slurm sends SIGUSR1 if --signal=USR1 asks for it, and a terminal that is closed sends SIGHUP.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A scheduler signals every process of a job, and torchrun passes on its own signal. Together these are one request.
ONE_REQUEST_S = 1.0
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command can go on later


class StopSignals:
    """Notes the first signal of ASKING. A later one has its usual effect: it ends the process at once.

    Before the first step has ended there is nothing to save, and a signal ends the process with EXIT_STATUS at once.
    The end of that step may never come: it waits for the compiler, a scheduler signals the compiler's processes too,
    and torch 2.11 waits for ever for processes that are gone.

    A run that was started to ignore SIGHUP, as under nohup, goes on doing so. Forks leave signals to this process.

    Attributes:
        received: the name of the signal that this process has received, or an empty text.
    """

    def __init__(self):
        self.received, self.received_at, self.has_stepped = "", 0.0, False
        self.flag, self.process = SharedFlag(), os.getpid()
        heeded = [each for each in ASKING if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heeded}

    def note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        if not self.has_stepped:
            log.warning("stopped before the first step, with nothing to save: %s", signal.Signals(number).name)
            os._exit(EXIT_STATUS)  # does not wait for the compiler
        if self.received and time.monotonic() > self.received_at + ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received_at = self.received_at if self.received else time.monotonic()
        self.received = self.received or signal.Signals(number).name

    def asked(self, problem: str) -> bool:
        """True on every rank once any rank was asked to stop, or has a problem. Every rank must call it every step."""
        self.has_stepped = True
        stopping = self.flag.raised(bool(self.received or problem))
        if stopping:
            log.warning("stopping after this step: %s", self.received or problem or "another process was asked to")
        return stopping

    def close(self) -> None:
        """Restores the signals' handlers."""
        self.flag.wait()
        for number, handler in self.before.items():
            signal.signal(number, handler)
