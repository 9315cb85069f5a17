"""Batches from a pack. They equal those from files, but nothing is decoded."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.form import Form
from data.packs.pack import Pack
from data.packs.shards import LostPack, Shards
from runtime.random_numbers import keyed_uniforms


class PackedSamples(Dataset):
    """`Samples` of a pack, a whole batch at a time. The same keys give the same windows, flips and pixels.

    The slow work is left to the device. `x` is as the pack has it: pixels (N, T, H, W, 3) uint8, or latents
    (N, T, 2, C, h, w) float16, or windows of latents (N, 1, 2, C, t, h, w). `flip` (N,) marks the pixels that are still
    to be mirrored. `unpack` transposes and mirrors. If the pack is lost, the batch is a `problem` alone: the error, as
    text that any process can send.
    """

    def __init__(self, pack: Pack, form: Form, seed: int):
        self.pack, self.form, self.seed, self.pixels = pack, form, seed, pack.settings.values == "pixels"
        self.shards = Shards(pack)

    def __len__(self) -> int:
        return len(self.pack)

    def __getitems__(self, keys: list[tuple[int, ...]]) -> dict:
        """The samples of many keys, as one batch. All keys have the same clip length and interval, if any."""
        form = self.form.of_batch(*keys[0][2:]) if keys[0][2:] else self.form
        indices = np.array([key[1] for key in keys])  # (N,)
        uniforms = keyed_uniforms(self.seed, [key[:2] for key in keys])  # (N, 2)
        places = self.places(indices, uniforms[:, 0], form)  # (N, T)
        flips = self.form.flip & (uniforms[:, 1] < 0.5)  # (N,)
        seconds = form.frame_interval / self.pack.rates[indices] if form.video else np.zeros(len(keys))  # (N,)
        try:
            x = self.gather(indices, places, flips)
        except LostPack as error:
            return {"problem": str(error)}
        return {
            "x": torch.from_numpy(x),
            "flip": torch.from_numpy(flips & self.pixels),
            "label": torch.from_numpy(self.pack.labels[indices]),
            "seconds_per_frame": torch.from_numpy(seconds.astype(np.float32)),
            "unreadable": [[]] * len(keys),
        }

    def places(self, indices: np.ndarray, starts: np.ndarray, form: Form | None = None) -> np.ndarray:
        """The frames of clips by their place in items (N,): (N, T), or (N, 1) for windows.

        Args:
            starts: where the clips start, (N,), from 0, the first place, up to, but not including, 1.
            form: of the clips; None: the form of the data set.
        """
        form, lengths = form or self.form, self.pack.lengths[indices]  # (N,)
        if self.pack.settings.windows:
            return (starts * lengths).astype(np.int64)[:, None]
        first = (starts * (np.maximum(lengths - form.window, 0) + 1)).astype(np.int64)  # (N,)
        places = first[:, None] + np.arange(form.clip_len) * form.frame_interval  # (N, T)
        return np.minimum(places, lengths[:, None] - 1)  # a short video holds its last frame

    def gather(self, indices: np.ndarray, places: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """The frames at places (N, T) of items (N,); for flipped latents, the mirrored copies.

        Raises:
            LostPack: a shard is missing, or has changed since this object was made.
        """
        settings, pack = self.pack.settings, self.pack
        shape = settings.frame_shape if self.pixels else settings.frame_shape[1:]
        x = np.empty((*places.shape, *shape), settings.dtype)
        offsets = (places + pack.first_frames[indices][:, None]) * settings.frame_bytes  # (N, T)
        if not self.pixels:
            offsets += flips[:, None] * (settings.frame_bytes // 2)
        self.shards.read(pack.shards[indices], offsets, x)
        return x


def unpack(x: Tensor, flip: Tensor, video: bool) -> Tensor:
    """Gives a batch of `PackedSamples` the layout of `Samples`, on any device.

    Pixels (N, T, H, W, 3) become (N, 3, T, H, W) uint8. Latents (N, T, 2, C, h, w) become (N, 2, C, T, h, w)
    float16, and windows of them (N, 2, C, t, h, w). Images lose T.
    """
    if x.dtype == torch.uint8:
        x = x.permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)
        x = torch.where(flip.view(-1, 1, 1, 1, 1), x.flip(-1), x)
    elif x.dim() == 7:
        x = x.squeeze(1)  # (N, 2, C, t, h, w)
    else:
        x = x.permute(0, 2, 3, 1, 4, 5)  # (N, 2, C, T, h, w)
    return x if video else x.squeeze(-3)
