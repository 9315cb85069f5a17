"""Where samples start: from noise, or from given clips or images with noise mixed in.

Source of the mixture γ₀·x + (1 − γ₀)·ε: Wang & Du 2025, arXiv 2510.02300, which denoises from any point
between noise and data. With S the share of noise, γ₀ = 1 − S.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.clips import Samples, first_windows
from data.latents import VAE, encode
from data.scan import Item, check_files, find_loose_files, unreadable_errors
from objective import Objective
from runtime import cli, distributed
from runtime.draws import sample_noise
from runtime.errors import UserError
from runtime.logs import log

INIT_NOISE = 0.5  # where --init-noise is not given

noise_share = cli.checked(float, lambda v: 0 < v <= 1, "a number above 0, and at most 1")


def add_start_args(parser: argparse.ArgumentParser) -> None:
    """Adds --init and --init-noise."""
    group = parser.add_argument_group("start")
    group.add_argument(
        "--init",
        type=Path,
        metavar="FOLDER",
        help="vary its clips or images, the first window of each, in sorted order; without --class, each under"
        " the class whose name its class folder has, else under none",
    )
    group.add_argument(
        "--init-noise",
        type=noise_share,
        metavar="S",
        help=f"share of noise in --init; 1: only noise; default {INIT_NOISE}",
    )


@dataclass(frozen=True)
class Starts:
    """Where samples start, by index: with `items`, sample i is the file i mod their number with noise mixed in.

    `window` reads a file, `vae` encodes it where samples are latents, `noise` is the share S of noise, and
    `objective` mixes it in as in training.
    """

    seed: int
    shape: tuple[int, ...]
    items: tuple[Item, ...] = ()
    window: Samples | None = None
    vae: VAE | None = None
    noise: float = 1.0
    objective: Objective = Objective()

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """The starts (N, *shape) of samples, float32; each sample's noise follows from (seed, its index) alone.

        Raises:
            UserError: a file cannot be read any more.
        """
        noise = sample_noise(self.seed, indices, self.shape)  # (N, …)
        if not self.items:
            return noise
        items = [self.item(index) for index in indices]
        distinct = list(dict.fromkeys(items))
        x = encode(torch.stack([self.read(item) for item in distinct]), self.vae).cpu()  # (D, …)
        x = x[[distinct.index(item) for item in items]]  # (N, …)
        return self.objective.interpolate(x, noise, torch.full((len(x),), 1 - self.noise))

    def item(self, index: int) -> Item:
        """The file that a sample starts from."""
        return self.items[index % len(self.items)]

    def given(self, index: int) -> np.ndarray:
        """What that file shows, (T, H, W, 3) uint8."""
        pixels = self.read(self.item(index))  # (3, [T,] H, W)
        return (pixels if pixels.dim() == 4 else pixels[:, None]).permute(1, 2, 3, 0).numpy()

    def read(self, item: Item) -> Tensor:
        """A file's pixels, (3, [T,] H, W) uint8."""
        try:
            return self.window.read(item, 0.0)[0]
        except unreadable_errors(item.video is not None) as error:
            raise UserError(f"--init: {item.path} cannot be read: {error}: remove it") from None


def choose_starts(
    args: argparse.Namespace, config: dict, shape: tuple[int, ...], vae: VAE | None, names: Sequence[str]
) -> tuple[Starts, list[int]]:
    """The starts that the flags ask for, and the class of each file; without --init no classes.

    A file in no class folder, or in one of another name than the classes', has the null class, `len(names)`.

    Raises:
        UserError: no readable file of the checkpoint's kind, --init-noise without --init, or samples that
            would replace the files.
    """
    objective = Objective(**config.get("objective", {}))
    if not args.init:
        if args.init_noise is not None:
            raise UserError("--init-noise says how much noise is mixed into --init FOLDER: give that too")
        return Starts(args.global_seed, shape, objective=objective), []
    if args.init.resolve() == args.folder.resolve():
        raise UserError(f"--init and --folder are both {args.init}: samples would replace what they start from")
    items = distributed.on_main(lambda: first_readable(args.init, len(shape) == 4, args.num_fid_samples, names))
    noise = INIT_NOISE if args.init_noise is None else args.init_noise
    starts = Starts(args.global_seed, shape, items, first_windows(config), vae, noise, objective)
    return starts, [item.label for item in items]


def first_readable(folder: Path, video: bool, wanted: int, names: Sequence[str]) -> tuple[Item, ...]:
    """As many of the first readable files of a folder as are wanted, fewer where there are no more."""
    found = find_loose_files(folder, video)
    labelled = [(path, names.index(name) if name in names else len(names)) for path, name in found]
    items: tuple[Item, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    while labelled and len(items) < wanted:
        missing = wanted - len(items)
        readable, rest = check_files(labelled[:missing], video)
        items, unreadable, labelled = items + readable, unreadable + rest, labelled[missing:]
    if not items:
        path, reason = unreadable[0]
        raise UserError(f"no readable {'clip' if video else 'image'} in --init {folder}: {path}: {reason}")
    if unreadable:
        log.warning("--init: %d files cannot be read and are left out, as %s: %s", len(unreadable), *unreadable[0])
    known = sum(item.label < len(names) for item in items)
    log.info("--init: %d files, %d of them in class folders that the checkpoint knows", len(items), known)
    return items
