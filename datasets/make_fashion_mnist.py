"""Unpacks Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) into class folders of PNG images.

    python datasets/make_fashion_mnist.py /usr/share/datasets/fashion-mnist datasets/fashion-mnist

The source holds four files: train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, and the same two for t10k.
Debian's package dataset-fashion-mnist has them. 60,000 images go to train/ and 10,000 to test/, 28×28 pixels, grey.
"""

import argparse
import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import flags

CLASSES = ("TShirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "AnkleBoot")
SPLITS = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 8  # the code of uint8 in an IDX file's header


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file. Exits with one line if it is damaged or has other dimensions."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        sys.exit(f"make_fashion_mnist.py: error: {path} cannot be read: {error}")
    header = np.frombuffer(content, ">u4", count=min(1 + dimensions, len(content) // 4))
    shape = tuple(map(int, header[1:]))
    if header[:1].tolist() != [UNSIGNED_BYTE << 8 | dimensions] or len(content) != 4 * len(header) + np.prod(shape):
        sys.exit(f"make_fashion_mnist.py: error: {path} is not a whole IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=4 * len(header)).reshape(shape)


def write_split(source: Path, destination: Path, split: str, limit: int | None) -> int:
    """Writes the images of a split, at most the first `limit` of each class. Returns how many."""
    prefix = SPLITS[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", 3)  # (N, 28, 28)
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", 1)  # (N,)
    if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
        sys.exit(f"make_fashion_mnist.py: error: {source}: {len(images)} images, and labels that do not match them")
    counts = [0] * len(CLASSES)
    for name in CLASSES:
        (destination / split / name).mkdir(parents=True, exist_ok=True)
    for image, label in tqdm(zip(images, labels, strict=True), total=len(labels), desc=split, unit="image"):
        if limit is None or counts[label] < limit:
            Image.fromarray(image).save(destination / split / CLASSES[label] / f"{counts[label]:05d}.png")
            counts[label] += 1
    return sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=flags.path, help="the folder of the four .gz files")
    parser.add_argument("destination", type=flags.path, help="gets the folders train/ and test/")
    parser.add_argument("--per-class", type=flags.whole(1, 1_000_000), help="images a class in each split; default all")
    args = parser.parse_args()
    try:
        counts = [write_split(args.source, args.destination, split, args.per_class) for split in SPLITS]
    except OSError as error:
        sys.exit(f"make_fashion_mnist.py: error: {args.destination} cannot be written: {error.strerror}")
    print(f"{counts[0]} images to train on and {counts[1]} to test with in {args.destination}")


if __name__ == "__main__":
    main()
