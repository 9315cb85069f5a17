"""The two sides of a comparison: what each holds, and its features."""

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.clips import Samples
from data.contents import Content, Kind, classes_asked, first_window, folder_sizes, kind_of, npz_content, open_path
from data.packs.pack import is_pack
from data.scan import Found, unreadable_errors
from evaluation.features import Features
from evaluation.judge import small
from runtime.draws import keyed_uniforms
from runtime.errors import UserError
from runtime.logs import log


@dataclass
class Side:
    """One side of the comparison: where it lies, what is read, and what came out of it.

    `rows` has the features (N, D) by name, `classes` the class of each of the N samples, `clips` what the
    judge sees (N, 3, t, h, w).
    """

    path: Path
    content: Content
    classes: list[str]
    about: dict
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    clips: Tensor = field(default_factory=lambda: torch.empty(0))


def open_sides(args: argparse.Namespace) -> tuple[Side, Side, Kind]:
    """Both sides, and what their samples are once read.

    Raises:
        UserError: nothing there, two kinds, or flags that are of clips for images.
    """
    of_generated = kind_of(args.generated)
    video = of_generated.video
    of_real = kind_of(args.real, video)
    if of_real.video != video:
        kinds = ("clips", "images")[:: 1 if of_real.video else -1]
        raise UserError(f"{args.real} holds {kinds[0]}, and {args.generated} {kinds[1]}: compare two of a kind")
    if not video and (args.clip_len or args.frame_interval):
        raise UserError("--clip-len and --frame-interval are of clips, and these are images: leave them out")
    size = args.image_size or of_generated.side
    frames = (args.clip_len or of_generated.frames) if video else 1
    if frames > of_generated.frames:
        raise UserError(f"--clip-len {frames}: the first generated clip has {of_generated.frames} frames")
    interval = args.frame_interval or matching_interval(of_real, of_generated)

    def window(place: int) -> float:
        return float(keyed_uniforms(args.seed, [(0, place)])[0, 0])

    sides = []
    for path, kind, every, place in ((args.real, of_real, interval, window), (args.generated, of_generated, 1, None)):
        windows = Samples(Found("", (), (), ()), size, frames, every, flip=False, seed=0)
        if path.suffix == ".npz" and not path.is_dir():
            content = npz_content(path, windows, video)
        else:
            content = open_path(path, windows, video, None, f"--image-size {size}", place or first_window)
        about = {"path": str(path), "first_file": asdict(kind), "frame_interval": every}
        if path.is_dir() and not is_pack(path):
            check_sizes(path, video, size, path is args.generated, about)
        sides.append(Side(path, content, classes_asked(path, content), about))
    return *sides, Kind(video, size, frames, of_generated.frames_per_second)


def matching_interval(real: Kind, generated: Kind) -> int:
    """The frame interval at which real clips come nearest to the generated ones' frames a second."""
    if not (real.frames_per_second and generated.frames_per_second):
        return 1
    return max(1, math.floor(real.frames_per_second / generated.frames_per_second + 0.5))


def check_sizes(path: Path, video: bool, size: int, generated: bool, about: dict) -> None:
    """Notes the sizes of a folder's files, and warns of what resizing does that a person may not expect."""
    sizes = {f"{w}x{h}": count for (w, h), count in sorted(folder_sizes(path, video).items())}
    about["sizes"] = sizes
    sides = [min(map(int, name.split("x"))) for name in sizes]
    if generated and len(sizes) > 1:
        log.warning("%s holds %d sizes, from %s to %s: all become %d×%d", path, len(sizes), *ends(sizes), size, size)
    if sides and min(sides) < size:
        log.warning("%s holds files of %s pixels, which are enlarged to %d×%d", path, ends(sizes)[0], size, size)


def ends(sizes: dict[str, int]) -> tuple[str, str]:
    ordered = sorted(sizes, key=lambda name: min(map(int, name.split("x"))))
    return ordered[0], ordered[-1]


def read_batches(side: Side, batch: int, video: bool, name: str) -> Iterator[tuple[list[int], Tensor]]:
    """Places and samples (N, 3, T, H, W) uint8 of a side, in order; what cannot be read is noted and left out."""
    content = side.content

    def read(place: int) -> Tensor | str:
        try:
            return content.read(place)[0]
        except unreadable_errors(video) as error:
            return str(error) or type(error).__name__

    total = len(content.names)
    with ThreadPoolExecutor() as pool, tqdm(total=total, desc=f"reading {name}", unit="file") as bar:
        for start in range(0, total, batch):
            places = range(start, min(start + batch, total))
            results = dict(zip(places, pool.map(read, places), strict=True))
            side.unreadable += [(content.names[i], x) for i, x in results.items() if isinstance(x, str)]
            found = {i: x for i, x in results.items() if isinstance(x, Tensor)}
            if found:
                x = torch.stack(list(found.values()))
                yield list(found), x if video else x[:, :, None]
            bar.update(len(places))


@torch.no_grad()
def measure(side: Side, features: list[Features], args: argparse.Namespace, video: bool, name: str) -> None:
    """Fills in a side's features, and the judge's clips.

    Raises:
        UserError: no file can be read, or features are not finite.
    """
    rows: dict[str, list[Tensor]] = {each.name: [] for each in features}
    read, clips = [], []
    for places, x in read_batches(side, args.batch_size, video, name):
        read += places
        for each in features:
            rows[each.name].append(each.extract(x).double())
        if args.judge:
            clips.append(small(x))
    if side.unreadable:
        log.warning("%d files in %s cannot be read, as %s: %s", len(side.unreadable), side.path, *side.unreadable[0])
    if not read:
        raise UserError(f"no readable file in {side.path}: {side.unreadable[0][0]}: {side.unreadable[0][1]}")
    side.rows = {feature: torch.cat(parts) for feature, parts in rows.items()}
    for feature, values in side.rows.items():
        if not values.isfinite().all():
            raise UserError(f"{feature} features of {side.path} are not finite: check --weights")
    side.classes = [side.classes[place] for place in read]
    side.clips = torch.cat(clips) if clips else side.clips
    side.about |= {"samples": len(read), "unreadable": len(side.unreadable)}
