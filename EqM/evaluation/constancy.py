"""Whether what a long video shows in its first frames is still there in its last frames."""

import numpy as np
import torch
from torch import Tensor

from data.contents import Kind, open_path
from data.form import Form
from evaluation.continuation import others
from evaluation.foreground import hues, same_hue
from evaluation.judge import Judge, Judged, small
from evaluation.report import shares
from evaluation.sides import Side, read_batches
from runtime.errors import UserError
from runtime.logs import log

LAST_WINDOW = 1 - 1e-9  # where a clip starts in its video: as late as it can


def open_ends(generated: Side, kind: Kind) -> tuple[Side, Side]:
    """The first and the last frames of generated videos, as two sides.

    Args:
        kind: of the frames at one end.
    """
    form = Form(True, kind.side, kind.frames)
    sides = []
    for name, start in (("first frames", 0.0), ("last frames", LAST_WINDOW)):
        content = open_path(generated.path, form, None, "EqM/evaluate_video.py", lambda place, start=start: start)
        sides.append(Side(name, generated.path, content, generated.classes, {}))
    return sides[0], sides[1]


def read_ends(ends: tuple[Side, Side], batch_size: int) -> tuple[Tensor, Tensor]:
    """What is needed of both ends of the videos, one video after the other.

    Returns:
        The clips for a judge (2, N, 3, t, h, w) uint8, and the hues (2, N) in degrees.

    Raises:
        UserError: fewer than two videos can be read.
    """
    found: list[dict[int, tuple[Tensor, Tensor]]] = [{}, {}]
    for side, of_side in zip(ends, found, strict=True):
        unreadable: list[tuple[str, str]] = []
        for places, x in read_batches(side, batch_size, True, unreadable):
            of_side |= dict(zip(places, zip(small(x), hues(x), strict=True), strict=True))
        if unreadable:
            log.warning("%d %s cannot be read, for example %s: %s", len(unreadable), side.name, *unreadable[0])
    places = sorted(found[0].keys() & found[1].keys())
    if len(places) < 2:
        raise UserError(f"{len(places)} videos of {ends[0].path} can be read: two are needed")
    clips, colours = (torch.stack([torch.stack([end[i][part] for i in places]) for end in found]) for part in (0, 1))
    return clips, colours


def constancy_rows(clips: Tensor, colours: Tensor, judge: Judge, seed: int) -> dict[str, dict]:
    """The share of videos whose last frames show the shape and the colour of the first ones.

    The control takes the last frames of another video, as if the windows of a video were independent.

    Args:
        clips: of both ends, (2, N, 3, t, h, w) uint8, from `small`.
        colours: their hues, (2, N), in degrees.
    """
    first, last = (judge.words_seen(end) for end in clips)
    part = "shape" if "shape" in first else "class"
    count = clips.shape[1]
    rows = {}
    for name, other in (("samples", np.arange(count)), ("last frames of other videos", others(count, seed))):
        right = {
            "shape": first[part] == last[part][other],
            "colour": same_hue(colours[0], colours[1][torch.from_numpy(other)]).numpy(),
        }
        right["both"] = right["shape"] & right["colour"]
        rows[name] = {"shares": shares(Judged(right), seed)}
    return rows
