"""Renders a small labelled video data set in UCF-101 layout: coloured shapes that move.

A class is a shape and a direction, for example CircleRight. Colour, size, lane and speed vary from clip to clip.
Every clip is an MPEG-4 .avi file. The same seed renders the same pixels.

    python datasets/make_moving_shapes.py datasets/moving-shapes
"""

import argparse
import colorsys
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

import flags

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # (x, y), y downwards
FRAMES_PER_SECOND = 25
BACKGROUND = 24  # grey level, 0 to 255
SUPERSAMPLING = 4  # points a pixel in each direction, for smooth edges
# Flags: name, least, largest and default value, help. What is larger would fill the memory or never end.
NUMBERS = (
    ("--train-clips", 1, 1_000_000, 100, "clips a class"),
    ("--test-clips", 0, 1_000_000, 10, "clips a class"),
    ("--size", 16, 1024, 64, "height and width in pixels, even"),
    ("--frames", 1, 1000, 16, "frames a clip"),
    ("--seed", 0, 2**63 - 1, 0, "of all random choices"),
)


def inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Which points belong to a shape. (x, y) is in pixels from its centre, y downwards."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9 * radius
    if shape == "triangle":
        return (y <= radius) & (abs(x) <= (y + radius) * 0.55)
    raise ValueError(f"unknown shape {shape!r}: {', '.join(SHAPES)}")


def render_clip(shape: str, direction: str, size: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """One clip, (T, size, size, 3) uint8: the shape crosses most of the picture and stays inside it."""
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.75, 1), rng.uniform(0.8, 1)))
    radius = rng.uniform(0.16, 0.24) * size
    low, high = radius + 1, size - radius - 1
    lane = rng.uniform(low, high)
    travel = rng.uniform(0.85, 1.0) * (high - low)
    start = rng.uniform(low, high - travel)

    dx, dy = DIRECTIONS[direction]
    sub_pixels = (np.arange(size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    grid_y, grid_x = np.meshgrid(sub_pixels, sub_pixels, indexing="ij")
    clip = np.empty((num_frames, size, size, 3), np.uint8)
    for i, progress in enumerate(np.linspace(0, 1, num_frames)):
        along = start + travel * (progress if dx + dy > 0 else 1 - progress)
        centre_x, centre_y = (along, lane) if dx else (lane, along)
        mask = inside(shape, grid_x - centre_x, grid_y - centre_y, radius)
        coverage = mask.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))[..., None]
        clip[i] = np.rint(BACKGROUND * (1 - coverage) + 255 * colour * coverage)
    return clip


def write_avi(path: Path, frames: np.ndarray) -> None:
    """Writes (T, H, W, 3) uint8 frames as MPEG-4 Part 2, a key frame every 12. The file is whole or absent."""
    temporary = path.with_suffix(".tmp")
    try:
        encode(temporary, frames)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(path: Path, frames: np.ndarray) -> None:
    """`write_avi`, in place."""
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND, options={"qmin": "2", "qmax": "2", "g": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def clip_jobs(args: argparse.Namespace) -> Iterator[tuple]:
    """Yields (path, shape, direction, size, frames, seed) for every clip of every split and class."""
    for split, clips in (("train", args.train_clips), ("test", args.test_clips)):
        for class_index, (shape, direction) in enumerate((s, d) for s in args.shapes for d in args.directions):
            name = shape.title() + direction.title()
            for i in range(clips):
                path = args.destination / split / name / f"v_{name}_g{i // 10 + 1:02d}_c{i % 10 + 1:02d}.avi"
                yield path, shape, direction, args.size, args.frames, (args.seed, split == "test", class_index, i)


def write_clip(job: tuple) -> None:
    path, shape, direction, size, frames, seed = job
    write_avi(path, render_clip(shape, direction, size, frames, np.random.default_rng(seed)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=flags.path, help="gets the folders train/ and test/")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=tuple(DIRECTIONS))
    for name, least, most, default, about in NUMBERS:
        parser.add_argument(name, type=flags.whole(least, most), default=default, help=f"{about}; default {default}")
    args = parser.parse_args()
    args.shapes, args.directions = dict.fromkeys(args.shapes), dict.fromkeys(args.directions)  # each once
    if args.size % 2:
        parser.error("--size must be even")
    return args


def make_folders(destination: Path, paths: list[Path]) -> None:
    """Makes the class folders. Exits with one line if it cannot, or if they hold other clips."""
    others = set(destination.glob("*/*/*.avi")) - set(paths)
    if others:
        sys.exit(
            f"make_moving_shapes.py: error: {min(others)} belongs to another set: empty the destination or give another"
        )
    try:
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"make_moving_shapes.py: error: {destination} cannot be written: {error.strerror}")


def main() -> None:
    args = parse_args()
    jobs = list(clip_jobs(args))
    make_folders(args.destination, [path for path, *_ in jobs])
    try:
        with ProcessPoolExecutor() as pool:
            for _ in tqdm(pool.map(write_clip, jobs, chunksize=8), total=len(jobs), desc="rendering", unit="clip"):
                pass
    except OSError as error:
        sys.exit(f"make_moving_shapes.py: error: {args.destination} cannot be written: {error.strerror}")
    print(f"{len(jobs)} clips of {len(args.shapes) * len(args.directions)} classes in {args.destination}")


if __name__ == "__main__":
    main()
