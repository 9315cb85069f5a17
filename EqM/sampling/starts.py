"""Where samples start: from noise, or from given clips or images with noise mixed in.

The mixture is γ₀·x + (1 − γ₀)·ε. Wang & Du 2025, arXiv 2510.02300, denoise in this way from any point between noise
and data. With S the share of noise, γ₀ = 1 − S. Or parts of them are held, and the rest starts from noise alone.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.clips import read_sample
from data.file_list import Item, Names
from data.form import Form
from data.latents import VAE, encode
from data.opening import check_files
from data.scan import Listing, collect, find_loose_files
from data.untrusted import Unreadable
from objective import Objective
from runs.config import Config
from runtime import cli, distributed
from runtime.errors import UserError
from runtime.logs import log
from runtime.random_numbers import sample_noise
from sampling.holding import Kept, choose_kept

INIT_NOISE = 0.5  # the share of noise, unless --init-noise says another

noise_share = cli.checked(float, lambda v: 0 < v <= 1, "a number above 0, and at most 1")


@dataclass(frozen=True)
class StartRequest:
    """Where samples are to start.

    Attributes:
        seed: of the noise.
        samples: how many samples there are; so many files are enough.
        folder: holds clips or images to start from. None: samples start from noise.
        noise: the share of noise that is mixed into them.
        keep_frames: all of so many of their first frames are held.
        keep_mask: a picture whose white part is held in all of their frames.
    """

    seed: int
    samples: int
    folder: Path | None = None
    noise: float = INIT_NOISE
    keep_frames: int = 0
    keep_mask: Path | None = None

    @property
    def keeps(self) -> bool:
        """Whether a part of each file is held."""
        return bool(self.keep_frames or self.keep_mask)

    @property
    def share(self) -> float:
        """The share of noise in a start."""
        return self.noise if self.folder and not self.keeps else 1.0


def add_start_args(parser: argparse.ArgumentParser) -> None:
    """Adds --init, --init-noise, --keep-frames and --keep-mask."""
    group = parser.add_argument_group("start")
    group.add_argument(
        "--init",
        type=cli.path,
        metavar="FOLDER",
        help="start from the clips or images of a folder, in sorted order, from the first window of each clip;"
        " without --class, a sample has the class that its class folder names, or none",
    )
    group.add_argument(
        "--init-noise",
        type=noise_share,
        metavar="S",
        help=f"share of noise that is mixed into --init; 1: only noise; default {INIT_NOISE}",
    )
    group.add_argument(
        "--keep-frames",
        type=cli.side,
        metavar="N",
        help="hold the first N frames of each clip of --init; the others start from noise",
    )
    group.add_argument(
        "--keep-mask",
        type=cli.path,
        metavar="PNG",
        help="hold the white part of this picture in each image, or frame, of --init; the rest starts from noise",
    )


def check_start_args(args: argparse.Namespace) -> None:
    """Raises UserError if --init-noise or --keep-… has nothing to work on, or samples would replace their starts."""
    if not args.init and args.init_noise is not None:
        raise UserError("--init-noise says how much noise is mixed into --init FOLDER: give that too")
    keeps = "--keep-frames" if args.keep_frames else "--keep-mask" if args.keep_mask else ""
    if keeps and not args.init:
        raise UserError(f"{keeps} says what is held of --init FOLDER: give that too")
    if keeps and args.init_noise is not None:
        raise UserError(f"{keeps} has all that is not held start from noise: leave out --init-noise")
    if keeps and (args.adaptive or args.sampler == "euler"):
        other = "--adaptive" if args.adaptive else "--sampler euler"
        raise UserError(f"{keeps} needs gradient descent with the same number of steps for all: leave out {other}")
    if args.init and args.init.resolve() == args.folder.resolve():
        raise UserError(f"--init and --folder are both {args.init}: samples would replace what they start from")


def start_request_of(args: argparse.Namespace) -> StartRequest:
    """What the flags ask for."""
    noise = INIT_NOISE if args.init_noise is None else args.init_noise
    kept = args.keep_frames or 0, args.keep_mask
    return StartRequest(args.global_seed, args.num_fid_samples, args.init, 1.0 if any(kept) else noise, *kept)


@dataclass(frozen=True)
class Starts:
    """Where samples start, by their indices. With `items`, sample i starts from items[i % len(items)] and noise.

    Attributes:
        seed: of the noise.
        shape: of one sample as the network sees it, (C, h, w) or (C, t, h, w).
        items: files to start from.
        form: how a file is read.
        vae: encodes what a file shows, if samples are latents.
        noise: the share of noise.
        objective: mixes noise into a file as in training.
        kept: what is held of a file; None: nothing.
    """

    seed: int
    shape: tuple[int, ...]
    items: tuple[Item, ...] = ()
    form: Form | None = None
    vae: VAE | None = None
    noise: float = 1.0
    objective: Objective = Objective()
    kept: Kept | None = None

    def __call__(self, indices: Sequence[int], window: int = 0) -> Tensor:
        """The starts (N, *shape) of samples, float32. The noise of a sample follows from the seed and its index alone.

        Args:
            window: of a long video. It has noise of its own, and only the first one starts from files.

        Raises:
            UserError: a file can no longer be read.
        """
        noise = sample_noise(self.seed, indices, self.shape, window)  # (N, …)
        if not self.items or self.kept or window:
            return noise
        return self.objective.interpolate(self.shown(indices), noise, torch.full((len(noise),), 1 - self.noise))

    def shown(self, indices: Sequence[int]) -> Tensor:
        """What the files of samples show, as the network sees it, (N, *shape) float32. Raises UserError as a call."""
        items = [self.item(index) for index in indices]
        distinct = list(dict.fromkeys(items))
        x = encode(torch.stack([self.read(item) for item in distinct]), self.vae).cpu()  # (D, …)
        return x[[distinct.index(item) for item in items]]  # (N, …)

    def item(self, index: int) -> Item:
        """The file that a sample starts from."""
        return self.items[index % len(self.items)]

    def given(self, index: int) -> np.ndarray:
        """The frames of that file, (T, H, W, 3) uint8."""
        pixels = self.read(self.item(index))  # (3, [T,] H, W)
        return (pixels if pixels.dim() == 4 else pixels[:, None]).permute(1, 2, 3, 0).numpy()

    def read(self, item: Item) -> Tensor:
        """The pixels of a file, (3, [T,] H, W) uint8.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return read_sample(item, self.form, 0.0)[0]
        except Unreadable as error:
            raise UserError(f"--init: {item.path} cannot be read: {error}: remove it") from None


