"""Writes checkpoints while training goes on, and keeps the newest ones."""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runs.checkpoint import is_sealed, save_checkpoint
from runtime.errors import UserError
from runtime.logs import log


def step_of(path: Path) -> int:
    """The step of a checkpoint file, or −1 for another file's name."""
    return int(path.stem) if path.stem.isdecimal() else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a run's folder, the newest first."""
    paths = [path for path in (folder / "checkpoints").glob("*.pt") if step_of(path) >= 0]
    return sorted(paths, key=step_of, reverse=True)


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread of rank 0. Threads of the other ranks send it their shares.

    Training waits only for the copy into the host's memory, which a GPU makes between two steps.

    Args:
        folder: the folder of the run.
        keep: how many good checkpoints to keep; None: all.
        assemble: makes a checkpoint's contents of what the ranks give, or passes on why a rank gives nothing; it
            returns nothing on ranks other than 0.

    Attributes:
        newest: the checkpoint that was written last, or that the run went on from; None: there is none yet.
        best: the checkpoint with the lowest held-out loss, which is kept beside the newest ones; None: none is.
        lowest_loss: that loss.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None,
        newest: Path | None,
        assemble: Callable[[dict, Exception | None], dict],
    ):
        self.folder, self.keep, self.newest, self.assemble = folder, keep, newest, assemble
        self.good = {newest} if newest else set()
        self.best: Path | None = None
        self.lowest_loss = math.inf
        self.buffers: dict[str, Tensor] = {}
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None

    def path_of(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"{step:07d}.pt"

    def is_best(self, step: int, loss: float) -> bool:
        """Whether this is the lowest held-out loss so far. The checkpoint of this step is then kept as the best one."""
        if not loss < self.lowest_loss:
            return False
        self.best, self.lowest_loss = self.path_of(step), loss
        return True

    def save(self, contents: dict) -> None:
        """Waits for the checkpoint before, then copies these contents and hands them to the thread.

        Every rank must call it. A checkpoint that cannot be written is an error in the log, and training goes on.
        """
        problem = self.wait()
        if problem:
            log.error("%s", problem)
        copied, problem = {}, None
        try:
            copied = self.to_host(contents)
        except (MemoryError, RuntimeError) as error:
            problem = error
        done = torch.cuda.Event(blocking=True) if torch.cuda.is_available() else None
        if done:
            done.record()
        path = self.path_of(contents["step"])
        self.pending = self.pool.submit(self.write, path, copied, problem, done)

    def to_host(self, value: Any, name: str = "") -> Any:
        """Copies tensors to (pinned) host memory. From a GPU, the copy is complete when the current stream is."""
        if isinstance(value, dict):
            return {key: self.to_host(part, f"{name}/{key}") for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name not in self.buffers:
            self.buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self.buffers[name].copy_(value.detach(), non_blocking=True)

    def write(self, path: Path, copied: dict, problem: Exception | None, done: torch.cuda.Event | None) -> None:
        """Writes one checkpoint, then removes old ones. Ranks other than 0 only send what they have copied."""
        if done:
            done.synchronize()
        contents = self.assemble(copied, problem)
        if not contents:
            return
        save_checkpoint(path, contents)
        log.info("saved %s", path)
        self.newest = path
        self.good.add(path)
        try:
            if self.keep:
                self.remove_old()
        except OSError as error:
            log.error("cannot remove old checkpoints in %s: %s", path.parent, error.strerror)

    def remove_old(self) -> None:
        """Removes all that are older than the `keep` newest good checkpoints."""
        found = 0
        for path in checkpoints(self.folder):
            if found == self.keep:
                if path != self.best:
                    path.unlink(missing_ok=True)
            else:
                found += path in self.good or self.is_good(path)

    def is_good(self, path: Path) -> bool:
        try:
            good = is_sealed(path)
        except (OSError, UserError):
            return False
        if good:
            self.good.add(path)
        return good

    def wait(self) -> str:
        """Waits for the thread. Returns why the last checkpoint could not be written, or an empty text."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except (OSError, MemoryError, RuntimeError) as error:
            return f"cannot save to {self.folder / 'checkpoints'}: {self.reason(error)}; {self.last_good()}"
        return ""

    def reason(self, error: Exception) -> str:
        """Why writing failed. On a full disk torch raises errors that do not say so."""
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if not (self.folder / "checkpoints").is_dir():
            return "the folder is gone"
        free = shutil.disk_usage(self.folder).free
        return f"{(str(error) or type(error).__name__).splitlines()[0]} ({free / 1e9:.2f} GB are free on the disk)"

    def advice(self) -> str:
        """Waits for the thread, and says for an error line which checkpoint to go on from."""
        return self.wait() or self.last_good()

    def last_good(self) -> str:
        return f"the last good checkpoint is {self.newest}" if self.newest else "there is no good checkpoint yet"

    def finish(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            UserError: it could not be written.
        """
        problem = self.wait()
        if problem:
            raise UserError(f"{problem}: make room, and go on with --resume (in place of --ckpt)")
