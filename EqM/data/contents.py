"""The samples of a PATH, in order. A PATH is a folder of files, a pack, or an .npz."""

import csv
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.clips import frame_indices, read_sample
from data.file_list import Item
from data.form import Form
from data.images import image_size
from data.latent_space import LatentSpace
from data.npz import read_npz
from data.packs.dataset import PackedSamples, unpack
from data.packs.pack import Pack, is_pack, open_pack, read_pack
from data.scan import find_loose_files
from data.untrusted import Unreadable
from data.video import probe_video, video_size
from data.walk import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, walk
from runtime import distributed
from runtime.errors import UserError
from runtime.files import read_csv
from runtime.size import ImageSize, covering, plain, sides, size_of, spelt

Window = Callable[[int], float]  # a sample's index ↦ where its clip starts in the video, as for `read_sample`


def first_window(index: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Content:
    """The names of samples, the names of their classes ("" for none), and how to read a sample by its index.

    `read` returns the sample and its seconds per frame: pixels (3, [T,] H, W) uint8, or the means of packed latents
    (C, [T,] h, w). It raises Unreadable.
    """

    names: list[str]
    classes: list[str]
    read: Callable[[int], tuple[Tensor, float]]


def open_path(path: Path, form: Form, space: LatentSpace | None, taker: str, window: Window = first_window) -> Content:
    """The content of a folder or of a pack.

    Args:
        form: the form to read samples in.
        space: the latent space that the reader works in; None: pixels. A pack of pixels is accepted for both.
        taker: the name of the reader in errors.
        window: where each clip starts.

    Raises:
        UserError: there is nothing, or a pack of another kind, size or latent space.
    """
    if path.is_dir() and is_pack(path):
        return packed_content(open_pack(path, distributed.is_main()), form, space, taker, window)
    files = find_loose_files(path, form.video)

    def read(index: int) -> tuple[Tensor, float]:
        file = files[index][0]
        return read_sample(Item(file, 0, probe_video(file) if form.video else None), form, window(index))

    return Content([str(Path(file).relative_to(path)) for file, _ in files], [name for _, name in files], read)


def packed_content(
    pack: Pack, form: Form, space: LatentSpace | None, taker: str, window: Window = first_window
) -> Content:
    """`open_path` for a pack."""
    settings = pack.settings
    packed = (settings.video, settings.image_size, settings.vae.get("fingerprint"))
    wanted = (form.video, form.image_size, space.fingerprint if space else None)
    windows = settings.windows
    if windows and (windows.clip_len, windows.frame_interval) != (form.clip_len, form.frame_interval):
        takes = f"clips of {form.clip_len} frames, {form.frame_interval} apart"
        raise UserError(f"{pack.folder} is {pack.describe()}: {taker} takes {takes}, give a pack of those")
    if packed not in (wanted, (*wanted[:2], None)):  # the VAE encodes pixels
        takes = f"{'videos' if form.video else 'images'} of {spelt(form.image_size)} pixels"
        raise UserError(f"{pack.folder} is {pack.describe()}: {taker} takes {takes}, give a pack of those")
    samples = PackedSamples(pack, form, seed=0)

    def read(index: int) -> tuple[Tensor, float]:
        one = np.array([index])
        places = samples.places(one, np.array([window(index)]))  # (1, T)
        x = torch.from_numpy(samples.gather(one, places, np.array([False])))
        x = unpack(x, torch.tensor([False]), form.video)[0]  # (3, T, H, W), or (2, C, t, h, w)
        return x if samples.pixels else x[0], form.frame_interval / pack.rates[index] if form.video else 0.0

    return Content(list(pack.paths), [pack.classes[label] for label in pack.labels], read)


def npz_content(path: Path, form: Form) -> Content:
    """`open_path` for an .npz. Clips start at their first frame.

    Raises:
        UserError: as `read_npz`, or it holds clips where images are wanted, or the reverse.
    """
    samples = read_npz(path)
    if (samples.ndim == 5) != form.video:
        holds, wanted = ("clips", "images")[:: 1 if samples.ndim == 5 else -1]
        raise UserError(f"{path} holds {holds}, and the other side {wanted}: compare two of a kind")

    def read(index: int) -> tuple[Tensor, float]:
        x = torch.from_numpy(samples[index]).movedim(-1, 0)  # (3, [T,] H, W)
        if form.video:
            x = x[:, frame_indices(form, x.shape[1], 0.0)]
        return resized(x, form.image_size), 0.0

    return Content([f"{path.name}[{i}]" for i in range(len(samples))], [""] * len(samples), read)


def resized(x: Tensor, size: ImageSize) -> Tensor:
    """The centre of a sample (…, h, w) that is resized until it just covers `size`: (…, H, W)."""
    if x.shape[-2:] == sides(size):
        return x
    from torchvision.transforms.v2 import functional  # here, because it takes 1.5 s

    larger = functional.resize(x, list(covering(*x.shape[-2:], size)), antialias=True)
    return functional.center_crop(larger, list(sides(size)))


@dataclass(frozen=True)
class Kind:
    """Clips or images, their size in pixels, their frames, and their frames a second, None if unknown."""

    video: bool
    side: ImageSize
    frames: int
    frames_per_second: float | None

    def as_dict(self) -> dict:
        """As plain data, for reports."""
        return asdict(self) | {"side": plain(self.side)}


def kind_of(path: Path, video: bool | None = None) -> Kind:
    """The kind of a PATH's samples, from the first readable one. `video` chooses if a folder holds both kinds.

    Raises:
        UserError: it holds no readable sample, latents, or both kinds and `video` is None.
    """
    if path.suffix == ".npz" and not path.is_dir():
        shape = read_npz(path).shape
        return Kind(len(shape) == 5, size_of(*shape[-3:-1]), shape[1] if len(shape) == 5 else 1, None)
    if path.is_dir() and is_pack(path):
        pack = read_pack(path)
        settings = pack.settings
        if settings.values != "pixels":
            raise UserError(
                f"{path} is {pack.describe()}: compare pixels, for example the folder that it was made from"
            )
        rate = float(pack.rates[0]) if settings.video else None
        return Kind(settings.video, settings.image_size, int(pack.lengths[0]), rate)
    return kind_of_folder(path, folder_holds_videos(path) if video is None else video)


def folder_holds_videos(folder: Path) -> bool:
    """Whether a folder holds videos, not images.

    Raises:
        UserError: it holds both, or neither.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, a pack or an .npz")
    suffixes = {Path(path).suffix.lower() for path, _ in walk(folder, VIDEO_EXTENSIONS + IMAGE_EXTENSIONS).taken}
    found = [bool(suffixes & {*extensions} - {".gif"}) for extensions in (VIDEO_EXTENSIONS, IMAGE_EXTENSIONS)]
    if all(found):
        raise UserError(f"{folder} holds videos and images: give a folder of one kind")
    if not any(found) and ".gif" in suffixes:
        raise UserError(f"{folder} holds GIFs, whose colours are reduced: sample again with --video-format mp4")
    if not any(found):
        raise UserError(f"no videos and no images in {folder}: give a folder of samples, a pack or an .npz")
    return found[0]


def kind_of_folder(folder: Path, video: bool) -> Kind:
    """`kind_of` for the videos, or the images, of a folder."""
    problem = ""
    for file, _ in find_loose_files(folder, video):
        try:
            width, height = video_size(file) if video else image_size(file)
            side = size_of(height, width)
            if not video:
                return Kind(False, side, 1, None)
            info = probe_video(file)
            return Kind(True, side, len(info.times), info.frames_per_second)
        except Unreadable as error:
            problem = problem or f"{file}: {error}"
    raise UserError(f"no readable {'clip' if video else 'image'} in {folder}: {problem}")


def folder_sizes(folder: Path, video: bool) -> Counter:
    """Counts a folder's readable files by (width, height)."""

    def size(file: tuple[str, str]) -> tuple[int, int] | None:
        try:
            return video_size(file[0]) if video else image_size(file[0])
        except Unreadable:
            return None

    with ThreadPoolExecutor() as pool:
        return Counter(size for size in pool.map(size, find_loose_files(folder, video)) if size)


def classes_asked(path: Path, content: Content) -> list[str]:
    """The class that each sample was asked to show, from EqM/sample_gd.py's samples.csv, else `content.classes`.

    Raises:
        UserError: samples.csv lacks a column, or is not a CSV.
    """
    table = path / "samples.csv"
    if not (path.is_dir() and table.is_file()):
        return content.classes
    try:
        asked = {row["file"]: row["class_name"] for row in read_csv(table)}
    except (KeyError, csv.Error) as error:
        raise UserError(f"{table} lacks the columns file and class_name: remove it ({error})") from None
    return [asked.get(name, "") for name in content.names]