def choose_starts(
    request: StartRequest, config: Config, shape: tuple[int, ...], vae: VAE | None
) -> tuple[Starts, list[int]]:
    """The starts of samples, and the class of each file. Without a folder there are no classes.

    A file has the null class if it is in no class folder, or if the network does not know the name of the folder.
    Every rank must call this.

    Raises:
        UserError: the folder has no readable file of the kind that the network was trained on, or what is to be held
            of its files makes no sense.
    """
    if not request.folder:
        return Starts(request.seed, shape, objective=config.objective), []
    kept = choose_kept(request.keep_frames, request.keep_mask, config, shape) if request.keeps else None
    names, video = config.class_names, config.network.is_video
    items = distributed.on_main(lambda: first_readable(request.folder, video, request.samples, names))
    starts = Starts(request.seed, shape, items, config.form, vae, request.noise, config.objective, kept)
    return starts, [item.label for item in items]


def first_readable(folder: Path, video: bool, wanted: int, names: Sequence[str]) -> tuple[Item, ...]:
    """The first readable files of a folder, as many as are wanted, or all if there are fewer.

    Raises:
        UserError: none can be read.
    """
    found = find_loose_files(folder, video)
    labelled = [(path, names.index(name) if name in names else len(names)) for path, name in found]
    items: tuple[Item, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    while labelled and len(items) < wanted:
        missing = wanted - len(items)
        some, labelled = labelled[:missing], labelled[missing:]
        listing = Listing((), Names(path for path, _ in some), np.array([label for _, label in some]), ())
        part = collect(str(folder), listing, check_files(listing.paths, video))
        items, unreadable = items + tuple(part), unreadable + part.unreadable
    if not items:
        path, reason = unreadable[0]
        raise UserError(f"no readable {'clip' if video else 'image'} in --init {folder}: {path}: {reason}")
    if unreadable:
        log.warning("--init: %d files cannot be read and are left out, as %s: %s", len(unreadable), *unreadable[0])
    known = sum(item.label < len(names) for item in items)
    log.info("--init: %d files, %d of them in class folders that the checkpoint knows", len(items), known)
    return items
