"""A checkpoint's network, ready to be sampled or to score."""

import argparse

import torch

from data.latents import IMAGE_SIZE, VAE, LatentSpace, load_vae
from energy import ENERGIES
from models import EqM, EqM_models, build_network, load_weights
from precision import Precision
from runs.checkpoint import check_written_here, load_file, network_weights
from runtime import cli
from runtime.errors import UserError


def load(args: argparse.Namespace, device: torch.device, precision: Precision) -> tuple[dict, dict, VAE | None]:
    """The checkpoint's weights, its config, and the VAE that decodes its samples if they are latents.

    Raises:
        UserError: no checkpoint, or the VAE is missing or another one than the network was trained on.
    """
    contents = load_file(args.ckpt)
    weights = network_weights(contents, args.ckpt)
    table = weights.get("y_embedder.embedding_table.weight", torch.empty(0))  # (classes and the null class, D)
    if "config" not in contents and len(table.shape) == 2 and args.model and args.vae not in (None, "none"):
        vae = load_vae(args.vae, device, precision.name == "bf16")
        return weights, published_config(args, len(table) - 1, vae.space), vae
    check_written_here(contents, args.ckpt)
    trained_on = contents["config"].get("vae") or {}
    name = args.vae or trained_on.get("name", "none")
    if (name == "none") == bool(trained_on):
        wants = f"latents of {trained_on['name']}" if trained_on else "pixels"
        raise UserError(f"{args.ckpt} was trained on {wants}, and --vae says {name}: leave it out")
    vae = load_vae(name, device, precision.name == "bf16") if name != "none" else None
    if trained_on and vae.space.fingerprint != trained_on["fingerprint"]:
        raise UserError(f"--vae {name} is another VAE than the one that {args.ckpt} was trained on")
    return weights, contents["config"], vae


def open_network(args: argparse.Namespace, device: torch.device, precision: Precision) -> tuple[EqM, dict, VAE | None]:
    """The checkpoint's network on the device in the precision, without gradients; its config, and its VAE if any.

    Raises:
        UserError: as `load`, and for a flag that contradicts the checkpoint, or weights of another network.
    """
    weights, config, vae = load(args, device, precision)
    check_flags(args, config)
    network = build_network(config["network"])
    load_weights(network, weights, args.ckpt)
    return network.requires_grad_(False).eval().to(device, precision.dtype), config, vae


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
