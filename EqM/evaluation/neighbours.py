"""The nearest real sample of each of some generated ones, in pixels: how near samples are to what was trained on."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.contents import Content
from data.untrusted import Unreadable
from drawing.pictures import contact_sheet
from evaluation.sides import Side, read_batches
from runtime.errors import UserError

SAMPLES = 24  # whose nearest real sample is looked for: the first readable ones
LINE = 2  # pixels between a clip and its neighbour below


@dataclass(frozen=True)
class Neighbour:
    """The nearest real sample of one file.

    Attributes:
        file, nearest: names.
        mirrored: it is near when it is mirrored.
        distance: root mean square of the difference of all pixels, which are in [−1, 1].
    """

    file: str
    nearest: str
    mirrored: bool
    distance: float


@dataclass(frozen=True)
class Found:
    """The neighbours of N samples, and the pixels of both, (N, 3, T, H, W) uint8. Neighbours are mirrored if so."""

    neighbours: list[Neighbour]
    samples: Tensor
    nearest: Tensor


def first_samples(content: Content, path: Path, video: bool) -> tuple[list[str], Tensor]:
    """Names and pixels, (N, 3, T, H, W) uint8, of the first SAMPLES readable samples.

    Raises:
        UserError: there is none.
    """
    names, clips = [], []
    for place, name in enumerate(content.names):
        try:
            x = content.read(place)[0]
        except Unreadable:
            continue
        names.append(name)
        clips.append(x if video else x[:, None])  # (3, T, H, W)
        if len(names) == SAMPLES:
            break
    if not names:
        raise UserError(f"no readable file in {path}")
    return names, torch.stack(clips)


def to_flat(x: Tensor) -> Tensor:
    """Pixels (N, …) uint8 as rows (N, D) float32 in [−1, 1]."""
    return x.flatten(1).float() / 127.5 - 1


def find_nearest(
    names: Sequence[str], samples: Tensor, real: Iterable[tuple[Sequence[str], Tensor]], device: torch.device
) -> Found:
    """Finds the nearest real sample of each sample, also among the mirrored ones.

    Args:
        names: of the samples.
        samples: (N, 3, T, H, W) uint8.
        real: batches of names and pixels, (B, 3, T, H, W) uint8.
    """
    rows = to_flat(samples.to(device))  # (N, D)
    best: list[Neighbour | None] = [None] * len(names)
    nearest = torch.empty_like(samples)
    for real_names, x in real:
        for mirrored in (False, True):
            turned = x.flip(-1) if mirrored else x
            others = to_flat(turned.to(device))  # (B, D)
            places = torch.cdist(rows, others).argmin(1)  # (N,)
            # cdist rounds small distances. So the distance to the one that it finds is computed again.
            exact = (rows - others[places]).square().mean(1).sqrt().tolist()
            for i, (place, distance) in enumerate(zip(places.tolist(), exact, strict=True)):
                if best[i] is None or distance < best[i].distance:
                    best[i], nearest[i] = Neighbour(names[i], real_names[place], mirrored, distance), turned[place]
    return Found(best, samples, nearest)


def named_batches(side: Side, batch_size: int, video: bool) -> Iterator[tuple[list[str], Tensor]]:
    """The readable samples of a side in batches: names and pixels."""
    for places, x in read_batches(side, batch_size, video, []):
        yield [side.content.names[place] for place in places], x


def find_neighbours(
    real: Side, generated: Side, held_out: Side | None, batch_size: int, video: bool, device: torch.device
) -> tuple[dict, np.ndarray]:
    """Looks for the nearest sample of REAL of the first generated samples, and of the first held-out real ones.

    Returns:
        The part of the report, as plain data, and the sheet, (H, W, 3) uint8.

    Raises:
        UserError: a side has no readable sample.
    """
    sides = [generated, *([held_out] if held_out else [])]
    asked = [first_samples(side.content, side.path, video) for side in sides]
    names, samples = [name for names, _ in asked for name in names], torch.cat([x for _, x in asked])
    found = find_nearest(names, samples, named_batches(real, batch_size, video), device)
    count = len(asked[0][0])
    report = {"of": "root mean square difference of pixels in [−1, 1], also to mirrored samples"}
    report["generated"] = summary(found.neighbours[:count])
    if held_out:
        report["held_out"] = {"path": str(held_out.path)} | summary(found.neighbours[count:])
        least = report["held_out"]["least"]
        report["nearer_than_held_out"] = sum(each.distance < least for each in found.neighbours[:count])
    return report, sheet(found, count)


def summary(neighbours: Sequence[Neighbour]) -> dict:
    """Median, least and largest distance, and all neighbours, as plain data."""
    distances = [each.distance for each in neighbours]
    about = {"samples": len(distances), "median": statistics.median(distances)}
    return about | {"least": min(distances), "largest": max(distances), "neighbours": [asdict(n) for n in neighbours]}


def sheet(found: Found, count: int) -> np.ndarray:
    """A contact sheet of the first `count` samples, each with its nearest real one: right of it, a clip's below it."""
    pairs, captions = [], []
    for neighbour, *clips in list(zip(found.neighbours, found.samples, found.nearest, strict=True))[:count]:
        sample, nearest = (clip.movedim(0, -1).numpy() for clip in clips)  # (T, H, W, 3) each
        if len(sample) == 1:
            pairs.append(np.concatenate([sample, nearest]))  # (2, H, W, 3)
        else:
            line = np.full((len(sample), LINE, *sample.shape[2:]), 255, np.uint8)
            pairs.append(np.concatenate([sample, line, nearest], axis=1))  # (T, 2·H + LINE, W, 3)
        captions.append(f"{neighbour.distance:.3f}" + ", mirrored" * neighbour.mirrored)
    return contact_sheet(pairs, captions)
