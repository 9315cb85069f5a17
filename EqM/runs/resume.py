"""Finds where a run goes on: its folder, and its newest good checkpoint."""

import json
import os
import platform
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from runs.checkpoint import is_sealed
from runs.checkpoint_writer import checkpoints
from runs.folder import create_run_folder, run_folders
from runtime import distributed
from runtime.errors import UserError
from runtime.files import leftovers, lock
from runtime.logs import log

# The loading processes of a run that was killed hold its lock until they notice, some seconds later.
LOCK_PATIENCE_S = 20
# Flags that may change between a run's parts without a word: they leave the weights as they are.
SILENT = {"resume", "ckpt", "results_dir", "max_steps", "epochs", "max_minutes", "log_every", "ckpt_every", "keep"}
SILENT |= {"sample_every", "sample_steps", "sample_stepsize", "sample_cfg_scale", "tensorboard", "wandb"}
SILENT |= {"num_workers", "max_bad_steps", "global_batch_size", "use_amp", "use_bf16"}  # the last three said otherwise


@dataclass(frozen=True)
class Start:
    """Where training starts: in a folder (None: a new one), from a checkpoint (None: from the beginning).

    `damaged` says of newer checkpoints why they were passed over.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    damaged: list[str] = field(default_factory=list)

    def log(self) -> None:
        for problem in self.damaged:
            log.warning("%s: passed over", problem)
        if self.checkpoint:
            log.info("going on from %s", self.checkpoint)


def find_start(args: Namespace) -> Start:
    """Where --resume, --ckpt, or torchrun's restart of a run that lost a process, say to start.

    Raises:
        UserError: the folder cannot be read.
    """
    restarted = distributed.restarts() > 0
    if not args.resume and not restarted:
        return Start(checkpoint=args.ckpt)
    try:
        folders = run_folders(args.results_dir, args.model, args.path_type)
        if restarted and not args.resume:
            folders = [folder for folder in folders if launcher_of(folder) == launcher()]
        if not folders:
            return Start(checkpoint=args.ckpt)
        keep_others_out(folders[-1])
        (folders[-1] / "checkpoints").mkdir(exist_ok=True)
        for leftover in leftovers(folders[-1] / "checkpoints", "*.pt"):
            leftover.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or args.results_dir} cannot be read: {error.strerror}") from None
    checkpoint, damaged = newest_good(folders[-1])
    if damaged and not checkpoint:
        raise UserError(f"{damaged[0]}, and there is no other: give an older one with --ckpt, or move the run away")
    return Start(folders[-1], checkpoint or args.ckpt, damaged)


def keep_others_out(folder: Path) -> None:
    """Locks a run's folder until this process ends.

    Raises:
        UserError: another process trains in it.
    """
    end = time.monotonic() + LOCK_PATIENCE_S
    while not lock(folder):
        if time.monotonic() > end:
            raise UserError(f"another process trains in {folder}: let it end, or stop it")
        time.sleep(0.2)


def new_folder(args: Namespace) -> Path:
    """The next run's folder, locked; raises UserError where it cannot be written."""
    folder = create_run_folder(args.results_dir, args.model, args.path_type)
    keep_others_out(folder)
    return folder


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of a run, and what is wrong with those after it."""
    damaged = []
    for path in checkpoints(folder):
        try:
            if is_sealed(path):
                return path, damaged
            damaged.append(f"{path} is cut short or has been changed")
        except UserError:
            damaged.append(f"{path} has changed since it was written")
        except OSError as error:
            damaged.append(f"{path} cannot be read ({error.strerror})")
    return None, damaged


def launcher() -> str:
    """The process that started this one, and when it started: the same after a restart of all ranks."""
    parent = Path(f"/proc/{os.getppid()}/stat")
    began = parent.read_text().rpartition(")")[2].split()[19] if parent.exists() else ""  # clock ticks since boot
    return f"{platform.node()}:{os.getppid()}:{began}"


def launcher_of(folder: Path) -> str | None:
    """The `launcher` that a run's config names; None where it was stopped before it was written."""
    try:
        return json.loads((folder / "config.json").read_text())["launcher"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def log_changes(saved: dict, config: dict) -> None:
    """Says in which settings a run that goes on differs from what it was."""
    was, now = saved["config"]["precision"]["name"], config["precision"]["name"]
    if was != now:
        log.warning("the checkpoint was trained in %s; this run goes on in %s", was, now)
    for name in ("global_batch_size", "processes"):
        if saved["config"].get(name, config[name]) != config[name]:
            log.warning("%s was %s and is %s", name, saved["config"][name], config[name])
    old, new = saved["config"].get("args", {}), config["args"]
    for name in sorted(old.keys() & new.keys() - SILENT):
        if old[name] != new[name]:
            log.warning("--%s was %s and is %s", name.replace("_", "-"), old[name], new[name])


def is_finished(saved: dict, last_sample: int, last_step: float) -> bool:
    """True where a checkpoint is at the end of the run that the flags describe."""
    return saved["step"] >= last_step or saved["samples"] >= last_sample
