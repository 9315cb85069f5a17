"""Checkpoints: one file of plain data that torch.load(..., weights_only=True) reads, with a checksum over every byte.

torch writes a zip archive. A flipped bit in it can load as another number without an error. So the archive's comment,
which readers ignore, holds a checksum: the seal.
"""

import argparse
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from runs.config import config_of
from runs.saved_state import check_saved_state
from runtime.errors import UserError, is_out_of_memory
from runtime.files import file_checksum, open_regular, write_whole
from runtime.plain_data import brief_names

REQUIRED_KEYS = {"model", "ema", "opt", "scaler", "step", "skipped", "epoch", "samples", "config"}
REQUIRED_KEYS |= {"since_log", "bad_steps"}
REQUIRED_CONFIG = {"network", "classes", "frames_per_second", "precision"}
# What DistributedDataParallel and torch.compile put before parameter names.
WRAPPER_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
END_OF_ARCHIVE, END_BYTES = b"PK\5\6", 22  # start and size of a zip archive's last record, without a comment
SEAL = b"EqM crc32 %08x"
SEAL_BYTES = len(SEAL % 0)


def save_checkpoint(path: Path, contents: dict) -> None:
    """Writes a checkpoint with its seal, completely or not at all.

    Raises:
        OSError, RuntimeError: the disk is full, read-only or gone.
    """

    def write(temporary: Path) -> None:
        torch.save(contents, temporary)
        seal(temporary)

    write_whole(path, write)


def seal(path: Path) -> None:
    """Adds the checksum to a file of torch.save. A zip archive ends with its comment, after the comment's length.

    Raises:
        OSError: the archive is not complete.
    """
    with path.open("r+b") as file:
        file.seek(-END_BYTES, 2)
        if not file.read().startswith(END_OF_ARCHIVE):
            raise OSError("the archive is not whole")
        file.seek(-2, 2)
        file.write(SEAL_BYTES.to_bytes(2, "little"))
    checksum = file_checksum(path)
    with path.open("ab") as file:
        file.write(SEAL % checksum)


def is_sealed(path: Path) -> bool:
    """True for a file with a seal, False for one without.

    Raises:
        UserError: the seal does not match the bytes: the file has changed.
    """
    with open_regular(path) as file:
        length = file.seek(0, 2) - SEAL_BYTES
        file.seek(max(length, 0))
        found = file.read()
    if not found.startswith(SEAL[: SEAL.index(b"%")]):
        return False
    if found != SEAL % file_checksum(path, length):
        raise UserError(f"{path} has changed since it was written: give another checkpoint")
    return True


def load_file(path: Path) -> dict:
    """The contents, on the CPU, of a checkpoint file: ours, a published one or a bare state dict.

    Published checkpoints hold flags of argparse. Beside plain data, only their type is allowed.

    Raises:
        UserError: the file is missing, cut short, changed, or no checkpoint.
    """
    try:
        sealed = is_sealed(path)
    except OSError as error:
        advice = "give the path of a .pt file that EqM/train.py wrote"
        raise UserError(f"no checkpoint {path} can be read ({error.strerror}): {advice}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the format of files that are refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many types
        if is_out_of_memory(error):
            raise
        refused = refused_types(path)
        if refused:
            what = f"other objects than plain data, of the types {brief_names(refused)}"
            raise UserError(f"{path} holds {what}: save its weights alone, in a dict of tensors") from None
        raise UserError(f"{path} is cut short or is no checkpoint: give another one") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(contents).__name__}")
    if is_ours(contents) and not sealed:
        raise UserError(f"{path} is cut short or has been changed, its checksum is missing: give another one")
    return contents


def refused_types(path: Path) -> list[str]:
    """The types in a whole file of torch.save that are not plain data. None of their code runs."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged bytes raise errors of many types
        return []


def is_ours(contents: dict) -> bool:
    """True if a file has the parts of a checkpoint that EqM/train.py wrote."""
    return contents.keys() >= REQUIRED_KEYS


def load_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint that EqM/train.py wrote.

    Raises:
        UserError: as `load_file`, and for a checkpoint of another program or version.
    """
    contents = load_file(path)
    check_written_here(contents, path)
    check_saved_state(contents, config_of(contents["config"], path).network, path)
    return contents


def check_written_here(contents: dict, path: Path) -> None:
    """Raises UserError if a file's contents are not those of a checkpoint that EqM/train.py wrote."""
    missing = REQUIRED_KEYS - contents.keys()
    if not missing:
        config = contents["config"]
        missing = REQUIRED_CONFIG - (config.keys() if isinstance(config, dict) else set())
    if missing:
        missing = "config" if "config" in missing else ", ".join(sorted(missing))
        advice = "to sample a published one, give --model, and --vae ema or mse"
        found = f"it has no {missing}, but {brief_names(contents)}"
        raise UserError(f"{path} was not written by EqM/train.py: {found} ({advice})")


def network_weights(contents: dict, source: str | Path) -> dict[str, Tensor]:
    """The EMA weights, else the model's weights, else the dict itself, without wrapper prefixes.

    Raises:
        UserError: the contents of `source` are not a network's weights.
    """
    place = next((name for name in ("ema", "model") if contents.get(name) is not None), "")
    weights = contents[place] if place else contents
    entries = weights.items() if isinstance(weights, dict) else ()
    if not entries or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        found = f"{place} is no dict of tensors" if place else f"neither ema nor model, but {brief_names(contents)}"
        raise UserError(f"{source} holds no network's weights ({found}): give a checkpoint of an EqM network")
    return {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in weights.items()}
