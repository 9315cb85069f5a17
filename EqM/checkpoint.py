"""Checkpoints: one file of plain data that torch.load(..., weights_only=True) reads."""

import argparse
import os
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import UserError, is_out_of_memory

REQUIRED_KEYS = {"model", "ema", "opt", "scaler", "step", "skipped", "epoch", "samples", "config"}
REQUIRED_CONFIG = {"network", "classes", "frames_per_second", "precision"}
# What DistributedDataParallel and torch.compile put before parameter names.
WRAPPER_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")


def save_checkpoint(path: Path, contents: dict) -> None:
    """Writes a checkpoint whole or not at all: to a temporary name, to the disk, then renamed."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_file(path: Path) -> dict:
    """The contents of a checkpoint file on the CPU: ours, a published one or a bare state dict.

    Published checkpoints carry an argparse.Namespace, the one type allowed beside plain data.

    Raises:
        UserError: no such file, cut short, or not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: give the path of a .pt file that EqM/train.py wrote")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the format of files that are refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a reader of any bytes may raise has no common type
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is cut short or is no checkpoint: give another one") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(contents).__name__}")
    return contents


def load_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint that EqM/train.py wrote.

    Raises:
        UserError: as `load_file`, and for a checkpoint of another program.
    """
    contents = load_file(path)
    missing = REQUIRED_KEYS - contents.keys()
    if not missing:
        config = contents["config"]
        missing = REQUIRED_CONFIG - (config.keys() if isinstance(config, dict) else set())
    if missing:
        missing = ", ".join(sorted(missing))
        advice = "to sample a published one, give --model and --vae"
        raise UserError(f"{path} was not written by EqM/train.py: it has no {missing} ({advice})")
    return contents


def network_weights(contents: dict) -> dict[str, Tensor]:
    """The EMA weights if there are any, else the model's, or the dict itself, without wrapper prefixes."""
    weights = contents.get("ema") or contents.get("model") or contents
    return {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in weights.items()}


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads a state dict strictly.

    Raises:
        UserError: names or shapes differ; the text gives the first difference.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name, "nothing"), found.get(name, "nothing")
        if ours != theirs:
            raise UserError(f"{source} holds another network: {name} is {theirs} there and {ours} here")
    network.load_state_dict(weights)
