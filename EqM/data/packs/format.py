"""What a pack is made from and how, where its parts lie, and the JSON files that it is described in."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.files import checked, parse_json

FORMAT, VERSION = "EqM pack", 2
# Packing loses one shard a process where it is interrupted, and a damaged one is made anew as a whole.
SHARD_BYTES, MIN_SHARDS = 2**28, 64
FRAMES_OF_A_VIDEO = 200  # for the size of shards, which is fixed before any video is opened


@dataclass(frozen=True)
class Settings:
    """What a pack is made from and how: the same settings give the same shards.

    `source` is where the files lay when the pack was begun. `vae` is empty for pixels; for latents
    it has `name`, `fingerprint`, `scale`, `channels` and `side`, the latents' height and width.
    `names_crc32` is over all files' names and classes.
    """

    format: str
    version: int
    source: str
    video: bool
    image_size: int
    values: str
    vae: dict
    classes: list[str]
    files: int
    names_crc32: int

    @property
    def frame_shape(self) -> tuple[int, ...]:
        if self.values == "pixels":
            return self.image_size, self.image_size, 3
        return 2, 2, self.vae["channels"], self.vae["side"], self.vae["side"]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.values == "pixels" else np.float16)

    @property
    def frame_bytes(self) -> int:
        return int(np.prod(self.frame_shape)) * self.dtype.itemsize

    @property
    def items_per_shard(self) -> int:
        """Files of a shard: few enough that any number of processes finds work in a small set too."""
        item_bytes = self.frame_bytes * (FRAMES_OF_A_VIDEO if self.video else 1)
        return max(1, min(SHARD_BYTES // item_bytes, -(-self.files // MIN_SHARDS)))

    @property
    def num_shards(self) -> int:
        return -(-self.files // self.items_per_shard)

    def identity(self) -> dict:
        """What the shards follow from: all but the place of the source, which may be moved."""
        return {name: value for name, value in asdict(self).items() if name != "source"}

    def command(self, folder: Path) -> str:
        """The command line that makes, goes on with, or mends a pack of these settings."""
        words = ["python", "EqM/prepare.py", self.source, str(folder)]
        words += ["--video"] * self.video + ["--image-size", str(self.image_size)]
        return shlex.join(words + (["--vae", self.vae["name"]] if self.vae else []))


def shard_path(folder: Path, number: int) -> Path:
    """A shard's frames; its items lie beside it, as .json."""
    return folder / f"shard-{number:05d}.bin"


def read_settings(folder: Path) -> Settings | None:
    """The settings of a pack, whole or half-made; None for a folder of anything else.

    Raises:
        UserError: a pack with damaged settings, or of another version.
    """
    path = folder / "settings.json"
    problem = f"{path} is missing, damaged or may not be read: make the pack again, in a new folder"
    try:
        contents = parse_json(path)
    except (OSError, ValueError):
        contents = None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        # Other programs have files of that name too.
        if shard_path(folder, 0).is_file():
            raise UserError(problem)
        return None
    version = contents.get("version")
    if isinstance(version, int) and version != VERSION:
        raise UserError(
            f"{folder} is a pack of version {version}, and this is version {VERSION}: make it again, in a new folder"
        )
    try:
        return Settings(**checked(contents))
    except (ValueError, TypeError):
        raise UserError(problem) from None
