"""The space of a VAE's latents: its geometry, and the numbers that bring latents to mean 0 and deviation 1."""

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from runtime import cli
from runtime.errors import UserError
from runtime.size import ImageSize, sides, size_of


@dataclass(frozen=True)
class LatentSpace:
    """What training and sampling know of a VAE.

    The network sees (z − mean) / deviation · scale for a latent z, as diffusers' pipelines do. Clips of a VAE that
    compresses time have 1 + k·time_factor frames, which become 1 + k frames of latents.

    Attributes:
        name: "ema", "mse" or a folder.
        fingerprint: the checksum of the weights.
        channels: of the latents.
        downsampling: pixels a latent, in each direction.
        time_factor: frames a frame of latents; 1 if each frame is encoded by itself.
        means: by channel, or by channel and frame of latents, channel first; empty: 0.
        deviations: as `means`; empty: 1.

    Raises:
        ValueError: means or deviations do not fit the channels.
    """

    name: str
    fingerprint: str
    scale: Annotated[float, cli.positive_float]
    channels: Annotated[int, cli.positive_int]
    downsampling: Annotated[int, cli.side]
    time_factor: Annotated[int, cli.side] = 1
    means: tuple[Annotated[float, cli.number], ...] = ()
    deviations: tuple[Annotated[float, cli.positive_float], ...] = ()

    def __post_init__(self):
        if len(self.means) % self.channels or len(self.deviations) % self.channels:
            counts = f"{len(self.means)} means and {len(self.deviations)} deviations"
            raise ValueError(f"{self.name} has {counts} for {self.channels} channels of latents")

    def as_dict(self) -> dict:
        """As plain data, for configs and packs. Leaves out what only some VAEs have."""
        optional = {field.name: field.default for field in fields(self)[5:]}
        return {name: value for name, value in asdict(self).items() if name not in optional or value != optional[name]}

    def size(self, image_size: ImageSize) -> ImageSize:
        """Latents in each direction of an image.

        Raises:
            UserError: `downsampling` does not divide the image's height or width.
        """
        height, width = sides(image_size)
        if height % self.downsampling or width % self.downsampling:
            raise UserError(f"--image-size {image_size} is not a multiple of the VAE's {self.downsampling} pixels")
        return size_of(height // self.downsampling, width // self.downsampling)

    def frames(self, clip_len: int) -> int:
        """Frames of the latents of a clip.

        Raises:
            UserError: the VAE takes no clip of this length.
        """
        whole, rest = divmod(clip_len - 1, self.time_factor)
        most = min((len(values) // self.channels for values in (self.means, self.deviations) if values), default=1)
        if most > 1 and whole + 1 > most:
            raise UserError(
                f"--clip-len {clip_len} is too long: the VAE knows clips up to {self.clip_len(most)} frames"
            )
        if rest:
            lower, higher = self.clip_len(whole + 1), self.clip_len(whole + 2)
            takes = f"the VAE {self.name} takes clips of 1 + {self.time_factor}·k frames"
            raise UserError(f"--clip-len {clip_len}: {takes}: give {lower} or {higher}")
        return whole + 1

    def clip_len(self, frames: int) -> int:
        """Frames of the clip that so many frames of latents show."""
        return 1 + (frames - 1) * self.time_factor

    def same_numbers(self, other: "LatentSpace") -> bool:
        """Whether another space scales and shifts its latents by the same numbers."""
        return (self.scale, self.means, self.deviations) == (other.scale, other.means, other.deviations)

    def normalised(self, latents: Tensor) -> Tensor:
        """What the network sees of latents as the VAE makes them, (N, C, [T,] h, w)."""
        if self.means:
            latents = latents - self.table(self.means, latents)
        if self.deviations:
            latents = latents / self.table(self.deviations, latents)
        return latents * self.scale

    def restored(self, x: Tensor) -> Tensor:
        """Latents for the VAE from what the network sees, (N, C, [T,] h, w): the inverse of `normalised`."""
        latents = x / self.scale
        if self.deviations:
            latents = latents * self.table(self.deviations, x)
        return latents + self.table(self.means, x) if self.means else latents

    def table(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        """Means or deviations in a shape for x, (N, C, [T,] h, w): (C, 1 or T, 1, 1), or (C, 1, 1)."""
        by_frame = on_device(values, x.device).view(self.channels, -1)  # (C, 1) or (C, all frames)
        return by_frame[:, : x.shape[2], None, None] if x.dim() == 5 else by_frame[:, :1, None]


@lru_cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values as a tensor (len(values),) float32. It is kept, since each copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device)


def draw(moments: Tensor, space: LatentSpace, generator: torch.Generator) -> Tensor:
    """Draws what the network sees (N, …) float32 from posteriors: mean and deviation (N, 2, …), any precision."""
    mean, std = moments.float().unbind(1)
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    return space.normalised(mean + std * noise)
