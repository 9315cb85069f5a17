"""What a checkpoint says of its run: made from flags and data, and checked against another run's."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import cli
import distributed
from cli import UserError
from data import Found
from energy import ENERGIES
from latents import IMAGE_SIZE, LatentSpace
from models import EqM_models, build_network
from objective import Objective
from precision import Precision


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


def check_classes(found: Found, asked: int | None) -> int:
    """The number of classes to build the network for."""
    if asked and asked < len(found.classes):
        raise UserError(f"--num-classes {asked} is less than the data's {len(found.classes)} classes")
    return asked or len(found.classes)


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


def published_config(args: argparse.Namespace, num_classes: int, space: LatentSpace) -> dict:
    """The config of a published image checkpoint, which carries none: --model, and the VAE's space, tell."""
    side = space.side(args.image_size or IMAGE_SIZE)
    network = {"model": args.model, "input_size": side, "in_channels": space.channels, "num_classes": num_classes}
    return {
        "network": network | {"temporal_patch": 1, "energy": args.ebm or "none"},
        "classes": [str(i) for i in range(num_classes)],
        "frames_per_second": None,
        "precision": {"name": "another program"},
        "vae": space.as_dict(),
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


def add_known_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `check_flags` compares with a checkpoint."""
    known = parser.add_argument_group("what the checkpoint knows, checked against it where given")
    known.add_argument("--model", choices=EqM_models, metavar="NAME")
    known.add_argument("--video", action="store_true", default=None)
    known.add_argument("--clip-len", type=cli.side)
    known.add_argument("--image-size", type=cli.side)
    known.add_argument("--num-classes", type=cli.positive_int)
    known.add_argument("--ebm", choices=ENERGIES)


def check_flags(args: argparse.Namespace, config: dict) -> None:
    """Raises UserError, with both values, where a flag contradicts the checkpoint."""
    network = config["network"]
    size, pixels = network["input_size"], (config.get("vae") or {}).get("downsampling", 1)
    video = not isinstance(size, int)
    trained = {
        "model": network["model"],
        "video": video,
        "clip_len": size[0] if video else 1,
        "image_size": (size[-1] if video else size) * pixels,
        "num_classes": network["num_classes"],
        "ebm": network.get("energy", "none"),
    }
    for name, value in trained.items():
        asked = getattr(args, name)
        if asked is not None and asked != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {asked} contradicts the checkpoint, which was trained with {value}: leave it out")


def class_names(config: dict) -> list[str]:
    """The names of all classes that the network knows; those without data are called by their index."""
    names = config["classes"]
    return names + [str(i) for i in range(len(names), config["network"]["num_classes"])]
