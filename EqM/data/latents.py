"""The latent space of a Stable Diffusion VAE: loading it, encoding, drawing from the posterior, decoding.

Source: Rombach et al. 2022, arXiv 2112.10752. The VAE is diffusers' AutoencoderKL, an optional
package (requirements-latent.txt).
"""

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from runtime import cli
from runtime.errors import UserError, first_line
from runtime.hub import check_hub

PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
DEFAULT_SIZE, DEFAULT_VAE_SIZE = 64, 256  # the default image sizes: without a VAE, and with one
CHUNK_PIXELS = 8 * 256 * 256  # pixels that go through the VAE at once; its memory grows with them


@dataclass(frozen=True)
class LatentSpace:
    """What training and sampling know of a VAE: its name or folder, the checksum of its weights, its geometry."""

    name: str
    fingerprint: str
    scale: Annotated[float, cli.positive_float]  # latents times this have about unit variance
    channels: Annotated[int, cli.positive_int]
    downsampling: Annotated[int, cli.side]  # pixels a latent, in each direction

    def as_dict(self) -> dict:
        """As plain data, for configs and packs."""
        return asdict(self)

    def side(self, image_size: int) -> int:
        """Latents in each direction of an image.

        Raises:
            UserError: `downsampling` does not divide the image's side.
        """
        if image_size % self.downsampling:
            raise UserError(f"--image-size {image_size} is not a multiple of the VAE's {self.downsampling} pixels")
        return image_size // self.downsampling


class VAE:
    """A frozen VAE on a device. Frames go through it in chunks, to bound the memory.

    It computes in float32, or with `bf16` in bfloat16. Its weights are cast once, which is faster than autocast. It
    never computes in float16, where its activations would overflow.
    """

    def __init__(self, network: nn.Module, name: str, device: torch.device, bf16: bool = False):
        config = network.config
        self.space = LatentSpace(
            name,
            fingerprint(network),
            float(config.scaling_factor),
            config.latent_channels,
            2 ** (len(config.block_out_channels) - 1),
        )
        dtype = torch.bfloat16 if bf16 else torch.float32
        # diffusers' own `to` would warn about parts that this network does not have.
        self.network = nn.Module.to(network.requires_grad_(False).eval(), device, dtype)
        self.device, self.dtype = device, dtype

    def chunks(self, frames: Tensor, pixels_a_number: int) -> Iterator[Tensor]:
        """Yields frames or latents (n, C, h, w) on the device, in the weights' type.

        Args:
            frames: (N, C, h, w).
            pixels_a_number: pixels that each of the h·w positions stands for.
        """
        size = max(1, CHUNK_PIXELS // (frames.shape[-1] * frames.shape[-2] * pixels_a_number))
        return (chunk.to(self.device, self.dtype) for chunk in frames.split(size))

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of pixels in [−1, 1]: (N, 3, H, W) → (N, 2, C, h, w) float32."""
        posteriors = [self.network.encode(chunk).latent_dist for chunk in self.chunks(frames, 1)]
        return torch.cat([torch.stack([p.mean, p.std], dim=1) for p in posteriors]).float()

    def encode_moments(self, frames: np.ndarray) -> np.ndarray:
        """`moments` of uint8 frames (N, H, W, 3), in float16 for packs: (N, 2, C, h, w)."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (N, 3, H, W)
        return self.moments(to_unit_range(pixels)).half().cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of scaled latents: (N, C, h, w) → (N, 3, H, W) float32, or (N, C, T, h, w) → (N, 3, T, H, W)."""
        if latents.dim() == 5:
            flat = self.decode(latents.transpose(1, 2).flatten(0, 1))  # (NT, 3, H, W)
            return flat.unflatten(0, (len(latents), -1)).transpose(1, 2)
        chunks = self.chunks(latents / self.space.scale, self.space.downsampling**2)
        return torch.cat([self.network.decode(chunk).sample.float() for chunk in chunks])


def fingerprint(network: nn.Module) -> str:
    """A CRC-32 checksum over all weights, in hexadecimal."""
    checksum = 0
    for weight in network.state_dict().values():
        checksum = zlib.crc32(weight.detach().cpu().float().contiguous().numpy(), checksum)
    return f"{checksum:08x}"


def load_vae(name: str, device: torch.device, bf16: bool = False) -> VAE:
    """Loads the published VAE "ema" or "mse", or one that diffusers saved to a folder.

    Raises:
        UserError: the package diffusers, or the weights, are missing, or the hub cannot be reached.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("--vae needs diffusers: pip install -r requirements-latent.txt") from None
    source = PUBLISHED.get(name, name)
    if name not in PUBLISHED and not Path(name).is_dir():
        raise UserError(f"--vae {name} is neither none, ema nor mse, nor a folder that diffusers saved a VAE to")
    load = partial(AutoencoderKL.from_pretrained, source, low_cpu_mem_usage=False)
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
    """`VAE.moments` of uint8 images (N, 3, H, W), → (N, 2, C, h, w), or clips (N, 3, T, H, W), → (N, 2, C, T, h, w)."""
    if x.dim() == 4:
        return vae.moments(to_unit_range(x))
    moments = vae.moments(to_unit_range(x.transpose(1, 2).flatten(0, 1)))  # (NT, 2, C, h, w)
    return moments.unflatten(0, (len(x), -1)).permute(0, 2, 3, 1, 4, 5)


def draw(moments: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Draws scaled latents (N, …) float32 from posteriors: mean and standard deviation (N, 2, …), any precision."""
    mean, std = moments.float().unbind(1)
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    return (mean + std * noise) * scale


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 pixels to float32 in [−1, 1], any shape."""
    return x.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Values in [−1, 1], clipped, to uint8 pixels, any shape."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def encode(x: Tensor, vae: VAE | None) -> Tensor:
    """uint8 pixels (N, 3, [T,] H, W) to the network's input: in [−1, 1], or the means of their scaled latents."""
    return batch_moments(vae, x)[:, 0] * vae.space.scale if vae else to_unit_range(x)
