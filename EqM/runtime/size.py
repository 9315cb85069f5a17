"""The size of a picture: one number for a square, as flags and files have always had it, and else a Size."""

import re
from dataclasses import dataclass

MAX_SIDE = 16_384  # pixels or frames; what is larger is a typing error, and would end in a hang or without memory
SIZE_HELP = "pixels: a square's side, or height x width as 64x96"
WANTED = f"a side from 1 to {MAX_SIDE}, or a height and a width such as 64x96"


@dataclass(frozen=True)
class Size:
    """The height and the width of a picture that is not square, in pixels or in latents."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


ImageSize = int | Size


def size_of(height: int, width: int) -> ImageSize:
    """The size of a picture of this height and width."""
    return height if height == width else Size(height, width)


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size.height, size.width)


def spelt(size: ImageSize) -> str:
    """A size for people: 64×96."""
    return "×".join(map(str, sides(size)))


def plain(size: ImageSize) -> int | str:
    """A size as plain data, for files: 64, or "64x96"."""
    return size if isinstance(size, int) else str(size)


def parse_size(text: str) -> ImageSize:
    """A size from a side such as 64, or from height and width such as 64x96.

    Raises:
        ValueError: it is neither, or a number is out of its range.
    """
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    numbers = [int(number) for number in found.groups() if number] if found else []
    if not numbers or not all(1 <= number <= MAX_SIDE for number in numbers):
        raise ValueError(f"it is not {WANTED}")
    return size_of(numbers[0], numbers[-1])


def read_size(value: object) -> ImageSize:
    """A size from the plain data of a file, as `plain` writes it.

    Raises:
        ValueError: it is none.
    """
    size = parse_size(value) if isinstance(value, str) else value
    if type(size) is int and not isinstance(value, str) and 1 <= size <= MAX_SIDE:
        return size
    if not isinstance(size, Size):
        raise ValueError(f"it is not {WANTED}")
    return size


def covering(height: int, width: int, size: ImageSize) -> tuple[int, int]:
    """Height and width to which a picture is resized before its centre is cropped to a size.

    The picture keeps its proportions, and becomes as small as it can without leaving a part of the size empty.
    """
    wanted_height, wanted_width = sides(size)
    if wanted_height * width >= wanted_width * height:
        return wanted_height, int(wanted_height * width / height)
    return int(wanted_width * height / width), wanted_width
