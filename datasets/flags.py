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


def path(text: str) -> Path:
    """An argparse type for a path. An empty text, as from a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty: is a variable not set?")
    return Path(text)
