"""VAEs of diffusers: loading one, encoding pixels, decoding latents.

Source: Rombach et al. 2022, arXiv 2112.10752. The package diffusers is optional (requirements-latent.txt).
docs/latents.md lists the classes, and what is honoured of each.
"""

import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.latent_space import LatentSpace
from runtime.errors import UserError, first_line
from runtime.hub import check_hub
from runtime.plain_data import brief, read_as

PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
# These encode clips whole, and compress time. The first frame stands alone.
KINDS += ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLLTXVideo", "AutoencoderKLCosmos")
KINDS += ("AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX")
DEFAULT_SIZE, DEFAULT_VAE_SIZE = 64, 256  # the default image sizes: without a VAE, and with one
CHUNK_PIXELS = 8 * 256 * 256  # pixels that go through the VAE at once; its memory grows with them


class VAE:
    """A frozen VAE on a device. Frames, or clips, go through it in chunks, to bound the memory.

    It computes in float32, or with `bf16` in bfloat16. Its weights are cast once, which is faster than autocast. It
    never computes in float16, where its activations would overflow.

    Raises:
        UserError: its config contradicts itself.
    """

    def __init__(self, network: nn.Module, name: str, device: torch.device, bf16: bool = False):
        self.space = space_of(network, name)
        dtype = torch.bfloat16 if bf16 else torch.float32
        # diffusers' own `to` would warn about parts that this network does not have.
        self.network = nn.Module.to(network.requires_grad_(False).eval(), device, dtype)
        self.device, self.dtype = device, dtype

    @property
    def takes_clips(self) -> bool:
        """Whether a clip is encoded whole."""
        return self.space.time_factor > 1

    def take_space(self, space: LatentSpace) -> None:
        """Scales and shifts latents as a checkpoint or a pack of the same weights says, whatever the VAE's config says.

        Versions that did not know shifts and statistics have written such files.
        """
        self.space = replace(space, name=self.space.name)

    def chunks(self, x: Tensor, pixels_a_number: int) -> Iterator[Tensor]:
        """Yields parts of x (N, C, …) on the device, in the weights' type.

        Args:
            pixels_a_number: pixels that each position of x stands for.
        """
        size = max(1, CHUNK_PIXELS // (math.prod(x.shape[2:]) * pixels_a_number))
        return (chunk.to(self.device, self.dtype) for chunk in x.split(size))

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of pixels in [−1, 1].

        (N, 3, H, W) → (N, 2, C, h, w) float32, or (N, 3, T, H, W) → (N, 2, C, t, h, w).

        Raises:
            UserError: the latents have another shape than the VAE's config says, or the VAE takes no such clip.
        """
        if x.dim() == 5 and not self.takes_clips:
            flat = self.moments(x.transpose(1, 2).flatten(0, 1))  # (NT, 2, C, h, w)
            return flat.unflatten(0, (len(x), -1)).permute(0, 2, 3, 1, 4, 5)
        if x.dim() == 4 and self.takes_clips:
            return self.moments(x[:, :, None]).squeeze(3)
        return torch.cat([self.posterior(chunk) for chunk in self.chunks(x, 1)]).float()

    def posterior(self, x: Tensor) -> Tensor:
        """`moments` of one chunk, in the weights' type. The deviation is 0 if the VAE is no variational one."""
        found = self.network.encode(x, return_dict=False)[0]
        mean = found if isinstance(found, Tensor) else found.mode()
        std = torch.zeros_like(mean) if isinstance(found, Tensor) else getattr(found, "std", torch.zeros_like(mean))
        self.check_shapes(x, mean)
        return torch.stack([mean, std], dim=1)

    def encode_moments(self, frames: np.ndarray) -> np.ndarray:
        """`moments` of uint8 frames (N, H, W, 3) or clips (N, T, H, W, 3), in float16 for packs."""
        pixels = torch.from_numpy(frames).movedim(-1, 1)  # (N, 3, [T,] H, W)
        moments = self.moments(to_unit_range(pixels))
        return moments.half().cpu().numpy()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pixels, float32, of what the network sees.

        (N, C, h, w) → (N, 3, H, W), or (N, C, t, h, w) → (N, 3, T, H, W).
        """
        if x.dim() == 5 and not self.takes_clips:
            flat = self.decode(x.transpose(1, 2).flatten(0, 1))  # (NT, 3, H, W)
            return flat.unflatten(0, (len(x), -1)).transpose(1, 2)
        if x.dim() == 4 and self.takes_clips:
            return self.decode(x[:, :, None]).squeeze(2)
        space = self.space
        chunks = self.chunks(space.restored(x), space.downsampling**2 * space.time_factor)
        return torch.cat([self.pixels(chunk) for chunk in chunks])

    def pixels(self, latents: Tensor) -> Tensor:
        """`decode` of one chunk of latents."""
        # Some of LTX's decoders are told how noisy the latents are: not at all.
        timed = [latents.new_zeros(len(latents))] if self.network.config.get("timestep_conditioning") else []
        pixels = self.network.decode(latents, *timed).sample.float()
        self.check_shapes(pixels, latents)
        return pixels

    def check_shapes(self, pixels: Tensor, latents: Tensor) -> None:
        """Raises UserError unless pixels (N, 3, [T,] H, W) have latents (N, C, [t,] h, w) as the config says."""
        space, (*frames, height, width) = self.space, latents.shape[2:]
        sides = [height * space.downsampling, width * space.downsampling]
        if [*pixels.shape[2:], latents.shape[1]] != [*map(space.clip_len, frames), *sides, space.channels]:
            found = f"{tuple(pixels.shape[1:])} pixels are {tuple(latents.shape[1:])} latents"
            raise UserError(f"of the VAE {space.name} {found}, which its config.json contradicts: correct it")


def space_of(network: nn.Module, name: str) -> LatentSpace:
    """The latent space of a VAE of diffusers, from its config and its buffers.

    Raises:
        UserError: a value is out of its range, or contradicts another.
    """
    known = {**network.config, **vars(network), **dict(network.named_buffers(recurse=False))}
    means, deviations, shift = (known.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
    channels = known.get("latent_channels") or known["z_dim"]
    if (means is None) != (deviations is None) or (means is not None and shift):
        problem = "latents_mean, latents_std and shift_factor do not go together: give both of the first, or the last"
        raise UserError(f"the config of the VAE {name}: {problem}")
    if any(known.get("decoder_inject_noise", ())):
        raise UserError(f"the VAE {name} decodes with noise (decoder_inject_noise): take another version of it")
    means = [shift] * channels if shift else listed(means)
    contents = {
        "name": name,
        "fingerprint": fingerprint(network),
        "scale": float(known.get("scaling_factor") or 1),
        "channels": channels,
        "downsampling": known.get("spatial_compression_ratio") or 2 ** (len(known["block_out_channels"]) - 1),
        "time_factor": known.get("temporal_compression_ratio") or 2 ** sum(known.get("temperal_downsample", ())),
        "means": means if any(means) else [],
        "deviations": [] if all(value == 1 for value in listed(deviations)) else listed(deviations),
    }
    try:
        return read_as(LatentSpace, contents)
    except ValueError as error:
        raise UserError(f"the config of the VAE {name}: {error}") from None


def listed(values: Tensor | Sequence[float] | None) -> list[float]:
    """Numbers of a buffer or of a config."""
    return values.tolist() if isinstance(values, Tensor) else list(values or ())


def fingerprint(network: nn.Module) -> str:
    """A CRC-32 checksum over all weights, in hexadecimal."""
    checksum = 0
    for weight in network.state_dict().values():
        checksum = zlib.crc32(weight.detach().cpu().float().contiguous().numpy(), checksum)
    return f"{checksum:08x}"


def load_vae(name: str, device: torch.device, bf16: bool = False) -> VAE:
    """Loads the published VAE "ema" or "mse", or one that diffusers saved to a folder.

    Raises:
        UserError: the package diffusers, or the weights, are missing, or the hub cannot be reached; or the VAE is of a
            class that is not in KINDS.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("--vae needs diffusers: pip install -r requirements-latent.txt") from None
    source = PUBLISHED.get(name, name)
    if name not in PUBLISHED and not Path(name).is_dir():
        raise UserError(f"--vae {name} is neither none, ema nor mse, nor a folder that diffusers saved a VAE to")

    def load(local_files_only: bool = False) -> nn.Module:
        config = diffusers.AutoencoderKL.load_config(source, local_files_only=local_files_only)
        kind = config.get("_class_name", KINDS[0])
        if kind not in KINDS or not hasattr(diffusers, kind):
            known = ", ".join(each for each in KINDS if hasattr(diffusers, each))
            raise UserError(f"--vae {name} is of the class {brief(kind)}: the classes that work here are {known}")
        return getattr(diffusers, kind).from_pretrained(
            source, local_files_only=local_files_only, low_cpu_mem_usage=False
        )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers gives huggingface_hub a parameter that it warns of
            try:
                network = load(local_files_only=True)
            except OSError:
                if name not in PUBLISHED:
                    raise
                check_hub(source, "--vae DIR")
                network = load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        advice = "give a folder with its weights as --vae DIR"
        raise UserError(f"cannot load {source}, {advice}: {first_line(error)}") from None
    return VAE(network, name, device, bf16)


def batch_moments(vae: VAE, x: Tensor) -> Tensor:
    """`VAE.moments` of uint8 images (N, 3, H, W), → (N, 2, C, h, w), or clips (N, 3, T, H, W), → (N, 2, C, t, h, w)."""
    return vae.moments(to_unit_range(x))


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 pixels to float32 in [−1, 1], any shape."""
    return x.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Values in [−1, 1], clipped, to uint8 pixels, any shape."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def encode(x: Tensor, vae: VAE | None) -> Tensor:
    """uint8 pixels (N, 3, [T,] H, W) to the network's input: in [−1, 1], or of the means of their latents."""
    return vae.space.normalised(batch_moments(vae, x)[:, 0]) if vae else to_unit_range(x)
