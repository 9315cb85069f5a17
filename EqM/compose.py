"""Sums of classes, as `A + 0.5*B`, and the names and indices by which people give classes."""

import math
import re
from collections.abc import Sequence

from cli import UserError

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
