"""What a checkpoint says of the state of a training, checked when it is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from network_settings import NetworkSettings, check_weights
from runtime import cli
from runtime.errors import UserError
from runtime.plain_data import check_tensors, read_as, shape_of
from sharding import plain_size, trainable

# Flags have narrower ranges than what grows during a training.
Count = Annotated[int, cli.checked(int, lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1")]
Factor = Annotated[float, cli.checked(float, lambda v: 0 < v < math.inf, "a number above 0")]


@dataclass(frozen=True)
class SavedScaler:
    """The state of an enabled torch.amp.GradScaler."""

    scale: Factor
    growth_factor: Factor
    backoff_factor: Factor
    growth_interval: Annotated[int, cli.positive_int]
    _growth_tracker: Count


@dataclass(frozen=True)
class NoScaler:
    """The state of a disabled one."""


@dataclass(frozen=True)
class SinceLog:
    """What has been summed since the last line of metrics."""

    sums: Tensor
    largest_norm: Tensor


@dataclass(frozen=True)
class SavedState:
    """The contents of a checkpoint: `TrainingState.assemble`, the epoch and the config."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    opt: dict[str, Tensor]
    scaler: NoScaler | SavedScaler
    since_log: SinceLog
    bad_steps: Tensor
    step: Count
    skipped: Count
    samples: Count
    epoch: Count
    config: dict


def check_saved_state(contents: dict, settings: NetworkSettings, source: str | Path) -> None:
    """Raises UserError if a training with such a network cannot go on from the contents of the checkpoint `source`."""
    try:
        saved = read_as(SavedState, contents)
    except ValueError as error:
        raise UserError(f"no training can go on from {source}: {error}") from None
    network = settings.check(source)
    for weights in (saved.model, saved.ema):
        check_weights(network, weights, source)
    if saved.opt or saved.step:  # before the first update there is no optimizer's state
        size = (plain_size(trainable(network)),)
        shapes = {"step": (), "exp_avg": size, "exp_avg_sq": size}
        if {name: shape_of(tensor) for name, tensor in saved.opt.items()} != shapes:
            raise UserError(
                f"{source} holds another optimizer's state: it can be sampled, but no training can go on from it"
            )
    # A loss can be infinite where its gradient is finite.
    check_tensors({"sums": (3,)}, {"sums": saved.since_log.sums}, source, finite=False)
    others = {**saved.opt, "largest_norm": saved.since_log.largest_norm, "bad_steps": saved.bad_steps}
    shapes = {name: shape_of(tensor) for name, tensor in saved.opt.items()}
    check_tensors(shapes | {"largest_norm": (), "bad_steps": (2,)}, others, source)
    for name in others.keys() - {"exp_avg"}:
        if others[name].min() < 0:
            raise UserError(f"no training can go on from {source}: {name} holds numbers below 0")
    others["sums"] = saved.since_log.sums
    for name, tensor in (*saved.model.items(), *saved.ema.items(), *others.items()):
        if tensor.dtype != torch.float32:
            raise UserError(f"no training can go on from {source}: {name} holds {tensor.dtype}, not torch.float32")
