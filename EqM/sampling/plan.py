"""What samples show, one class or a sum of classes, where they start and how they get to the data."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.latents import VAE
from runs.load_network import class_names
from runtime.errors import UserError
from sampling.starts import Starts, choose_starts


@dataclass(frozen=True)
class Plan:
    """What samples show and where they start.

    They have the classes in turn, or all show the sum of (weight, class) `terms`, in place of which, as
    of no class, `classes` has the null class.
    """

    classes: list[int]
    terms: list[tuple[float, int]]
    starts: Starts

    def labels(self, samples: Sequence[int]) -> Tensor:
        """The classes of samples (N,), on the host, which thus knows them without waiting for a GPU."""
        return torch.tensor([self.classes[i % len(self.classes)] for i in samples])

    @property
    def weights(self) -> list[float]:
        """Of the fields that are added."""
        return [weight for weight, _ in self.terms] or [1.0]

    def rows(self, y: Tensor) -> Tensor:
        """The classes whose fields are added for samples of classes y (N,): (K, N)."""
        return torch.stack([torch.full_like(y, label) for _, label in self.terms] or [y])


def make_plan(args: argparse.Namespace, config: dict, shape: tuple[int, ...], vae: VAE | None) -> Plan:
    """The plan that the flags ask for, of samples of one shape.

    Raises:
        UserError: a class that is not known, no sum, flags that contradict each other, or a network that
            cannot be sampled in this way.
    """
    if args.sampler == "euler" and args.adaptive:
        raise UserError("--adaptive stops gradient descent, and --sampler euler takes its steps over time: drop one")
    if args.sampler != "euler" and not config["network"].get("uncond", True):
        raise UserError(
            "the checkpoint was trained with --no-uncond: its field wants γ, which gradient descent lacks:"
            " add --sampler euler"
        )
    names = class_names(config)
    terms = parse_sum(args.compose, names) if args.compose is not None else []
    asked = [class_index(text, names) for text in args.classes or []]
    if terms and asked:
        raise UserError("--class and --compose both say what samples show: give one of them")
    starts, of_starts = choose_starts(args, config, shape, vae, names)
    classes = asked or of_starts or list(range(len(config["classes"])))
    if args.cfg_scale != 1 and not terms and set(classes) == {len(names)}:
        raise UserError(f"--cfg-scale {args.cfg_scale:g} has no class to guide to: add --class, or leave it out")
    return Plan([len(names)] if terms else classes, terms, starts)


TERM = re.compile(
    r"""\s*(?P<sign>[+-]?)                                      # needed before every term but the first
    \s*(?:(?P<weight>[0-9]+\.?[0-9]*|\.[0-9]+)\s*\*)?           # a decimal number and *
    \s*(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<bare>[^\s+*'"-]+))\s*""",
    re.VERBOSE,
)


def class_index(text: str, names: Sequence[str], flag: str = "--class") -> int:
    """The index of a class from its name or its index.

    Raises:
        UserError: there is no such class.
    """
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise UserError(f"{flag} {text} is unknown: the checkpoint has 0 to {len(names) - 1}: {some}")


def parse_sum(text: str, names: Sequence[str]) -> list[tuple[float, int]]:
    """A sum's (weight, class index), each class once, in the order of the text.

    A term is a name or an index, with a decimal weight and * before it where that is not 1. Names that
    contain spaces, +, -, * or quotes stand in quotes.

    Raises:
        UserError: no such sum or class, or nothing is left of it.
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
