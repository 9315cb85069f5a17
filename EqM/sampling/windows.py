"""Long videos: windows of the length that the network sees, each begun from the last frames of the one before.

Those frames are held as given frames are (sampling/holding.py). One window is in memory at a time.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runs.config import Config
from runtime import cli
from runtime.errors import UserError
from runtime.logs import log
from sampling.holding import check_whole, how_held

OVERLAP = 0.25  # of a window, unless --overlap says another


@dataclass(frozen=True)
class Windows:
    """How a video is cut into windows, in frames. The last window is cut at the end of the video.

    Attributes:
        total: of the video.
        length: of a window.
        overlap: first frames of a window that are the last of the one before; 0: windows know nothing of one another.
    """

    total: int
    length: int
    overlap: int

    def __len__(self) -> int:
        """The number of windows."""
        return 1 + -(-(self.total - self.length) // (self.length - self.overlap))

    def first(self, window: int) -> int:
        """The place in the video of the first frame that a window adds."""
        return window * (self.length - self.overlap) + (self.overlap if window else 0)

    def added(self, window: int) -> slice:
        """The frames of a window that the video does not have yet."""
        start = self.overlap if window else 0
        return slice(start, min(self.length, start + self.total - self.first(window)))

    def mask(self, shape: Sequence[int]) -> Tensor:
        """Where a window of this shape, (C, T, H, W), holds the one before: (1, T, H, W)."""
        return (torch.arange(shape[1]) < self.overlap)[None, :, None, None].expand(1, *shape[1:])

    def begun(self, before: Tensor) -> Tensor:
        """What a window holds of the one before, (N, C, T, H, W), whose last frames come first."""
        return before.roll(self.overlap, dims=2)


def add_window_args(group: argparse._ActionsContainer) -> None:
    """Adds --frames and --overlap."""
    group.add_argument(
        "--frames",
        type=cli.count,
        metavar="N",
        help="frames of a video that is longer than the clips that the network sees: windows of that length follow"
        " one another",
    )
    overlap = f"frames that a window holds of the one before; 0: none; default {OVERLAP:g} of a window"
    group.add_argument("--overlap", type=cli.whole(0, cli.MAX_SIDE), metavar="N", help=overlap)


def check_window_args(args: argparse.Namespace) -> None:
    """Raises UserError if flags contradict --frames, or lack it."""
    if args.overlap is not None and not args.frames:
        raise UserError("--overlap says how the windows of --frames N overlap: give that too")
    if args.frames and args.init and not args.keep_frames:
        raise UserError("--frames goes on from the first frames of --init: say with --keep-frames how many are given")
    wrong = {
        "--adaptive": args.adaptive,
        "--sampler euler": args.sampler == "euler",
        "--trace": args.trace,
        "--keep-mask": args.keep_mask,
    }
    for flag, given in wrong.items():
        if args.frames and given:
            raise UserError(f"--frames makes videos of several descents, which {flag} does not fit: leave one out")


def choose_windows(frames: int, overlap: int | None, config: Config) -> Windows:
    """The windows of videos of so many frames.

    Args:
        overlap: in frames; None: OVERLAP of a window, in whole tokens.

    Raises:
        UserError: the network makes images, or sees more frames at once; the overlap is no whole tokens, or a window;
            or the latents cannot be cut.
    """
    network, space, length = config.network, config.space, config.network.frames
    if not network.is_video:
        raise UserError("--frames is for videos, and the checkpoint makes images: leave it out")
    if space and space.time_factor > 1:
        alone = f"{space.time_factor} frames a frame of latents, but for the first"
        raise UserError(f"--frames: the VAE {space.name} has {alone}, so that windows do not overlap: leave it out")
    if frames < length:
        raise UserError(f"--frames {frames}: the network makes {length} frames at once: give as many, or more")
    patch = network.temporal_patch
    if overlap is None:
        overlap = max(int(OVERLAP * length) // patch, 1) * patch
    check_whole("--overlap", overlap, range(0, length, patch), config)
    windows, how = Windows(frames, length, overlap), how_held(config.objective.by_frame > 0)
    held = f", {overlap} of them held {how}" if overlap else ""
    log.info("--frames: %d windows of %d frames%s", len(windows), length, held)
    return windows
