"""Finds where a run goes on: its folder, and its newest good checkpoint."""

import argparse
import functools
import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from runs.checkpoint import is_sealed, load_checkpoint
from runs.checkpoint_writer import checkpoints
from runs.config import Config, changed_counts, config_of
from runs.folder import create_run_folder, one_at_a_time, run_folders, run_name, write_config
from runtime import cli, environment
from runtime.errors import UserError, first_line
from runtime.files import leftovers, lock, parse_json
from runtime.logs import log

# The loading processes of a killed run keep its lock until they notice, some seconds later.
LOCK_PATIENCE_S = 20
# Flags that tell one run from another. --resume goes on with the newest run that has all given values of these flags.
TELLING = ("model", "video", "clip_len", "image_size", "num_classes", "temporal_patch", "positions", "vae")
TELLING += ("init_weights", "path_type", "c_schedule", "c_a", "c_b", "c_lambda", "disp", "ebm", "uncond", "predict")
TELLING += ("gamma_per_frame", "optimizer")
TELLING += ("loss_weight", "gamma_distribution", "gamma_mean", "gamma_std")
# Flags that may change without a warning when a run goes on.
SILENT = {"resume", "ckpt", "results_dir", "max_steps", "epochs", "max_minutes", "log_every", "ckpt_every", "keep"}
SILENT |= {"sample_every", "sample_steps", "sample_stepsize", "sample_cfg_scale", "tensorboard", "wandb"}
SILENT |= {"num_workers", "max_bad_steps", "vae"}  # check_resumable compares the VAEs themselves
SILENT |= {"eval_path", "eval_every", "eval_samples", "keep_best"}
SILENT |= {"init_weights"}  # only a new run reads it
SILENT |= {"global_batch_size", "use_amp", "use_bf16"}  # log_changes has lines of its own for these


@dataclass(frozen=True)
class Asked:
    """Where the flags ask a run to start.

    Attributes:
        resume: go on with the newest run that has the given settings, if there is one.
        checkpoint: go on from this file in a new folder; None: start at the beginning.
        given: the flags of TELLING that were given, by name.
        new_name: the name that a new run would get, after its number.
    """

    results_dir: Path
    resume: bool
    checkpoint: Path | None
    given: dict
    new_name: str = ""


