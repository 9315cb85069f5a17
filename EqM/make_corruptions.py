"""Spoils a folder of clips in three ways, to see whether a network tells them from whole ones (EqM/score.py).

    python EqM/make_corruptions.py datasets/moving-shapes/test datasets/spoiled --image-size 64

makes, with the same names and class folders as the clips,

    noise/     standard normal noise, as pixels: where sampling starts
    shuffled/  the clip's frames in another order
    frozen/    its first frame, held

They are cropped and resized to the network's size as in training, and stored without loss (FFV1 in .mkv). So only
what was spoiled tells them from the clips. The same seed makes the same pixels.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.scan import find_loose_files
from data.untrusted import Unreadable
from data.video import iterate_frames, probe_video, write_video
from runtime import cli
from runtime.errors import UserError, shown
from runtime.size import SIZE_HELP


def shuffled_order(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A random order (T,) of frames, if possible neither the clip's own order nor its reverse."""
    own = np.arange(num_frames)  # (T,)
    while True:
        order = rng.permutation(num_frames)  # (T,)
        if num_frames < 3 or not (np.array_equal(order, own) or np.array_equal(order, own[::-1])):
            return order


def spoil(frames: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (kind, frames) for each way to spoil a clip; all frames are (T, H, W, 3) uint8."""
    noise = rng.standard_normal(frames.shape)  # (T, H, W, 3)
    yield "noise", ((noise.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    yield "shuffled", frames[shuffled_order(len(frames), rng)]
    yield "frozen", frames[:1].repeat(len(frames), axis=0)


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Spoils clips: noise, shuffled frames, frozen frames.")
    parser.add_argument("source", type=cli.path, help="a folder of clips, or of class folders of clips")
    parser.add_argument("destination", type=cli.path, help="gets the folders noise/, shuffled/ and frozen/")
    parser.add_argument("--image-size", type=cli.size, default=64, help=f"the network's; {SIZE_HELP}")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of all random choices")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    files = find_loose_files(args.source, video=True)
    if args.destination.resolve().is_relative_to(args.source.resolve()):
        raise UserError(f"{args.destination} lies in {args.source} and would be taken for clips: give another folder")
    unreadable = []
    for number, (path, _) in enumerate(tqdm(files, desc="spoiling", unit="clip")):
        try:
            info = probe_video(path)
            frames = np.stack(list(iterate_frames(path, info, args.image_size)))  # (T, H, W, 3)
        except Unreadable as error:
            unreadable.append((path, error))
            continue
        for kind, spoiled in spoil(frames, np.random.default_rng((args.seed, number))):
            target = args.destination / kind / Path(path).relative_to(args.source).with_suffix(".mkv")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_video(target, spoiled, info.frames_per_second, lossless=True)
            except OSError as error:
                raise UserError(f"{target} cannot be written: {error.strerror}") from None
    if len(unreadable) == len(files):
        raise UserError("no readable clip in {}: {}: {}".format(args.source, *unreadable[0]))
    for path, error in unreadable:
        print(shown(f"left out {path}: {error}"))
    print(f"{len(files) - len(unreadable)} clips, each spoiled in three ways, in {shown(args.destination)}")


if __name__ == "__main__":
    cli.run(main, "take shorter clips or a smaller --image-size")
