"""The two sides of a comparison, real and generated: what each holds, and the features of its samples."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.contents import (
    Content,
    Kind,
    Window,
    classes_asked,
    first_window,
    folder_sizes,
    kind_of,
    npz_content,
    open_path,
)
from data.form import Form
from data.packs.pack import is_pack
from data.untrusted import Unreadable
from evaluation.features import Features
from evaluation.judge import small
from runtime.errors import UserError
from runtime.logs import log
from runtime.random_numbers import keyed_uniforms
from runtime.size import ImageSize, sides, spelt


@dataclass(frozen=True)
class Comparison:
    """What to compare, and in which form.

    None for the size (pixels) or the length (frames) means that of the first generated sample, and for the interval
    the one that matches the frame rates. `seed` decides where the window of each real clip starts.
    """

    real: Path
    generated: Path
    image_size: ImageSize | None = None
    clip_len: int | None = None
    frame_interval: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """One side before its samples are read: its path, its content, and the class of each sample ("" for none).

    `name` is "real" or "generated". `about` is the side's part of the report, as plain data.
    """

    name: str
    path: Path
    content: Content
    classes: list[str]
    about: dict


@dataclass(frozen=True)
class SideFeatures:
    """The N readable samples of a side: features (N, D) float64 by name, classes, and the judge's clips.

    `clips` is (N, 3, t, h, w) uint8, or None without a judge. `about` is the side's, with the counts of its samples.
    """

    rows: dict[str, Tensor]
    classes: list[str]
    clips: Tensor | None
    about: dict


def open_sides(comparison: Comparison) -> tuple[Side, Side, Kind]:
    """Opens the real side and the generated one, and says what samples of both are once they are read.

    Raises:
        UserError: a side is empty, the sides are of two kinds, or the comparison asks for clips of images.
    """
    of_generated = kind_of(comparison.generated)
    video = of_generated.video
    of_real = kind_of(comparison.real, video)
    check_kinds(comparison, of_real, of_generated)
    size = comparison.image_size or of_generated.side
    frames = (comparison.clip_len or of_generated.frames) if video else 1
    interval = comparison.frame_interval or matching_interval(of_real, of_generated)

    sides = []
    for name, path, kind, every, window in (
        ("real", comparison.real, of_real, interval, random_windows(comparison.seed)),
        ("generated", comparison.generated, of_generated, 1, first_window),
    ):
        content = content_of(path, Form(video, size, frames, every), window)
        about = {"path": str(path), "first_file": kind.as_dict(), "frame_interval": every}
        if path.is_dir() and not is_pack(path):
            about["sizes"] = file_sizes(path, video)
            warn_of_resizing(path, about["sizes"], size, name == "generated")
        sides.append(Side(name, path, content, classes_asked(path, content), about))
    return *sides, Kind(video, size, frames, of_generated.frames_per_second)


def open_held_out(path: Path, real: Side, kind: Kind, seed: int) -> Side:
    """Opens real samples that training did not see, in the form of the real side.

    Raises:
        UserError: there are none of this kind.
    """
    of_path = kind_of(path, kind.video)
    if of_path.video != kind.video:
        holds, wanted = ("clips", "images")[:: 1 if of_path.video else -1]
        raise UserError(f"--held-out {path} holds {holds}, and the other sides {wanted}: give those")
    form = Form(kind.video, kind.side, kind.frames, real.about["frame_interval"])
    content = content_of(path, form, random_windows(seed))
    return Side("held-out", path, content, content.classes, {"path": str(path)})


def random_windows(seed: int) -> Window:
    """Windows that follow from the seed and the place of a clip."""
    return lambda place: float(keyed_uniforms(seed, [(0, place)])[0, 0])


def content_of(path: Path, form: Form, window: Window) -> Content:
    """The samples of one side in a form. Raises UserError if there are none."""
    if path.suffix == ".npz" and not path.is_dir():
        return npz_content(path, form)
    return open_path(path, form, None, f"--image-size {form.image_size}", window)


def check_kinds(comparison: Comparison, of_real: Kind, of_generated: Kind) -> None:
    """Raises UserError if the two sides cannot be compared in the form that is asked for."""
    if of_real.video != of_generated.video:
        kinds = ("clips", "images")[:: 1 if of_real.video else -1]
        holds = f"{comparison.real} holds {kinds[0]}, and {comparison.generated} {kinds[1]}"
        raise UserError(f"{holds}: compare two of a kind")
    if not of_real.video and (comparison.clip_len or comparison.frame_interval):
        raise UserError("--clip-len and --frame-interval are for clips, and these are images: leave them out")
    if of_generated.video and (comparison.clip_len or 0) > of_generated.frames:
        found = f"the first generated clip has {of_generated.frames} frames"
        raise UserError(f"--clip-len {comparison.clip_len}: {found}")


def matching_interval(real: Kind, generated: Kind) -> int:
    """The frame interval that brings real clips nearest to the generated clips' frames per second; 1 if unknown."""
    if not (real.frames_per_second and generated.frames_per_second):
        return 1
    return max(1, math.floor(real.frames_per_second / generated.frames_per_second + 0.5))


