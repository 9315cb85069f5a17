"""The data of a run: files or a pack, as pixels or as latents."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.clips import Samples
from data.file_list import Found
from data.form import Form
from data.latent_space import LatentSpace, draw
from data.latents import DEFAULT_SIZE, DEFAULT_VAE_SIZE, VAE, batch_moments, load_vae, to_unit_range
from data.packs.dataset import PackedSamples, unpack
from data.packs.pack import Pack, is_pack, open_pack
from data.scan import scan_for_training
from data.walk import MISTAKE
from precision import Precision
from runtime import cli, distributed
from runtime.errors import UserError, shown
from runtime.logs import log
from runtime.random_numbers import seed_draws
from runtime.size import SIZE_HELP

POSTERIOR = 1  # in a seed: keeps the posterior's draws apart from the step's


@dataclass(frozen=True)
class Source:
    """The data of a run, and how they become the network's input.

    Attributes:
        found: the files.
        pack: holds them, if they are packed.
        space: the latent space that the network sees; None: it sees pixels.
        vae: encodes pixels during training; None if the network sees pixels, or the pack holds latents.
    """

    form: Form
    found: Found
    pack: Pack | None
    space: LatentSpace | None
    vae: VAE | None

    def dataset(self, seed: int) -> Dataset:
        """Samples by key (epoch, index)."""
        if self.pack:
            return PackedSamples(self.pack, self.form, seed)
        return Samples(self.found, self.form, seed)

    def to_input(self, batch: dict, generator: torch.Generator, *place: int) -> Tensor:
        """Turns a batch on the device into the network's input, (N, C, [T,] H, W) float32, contiguous.

        The place (seed, samples drawn before, rank) alone decides the draws from the posterior.
        """
        x = unpack(batch["x"], batch["flip"], self.form.video) if self.pack else batch["x"]
        # An explicit energy would be compiled a second time for an x of another memory layout.
        if not self.space:
            return to_unit_range(x.contiguous())
        seed_draws(generator, *place, POSTERIOR)
        return draw(batch_moments(self.vae, x) if self.vae else x, self.space, generator).contiguous()

    def decoder(self, device: torch.device, precision: Precision) -> VAE | None:
        """The VAE that decodes samples; None for pixels. Loads it if the pack holds latents.

        Raises:
            UserError: the VAE is missing, or its weights are not those that the pack was made with.
        """
        if self.vae or not self.space:
            return self.vae
        vae = load_vae(self.space.name, device, precision.name == "bf16")
        if vae.space.fingerprint != self.space.fingerprint:
            raise UserError(
                f"{self.pack.folder} was made with other weights of the VAE {self.space.name}: make the pack again"
            )
        vae.take_space(self.space)
        return vae

    @property
    def time_factor(self) -> int:
        """Frames of a clip from one frame that the network sees to the next."""
        return self.space.time_factor if self.space else 1

    def announce(self) -> None:
        """Logs the size of the data, what is left out of them, and the files that cannot be read."""
        found, form = self.found, self.form
        log.info("data: %s, %d %s, %d classes", self, len(found), form.kind, len(found.classes))
        for note in found.notes:
            (log.warning if note.startswith(MISTAKE) else log.info)("%s", note)
        for path, reason in found.unreadable:
            log.warning("skipped unreadable %s: %s", shown(path), shown(reason))
        if form.video:
            for each in form.batch_forms:
                self.announce_clips(each)

    def announce_clips(self, form: Form) -> None:
        """Logs the length of clips, and how many videos are too short for them."""
        log.info("clips of %d frames, %d apart", form.clip_len, form.frame_interval)
        if self.time_factor > 1:
            log.info("the VAE makes %d frames of latents of each", self.space.frames(form.clip_len))
        if not (self.pack and self.pack.settings.windows):
            short, count = self.found.shorter_than(form.window), len(self.found)
            log.info("%d of %d videos are shorter than a clip, which repeats their last frame", short, count)

    def __str__(self) -> str:
        if not self.pack:
            return f"{self.found.root}, latents of {self.space.name}" if self.space else self.found.root
        return f"{self.found.root}, a pack of {self.pack.settings.values}"


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the data and of their form."""
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", type=cli.path, required=True, help="class folders, videos with a CSV, or a pack")
    cli.add_kept(data, "--video", False, action="store_true", help="train on clips of videos, not on images")
    cli.add_kept(data, "--image-size", type=cli.size, help=f"{SIZE_HELP}; default 64, with a VAE 256")
    vae = "train on latents of this VAE: ema, mse, a folder, or none for pixels; default none, or the pack's"
    cli.add_kept(data, "--vae", type=cli.given, metavar="NAME", help=vae)
    length = "frames of a clip; of several lengths each batch has one, by chance: for --positions rotary"
    cli.add_kept(data, "--clip-len", 16, type=cli.side, nargs="+", action=cli.OneOrMore, metavar="N", help=length)
    interval = "video frames from one of a clip to the next; of several intervals each batch has one, by chance"
    several = {"type": cli.positive_int, "nargs": "+", "action": cli.OneOrMore, "metavar": "N"}
    cli.add_kept(data, "--frame-interval", 3, **several, help=interval)
    flip = "never mirror samples: for classes that a mirror would swap"
    cli.add_kept(data, "--no-flip", False, action="store_true", help=flip)
    workers = "loading processes a rank; default 4; 0 on a CPU and for a pack"
    data.add_argument("--num-workers", type=cli.loading_processes, help=workers)


