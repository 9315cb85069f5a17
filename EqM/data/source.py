"""What a run trains on: files or a pack, as pixels or as latents."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.clips import Samples, window_length
from data.latents import IMAGE_SIZE, PIXEL_SIZE, VAE, LatentSpace, batch_moments, draw, load_vae, to_unit_range
from data.packs.pack import Pack, is_pack, open_pack
from data.packs.samples import PackedSamples, unpack
from data.scan import Found, scan_for_training
from precision import Precision
from runs.config import network_settings
from runtime import distributed
from runtime.draws import seed_draws
from runtime.errors import UserError
from runtime.logs import log

POSTERIOR = 1  # sets the draws from the posterior apart from the step's own


@dataclass(frozen=True)
class Source:
    """Where samples come from, and how they become the network's input.

    `found` says what there is. `pack` holds it where it is packed; `space` is the latents' where
    training sees latents, and `vae` what encodes pixels as they come.
    """

    image_size: int
    found: Found
    pack: Pack | None
    space: LatentSpace | None
    vae: VAE | None

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Samples by key (epoch, index)."""
        flip, seed = not args.no_flip, args.global_seed
        if self.pack:
            return PackedSamples(self.pack, args.clip_len, args.frame_interval, flip, seed)
        return Samples(self.found, self.image_size, args.clip_len, args.frame_interval, flip, seed)

    def to_input(self, batch: dict, generator: torch.Generator, *place: int) -> Tensor:
        """A batch on the device as the network's input, (N, C, H, W) or (N, C, T, H, W) float32, contiguous.

        Draws from the posterior follow from the place alone, as (seed, samples drawn before, rank).
        """
        x = unpack(batch["x"], batch["flip"], self.pack.settings.video) if self.pack else batch["x"]
        # In another layout x would have an explicit energy compiled a second time.
        if not self.space:
            return to_unit_range(x.contiguous())
        seed_draws(generator, *place, POSTERIOR)
        return draw(batch_moments(self.vae, x) if self.vae else x, self.space.scale, generator).contiguous()

    def decoder(self, device: torch.device, precision: Precision) -> VAE | None:
        """The VAE that decodes samples, if they are latents; reading packed ones has not loaded it.

        Raises:
            UserError: it is missing, or another one than the pack was made with.
        """
        if self.vae or not self.space:
            return self.vae
        vae = load_vae(self.space.name, device, precision.name == "bf16")
        if vae.space.fingerprint != self.space.fingerprint:
            raise UserError(f"the VAE {self.space.name} is another one than {self.pack.folder} was made with")
        return vae

    def announce(self, args: argparse.Namespace) -> None:
        """Logs what there is, and what cannot be read."""
        found, kind = self.found, "clips" if args.video else "images"
        log.info("data: %s, %d %s, %d classes", self, len(found.items), kind, len(found.classes))
        for path, reason in found.unreadable:
            log.warning("skipped unreadable %s: %s", path, reason)
        if args.video:
            log.info(
                "clips of %d frames, %d apart; shorter videos, which hold their last frame: %d of %d",
                args.clip_len,
                args.frame_interval,
                found.shorter_than(window_length(args.clip_len, args.frame_interval)),
                len(found.items),
            )

    def __str__(self) -> str:
        if not self.pack:
            return f"{self.found.root}, latents of {self.space.name}" if self.space else self.found.root
        return f"{self.found.root}, a pack of {self.pack.settings.values}"


def open_source(args: argparse.Namespace, device: torch.device, precision: Precision) -> Source:
    """Opens what --data-path names, in the form that --vae and --image-size ask for.

    Raises:
        UserError: nothing there, or not in that form.
    """
    wanted = args.vae not in (None, "none")
    pack = distributed.on_main(lambda: open_pack(args.data_path) if is_pack(args.data_path) else None)
    if pack:
        check_pack(args, pack)
        space = packed_space(pack)
        vae = None if space or not wanted else load_vae(args.vae, device, precision.name == "bf16")
        return Source(pack.settings.image_size, pack.found(), pack, space or (vae and vae.space), vae)
    vae = load_vae(args.vae, device, precision.name == "bf16") if wanted else None
    size = args.image_size or (IMAGE_SIZE if vae else PIXEL_SIZE)
    network_settings(args, size, 1, vae and vae.space)  # a wrong size ends the run before a long scan
    found = distributed.on_main(lambda: scan_for_training(args.data_path, args.video))
    return Source(size, found, None, vae and vae.space, vae)


def packed_space(pack: Pack) -> LatentSpace | None:
    """The space of a pack's latents."""
    vae = pack.settings.vae
    if not vae:
        return None
    downsampling = pack.settings.image_size // vae["side"]
    return LatentSpace(vae["name"], vae["fingerprint"], vae["scale"], vae["channels"], downsampling)


def check_pack(args: argparse.Namespace, pack: Pack) -> None:
    """Raises UserError, with both values, where a flag asks for another pack than there is."""
    settings = pack.settings
    if settings.video != args.video:
        holds, flag = ("videos", "add") if settings.video else ("images", "leave out")
        raise UserError(f"{args.data_path} is a pack of {holds}: {flag} --video")
    packed = {"--image-size": (args.image_size, settings.image_size)}
    if settings.vae:
        packed["--vae"] = (args.vae, settings.vae["name"])
    for flag, (asked, value) in packed.items():
        if asked is not None and asked != value:
            raise UserError(
                f"{args.data_path} was made with {flag} {value}, and this run asks for {asked}: leave it out"
            )


def check_classes(found: Found, asked: int | None) -> int:
    """The number of classes to build the network for."""
    if asked and asked < len(found.classes):
        raise UserError(f"--num-classes {asked} is less than the data's {len(found.classes)} classes")
    return asked or len(found.classes)
