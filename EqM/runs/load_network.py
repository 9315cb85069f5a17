"""The network of a checkpoint, ready to sample, to score, or to start a training from.

In a notebook, or in a script of your own, with the folder EqM on Python's path:

    import torch
    from runs.load_network import load_network

    loaded = load_network("results/000-EqM-S-4-Linear-velocity-None/checkpoints/0001000.pt", "cuda")
    x = torch.randn(2, *loaded.network.input_shape, device="cuda")  # (2, 3, T, H, W)
    y = torch.tensor([loaded.classes.index("CircleUp")] * 2, device="cuda")
    field = loaded.network(x, torch.zeros(2, device="cuda"), y, loaded.config.seconds_per_frame)
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.latent_space import LatentSpace
from data.latents import DEFAULT_VAE_SIZE, VAE, load_vae
from energy import ENERGIES
from models import EqM, EqM_models, NetworkSettings, check_weights, load_weights
from precision import Precision, resolve_precision
from runs.checkpoint import check_written_here, is_ours, load_file, network_weights
from runs.config import Config, config_of
from runs.resume import TELLING
from runtime import cli
from runtime.errors import UserError
from runtime.plain_data import shape_of

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
    bf16 = precision.name == "bf16"
    weights = averaged_weights(contents, request.path)
    if is_published(contents, weights, request):
        vae = load_vae(request.vae, device, bf16)
        config = published_config(request, weights, vae.space)
    else:
        check_written_here(contents, request.path)
        config = config_of(contents["config"], request.path)
        vae = load_same_vae(request, config.space, device, bf16)
    check_known(request.known, config)
    check_weights(config.network.check(request.path), weights, request.path)
    network = config.network.build()
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval().to(device, precision.dtype), config, vae


@dataclass(frozen=True)
class LoadedNetwork:
    """A network for sampling, without gradients, on its device.

    Attributes:
        config: what the checkpoint says of it, such as `config.network` and `config.form`.
        classes: the names of the classes, by label. The label after the last is the null class.
        vae: decodes the latents that the network sees; None: it sees pixels in [−1, 1].
    """

    network: EqM
    config: Config
    classes: list[str]
    vae: VAE | None


def load_network(
    path: str | Path,
    device: str = "cpu",
    precision: str = "fp32",
    vae: str | None = None,
    model: str | None = None,
    image_size: int | None = None,
    ebm: str | None = None,
) -> LoadedNetwork:
    """The network with the averaged weights of a checkpoint, for notebooks and scripts.

    Args:
        device: as torch names it.
        precision: "fp32", "fp16" or "bf16". If the device cannot compute in it, the network has fp32.
        vae: "ema", "mse" or a folder; None: the VAE of the training.
        model, image_size, ebm: for a published checkpoint, which has no config: `model`, such as "EqM-XL/2", is needed
            with `vae`; `image_size` is 256 and `ebm` "none" by default.

    Raises:
        UserError: as `open_network`, with one line that says what is wrong; or there is no such model.
        RuntimeError: torch has no such device.
        ValueError: there is no such precision.
    """
    if model not in (None, *EqM_models):
        raise UserError(f"there is no model {model!r}: choose {', '.join(EqM_models)}")
    given = {"model": model, "image_size": image_size, "ebm": ebm}
    known = {name: value for name, value in given.items() if value is not None}
    request, place = CheckpointRequest(Path(path), vae, known), torch.device(device)
    network, config, decoder = open_network(request, place, resolve_precision(precision, place.type))
    return LoadedNetwork(network, config, config.class_names, decoder)


def averaged_weights(contents: dict, path: Path) -> dict[str, Tensor]:
    """The weights that sample. A checkpoint of EqM/train.py must have their average."""
    return network_weights({"ema": contents["ema"]} if is_ours(contents) else contents, path)


def start_from(network: EqM, config: Config, path: Path) -> list[str]:
    """Gives a new network the averaged weights of a checkpoint, ours or a published one.

    The table of labels begins anew, unless the checkpoint names the same classes. Positions stay those of the new
    network, whose pictures may have another size.

    Returns:
        What was loaded and what was not, for the log.

    Raises:
        UserError: there is no such checkpoint, or its network has another output, width, depth or patch.
    """
    contents = load_file(path)
    weights, fresh = averaged_weights(contents, path), network.state_dict()
    before = None
    if is_ours(contents):
        check_written_here(contents, path)
        before = config_of(contents["config"], path)
        if before.network.energy != config.network.energy:
            energies = f"{before.network.energy}, and this run has {config.network.energy}"
            raise UserError(f"--init-weights {path} was trained with --ebm {energies}: give the same")
    same_classes = before and before.class_names == config.class_names
    anew = [] if same_classes else ["y_embedder.embedding_table.weight"]
    anew += [name for name in ("pos_embed",) if name in weights and shape_of(weights[name]) != fresh[name].shape]
    try:
        load_weights(network, weights | {name: fresh[name] for name in anew}, f"--init-weights {path}")
    except UserError as error:
        raise UserError(f"{error} (size, patches, temporal patch and output must be the same)") from None
    notes = [f"--init-weights: started from the averaged weights of {path}"]
    if not same_classes:
        notes.append("--init-weights: the table of labels was not loaded, and begins anew: other or unknown classes")
    if "pos_embed" in anew:
        notes.append("--init-weights: the positions were not loaded: pictures or clips have another size")
    theirs, ours = before.kept_flags() if before else {}, config.kept_flags()
    differ = [name for name in TELLING if name in theirs and theirs[name] != ours[name] and name != "init_weights"]
    return notes + [f"--{name.replace('_', '-')} was {theirs[name]} there and is {ours[name]} here" for name in differ]


def is_published(contents: dict, weights: dict[str, Tensor], request: CheckpointRequest) -> bool:
    """True for a published image checkpoint, if the flags give what it lacks."""
    table = weights.get("y_embedder.embedding_table.weight", torch.empty(0))  # (classes and the null class, D)
    described = "model" in request.known and request.vae not in (None, "none")
    return not is_ours(contents) and table.dim() == 2 and described


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
    vae.take_space(space)
    return vae


def check_known(known: Mapping[str, object], config: Config) -> None:
    """Raises UserError, with both values, if a flag contradicts the checkpoint."""
    trained = config.kept_flags() | {"clip_len": config.form.clip_len}
    for name, asked in known.items():
        if asked != trained[name]:
            flag = f"--{name.replace('_', '-')} {asked}"
            raise UserError(f"{flag} contradicts the checkpoint, which was trained with {trained[name]}: leave it out")