def find_pack(path: Path) -> Pack | None:
    """The pack at a path; None if something else is there. Every rank must call it.

    Raises:
        UserError: the pack is half-made or damaged.
    """
    return distributed.on_main(lambda: open_pack(path) if is_pack(path) else None)


def form_of(args: argparse.Namespace, pack: Pack | None) -> Form:
    """The form that the flags ask for. Without --image-size, the pack's size or a default."""
    default = DEFAULT_VAE_SIZE if args.vae not in (None, "none") else DEFAULT_SIZE
    size = args.image_size or (pack.settings.image_size if pack else default)
    clip_len, interval = (args.clip_len, args.frame_interval) if args.video else (1, 1)
    lengths, intervals = (value if isinstance(value, tuple) else () for value in (clip_len, interval))
    clip_len, interval = max(lengths, default=clip_len), min(intervals, default=interval)
    return Form(bool(args.video), size, clip_len, interval, not args.no_flip, lengths, intervals)


def open_space(
    pack: Pack | None,
    vae_name: str | None,
    device: torch.device,
    precision: Precision,
    before: LatentSpace | None = None,
) -> tuple[LatentSpace | None, VAE | None]:
    """The latent space that the network sees, and the VAE that encodes pixels; None, None for pixels.

    Args:
        before: the space of the run that goes on. If it is of the same VAE, the run goes on in it.

    Raises:
        UserError: the VAE cannot be loaded.
    """
    packed = pack.settings.space if pack else None
    if packed:
        return packed, None
    vae = load_vae(vae_name, device, precision.name == "bf16") if vae_name not in (None, "none") else None
    if vae and before and before.fingerprint == vae.space.fingerprint:
        vae.take_space(before)
    return vae and vae.space, vae


def open_source(path: Path, form: Form, pack: Pack | None, space: LatentSpace | None, vae: VAE | None) -> Source:
    """The source at a path. Scans the path if it is not a pack. Every rank must call it.

    Raises:
        UserError: there are no files or no classes, or too many files cannot be read.
    """
    found = pack.found() if pack else distributed.on_main(lambda: scan_for_training(path, form.video))
    return Source(form, found, pack, space, vae)


def packed_flags(pack: Pack | None) -> dict:
    """What a new run takes for flags that a pack of windows decides, by name."""
    windows = pack.settings.windows if pack else None
    return {"clip_len": windows.clip_len, "frame_interval": windows.frame_interval} if windows else {}


def check_pack(args: argparse.Namespace, pack: Pack | None) -> None:
    """Raises UserError if a flag contradicts the pack."""
    if not pack:
        return
    settings = pack.settings
    if args.video is not None and settings.video != args.video:
        holds, flag = ("videos", "add") if settings.video else ("images", "leave out")
        raise UserError(f"{args.data_path} is a pack of {holds}: {flag} --video")
    packed = {"--image-size": (args.image_size, settings.image_size)}
    if settings.vae:
        packed["--vae"] = (args.vae, settings.vae["name"])
    for name, value in packed_flags(pack).items():
        packed[f"--{name.replace('_', '-')}"] = (getattr(args, name), value)
    for flag, (asked, value) in packed.items():
        if asked is not None and asked != value:
            raise UserError(f"{args.data_path} was made with {flag} {value}, not {asked}: leave out {flag}")


def class_count(found: Found, asked: int | None) -> int:
    """The number of classes that the network is built for: `asked`, or that of the data.

    Raises:
        UserError: `asked` is less than the data have.
    """
    if asked and asked < len(found.classes):
        raise UserError(f"--num-classes {asked} is less than the data's {len(found.classes)} classes")
    return asked or len(found.classes)
