"""The networks by name, the settings that a network is built from, and its weights."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from energy import ENERGIES
from models import EqM
from positions import POSITIONS
from runtime import cli
from runtime.errors import UserError, first_line
from runtime.plain_data import check_tensors, one_of, shape_of
from runtime.size import ImageSize, size_of

EqM_sizes = {
    "Ti": {"depth": 6, "hidden_size": 128, "num_heads": 2},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
EqM_models = {
    f"EqM-{size}/{patch}": partial(EqM, patch_size=patch, **shape)
    for size, shape in EqM_sizes.items()
    for patch in (2, 4, 8, 16, 32)
}
Side = Annotated[int, cli.side]


def add_model_args(group: argparse._ActionsContainer) -> None:
    """Adds the flags of the network's size, classes and positions."""
    sizes = "EqM-{Ti,S,B,L,XL}/{2,4,8,16,32}: size and patch"
    cli.add_kept(group, "--model", "EqM-XL/2", choices=EqM_models, metavar="NAME", help=sizes)
    cli.add_kept(group, "--num-classes", type=cli.count, help="at least the data's count, which is the default")
    frames = "frames of a token; default 2 if that divides the clip, else 1"
    cli.add_kept(group, "--temporal-patch", type=cli.side, help=frames)
    rotary = "rotary: in every attention, so that one network takes clips and images of any length and size"
    cli.add_kept(group, "--positions", "fixed", choices=POSITIONS, help=rotary)


class UndrawnWeights(TorchFunctionMode):
    """Within it weights are not drawn: they stay as memory has them.

    Values that are replaced at once need not be drawn. On the meta device that would also import torch's compiler.
    """

    def __torch_function__(self, func: Callable, types: Sequence, given: Sequence = (), named: dict | None = None):
        named = named or {}
        if func.__name__.endswith(("uniform_", "normal_")):
            return given[0] if given else named["tensor"]
        return func(*given, **named)


@dataclass(frozen=True)
class NetworkSettings:
    """The settings that a network is built from, as checkpoints keep them: `model` names the size, EqM has the rest.

    A default is what a checkpoint without this key means. It must never change.
    """

    model: Annotated[str, one_of(EqM_models)]
    input_size: Side | tuple[Side, Side] | tuple[Side, Side, Side]
    in_channels: Annotated[int, cli.positive_int]
    num_classes: Annotated[int, cli.positive_int]
    temporal_patch: Annotated[int, cli.positive_int] = 1
    uncond: bool = True
    energy: Annotated[str, one_of(ENERGIES)] = "none"
    clip_gain: Annotated[float, cli.non_negative_float] = 0.0
    positions: Annotated[str, one_of(POSITIONS)] = "fixed"
    clip_a: Annotated[float, cli.fraction] = 0.0
    clip_b: Annotated[float, cli.positive_float] = 1.0

    @property
    def is_video(self) -> bool:
        return not isinstance(self.input_size, int) and len(self.input_size) == 3

    @property
    def frames(self) -> int:
        """Frames of a clip; 1 for images."""
        return self.input_size[0] if self.is_video else 1

    @property
    def size(self) -> ImageSize:
        """Height and width of the input, in pixels or latents."""
        return self.input_size if isinstance(self.input_size, int) else size_of(*self.input_size[-2:])

    def build(self, drawn: bool = True) -> EqM:
        """The network, with new weights.

        Args:
            drawn: False: weights have no values yet. Those of a checkpoint are to be loaded.

        Raises:
            UserError: sizes do not divide.
        """
        settings = asdict(self)
        try:
            with nullcontext() if drawn else UndrawnWeights():
                return EqM_models[settings.pop("model")](**settings)
        except ValueError as error:
            raise UserError(f"{self.model}: {error}") from None

    def check(self, source: str | Path = "") -> EqM:
        """The network on the meta device, where it takes no memory. Its weights have no values.

        Raises:
            UserError: sizes do not divide, or are too large for any tensor. The text names the file `source`.
        """
        start = f"{source}: " if source else ""
        try:
            with torch.device("meta"):
                return self.build(drawn=False)
        except UserError as error:
            raise UserError(f"{start}{error}") from None
        except (RuntimeError, OverflowError) as error:
            sizes = f"num_classes {self.num_classes}, input_size {self.input_size}"
            raise UserError(f"{start}{self.model} cannot have {sizes}: {first_line(error)}") from None


def check_weights(network: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError as `check_tensors` if a state dict from `source` is not one of this network."""
    check_tensors({name: shape_of(tensor) for name, tensor in network.state_dict().items()}, weights, source)


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads a state dict, which came from `source`. Raises UserError as `check_weights`."""
    check_weights(network, weights, source)
    network.load_state_dict(weights)
