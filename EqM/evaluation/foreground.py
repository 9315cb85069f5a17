"""Where a coloured thing is in a clip, which colour it has, and how it moves. For sets such as moving shapes.

Clips are (N, 3, T, H, W) uint8. Whatever has colour is the foreground, and grey is the background. Colour is measured
as chroma, the largest of red, green and blue less the least.
"""

import math

import torch
from torch import Tensor

LEAST_CHROMA = 64  # of 255; what has less is background
LEAST_SHARE = 0.002  # of a frame's pixels; a smaller foreground is none
HUE_TOLERANCE = 15.0  # degrees
TURN_TOLERANCE = 45.0  # degrees
ROUNDING = 1 / 12  # mean squared error of rounding to whole levels; no error counts as less


def foreground(clips: Tensor) -> Tensor:
    """The weight of each pixel, (N, T, H, W) float32: its chroma, or 0 if it is background."""
    chroma = (clips.amax(1) - clips.amin(1)).float()  # (N, T, H, W)
    weights = torch.where(chroma >= LEAST_CHROMA, chroma, 0.0)
    seen = (weights > 0).float().mean((2, 3), keepdim=True) >= LEAST_SHARE  # (N, T, 1, 1)
    return weights * seen


def hues(clips: Tensor) -> Tensor:
    """The mean hue of each clip's foreground, (N,) degrees from -180 to 180. NaN if a frame has no foreground.

    Red, green and blue are three directions in a plane, 120° apart, and a colour is their sum. Its angle is the hue;
    it differs from the hue of HSV by at most 1.2°. The mean weighs pixels by chroma.
    """
    weights = foreground(clips)  # (N, T, H, W)
    red, green, blue = (clips.float() * (weights > 0)[:, None]).sum((2, 3, 4)).unbind(1)  # (N,)
    found = torch.atan2(math.sqrt(3) / 2 * (green - blue), red - (green + blue) / 2).rad2deg()
    return torch.where((weights.sum((2, 3)) > 0).all(1), found, torch.nan)


def same_hue(first: Tensor, second: Tensor) -> Tensor:
    """(N,) bool: hues (N,) differ by at most HUE_TOLERANCE. False where there is none."""
    return ((first - second + 180) % 360 - 180).abs() <= HUE_TOLERANCE


def centroids(clips: Tensor) -> Tensor:
    """Where the foreground lies on average, (N, T, 2), as (x, y) in pixels. NaN in a frame without one."""
    weights = foreground(clips)  # (N, T, H, W)
    across, down = (torch.arange(side, device=clips.device) + 0.5 for side in (clips.shape[-1], clips.shape[-2]))
    total = weights.sum((2, 3))  # (N, T)
    x, y = (weights.sum(2) * across).sum(2), (weights.sum(3) * down).sum(2)  # (N, T)
    return torch.stack([x, y], dim=2) / total[..., None]


def same_motion(first: Tensor, second: Tensor) -> Tensor:
    """(N,) bool: two paths (N, T, 2) move alike, frame by frame, and not just in the end.

    The steps of a path from frame to frame are one vector. The angle between the vectors of the two paths is at most
    TURN_TOLERANCE. False if a path stands still, or has a frame without foreground.
    """
    steps, others = (path.diff(dim=1).flatten(1) for path in (first, second))  # (N, 2·(T − 1))
    cosine = (steps * others).sum(1) / (steps.norm(dim=1) * others.norm(dim=1))  # (N,), NaN for 0 / 0
    return cosine >= math.cos(math.radians(TURN_TOLERANCE))


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of clips (N, 3, T, H, W) uint8: (N,) decibels, at most 59."""
    pairs = zip(first, second, strict=True)  # one by one: as floats they take four times the memory
    errors = torch.stack([(one.float() - other.float()).square().mean() for one, other in pairs])  # (N,)
    return 10 * (255**2 / errors.clamp_min(ROUNDING)).log10()
