"""The settings of a pack: what it is made from and how, and where its parts lie."""

import os
import shlex
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np

from data.latent_space import LatentSpace
from runtime import cli
from runtime.errors import UserError
from runtime.files import parse_json, without_checksum
from runtime.plain_data import read_as
from runtime.size import MAX_SIDE, ImageSize, plain, read_size, sides

FORMAT, VERSION = "EqM pack", 2
# An interruption costs one shard a process, and damage costs a whole shard.
SHARD_BYTES, MIN_SHARDS = 2**28, 64
FRAMES_OF_A_VIDEO = 200  # assumed, since the size of shards is fixed before any video is opened
MAX_FILES = 10**9
APPENDED = "more-"  # begins the names of folders inside a pack


@dataclass(frozen=True)
class Windows:
    """Which clips of each video a pack holds, if its VAE encodes clips whole: at most `windows`, evenly spread."""

    clip_len: Annotated[int, cli.side]
    frame_interval: Annotated[int, cli.positive_int]
    windows: Annotated[int, cli.side]


@dataclass(frozen=True)
class Settings:
    """What a pack is made from and how. The same settings give the same shards.

    Attributes:
        source: where the files were when the pack was begun.
        video: made from videos, not images.
        image_size: height and width of a frame, pixels. Files have 64, or "64x96".
        values: "pixels" or "latents".
        vae: for latents what `LatentSpace.as_dict` gives, but with `side`, the latents' height and width as files have
            sizes, in place of `downsampling`; and the attributes of Windows, if there are such. Empty for pixels.
        classes: names of the classes.
        files: how many files.
        names_crc32: checksum over the names and classes of all files.
        options: flags of EqM/prepare.py that say how the source is read. An empty list is not kept.
    """

    format: str
    version: int
    source: str
    video: bool
    image_size: ImageSize
    values: str
    vae: dict
    classes: list[str]
    files: int
    names_crc32: int
    options: list[str] = field(default_factory=list)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(H, W, 3), or (2, 2, C, [t,] h, w) for latents: as it is and mirrored, mean and standard deviation.

        With windows, each window stands in the place of a frame.
        """
        if self.values == "pixels":
            return self.pixel_shape
        frames = [self.space.frames(self.windows.clip_len)] if self.windows else []
        return 2, 2, self.vae["channels"], *frames, *sides(self.latent_size)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """The pixels that a frame is made of: (H, W, 3), or (T, H, W, 3) for a window."""
        return *([self.windows.clip_len] if self.windows else []), *sides(self.image_size), 3

    @property
    def latent_size(self) -> ImageSize:
        """Height and width of the latents. Raises ValueError if `vae` is wrong."""
        return read_size(self.vae.get("side"))

    @cached_property
    def space(self) -> LatentSpace | None:
        """The space of the latents; None for pixels. Raises ValueError if `vae` is wrong."""
        if not self.vae:
            return None
        about = {name: value for name, value in self.vae.items() if name not in {"side", *WINDOW_KEYS}}
        downsampling = sides(self.image_size)[0] // sides(self.latent_size)[0]
        return read_as(LatentSpace, about | {"downsampling": downsampling}, "vae")

    @cached_property
    def windows(self) -> Windows | None:
        """The windows of each video; None if it holds all frames. Raises ValueError if `vae` is wrong."""
        about = {name: value for name, value in self.vae.items() if name in WINDOW_KEYS}
        return read_as(Windows, about, "vae") if about else None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.values == "pixels" else np.float16)

    @property
    def frame_bytes(self) -> int:
        return int(np.prod(self.frame_shape)) * self.dtype.itemsize

    @property
    def items_per_shard(self) -> int:
        """Files of a shard. There are few, so that many processes find work in a small set too."""
        frames = self.windows.windows if self.windows else FRAMES_OF_A_VIDEO if self.video else 1
        item_bytes = self.frame_bytes * frames
        return max(1, min(SHARD_BYTES // item_bytes, -(-self.files // MIN_SHARDS)))

    @property
    def num_shards(self) -> int:
        return -(-self.files // self.items_per_shard)

    @property
    def unit(self) -> str:
        """The word for what an item has many of."""
        return "windows" if self.windows else "frames"

    def contents(self) -> dict:
        """All that settings.json keeps."""
        return {name: value for name, value in self.as_dict().items() if name != "options" or value}

    def identity(self) -> dict:
        """All that decides the shards. The source may be moved, and `names_crc32` sees what the options decide."""
        return {name: value for name, value in self.as_dict().items() if name not in ("source", "options")}

    def as_dict(self) -> dict:
        """All values, as plain data."""
        return asdict(self) | {"image_size": plain(self.image_size)}

    def check(self) -> None:
        """Raises ValueError for a value of another type, or out of its range."""
        sound = is_whole(self.files, 1, MAX_FILES)
        sound = sound and is_whole(self.names_crc32, 0, 2**32 - 1) and isinstance(self.source, str)
        sound = sound and isinstance(self.video, bool) and isinstance(self.vae, dict) and is_texts(self.classes)
        sound = sound and 0 < len(self.classes) == len(set(self.classes)) and is_texts(self.options)
        if self.values == "latents":
            pairs = list(zip(sides(self.image_size), sides(self.latent_size), strict=True))
            sound = sound and all(latents <= pixels for pixels, latents in pairs)
            sound = sound and len({pixels // latents for pixels, latents in pairs}) == 1
            sound = sound and is_texts([self.space.name, self.space.fingerprint]) and self.space.channels <= MAX_SIDE
            sound = sound and bool(self.windows) == (self.video and self.space.time_factor > 1)
            sound = sound and (not self.windows or self.space.frames(self.windows.clip_len) > 0)
        else:
            sound = sound and self.values == "pixels" and not self.vae
        if not sound:
            raise ValueError("a value is of another type, or out of its range")

    def command(self, folder: Path) -> str:
        """The command line that makes, continues or mends a pack of these settings."""
        words = ["python", "EqM/prepare.py", self.source, str(folder)]
        words += ["--video"] * self.video + ["--image-size", str(self.image_size)]
        words += ["--vae", self.vae["name"]] if self.vae else []
        about = asdict(self.windows) if self.windows else {}
        words += [f"--{name.replace('_', '-')}={value}" for name, value in about.items()]
        return shlex.join(words + self.options)


WINDOW_KEYS = {field.name for field in fields(Windows)}


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether a value of a file is a whole number within bounds."""
    return type(value) is int and least <= value <= most


