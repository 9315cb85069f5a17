"""Lays out the clip art of Debian's package openclipart-png as class folders of square pictures in colour.

    python datasets/make_clip_art.py /usr/share/openclipart/png datasets/clip-art

The drawings are in the public domain. A class is a top folder of the package, for example Animals. A picture is put
on white, padded to a square and resized. Each goes to train/ or test/ by a hash of its name.
"""

import argparse
import hashlib
import io
import os
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import flags

# Folders whose names say nothing about their pictures, and 1,378 stars of thin lines, which become grey rings.
LEFT_OUT = ("special", "unsorted", "shapes/stars")
SIDE = 64  # pixels
LEAST, MOST = 100, 400  # pictures of a class
TEST_SHARE = 0.1
MAX_PIXELS = 2**26  # of a file. A few have ten times as many, and would fill the memory
MAX_ASPECT = 8  # of a longer one little would be left on the square


@dataclass(frozen=True)
class Picture:
    """A picture that was read: its class, the name of its file, a hash of its pixels, and its contents as PNG."""

    of_class: str
    stem: str
    pixels: str
    png: bytes

    @property
    def number(self) -> float:
        """A number in [0, 1) that follows from the name of the file alone."""
        return int.from_bytes(hashlib.sha256(os.fsencode(self.stem)).digest()[:7], "big") / 256**7

    @property
    def path(self) -> Path:
        """Where it goes in the data set."""
        split = "test" if self.number < TEST_SHARE else "train"
        return Path(split, self.of_class, f"{self.stem}-{self.pixels[:8]}.png")


def class_name(folder: str) -> str:
    """SignsAndSymbols, of signs_and_symbols."""
    return "".join(word.title() for word in folder.split("_"))


def on_white_square(image: Image.Image) -> Image.Image:
    """A picture in mode RGB, on white where it is transparent, in the middle of a white square."""
    colours, side = image.convert("RGBA"), max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(colours, ((side - image.width) // 2, (side - image.height) // 2), mask=colours)
    return square


def read_picture(path: Path, source: Path, side: int) -> Picture | str:
    """Reads a file as a picture of side × side pixels, or says in a few words why it is left out."""
    if not path.is_file():
        return "not a file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about large files
            with Image.open(path, formats=["PNG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    return "too large"
                if max(image.size) > MAX_ASPECT * min(image.size):
                    return "long and thin"
                if max(image.size) < side:
                    return f"smaller than {side} pixels"
                square = on_white_square(image).resize((side, side), Image.Resampling.BICUBIC)
    except MemoryError:
        raise
    except Exception:  # Pillow raises nearly all of Python's errors on a damaged file
        return "unreadable"
    file = io.BytesIO()
    square.save(file, "PNG")
    digest = hashlib.sha256(square.tobytes()).hexdigest()
    return Picture(class_name(path.relative_to(source).parts[0]), path.stem, digest, file.getvalue())


def find_files(source: Path) -> list[Path]:
    """The PNG files in the top folders, without those in LEFT_OUT, by path. Exits with one line if there is none."""
    left_out = [source / folder for folder in LEFT_OUT]
    files = sorted(file for file in source.glob("*/**/*.png") if not set(left_out) & set(file.parents))
    if not files:
        fail(f"{source} has no folders of PNG files: give the folder png of Debian's package openclipart-png")
    return files


def choose(pictures: list[Picture], least: int, most: int) -> list[Picture]:
    """Those that the data set takes: each picture once, in classes of at least `least`, of each at most `most`.

    Of several equal pictures the first is taken. A class that has too many keeps those whose hashes are the smallest
    within each split, so that the share of the splits stays.
    """
    unlike = {picture.pixels: picture for picture in reversed(pictures)}.values()
    of_class = defaultdict(list)
    for picture in unlike:
        of_class[picture.of_class].append(picture)
    chosen = []
    for name in sorted(name for name, members in of_class.items() if len(members) >= least):
        members = sorted(of_class[name], key=lambda picture: (picture.number, picture.path))
        tests = [picture for picture in members if picture.number < TEST_SHARE]
        in_test = min(len(tests), round(most * TEST_SHARE))
        chosen += tests[:in_test] + members[len(tests) :][: most - in_test]
    return chosen


def write(pictures: list[Picture], destination: Path) -> None:
    """Writes the pictures. Exits with one line if it cannot, or if the folder holds other ones."""
    paths = [destination / picture.path for picture in pictures]
    others = set(destination.glob("*/*/*.png")) - set(paths)
    if others:
        fail(f"{min(others)} belongs to another set: empty the destination or give another")
    try:
        for path, picture in zip(paths, pictures, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(picture.png)
            temporary.replace(path)
    except OSError as error:
        fail(f"{destination} cannot be written: {error.strerror}")


def fail(message: str) -> None:
    """Exits with one line."""
    sys.exit(f"make_clip_art.py: error: {message}".encode(errors="backslashreplace").decode())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("/usr/share/openclipart/png")
    parser.add_argument(
        "source", type=flags.path, nargs="?", default=default, help=f"the folder png; default {default}"
    )
    parser.add_argument("destination", type=flags.path, help="gets the folders train/ and test/")
    for name, low, most, default, about in (
        ("--size", 16, 512, SIDE, "height and width in pixels; smaller files are left out"),
        ("--least", 2, 10_000, LEAST, "pictures of a class; smaller classes are left out"),
        ("--per-class", 2, 10_000, MOST, "the most pictures of a class, in train and test together"),
    ):
        parser.add_argument(name, type=flags.whole(low, most), default=default, help=f"{about}; default {default}")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    files = find_files(args.source)
    with ProcessPoolExecutor() as pool:
        read = pool.map(partial(read_picture, source=args.source, side=args.size), files, chunksize=16)
        found = list(tqdm(read, total=len(files), desc="reading", unit="file"))
    pictures = [picture for picture in found if isinstance(picture, Picture)]
    chosen = choose(pictures, args.least, args.per_class)
    if not chosen:
        fail(f"no class of {args.source} has {args.least} pictures: lower --least")
    write(chosen, args.destination)
    left_out = Counter(reason for reason in found if isinstance(reason, str))
    left_out["duplicates"] = len(pictures) - len({picture.pixels for picture in pictures})
    for reason, count in sorted(left_out.items()):
        print(f"left out: {count} {reason}")
    for name, count in sorted(Counter(picture.of_class for picture in chosen).items()):
        print(f"{name}: {count}")
    splits = Counter(picture.path.parts[0] for picture in chosen)
    print(f"{splits['train']} pictures to train on and {splits['test']} to test with in {args.destination}")


if __name__ == "__main__":
    main()
