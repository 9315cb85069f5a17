"""How well samples continue the clips whose first frames they were given, beside baselines and a control.

Only the frames that follow are measured. A clip is (3, T, H, W) uint8, and all clips of the samples are in memory.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.clips import read_sample
from data.contents import Content, Kind
from data.file_list import Item
from data.form import Form
from data.scan import UCF_NAME
from data.untrusted import Unreadable
from data.video import probe_video
from evaluation.foreground import centroids, hues, psnr, same_hue, same_motion
from evaluation.judge import Judge, Judged, small
from evaluation.report import shares
from evaluation.sides import Side, read_batches
from runtime.errors import UserError
from runtime.files import read_csv
from runtime.logs import log


@dataclass(frozen=True)
class Continued:
    """Samples, and the clips whose first frames they were given.

    Attributes:
        samples: (N, 3, T, H, W) uint8.
        truths: the clips, (N, 3, T, H, W) uint8.
        classes: the class of each clip.
        given: so many of the first frames were given.
    """

    samples: Tensor
    truths: Tensor
    classes: list[str]
    given: int

    def shuffled(self, seed: int) -> "Continued":
        """The same samples, each beside the clip of another one."""
        other = others(len(self.samples), seed)
        return Continued(self.samples, self.truths[other], [self.classes[i] for i in other], self.given)


def others(count: int, seed: int) -> np.ndarray:
    """For each of `count` samples the place of another one, (N,), at random: all of them stand in one circle."""
    circle = np.random.default_rng(seed).permutation(count)
    places = np.empty(count, np.int64)
    places[circle] = np.roll(circle, 1)
    return places


def source_paths(side: Side) -> list[Path]:
    """The file that each sample started from, from samples.csv.

    Raises:
        UserError: the samples started from no files.
    """
    table = side.path / "samples.csv"
    try:
        rows = {row["file"]: row["init"] for row in read_csv(table)}
    except (OSError, KeyError, csv.Error):
        rows = {}
    paths = [rows.get(name, "") for name in side.content.names]
    if not paths or not all(paths):
        raise UserError(f"{table} does not say what each sample started from: sample with EqM/sample_gd.py --init")
    return [Path(path) for path in paths]


def class_of(path: Path, names: Sequence[str]) -> str:
    """The class of a source: the name of its folder, or the one in a file name as UCF-101 has them.

    Raises:
        UserError: neither is a class of REAL.
    """
    found = UCF_NAME.match(path.stem)
    for name in (path.parent.name, found["label"] if found else ""):
        if name in names:
            return name
    raise UserError(f"{path}, which a sample started from, shows no class of REAL: give a REAL that has its class")


def open_sources(real: Side, generated: Side, kind: Kind) -> Side:
    """The side of the clips that the samples started from, in the order of the samples.

    They are read as the samples are, and one in so many frames as of REAL. A clip that is too short cannot be read.

    Raises:
        UserError: the samples started from no files, a class is unknown, or REAL holds one of the clips.
    """
    paths = source_paths(generated)
    form = Form(True, kind.side, kind.frames, real.about["frame_interval"])
    if real.path.is_dir():
        same = {(real.path / name).resolve() for name in real.content.names} & {path.resolve() for path in paths}
        if same:
            raise UserError(f"REAL holds {min(same)}, which a sample started from: give clips that are no part of it")

    def read(place: int) -> tuple[Tensor, float]:
        path = str(paths[place])
        info = probe_video(path)
        if len(info.times) < form.window:
            raise Unreadable(f"it has {len(info.times)} frames, and a sample {form.window}")
        return read_sample(Item(path, 0, info), form, 0.0)

    content = Content(
        [str(path) for path in paths], [class_of(path, sorted(set(real.classes))) for path in paths], read
    )
    return Side("sources", generated.path, content, content.classes, {})


def read_all(side: Side, batch_size: int) -> dict[int, Tensor]:
    """Every clip of a side that can be read, (3, T, H, W) uint8, by its place."""
    unreadable: list[tuple[str, str]] = []
    clips: dict[int, Tensor] = {}
    for places, x in read_batches(side, batch_size, True, unreadable):
        clips |= dict(zip(places, x, strict=True))
    if unreadable:
        log.warning("%d of the %s are left out, as %s: %s", len(unreadable), side.name, *unreadable[0])
    if not clips:
        raise UserError(f"no readable file in {side.path}: {unreadable[0][0]}: {unreadable[0][1]}")
    return clips


def read_continued(generated: Side, sources: Side, given: int, batch_size: int) -> Continued:
    """Reads the samples and what really follows. Leaves out samples if one of the two cannot be read.

    Raises:
        UserError: none can be read, or only one.
    """
    samples, truths = read_all(generated, batch_size), read_all(sources, batch_size)
    places = sorted(samples.keys() & truths.keys())
    if len(places) < 2:
        raise UserError(f"{len(places)} samples of {generated.path} can be compared with their clips: two are needed")
    pairs = (torch.stack([clips[place] for place in places]) for clips in (samples, truths))
    return Continued(*pairs, [sources.classes[place] for place in places], given)


class Nearest:
    """Finds the training clips whose given frames are nearest to those of some clips. Sees them in batches.

    Args:
        given: the clips' given frames, (N, 3, G, H, W) uint8.
    """

    def __init__(self, given: Tensor):
        self.wanted = small(given).flatten(1).float()  # (N, D)
        self.distances = torch.full((len(given),), torch.inf)
        self.places = torch.zeros(len(given)).long()

    def see(self, places: Sequence[int], given: Tensor) -> None:
        """Takes some training clips: their places, and their given frames (M, 3, G, H, W) uint8."""
        distances, nearest = torch.cdist(self.wanted, small(given).flatten(1).float()).min(1)  # (N,)
        nearer = distances < self.distances
        self.distances = torch.where(nearer, distances, self.distances)
        self.places = torch.where(nearer, torch.tensor(places)[nearest], self.places)

    def clips(self, read: Callable[[int], tuple[Tensor, float]]) -> Tensor:
        """These training clips, (N, 3, T, H, W) uint8."""
        found = {place: read(place)[0] for place in set(self.places.tolist())}
        return torch.stack([found[place] for place in self.places.tolist()])


def read_training(real: Side, continued: Continued, batch_size: int) -> tuple[Tensor, list[str], Nearest]:
    """Reads the training clips once.

    Returns:
        For a judge, their following frames (M, 3, t, h, w) uint8 and their classes. And the nearest ones.
    """
    given, unreadable = continued.given, []
    nearest = Nearest(continued.truths[:, :, :given])
    following, classes = [], []
    for places, x in read_batches(real, batch_size, True, unreadable):
        nearest.see(places, x[:, :, :given])
        following.append(small(x[:, :, given:]))
        classes += [real.classes[place] for place in places]
    if unreadable:
        log.warning("%d files in %s cannot be read, for example %s: %s", len(unreadable), real.path, *unreadable[0])
    if not following:
        raise UserError(f"no readable file in {real.path}: {unreadable[0][0]}: {unreadable[0][1]}")
    return torch.cat(following), classes, nearest


def measured(clips: Tensor, truth: Continued, judge: Judge, seed: int) -> dict:
    """What is right of clips (N, 3, T, H, W) uint8 in the frames that follow those given: shares, and mean PSNR."""
    follows, truths = clips[:, :, truth.given :], truth.truths[:, :, truth.given :]  # (N, 3, M, H, W)
    judged = judge.judge(small(follows), truth.classes).right
    right = {
        "shape": judged["shape"] if "shape" in judged else judged["class"],
        "direction": same_motion(centroids(follows), centroids(truths)).numpy(),
        "colour": same_hue(hues(follows), hues(truth.truths[:, :, : truth.given])).numpy(),
    }
    right["all three"] = np.all(list(right.values()), axis=0)
    return {"shares": shares(Judged(right), seed), "psnr": float(psnr(follows, truths).mean())}


def continuation_rows(continued: Continued, nearest: Tensor, judge: Judge, seed: int) -> dict[str, dict]:
    """Measures the samples, what really follows, two baselines, and a control in which nothing should be right.

    Args:
        nearest: for each clip the training clip whose given frames are nearest, (N, 3, T, H, W) uint8.
    """
    truths, last = continued.truths, continued.given - 1
    held = torch.cat([truths[:, :, : last + 1], truths[:, :, [last]].expand_as(truths[:, :, last + 1 :])], dim=2)
    return {
        "samples": measured(continued.samples, continued, judge, seed),
        "what really follows": measured(truths, continued, judge, seed),
        "last given frame held": measured(held, continued, judge, seed),
        "nearest training clip": measured(nearest, continued, judge, seed),
        "samples, against other clips": measured(continued.samples, continued.shuffled(seed), judge, seed),
    }
