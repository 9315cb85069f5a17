"""Renders a small labelled video data set in UCF-101 layout: coloured shapes that move.

A class is a shape and a direction, for example CircleRight. Colour, size, lane and speed vary from clip to clip.
With --bounce a shape flies in any direction, and the four walls reflect it. Its direction then belongs to no clip as a
whole, so a class is a shape alone, for example Circle. Every clip is an MPEG-4 .avi file. The same seed renders the
same pixels.

    python datasets/make_moving_shapes.py datasets/moving-shapes
    python datasets/make_moving_shapes.py datasets/bouncing-shapes --bounce --frames 64
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
# How far a shape reaches from its centre, in radii, in x and in y.
REACH = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.1, 1.0)}
CROSSING_FRAMES = 16  # a shape that bounces is as fast as one that crosses the picture in a clip of so many frames
FRAMES_PER_SECOND = 25
BACKGROUND = 24  # grey level, 0 to 255
SUPERSAMPLING = 4  # points a pixel in each direction, for smooth edges
SIDES = (16, 1024)  # pixels, the least and the largest
# Flags: name, least, largest and default value, help. What is larger would fill the memory or never end.
NUMBERS = (
    ("--train-clips", 1, 1_000_000, 100, "clips a class"),
    ("--test-clips", 0, 1_000_000, 10, "clips a class"),
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


def reflected(places: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where a point is that moves on a line between two walls, which reflect it, if without walls it were at `places`.

    Its speed stays, and its direction turns at a wall.
    """
    span = high - low
    return low + span - np.abs((places - low) % (2 * span) - span)


def crossing_path(
    direction: str, radius: float, size: tuple[int, int], num_frames: int, rng: np.random.Generator
) -> np.ndarray:
    """Centres (T, 2), as (x, y), of a shape that crosses most of the picture on a lane, and stays inside."""
    dx, dy = DIRECTIONS[direction]
    length, across = (size[1], size[0]) if dx else size
    low, high = radius + 1, length - radius - 1
    lane = rng.uniform(low, across - radius - 1)
    travel = rng.uniform(0.85, 1.0) * (high - low)
    start = rng.uniform(low, high - travel)
    progress = np.linspace(0, 1, num_frames)
    along = start + travel * (progress if dx + dy > 0 else 1 - progress)
    lanes = np.full(num_frames, lane)
    return np.stack([along, lanes] if dx else [lanes, along], axis=1)


def bouncing_path(
    shape: str, radius: float, size: tuple[int, int], num_frames: int, rng: np.random.Generator
) -> np.ndarray:
    """Centres (T, 2), as (x, y), of a shape that flies straight on, is reflected by the walls, and stays whole."""
    lows = [reach * radius + 1 for reach in REACH[shape]]
    highs = [side - low for side, low in zip(size[::-1], lows, strict=True)]
    room = min(high - low for low, high in zip(lows, highs, strict=True))
    speed = rng.uniform(0.85, 1.0) * room / (CROSSING_FRAMES - 1)  # pixels a frame
    angle = rng.uniform(0, 2 * np.pi)
    path = []
    for low, high, part in zip(lows, highs, (np.cos(angle), np.sin(angle)), strict=True):
        path.append(reflected(rng.uniform(low, high) + part * speed * np.arange(num_frames), low, high))
    return np.stack(path, axis=1)


def render_clip(
    shape: str, direction: str | None, size: int | tuple[int, int], num_frames: int, rng: np.random.Generator
) -> np.ndarray:
    """One clip, (T, H, W, 3) uint8: the shape crosses most of the picture and stays inside it.

    Args:
        direction: one of DIRECTIONS. None: the shape flies anywhere, and bounces off the walls.
        size: height and width, or both in one number; pixels.
    """
    height, width = size = size if isinstance(size, tuple) else (size, size)
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.75, 1), rng.uniform(0.8, 1)))
    radius = rng.uniform(0.16, 0.24) * min(size)
    if direction:
        path = crossing_path(direction, radius, size, num_frames, rng)  # (T, 2)
    else:
        path = bouncing_path(shape, radius, size, num_frames, rng)

    sub_y, sub_x = ((np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING for side in size)
    grid_y, grid_x = np.meshgrid(sub_y, sub_x, indexing="ij")
    clip = np.empty((num_frames, height, width, 3), np.uint8)
    for i, (centre_x, centre_y) in enumerate(path):
        mask = inside(shape, grid_x - centre_x, grid_y - centre_y, radius)
        coverage = mask.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean((1, 3))[..., None]
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
            name = shape.title() + (direction or "").title()
            for i in range(clips):
                path = args.destination / split / name / f"v_{name}_g{i // 10 + 1:02d}_c{i % 10 + 1:02d}.avi"
                yield path, shape, direction, args.size, args.frames, (args.seed, split == "test", class_index, i)


def write_clip(job: tuple) -> str:
    """Renders and writes a clip. Returns what kept it from being written, or an empty text."""
    path, shape, direction, size, frames, seed = job
    try:
        write_avi(path, render_clip(shape, direction, size, frames, np.random.default_rng(seed)))
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return ""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=flags.path, help="gets the folders train/ and test/")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, help="default: all")
    parser.add_argument("--bounce", action="store_true", help="walls reflect the shapes; a class is a shape alone")
    parser.add_argument(
        "--size",
        type=flags.size(*SIDES),
        default=(64, 64),
        metavar="SIDE|HxW",
        help="pixels, even: a side, or height and width, as 64x96; default 64",
    )
    for name, least, most, default, about in NUMBERS:
        parser.add_argument(name, type=flags.whole(least, most), default=default, help=f"{about}; default {default}")
    args = parser.parse_args()
    if args.bounce and args.directions:
        parser.error("--bounce lets shapes fly in any direction: leave --directions out")
    directions = [None] if args.bounce else args.directions or DIRECTIONS
    args.shapes, args.directions = dict.fromkeys(args.shapes), dict.fromkeys(directions)  # each once
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
    with ProcessPoolExecutor() as pool:
        problems = pool.map(write_clip, jobs, chunksize=8)
        for problem in tqdm(problems, total=len(jobs), desc="rendering", unit="clip"):
            if problem:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"make_moving_shapes.py: error: {problem}")
    print(f"{len(jobs)} clips of {len(args.shapes) * len(args.directions)} classes in {args.destination}")


if __name__ == "__main__":
    main()