def is_texts(values: object) -> bool:
    """Whether a value of a file is a list of texts, each of which can be a file's name."""
    if not (isinstance(values, list) and all(isinstance(text, str) for text in values)):
        return False
    os.fsencode("".join(values))  # raises ValueError
    return True


def appended_folders(folder: Path) -> list[Path]:
    """The folders of what was appended to a pack, whole or half-made, in order. Each is a pack of its own."""
    return sorted(path for path in folder.glob(f"{APPENDED}*") if path.is_dir())


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard's frames. Its record has the same name, but .json."""
    return folder / f"shard-{number:05d}.bin"


def read_settings(folder: Path) -> Settings | None:
    """The settings of a pack, whole or half-made. None if the folder holds something else.

    Raises:
        UserError: the pack has damaged settings, or is of another version.
    """
    path = folder / "settings.json"
    problem = f"{path} is missing, damaged or may not be read: make the pack again, in a new folder"
    try:
        contents = parse_json(path)
    except (OSError, ValueError):
        contents = None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        # Other programs write files of that name too, but no shards.
        if shard_path(folder, 0).is_file():
            raise UserError(problem)
        return None
    version = contents.get("version")
    if isinstance(version, int) and version != VERSION:
        raise UserError(
            f"{folder} is a pack of version {version}, and this is version {VERSION}: make it again, in a new folder"
        )
    try:
        contents = without_checksum(contents)
        settings = Settings(**contents | {"image_size": read_size(contents.get("image_size"))})
        settings.check()
        return settings
    except (ValueError, TypeError):
        raise UserError(problem) from None
