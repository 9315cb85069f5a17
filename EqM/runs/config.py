"""What a checkpoint says of its run: made from flags and data, and checked against another run's."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from data.latents import LatentSpace
from data.scan import Found
from models import build_network
from objective import Objective
from precision import Precision
from runtime import distributed
from runtime.errors import UserError


def network_settings(args: argparse.Namespace, image_size: int, num_classes: int, space: LatentSpace | None) -> dict:
    """The network's settings, as checkpoints keep them; `image_size` in pixels.

    Raises:
        UserError: sizes that do not divide.
    """
    side, channels = (space.side(image_size), space.channels) if space else (image_size, 3)
    settings = {
        "model": args.model,
        "input_size": (args.clip_len, side, side) if args.video else side,
        "in_channels": channels,
        "num_classes": num_classes,
        "temporal_patch": (args.temporal_patch or (1 if args.clip_len % 2 else 2)) if args.video else 1,
        "uncond": args.uncond,
        "energy": args.ebm,
    }
    try:
        with torch.device("meta"):
            build_network(settings)
    except ValueError as error:
        raise UserError(f"{args.model}: {error}") from None
    return settings


def make_config(
    args: argparse.Namespace,
    settings: dict,
    objective: Objective,
    found: Found,
    precision: Precision,
    batch: int,
    space: LatentSpace | None,
) -> dict:
    """What a checkpoint says of its run, as plain data."""
    rate = found.mean_frame_rate() / args.frame_interval if args.video else None
    return {
        "network": settings,
        "objective": asdict(objective),
        "classes": list(found.classes),
        "frames_per_second": rate,
        "precision": precision.as_dict(),
        "vae": space.as_dict() if space else None,
        "global_batch_size": batch,
        "processes": distributed.world_size(),
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
    }


def check_resumable(saved: dict, config: dict, path: Path) -> None:
    """Raises UserError, with both values, where a checkpoint does not fit the flags or the data."""

    def described(config: dict) -> dict:
        # Older checkpoints do not say what was the same for all.
        objective = asdict(Objective(**config.get("objective", {})))
        return {
            **{"uncond": True, "energy": "none"},
            **config["network"],
            **{f"the objective's {key}": value for key, value in objective.items()},
            "classes": config["classes"],
            "vae": (config.get("vae") or {}).get("fingerprint"),
        }

    ours, theirs = described(config), described(saved["config"])
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(f"{path} was trained with {key} {theirs.get(key)}, and this run has {value}")