def add_resume_args(parser: argparse._ActionsContainer) -> None:
    """Adds --ckpt, --resume and --init-weights."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--ckpt", type=cli.path, help="a checkpoint to go on from, in a new run folder")
    start.add_argument(
        "--resume", action="store_true", help="go on with the newest run that has the given settings, or start one"
    )
    weights = "a new run starts from the averaged weights of this checkpoint, ours or a published one"
    parser.add_argument("--init-weights", type=cli.path, metavar="FILE", help=weights)


def asked_of(args: argparse.Namespace, defaults: dict) -> Asked:
    """Where the flags ask a run to start. A flag that was not given must be None."""
    given = {name: value for name in TELLING if (value := getattr(args, name)) is not None}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    new = defaults | given
    return Asked(args.results_dir, args.resume, args.ckpt, given, run_name(new["model"], new["path_type"]))


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        folder: of the run that goes on; None: a new run.
        checkpoint: to go on from; None: start at the beginning.
        config: of the run that goes on, if it is known.
        notes: warnings for the log, for example of damaged checkpoints.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    config: Config | None = None
    notes: list[str] = field(default_factory=list)

    def log(self) -> None:
        for note in self.notes:
            log.warning("%s", note)
        if self.checkpoint:
            log.info("going on from %s", self.checkpoint)


def find_start(asked: Asked) -> Start:
    """Where to start: as --resume or --ckpt say, or in the run that torchrun restarts after a process died.

    Raises:
        UserError: the folder cannot be read, or the run has only damaged checkpoints.
    """
    restarted = environment.restarts() > 0
    if not asked.resume and not restarted:
        return Start(checkpoint=asked.checkpoint)
    notes: list[str] = []
    try:
        folders = run_folders(asked.results_dir)
        if restarted and not asked.resume:
            folder = next((each for each in reversed(folders) if launcher_of(each) == launcher()), None)
        else:
            fit = fitting(folders, asked)
            folder = fit[0] if fit else None
            if folders and not folder:
                notes.append(f"no run in {asked.results_dir} has the given settings: this one is new")
        if not folder:
            return Start(checkpoint=asked.checkpoint, notes=notes)
        lock_run(folder)
        if not restarted and (older := older_with_checkpoint(fit)):
            notes.append(f"{folder} has no checkpoint: going on with {older}, which has the same settings")
            folder = older
            lock_run(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        for leftover in leftovers(folder / "checkpoints", "*.pt"):
            leftover.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or asked.results_dir} cannot be read: {error.strerror}") from None
    checkpoint, damaged = newest_good(folder)
    if damaged and not checkpoint:
        raise UserError(f"{damaged[0]}, and there is no other: give an older one with --ckpt, or move the run away")
    notes += [f"{problem}: passed over" for problem in damaged]
    return Start(folder, checkpoint or asked.checkpoint, config_of_run(folder), notes)


def fitting(folders: list[Path], asked: Asked) -> list[Path]:
    """Those of the runs that have all given settings, the newest first."""
    newest = list(reversed(folders))
    exact = [each for each in newest if has_settings(each, asked)]
    return exact or [each for each in newest if has_settings(each, asked, unused=(None,))]


def older_with_checkpoint(fit: list[Path]) -> Path | None:
    """The newest run that has checkpoints, if the newest of all has none.

    Raises:
        UserError: these two differ in a flag of TELLING, so that nobody knows which one is meant.
    """
    newest, *others = fit
    older = next((each for each in others if checkpoints(each)), None)
    if checkpoints(newest) or not older:
        return None
    ours, theirs = config_of_run(newest), config_of_run(older)
    kept, known = ours and ours.kept_flags(), theirs and theirs.kept_flags()
    for name in TELLING:
        if kept and known and kept[name] != known[name]:
            raise UserError(
                f"{newest} has no checkpoint, and {older} has, with --{name.replace('_', '-')} {known[name]} in place"
                f" of {kept[name]}: give this flag to say which one is meant"
            )
    return older


def has_settings(folder: Path, asked: Asked, unused: tuple = ()) -> bool:
    """True if a run has all given settings. A run without a config must have the name that a new run would get.

    Args:
        unused: what also counts as equal for the length of clips: (None,), for runs of images.
    """
    config = config_of_run(folder)
    if not config:
        return re.sub(r"^\d+-", "", folder.name) == asked.new_name
    kept = config.kept_flags()
    for name in ("vae", "init_weights"):
        kept[name] = same_path(kept[name], asked.given.get(name))
    return all(
        kept[name] == value or (name in ("clip_len", "temporal_patch") and kept[name] in unused)
        for name, value in asked.given.items()
    )


def same_path(kept: str | None, given: str | None) -> str | None:
    """The file or folder of a run, spelt as it was given if both name the same."""
    return given if kept and given and Path(kept).resolve() == Path(given).resolve() else kept


def config_of_run(folder: Path) -> Config | None:
    """The config of a run; None if the run was stopped before it wrote one."""
    path = folder / "config.json"
    try:
        return config_of(parse_json(path), path)
    except FileNotFoundError:
        pass
    except UserError as error:
        warn_once(f"{error}: it is passed over")
    except (OSError, ValueError) as error:
        warn_once(f"{path} is damaged and passed over: {first_line(error)}")
    checkpoint, _ = newest_good(folder)
    try:
        return config_of(load_checkpoint(checkpoint)["config"], checkpoint) if checkpoint else None
    except UserError:  # of another program or version: who goes on with this run is told
        return None


@functools.cache
def warn_once(text: str) -> None:
    """Warns of a file that is looked at more than once."""
    log.warning("%s", text)


def lock_run(folder: Path) -> None:
    """Locks a run's folder until this process ends.

    Raises:
        UserError: another process trains in it.
    """
    end = time.monotonic() + LOCK_PATIENCE_S
    while not lock(folder):
        if time.monotonic() > end:
            raise UserError(f"another process trains in {folder}: let it end, or stop it")
        time.sleep(0.2)


def claim_folder(start: Start, asked: Asked, config: Config) -> Path:
    """The folder of the run that goes on, or the next new one. It is locked, and holds the config.

    Raises:
        UserError: it cannot be written, or --resume was given, and another process has begun such a run since
            `find_start` looked for one.
    """
    if start.folder:
        write_config(start.folder, config.as_dict() | {"launcher": launcher()})
        return start.folder
    with one_at_a_time(asked.results_dir):
        begun = fitting(run_folders(asked.results_dir), asked) if asked.resume else []
        if begun:
            raise UserError(f"another process has just begun to train in {begun[0]}: let it end, or stop it")
        folder = create_run_folder(asked.results_dir, config.network.model, config.objective.path)
        lock_run(folder)
        write_config(folder, config.as_dict() | {"launcher": launcher()})
    return folder


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of a run, and what is wrong with each newer one."""
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
    """The parent process and its start time. Both stay the same when torchrun restarts all ranks."""
    parent = Path(f"/proc/{os.getppid()}/stat")
    began = parent.read_text().rpartition(")")[2].split()[19] if parent.exists() else ""  # clock ticks since boot
    return f"{platform.node()}:{os.getppid()}:{began}"


def launcher_of(folder: Path) -> str | None:
    """The `launcher` in a run's config; None if the run was stopped before it wrote one."""
    try:
        return parse_json(folder / "config.json")["launcher"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def log_changes(saved: Config, ours: Config) -> None:
    """Warns of each setting that has changed since the checkpoint of a run that goes on."""
    was, now = saved.precision["name"], ours.precision["name"]
    if was != now:
        log.warning("the checkpoint was trained in %s; this run goes on in %s", was, now)
    for name in ("global_batch_size", "processes"):
        before, after = getattr(saved, name), getattr(ours, name)
        if before not in (None, after):
            log.warning("%s was %s and is %s", name, before, after)
    counts = changed_counts(saved, ours)
    if counts:
        log.warning("%s", counts)
    old, new = saved.flags, ours.as_dict()["args"]
    for name in sorted(old.keys() & new.keys() - SILENT):
        if old[name] != new[name] and old[name] is not None:
            log.warning("--%s was %s and is %s", name.replace("_", "-"), old[name], new[name])


def is_finished(step: int, samples: int, last_sample: int, last_step: float) -> bool:
    """True if a checkpoint is at the end of the run that the flags describe."""
    return step >= last_step or samples >= last_sample
