"""The network of a checkpoint, or of other programs, ready to sample, to score, or to start a training from.

In a notebook, or in a script of your own, with the folder EqM on Python's path:

    import torch
    from runs.load_network import load_network

    loaded = load_network("results/000-EqM-S-4-Linear-velocity-None/checkpoints/0001000.pt", "cuda")
    x = torch.randn(2, *loaded.network.input_shape, device="cuda")  # (2, 3, T, H, W)
    y = torch.tensor([loaded.classes.index("CircleUp")] * 2, device="cuda")
    field = loaded.network(x, torch.zeros(2, device="cuda"), y, loaded.config.seconds_per_frame)

In place of the checkpoint may stand a folder of EqM/export.py, or its id user/name on the Hugging Face hub.
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
from models import EqM
from network_settings import EqM_models, NetworkSettings, check_weights
from objective import Objective
from precision import Precision, resolve_precision
from runs.checkpoint import check_written_here, is_ours, load_file, network_weights
from runs.config import Config, config_of
from runs.exchange import find_place, is_exchanged, read_exchanged
from runtime import cli
from runtime.errors import UserError
from runtime.plain_data import shape_of
from runtime.size import SIZE_HELP, ImageSize

KNOWN = ("model", "video", "clip_len", "image_size", "num_classes", "ebm")
TABLE = "y_embedder.embedding_table.weight"
# What published image checkpoints were trained for. All have the same names of weights. Whether the network sees γ, and
# its objective. SiT learns the velocity of the Linear path from noise at 0 to data at 1 (arXiv 2401.08740): c(γ) = 1.
PUBLISHED = {"eqm": (True, Objective()), "sit": (False, Objective(schedule="constant", scale=1.0))}


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint to open, and what the flags say about it.

    Attributes:
        vae: name or folder of the VAE, or "none"; None: the VAE of the training.
        known: the given flags whose values the checkpoint knows too, by name.
        published: one of PUBLISHED; None: not said.
    """

    path: Path
    vae: str | None
    known: Mapping[str, object]
    published: str | None = None


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    """Adds --ckpt, --vae, --published, and flags whose values the checkpoint knows too."""
    parser.add_argument(
        "--ckpt",
        type=cli.path,
        required=True,
        help="a checkpoint of EqM/train.py; a folder of EqM/export.py, or its id user/name on the Hugging Face hub;"
        " a .safetensors file; or a published .pt file",
    )
    parser.add_argument(
        "--vae", type=cli.given, metavar="NAME", help="ema, mse or a folder; default: the VAE of the training"
    )
    parser.add_argument(
        "--published",
        choices=PUBLISHED,
        help="what a published checkpoint was trained for: eqm (the default), or sit, whose network sees γ",
    )
    known = parser.add_argument_group("what the checkpoint knows; if given, it must agree")
    known.add_argument("--model", choices=EqM_models, metavar="NAME")
    known.add_argument("--video", action="store_true", default=None)
    rotary = "a network with --positions rotary takes any"
    known.add_argument("--clip-len", type=cli.side, help=f"frames of a clip; {rotary}")
    known.add_argument("--image-size", type=cli.size, help=f"{SIZE_HELP}; {rotary}")
    known.add_argument("--num-classes", type=cli.count)
    known.add_argument("--ebm", choices=ENERGIES)


def checkpoint_request_of(args: argparse.Namespace) -> CheckpointRequest:
    """The checkpoint that the flags name."""
    known = {name: getattr(args, name) for name in KNOWN if getattr(args, name) is not None}
    return CheckpointRequest(args.ckpt, args.vae, known, args.published)


