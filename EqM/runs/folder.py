"""The folders of training runs."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import UserError
from runtime.files import write_whole


def run_folders(results_dir: Path) -> list[Path]:
    """The folders of all runs, the newest last."""
    number = re.compile(r"(\d+)-EqM-.+-velocity-None")
    found = [(int(match[1]), path) for path in results_dir.glob("*") if (match := number.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def run_name(model: str, path_type: str) -> str:
    """The name of a run after its number."""
    return f"{model.replace('/', '-')}-{path_type}-velocity-None"


def create_run_folder(results_dir: Path, model: str, path_type: str = "Linear") -> Path:
    """Makes and returns the next numbered folder, for example 027-EqM-S-4-Linear-velocity-None.

    Making a folder is atomic, so two runs that start at the same time get two numbers.

    Raises:
        UserError: the folder cannot be written.
    """
    name = run_name(model, path_type)
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = [int(n[0]) for path in results_dir.iterdir() if (n := re.findall(r"^\d+(?=-)", path.name))]
            folder = results_dir / f"{max(numbers, default=-1) + 1:03d}-{name}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            (folder / "checkpoints").mkdir()
            return folder
    except OSError as error:
        raise UserError(f"--results-dir {results_dir} cannot be written: {error.strerror}") from None


@contextmanager
def one_at_a_time(results_dir: Path) -> Iterator[None]:
    """Lets one process at a time make a run's folder. Network disks without locks let everyone in.

    Raises:
        UserError: the folder of the runs cannot be made.
    """
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(results_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--results-dir {results_dir} cannot be written: {error.strerror}") from None
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_config(folder: Path, config: dict) -> None:
    """Writes config.json.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        write_whole(folder / "config.json", lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