def file_sizes(path: Path, video: bool) -> dict[str, int]:
    """How many files of a folder have each size, such as {"64x48": 3}."""
    return {f"{w}x{h}": count for (w, h), count in sorted(folder_sizes(path, video).items())}


def warn_of_resizing(path: Path, found: dict[str, int], size: ImageSize, generated: bool) -> None:
    """Warns if files of these sizes are enlarged, or if generated files have several sizes."""
    ordered = sorted(found, key=lambda of_files: shrinking(of_files, size))
    if generated and len(ordered) > 1:
        several = f"{len(ordered)} sizes, from {ordered[0]} to {ordered[-1]}"
        log.warning("%s holds %s: all become %s", path, several, spelt(size))
    if ordered and shrinking(ordered[0], size) < 1:
        log.warning("%s holds files of %s pixels, which are enlarged to %s", path, ordered[0], spelt(size))


def shrinking(of_files: str, size: ImageSize) -> float:
    """How many times as large as a size files are, in the direction in which they are less so. "64x48" is 64 wide."""
    (height, width), (wide, high) = sides(size), map(int, of_files.split("x"))
    return min(high / height, wide / width)


def read_batches(
    side: Side, batch_size: int, video: bool, unreadable: list[tuple[str, str]]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields a side's samples in order: their places in it, and (N, 3, T, H, W) uint8.

    It leaves out a sample that cannot be read, and adds its name and the reason to `unreadable`.
    """
    content = side.content

    def read(place: int) -> Tensor | str:
        try:
            return content.read(place)[0]
        except Unreadable as error:
            return str(error)

    total = len(content.names)
    with ThreadPoolExecutor() as pool, tqdm(total=total, desc=f"reading {side.name}", unit="file") as bar:
        for start in range(0, total, batch_size):
            places = range(start, min(start + batch_size, total))
            results = dict(zip(places, pool.map(read, places), strict=True))
            unreadable += [(content.names[i], x) for i, x in results.items() if isinstance(x, str)]
            found = {i: x for i, x in results.items() if isinstance(x, Tensor)}
            if found:
                x = torch.stack(list(found.values()))
                yield list(found), x if video else x[:, :, None]
            bar.update(len(places))


@torch.no_grad()
def read_features(
    side: Side, features: Sequence[Features], batch_size: int, video: bool, for_judge: bool
) -> SideFeatures:
    """Reads all samples of a side once, and computes all features of them, and the clips for a judge.

    Raises:
        UserError: no sample can be read, or features are not finite.
    """
    rows: dict[str, list[Tensor]] = {each.name: [] for each in features}
    unreadable: list[tuple[str, str]] = []
    places, clips = [], []
    for of_batch, x in read_batches(side, batch_size, video, unreadable):
        places += of_batch
        for each in features:
            rows[each.name].append(each.extract(x).double())  # (N, D)
        if for_judge:
            clips.append(small(x))
    if unreadable:
        log.warning("%d files in %s cannot be read, for example %s: %s", len(unreadable), side.path, *unreadable[0])
    if not places:
        raise UserError(f"no readable file in {side.path}: {unreadable[0][0]}: {unreadable[0][1]}")
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    for each in features:
        check_finite(each, joined[each.name], side.path)
    about = side.about | {"samples": len(places), "unreadable": len(unreadable)}
    return SideFeatures(joined, [side.classes[i] for i in places], torch.cat(clips) if clips else None, about)


def check_finite(features: Features, rows: Tensor, path: Path) -> None:
    """Raises UserError if features (N, D) are not finite."""
    if not rows.isfinite().all():
        advice = "leave --use-amp out" if features.precision.name == "fp16" else "check --weights"
        raise UserError(f"{features.name} features of {path} are not finite: {advice}")
