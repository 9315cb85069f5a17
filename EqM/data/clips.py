"""Samples read from files: clips of videos, and images."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from data.scan import Found, Item, unreadable_errors
from data.untrusted import open_image
from data.video import read_frames
from runtime.draws import keyed_uniforms

MAX_TRIES = 20  # files tried in place of an unreadable one


class Samples(Dataset):
    """Samples as dicts, by key (epoch, index): the same key gives the same sample in any worker.

    `x` is uint8, (3, T, size, size) for videos and (3, size, size) for images; `label` an int;
    `seconds_per_frame` a float, 0 for images; `unreadable` the paths, a line each, that could
    not be read and were replaced by others of the set.
    """

    def __init__(self, found: Found, image_size: int, clip_len: int, frame_interval: int, flip: bool, seed: int):
        self.items = found.items
        self.image_size, self.clip_len, self.frame_interval = image_size, clip_len, frame_interval
        self.flip, self.seed = flip, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        _, index = key
        place, mirror = keyed_uniforms(self.seed, [key])[0]
        unreadable = []
        for _ in range(MAX_TRIES):
            item = self.items[index]
            try:
                x, seconds_per_frame = self.read(item, place)
                break
            except unreadable_errors(item.video is not None):
                unreadable.append(item.path)
                index = int(np.random.default_rng((self.seed, *key, len(unreadable))).integers(len(self.items)))
        else:
            # Not for training: `UnreadableLog` ends the run when it reads this many names.
            frames = (self.clip_len,) if item.video else ()
            x, seconds_per_frame = torch.zeros(3, *frames, self.image_size, self.image_size).byte(), 0.0
        if self.flip and mirror < 0.5:
            x = x.flip(-1)
        seconds = np.float32(seconds_per_frame)
        return {"x": x, "label": item.label, "seconds_per_frame": seconds, "unreadable": "\n".join(unreadable)}

    def read(self, item: Item, place: float) -> tuple[Tensor, float]:
        """One file's sample, (3, [T,] size, size) uint8, and its seconds per frame; `place` in [0, 1) tells where."""
        if item.video is None:
            return read_image(item.path, self.image_size), 0.0
        available = len(item.video.times)
        start = int(place * (max(available - window_length(self.clip_len, self.frame_interval), 0) + 1))
        places = [min(start + i * self.frame_interval, available - 1) for i in range(self.clip_len)]
        frames = torch.from_numpy(read_frames(item.path, item.video, places, self.image_size))  # (T, H, W, 3)
        return frames.permute(3, 0, 1, 2).contiguous(), self.frame_interval / item.video.frames_per_second


def read_image(path: str, size: int) -> Tensor:
    """An image resized so that its short side is `size`, and its centre: (3, size, size) uint8."""
    with open_image(path) as image:
        pixels = image.convert("RGB")
    image = transforms.resize(pixels, [size], antialias=True)
    return transforms.pil_to_tensor(transforms.center_crop(image, [size]))


def window_length(clip_len: int, frame_interval: int) -> int:
    """Frames of the file from a clip's first to its last."""
    return 1 + (clip_len - 1) * frame_interval


def first_windows(config: dict) -> Samples:
    """What reads files as the checkpoint's training did: its size, frames and frame interval.

    Of each clip it is to read the first window, `read(item, 0.0)`.
    """
    size, pixels = config["network"]["input_size"], (config.get("vae") or {}).get("downsampling", 1)
    clip_len, side = (1, size) if isinstance(size, int) else (size[0], size[-1])
    interval = config.get("args", {}).get("frame_interval", 1)
    return Samples(Found("", (), (), ()), side * pixels, clip_len, interval, flip=False, seed=0)