def open_network(
    request: CheckpointRequest, device: torch.device, precision: Precision
) -> tuple[EqM, Config, VAE | None]:
    """The network on the device in the precision, without gradients; its config; and the VAE of its latents, or None.

    A published image checkpoint has no config. The flags --model and --vae replace it. A network with rotary positions
    is opened for the length and the size that the flags ask for, and so are its config and the form of its data.

    Raises:
        UserError: there is no such checkpoint, a flag contradicts it, it holds the weights of another network, or
            the VAE is missing or is not the VAE of the training.
    """
    weights, config, contents = read_stored(request.path)
    bf16 = precision.name == "bf16"
    if config:
        if request.published:
            raise UserError(f"--published is for weights without a config, and {request.path} has one: leave it out")
        vae = load_same_vae(request, config.space, device, bf16)
    else:
        check_described(request, contents)
        vae = load_vae(request.vae, device, bf16)
        config = published_config(request, weights, vae.space)
    config = of_asked_size(request.known, config)
    check_known(request.known, config)
    check_weights(config.network.check(request.path), weights, request.path)
    network = config.network.build(drawn=False)
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
    image_size: ImageSize | None = None,
    ebm: str | None = None,
    published: str | None = None,
    clip_len: int | None = None,
) -> LoadedNetwork:
    """The network with the averaged weights of a checkpoint, for notebooks and scripts.

    Args:
        path: a checkpoint, a folder of EqM/export.py, its id user/name on the Hugging Face hub, or published weights.
        device: as torch names it.
        precision: "fp32", "fp16" or "bf16". If the device cannot compute in it, the network has fp32.
        vae: "ema", "mse" or a folder; None: the VAE of the training.
        model, image_size, ebm, published: for a published checkpoint, which has no config: `model`, such as "EqM-XL/2",
            is needed with `vae`; `image_size` is 256, `ebm` "none" and `published` "eqm" by default.
        clip_len, image_size: what a network with rotary positions is opened for; None: as in its training.

    Raises:
        UserError: as `open_network`, with one line that says what is wrong; or there is no such model.
        RuntimeError: torch has no such device.
        ValueError: there is no such precision.
    """
    if model not in (None, *EqM_models):
        raise UserError(f"there is no model {model!r}: choose {', '.join(EqM_models)}")
    if published not in (None, *PUBLISHED):
        raise UserError(f"there is no published {published!r}: choose {', '.join(PUBLISHED)}")
    given = {"model": model, "image_size": image_size, "ebm": ebm, "clip_len": clip_len}
    known = {name: value for name, value in given.items() if value is not None}
    request, place = CheckpointRequest(Path(path), vae, known, published), torch.device(device)
    network, config, decoder = open_network(request, place, resolve_precision(precision, place.type))
    return LoadedNetwork(network, config, config.class_names, decoder)


def read_stored(path: Path) -> tuple[dict[str, Tensor], Config | None, dict]:
    """The weights that sample, on the CPU; the config of their training, if there is one; and what holds the weights.

    A checkpoint of EqM/train.py must have averaged weights. Files of torch.save are read as plain data.

    Raises:
        UserError: there is no such file, folder or id of the hub, or it is damaged or holds something else.
    """
    place = find_place(path)
    if is_exchanged(place):
        weights, config = read_exchanged(place)
        return weights, config, weights
    contents = load_file(place)
    if not is_ours(contents):
        return network_weights(contents, place), None, contents
    weights = network_weights({"ema": contents["ema"]}, place)
    check_written_here(contents, place)
    return weights, config_of(contents["config"], place), contents


def check_described(request: CheckpointRequest, contents: dict) -> None:
    """Raises UserError if the flags do not give what contents without a config lack: the model and the VAE."""
    if "model" in request.known and request.vae not in (None, "none"):
        return
    if request.path.suffix == ".safetensors":
        advice = "put it there, or, for published weights, give --model, and --vae ema or mse"
        raise UserError(f"{request.path} has no config.json beside it: {advice}")
    check_written_here(contents, request.path)


def published_config(request: CheckpointRequest, weights: dict[str, Tensor], space: LatentSpace) -> Config:
    """The config of a published image checkpoint, from the flags, the weights and the space of the VAE.

    Raises:
        UserError: the weights have no table of labels, or the image is to be one that is not square.
    """
    shape = shape_of(weights[TABLE]) if TABLE in weights else ()  # (classes and the null class, D)
    if len(shape) != 2 or not 1 < shape[0] <= cli.MAX_COUNT:
        raise UserError(f"{request.path} holds no published network: {TABLE} is missing, or no table of labels")
    known, num_classes, (uncond, objective) = request.known, shape[0] - 1, PUBLISHED[request.published or "eqm"]
    size, energy = space.size(known.get("image_size", DEFAULT_VAE_SIZE)), known.get("ebm", "none")
    if not isinstance(size, int):
        raise UserError(f"--image-size {known['image_size']}: published networks take square images: give one number")
    return Config(
        NetworkSettings(known["model"], size, space.channels, num_classes, uncond=uncond, energy=energy),
        classes=tuple(map(str, range(num_classes))),
        frames_per_second=None,
        precision={"name": "another program"},
        objective=objective,
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


def of_asked_size(known: Mapping[str, object], config: Config) -> Config:
    """The config for the length and the size that the flags ask for, if the network takes others than its training's.

    Raises:
        UserError: the patches or the VAE do not take this size.
    """
    clip_len = known.get("clip_len") if config.network.is_video else None
    asked = clip_len, known.get("image_size")
    return config.of_size(*asked) if config.network.positions == "rotary" and any(asked) else config


def check_known(known: Mapping[str, object], config: Config) -> None:
    """Raises UserError, with both values, if a flag contradicts the checkpoint."""
    trained = config.kept_flags() | {"clip_len": config.form.clip_len}
    for name, asked in known.items():
        if asked != trained[name]:
            flag = f"--{name.replace('_', '-')} {asked}"
            raise UserError(f"{flag} contradicts the checkpoint, which was trained with {trained[name]}: leave it out")
