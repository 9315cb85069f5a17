"""The data, the network and the config of a run, from the flags."""

import argparse
from dataclasses import asdict

import torch

from data.form import Form
from data.latent_space import LatentSpace
from data.packs.pack import Pack
from data.source import Source, class_count, form_of, open_source, open_space
from network_settings import NetworkSettings
from objective import objective_of
from precision import Precision
from runs.config import Config
from runtime import distributed
from runtime.errors import UserError


def network_of(args: argparse.Namespace, form: Form, space: LatentSpace | None, num_classes: int) -> NetworkSettings:
    """The settings of the network that the flags ask for.

    Raises:
        UserError: sizes do not divide, or there is one token in time where there should be several.
    """
    sizes, channels = [each.input_size(space) for each in form.forms], space.channels if space else 3
    frames = network_frames(form, space)
    temporal_patch = (args.temporal_patch or (1 if any(count % 2 for count in frames) else 2)) if form.video else 1
    if args.gamma_per_frame and frames[0] // temporal_patch < 2:
        raise UserError(
            f"--gamma-per-frame needs two tokens in time, and {frames[0]} frames in patches of {temporal_patch} are"
            " one: raise --clip-len, or lower --temporal-patch"
        )
    clip = asdict(objective_of(args).clip_output) if args.predict == "clip" else {}
    seen = {"uncond": args.uncond, "energy": args.ebm, "positions": args.positions}
    seen |= {f"clip_{name}": value for name, value in clip.items()}
    for size in sizes:
        settings = NetworkSettings(args.model, size, channels, num_classes, temporal_patch, **seen)
        settings.check()
    return settings


def network_frames(form: Form, space: LatentSpace | None) -> list[int]:
    """The frames that a network sees of clips of each length, as pixels or latents, ascending; [1] for images.

    Raises:
        UserError: the VAE takes no clip of a length.
    """
    return [each.input_size(space)[0] for each in form.forms] if form.video else [1]


def source_of(
    args: argparse.Namespace,
    pack: Pack | None,
    before: LatentSpace | None,
    device: torch.device,
    precision: Precision,
) -> Source:
    """What --data-path names, in the form that the flags ask for. Every rank must call it.

    Args:
        before: the space of the latents of the run that goes on.

    Raises:
        UserError: there is nothing in this form, or no network fits it.
    """
    form = form_of(args, pack)
    space, vae = open_space(pack, args.vae, device, precision, before)
    network_of(args, form, space, num_classes=1)  # a wrong size ends the run before a long scan
    return open_source(args.data_path, form, pack, space, vae)


def new_config_of(
    args: argparse.Namespace, source: Source, precision: Precision, batch: int, least_classes: int
) -> Config:
    """What the run's checkpoints say of it. A checkpoint's network knows at least `least_classes` classes."""
    form, found = source.form, source.found
    classes = class_count(found, args.num_classes or max(least_classes, len(found.classes)))
    network = network_of(args, form, source.space, classes)
    rate = found.mean_frame_rate() / form.frame_interval if form.video else None
    objective, ranks, counts = objective_of(args), distributed.world_size(), tuple(found.count_by_class())
    settings = (network, found.classes, rate, precision.as_dict(), objective, source.space, batch, ranks, vars(args))
    return Config(*settings, counts)
