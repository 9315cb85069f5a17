"""A checkpoint's network, ready to be sampled or to score."""

import argparse

import torch

from checkpoint import check_written_here, load_file, load_weights, network_weights
from cli import UserError
from config import check_flags, published_config
from latents import VAE, load_vae
from models import EqM, build_network
from precision import Precision


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
