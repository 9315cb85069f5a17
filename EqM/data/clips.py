"""Samples read from files: clips of videos, and images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.file_list import Found, Item
from data.form import Form
from data.images import decode_image
from data.untrusted import File, Unreadable, reading
from data.video import read_frames
from runtime.random_numbers import keyed_uniforms
from runtime.size import ImageSize, covering, sides

MAX_TRIES = 20  # files in a row that may be unreadable before a sample gives up


class Samples(Dataset):
    """Samples as dicts, by key: (epoch, index), or (epoch, index, clip length, interval).

    A key gives one sample, in any process.

    `x` is uint8, (3, T, H, W) for videos and (3, H, W) for images. `label` is an int.
    `seconds_per_frame` is a float, 0 for images. `unreadable` lists (path, reason) of what could not be read.
    Another file of the set stands in for it.
    """

    def __init__(self, found: Found, form: Form, seed: int):
        self.found, self.form, self.seed = found, form, seed

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        key, form = key[:2], self.form.of_batch(*key[2:]) if key[2:] else self.form
        start, mirror = keyed_uniforms(self.seed, [key])[0]
        index = key[1]
        unreadable = []
        for _ in range(MAX_TRIES):
            item = self.found[index]
            try:
                x, seconds_per_frame = read_sample(item, form, start)
                break
            except Unreadable as error:
                unreadable.append((item.path, str(error)))
                index = int(np.random.default_rng((self.seed, *key, len(unreadable))).integers(len(self.found)))
        else:
            # Nothing trains on these zeros: `UnreadableLog` ends the run at MAX_TRIES paths.
            frames = (form.clip_len,) if form.video else ()
            x, seconds_per_frame = torch.zeros(3, *frames, *sides(form.image_size)).byte(), 0.0
        if form.flip and mirror < 0.5:
            x = x.flip(-1)
        seconds = np.float32(seconds_per_frame)
        return {"x": x, "label": item.label, "seconds_per_frame": seconds, "unreadable": unreadable}


def read_sample(item: Item, form: Form, start: float) -> tuple[Tensor, float]:
    """One file's sample, (3, [T,] H, W) uint8, and its seconds per frame, 0 for an image.

    Args:
        start: where the clip starts, from 0, the video's first frame, up to, but not including, 1.

    Raises:
        Unreadable: it cannot be read.
    """
    if item.video is None:
        return read_image(item.path, form.image_size), 0.0
    indices = frame_indices(form, len(item.video.times), start)
    frames = torch.from_numpy(read_frames(item.path, item.video, indices, form.image_size))  # (T, H, W, 3)
    return frames.permute(3, 0, 1, 2).contiguous(), form.frame_interval / item.video.frames_per_second


def frame_indices(form: Form, available: int, start: float) -> Sequence[int]:
    """The clip's frames, by index in a video of `available` frames. The last frame of a short video is repeated."""
    first = int(start * (max(available - form.window, 0) + 1))
    return [min(first + i * form.frame_interval, available - 1) for i in range(form.clip_len)]


@reading()
def read_image(path: File, size: ImageSize) -> Tensor:
    """The centre of an image that is resized until it just covers `size`: (3, H, W) uint8.

    Raises:
        Unreadable: it cannot be read.
    """
    return centre_of(decode_image(path), size)


def centre_of(pixels: Image.Image, size: ImageSize) -> Tensor:
    """The centre of an image in mode RGB that is resized until it just covers `size`: (3, H, W) uint8."""
    (wanted_height, wanted_width), (height, width) = sides(size), covering(pixels.height, pixels.width, size)
    left, top = round((width - wanted_width) / 2), round((height - wanted_height) / 2)
    resized = pixels.resize((width, height), Image.Resampling.BILINEAR)
    resized = resized.crop((left, top, left + wanted_width, top + wanted_height))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
