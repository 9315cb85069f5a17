"""Types of the flags of this folder's commands: what makes no sense is refused before any work."""

import argparse
from collections.abc import Callable
from pathlib import Path


def whole(least: int, most: int) -> Callable[[str], int]:
    """An argparse type for a whole number in a range, which includes both ends."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # Python refuses to convert thousands of digits too
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number from {least} to {most}")
        return value

    return parse


def size(least: int, most: int) -> Callable[[str], tuple[int, int]]:
    """An argparse type for a size in pixels, 64 or 64x96: height and width, both even and in a range."""
    side = whole(least, most)

    def parse(text: str) -> tuple[int, int]:
        try:
            sides = [side(part) for part in text.split("x", 2)]
        except argparse.ArgumentTypeError:
            sides = []
        if len(sides) not in (1, 2) or any(each % 2 for each in sides):
            wanted = f"even numbers from {least} to {most}, as 64 or as 64x96 (height and width)"
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not one or two {wanted}")
        return sides[0], sides[-1]

    return parse


def path(text: str) -> Path:
    """An argparse type for a path. An empty text, as from a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty: is a variable not set?")
    return Path(text)
