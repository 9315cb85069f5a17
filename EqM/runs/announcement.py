"""What the log says of a run before its first step."""

import math
from pathlib import Path

import torch

from data.source import Source
from models import EqM
from precision import log_precision
from runs.config import Config
from runs.new_config import network_frames
from runtime import distributed
from runtime.errors import UserError
from runtime.logs import device_name, log, start_log
from state import TrainingState


def announce(config: Config, state: TrainingState, source: Source, batch: int, by_default: bool) -> None:
    """Writes the log's first lines."""
    where = device_name(state.device)
    log.info("device: %s, %d process(es), torch %s", where, distributed.world_size(), torch.__version__)
    log_precision(state.precision)
    parameters = sum(p.numel() for p in state.working.parameters())
    log.info("model: %s, %s parameters", config.network.model, f"{parameters:,}")
    source.announce()
    frames = network_frames(source.form, source.space)
    tokens = [state.working.num_tokens * count // config.network.frames for count in frames]
    log.info("tokens per sample: %s", ", ".join(map(str, tokens)))
    warn_of_wide_tokens(state.working)
    note = " (the default on a CPU; on a GPU 256)" if by_default and state.device.type == "cpu" else ""
    log.info("batch: %d%s, %d per rank", batch, note, batch // distributed.world_size())


def warn_of_wide_tokens(network: EqM) -> None:
    """Warns if tokens are as wide as a network that puts out the field. docs/quality.md has what they cost."""
    width, *shape = network.x_embedder.proj.weight.shape
    numbers = math.prod(shape)  # of a token
    if not network.clip_output and numbers >= width:
        log.warning(
            "a token holds %d numbers, and the network is %d wide: it can hardly put out the noise that the field"
            " needs; take --predict clip, a smaller patch or a larger network",
            numbers,
            width,
        )


def report_finished(folder: Path | None, step: int) -> None:
    """Says that there is nothing left to do.

    Raises:
        UserError: --ckpt asked to train on.
    """
    if not folder:
        raise UserError(f"--ckpt is at step {step}, the end of --max-steps or --epochs: raise them to train on")
    start_log()
    log.info("finished: %s is at step %d, the end of --max-steps or --epochs", folder, step)
    distributed.stop()
