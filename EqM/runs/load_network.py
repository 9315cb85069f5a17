"""The network of a checkpoint, ready to sample or to score."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.latents import DEFAULT_VAE_SIZE, VAE, LatentSpace, load_vae
from energy import ENERGIES
from models import EqM, EqM_models, NetworkSettings, load_weights
from precision import Precision
from runs.checkpoint import check_written_here, load_file, network_weights
from runs.config import Config, config_of
from runtime import cli
from runtime.errors import UserError

KNOWN = ("model", "video", "clip_len", "image_size", "num_classes", "ebm")


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint to open, and what the flags say about it.

    Attributes:
        vae: name or folder of the VAE, or "none"; None: the VAE of the training.
        known: the given flags whose values the checkpoint knows too, by name.
    """

    path: Path
    vae: str | None
    known: Mapping[str, object]


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    """Adds --ckpt, --vae, and flags whose values the checkpoint knows too."""
    parser.add_argument("--ckpt", type=cli.path, required=True, help="a checkpoint that EqM/train.py wrote")
    parser.add_argument(
        "--vae", type=cli.given, metavar="NAME", help="ema, mse or a folder; default: the VAE of the training"
    )
    known = parser.add_argument_group("what the checkpoint knows; if given, it must agree")
    known.add_argument("--model", choices=EqM_models, metavar="NAME")
    known.add_argument("--video", action="store_true", default=None)
    known.add_argument("--clip-len", type=cli.side)
    known.add_argument("--image-size", type=cli.side)
    known.add_argument("--num-classes", type=cli.count)
    known.add_argument("--ebm", choices=ENERGIES)


def checkpoint_request_of(args: argparse.Namespace) -> CheckpointRequest:
    """The checkpoint that the flags name."""
    known = {name: getattr(args, name) for name in KNOWN if getattr(args, name) is not None}
    return CheckpointRequest(args.ckpt, args.vae, known)


def open_network(
    request: CheckpointRequest, device: torch.device, precision: Precision
) -> tuple[EqM, Config, VAE | None]:
    """The network on the device in the precision, without gradients; its config; and the VAE of its latents, or None.

    A published image checkpoint has no config. The flags --model and --vae replace it.

    Raises:
        UserError: there is no such checkpoint, a flag contradicts it, it holds the weights of another network, or
            the VAE is missing or is not the VAE of the training.
    """
    contents = load_file(request.path)
    weights = network_weights(contents, request.path)
    bf16 = precision.name == "bf16"
    if is_published(contents, weights, request):
        vae = load_vae(request.vae, device, bf16)
        config = published_config(request, weights, vae.space)
    else:
        check_written_here(contents, request.path)
        config = config_of(contents["config"], request.path)
        vae = load_same_vae(request, config.space, device, bf16)
    check_known(request.known, config)
    network = config.network.build()
    load_weights(network, weights, request.path)
    return network.requires_grad_(False).eval().to(device, precision.dtype), config, vae


def is_published(contents: dict, weights: dict[str, Tensor], request: CheckpointRequest) -> bool:
    """True for a published image checkpoint, if the flags give what it lacks."""
    table = weights.get("y_embedder.embedding_table.weight", torch.empty(0))  # (classes and the null class, D)
    described = "model" in request.known and request.vae not in (None, "none")
    return "config" not in contents and table.dim() == 2 and described


def published_config(request: CheckpointRequest, weights: dict[str, Tensor], space: LatentSpace) -> Config:
    """The config of a published image checkpoint, from the flags, the weights and the space of the VAE."""
    known, num_classes = request.known, len(weights["y_embedder.embedding_table.weight"]) - 1
    side = space.side(known.get("image_size", DEFAULT_VAE_SIZE))
    return Config(
        NetworkSettings(known["model"], side, space.channels, num_classes, energy=known.get("ebm", "none")),
        classes=tuple(map(str, range(num_classes))),
        frames_per_second=None,
        precision={"name": "another program"},
        space=space,
    )


def load_same_vae(
    request: CheckpointRequest, space: LatentSpace | None, device: torch.device, bf16: bool
) -> VAE | None:
    """The VAE whose latents a network was trained on; None for pixels.

    Raises:
        UserError: it is missing, or the flags name another one.
    """
    name = request.vae or (space.name if space else "none")
    if (name == "none") == (space is not None):
        wants = f"latents of {space.name}" if space else "pixels"
        raise UserError(f"{request.path} was trained on {wants}, and --vae says {name}: leave it out")
    if not space:
        return None
    vae = load_vae(name, device, bf16)
    if vae.space.fingerprint != space.fingerprint:
        raise UserError(f"--vae {name} is not the VAE that {request.path} was trained on")
    return vae


def check_known(known: Mapping[str, object], config: Config) -> None:
    """Raises UserError, with both values, if a flag contradicts the checkpoint."""
    trained = config.kept_flags() | {"clip_len": config.network.frames}
    for name, asked in known.items():
        if asked != trained[name]:
            flag = f"--{name.replace('_', '-')} {asked}"
            raise UserError(f"{flag} contradicts the checkpoint, which was trained with {trained[name]}: leave it out")
