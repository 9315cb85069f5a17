"""What samples show, one class or a sum of classes, and where they start."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.latents import VAE
from runs.config import Config
from runtime.errors import UserError
from sampling.method import Method
from sampling.starts import StartRequest, Starts, add_start_args, check_start_args, choose_starts, start_request_of
from sampling.windows import Windows, add_window_args, check_window_args, choose_windows

NO_CLASS = "none"  # asks for the null class, unless a class has this name


@dataclass(frozen=True)
class PlanRequest:
    """What samples are to show and where they are to start, as people write it.

    Attributes:
        start: where samples start.
        classes: names or indices, or NO_CLASS. Empty: the classes of the files that samples start from, or all classes.
        compose: a sum of classes, as parse_sum reads it.
        frames: of a long video; None: as many as the network sees at once.
        overlap: of its windows, in frames; None: the default.
    """

    start: StartRequest
    classes: tuple[str, ...] = ()
    compose: str | None = None
    frames: int | None = None
    overlap: int | None = None


def add_plan_args(parser: argparse.ArgumentParser) -> None:
    """Adds --class, --compose, and the flags of where samples start."""
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="CLASS",
        help="name or index of a class, or none for samples without a class; repeat it for more classes;"
        " default: all classes in turn",
    )
    parser.add_argument("--compose", metavar="SUM", help='adds the fields of classes, as "A + 0.5*B - 0.3*C"')
    add_start_args(parser)
    add_window_args(parser.add_argument_group("long videos"))


def check_plan_args(args: argparse.Namespace) -> None:
    """Raises UserError if flags contradict each other."""
    if args.classes and args.compose is not None:
        raise UserError("--class and --compose both say what samples show: give one of them")
    check_start_args(args)
    check_window_args(args)


def plan_request_of(args: argparse.Namespace) -> PlanRequest:
    """What the flags ask for."""
    return PlanRequest(start_request_of(args), tuple(args.classes or ()), args.compose, args.frames, args.overlap)


@dataclass(frozen=True)
class Plan:
    """What samples show and where they start.

    Sample i shows classes[i % len(classes)]. If `terms` is set, every sample shows that sum, and `classes` holds
    only the null class.

    Attributes:
        classes: labels.
        terms: (weight, label) of a sum.
        starts: where samples start.
        names: what people call a sample, by its label. The last is the name of the null class.
        windows: of long videos; None: samples are as long as the network sees them.
    """

    classes: list[int]
    terms: list[tuple[float, int]]
    starts: Starts
    names: tuple[str, ...] = ()
    windows: Windows | None = None

    def label(self, sample: int) -> int:
        return self.classes[sample % len(self.classes)]

    def labels(self, samples: Sequence[int]) -> Tensor:
        """The classes of samples (N,), on the host: so nothing waits for a GPU to know them."""
        return torch.tensor([self.label(i) for i in samples])

    def caption(self, sample: int) -> str:
        """The name of what a sample shows."""
        return self.names[self.label(sample)]

    @property
    def weights(self) -> list[float]:
        """The weights of the fields that are added."""
        return [weight for weight, _ in self.terms] or [1.0]

    def rows(self, y: Tensor) -> Tensor:
        """The classes whose fields are added for samples of classes y (N,): (K, N)."""
        return torch.stack([torch.full_like(y, label) for _, label in self.terms] or [y])


def make_plan(request: PlanRequest, method: Method, config: Config, shape: tuple[int, ...], vae: VAE | None) -> Plan:
    """The plan for samples of a network.

    Args:
        config: of the network.
        shape: of one sample, (C, H, W) or (C, T, H, W).
        vae: encodes files for samples that are latents.

    Raises:
        UserError: an unknown class, no sum, no file to start from, no windows, or a network that the method cannot
            sample.
    """
    if method.sampler != "euler" and not config.network.uncond:
        raise UserError(
            "the checkpoint was trained with --no-uncond: its field depends on γ, and gradient descent has no γ:"
            " add --sampler euler"
        )
    names = config.class_names
    terms = parse_sum(request.compose, names) if request.compose is not None else []
    asked = [asked_label(text, names) for text in request.classes]
    starts, of_files = choose_starts(request.start, config, shape, vae)
    classes = [len(names)] if terms else asked or of_files or list(range(len(config.classes)))
    if method.cfg_scale != 1 and not terms and set(classes) == {len(names)}:
        raise UserError(f"--cfg-scale {method.cfg_scale:g} has no class to guide to: add --class, or leave it out")
    windows = choose_windows(request.frames, request.overlap, config) if request.frames else None
    return Plan(classes, terms, starts, (*names, request.compose or "no class"), windows)


TERM = re.compile(
    r"""\s*(?P<sign>[+-]?)                                      # every term but the first needs a sign
    \s*(?:(?P<weight>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*\*)?           # a decimal number and *
    \s*(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<bare>[^\s+*'"-]+))\s*""",
    re.VERBOSE,
)


def asked_label(text: str, names: Sequence[str]) -> int:
    """The label that a --class asks for, which may be the null class. Raises UserError as `class_index`."""
    return len(names) if text == NO_CLASS and text not in names else class_index(text, names)


def class_index(text: str, names: Sequence[str], flag: str = "--class") -> int:
    """The index of a class, from its name or its index. A name wins over an index.

    Raises:
        UserError: there is no such class.
    """
    if text in names:
        return names.index(text)
    if text.isdecimal() and len(text) < 10 and int(text) < len(names):
        return int(text)
    some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise UserError(f"{flag} {text} is unknown: the checkpoint has 0 to {len(names) - 1}: {some}")


def parse_sum(text: str, names: Sequence[str]) -> list[tuple[float, int]]:
    """Reads a sum as (weight, class index), each class once, in the order of the text.

    A term is the name or the index of a class. A decimal weight and * may stand before it. Names that
    contain spaces, +, -, * or quotes stand in quotes.

    Raises:
        UserError: it is no sum, a class is unknown, or all weights cancel.
    """
    weights: dict[int, float] = {}
    end = 0
    while end < len(text) or not end:
        term = TERM.match(text, end)
        if not term or (end and not term["sign"]):
            rest = repr(text[end:]) if text[end:] else "its end"
            raise UserError(
                f"--compose {text!r} is not a sum from {rest} on: write it as A + 0.5*B,"
                " with names that contain spaces, +, - or * in quotes"
            )
        index = class_index(term["double"] or term["single"] or term["bare"], names, "--compose: class")
        weights[index] = weights.get(index, 0.0) + float(term["sign"] + (term["weight"] or "1"))
        end = term.end()
    terms = [(weight, index) for index, weight in weights.items() if weight]
    if not terms or not all(math.isfinite(weight) for weight, _ in terms):
        raise UserError(f"--compose {text!r} leaves no class with a finite weight other than 0: change the weights")
    return terms
