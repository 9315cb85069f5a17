"""Packs: a data set decoded once, as memory-mapped shards of frames. EqM/prepare.py makes them.

A pack is a folder of

    settings.json     what it is made from and how; there from the start
    shard-00000.bin   the frames of some items, one after another
    shard-00000.json  those items, and the shard's size and checksum; a shard counts when this is there
    index.json        all of it in one file; written last, and the pack is whole when this is there

A frame is (H, W, 3) uint8 pixels, or (2, 2, C, h, w) float16 latents: as it is and mirrored, and
of each the mean and the standard deviation.
"""

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError
from data import Found, Item
from video import VideoInfo

FORMAT, VERSION = "EqM pack", 1
# Packing loses one shard a process where it is interrupted, and a damaged one is made anew as a whole.
SHARD_BYTES, MIN_SHARDS = 2**28, 64
FRAMES_OF_A_VIDEO = 200  # for the size of shards, which is fixed before any video is opened
CHECK_BYTES = 2**22  # read at a time
MAX_MAPPED = 256  # shards a process holds open: each takes a file descriptor

Encode = Callable[[np.ndarray], np.ndarray]  # (N, H, W, 3) uint8 to (N, 2, C, h, w) float16: mean, deviation


@dataclass(frozen=True)
class Settings:
    """What a pack is made from and how: the same settings give the same shards.

    `vae` is empty for pixels; for latents it has `name`, `fingerprint`, `scale`, `channels` and
    `side`, the latents' height and width. `names_crc32` is over all files' names and classes.
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

    def command(self, folder: Path) -> str:
        """The command line that makes, goes on with, or mends a pack of these settings."""
        vae = f" --vae {self.vae['name']}" if self.vae else ""
        video = " --video" if self.video else ""
        return f"python EqM/prepare.py {self.source} {folder}{video} --image-size {self.image_size}{vae}"


def shard_path(folder: Path, number: int) -> Path:
    """A shard's frames; its items lie beside it, as .json."""
    return folder / f"shard-{number:05d}.bin"


def write_json(path: Path, contents: dict) -> None:
    """Writes a file whole or not at all: to a temporary name, to the disk, then renamed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(contents, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_settings(folder: Path) -> Settings:
    """The settings of a pack, whole or half-made.

    Raises:
        UserError: damaged, or of another version.
    """
    path = folder / "settings.json"
    try:
        contents = json.loads(path.read_text())
        known = (contents["format"], contents["version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged: delete {folder} and run EqM/prepare.py again") from None
    if known != (FORMAT, VERSION):
        raise UserError(f"{folder} is a pack of version {known[1]}, and this is version {VERSION}: make it again")
    return Settings(**contents)


def read_shard_records(folder: Path, settings: Settings) -> dict[int, dict]:
    """What lies beside each shard that is written, by number; none of a damaged record."""
    records = {}
    for number in range(settings.num_shards):
        with suppress(FileNotFoundError, ValueError):
            records[number] = json.loads(shard_path(folder, number).with_suffix(".json").read_text())
    return records


def build_index(folder: Path, settings: Settings) -> dict:
    """The index of a folder in which every shard is there."""
    index: dict = {"settings": asdict(settings), "shards": [], "items": {}, "unreadable": []}
    for number, contents in read_shard_records(folder, settings).items():
        columns = contents["items"] | {"shard": [number] * len(contents["items"]["path"])}
        for name, column in columns.items():
            index["items"].setdefault(name, []).extend(column)
        index["shards"].append({name: contents[name] for name in ("bytes", "crc32", "mtime_ns")})
        index["unreadable"].extend(contents["unreadable"])
    return index


class Pack:
    """A whole pack, to read. Its shards are opened when they are first used, in each process for itself.

    Per item, in the order of the source's files: `labels` (N,) int64, `lengths` (N,) int64 in frames,
    `rates` (N,) float64 in frames a second, 0 for images.
    """

    def __init__(self, folder: Path, index: dict):
        self.folder, self.settings = folder, Settings(**index["settings"])
        self.shard_records, self.unreadable = index["shards"], index["unreadable"]
        items = index["items"]
        self.paths = items["path"]
        self.labels = np.array(items["label"], np.int64)  # (N,)
        self.lengths = np.array(items["frames"], np.int64)  # (N,)
        self.rates = np.array(items["frames_per_second"], np.float64)  # (N,)
        self.shards = np.array(items["shard"], np.int64)  # (N,)
        self.first_frames = np.array(items["offset"], np.int64) // self.settings.frame_bytes  # (N,)
        self.shard_frames = lru_cache(MAX_MAPPED)(self.map_shard)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "shard_frames"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.shard_frames = lru_cache(MAX_MAPPED)(self.map_shard)

    def map_shard(self, number: int) -> np.ndarray:
        """All frames of a shard, (frames, *frame_shape), which stay in the file until they are read."""
        frames = self.shard_records[number]["bytes"] // self.settings.frame_bytes
        shape = (frames, *self.settings.frame_shape)
        # A plain array on the same memory: np.memmap's own slices take several times as long.
        return np.asarray(np.memmap(shard_path(self.folder, number), self.settings.dtype, "r", shape=shape))

    def frames(self, index: int) -> np.ndarray:
        """An item's frames without a copy: (T, H, W, 3) uint8 pixels, or (T, 2, 2, C, h, w) float16 latents."""
        first = self.first_frames[index]
        return self.shard_frames(int(self.shards[index]))[first : first + self.lengths[index]]

    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(record["bytes"] for record in self.shard_records)

    def describe(self) -> str:
        """A line for people: what the numbers are, how much it is, and what it was made from."""
        settings = self.settings
        kind = f"{settings.image_size}×{settings.image_size} pixels"
        if settings.values == "latents":
            side = settings.vae["side"]
            kind = f"{settings.vae['channels']}×{side}×{side} latents of {kind} by the VAE {settings.vae['name']}"
        size = f"{self.num_bytes():,} bytes in {settings.num_shards} shards"
        return f"a pack of {kind}: {self.lengths.sum():,} frames, {size}, made from {settings.source}"

    def found(self) -> Found:
        """What `data.scan` says of files, of the items of the pack."""
        source, video = self.settings.source, self.settings.video
        columns = zip(self.paths, self.labels.tolist(), self.lengths.tolist(), self.rates.tolist(), strict=True)
        items = tuple(
            Item(os.path.join(source, path), label, VideoInfo(range(length), rate) if video else None)  # noqa: PTH118
            for path, label, length, rate in columns
        )
        unreadable = tuple((str(Path(source, path)), reason) for path, reason in self.unreadable)
        return Found(str(self.folder), tuple(self.settings.classes), items, unreadable)


def is_pack(folder: Path) -> bool:
    """True for a whole pack, False for any other folder.

    Raises:
        UserError: a half-made pack.
    """
    if (folder / "index.json").is_file():
        return True
    if (folder / "settings.json").is_file() or (folder / "shard-00000.bin").is_file():
        command = read_settings(folder).command(folder)
        raise UserError(f"{folder} is a half-made pack: run {command} again to finish it")
    return False


def read_pack(folder: Path) -> Pack:
    """A pack whose index is whole; its shards are not looked at.

    Raises:
        UserError: no pack, half-made, damaged, or of another version.
    """
    if not is_pack(folder):
        raise UserError(f"{folder} is not a pack: make one with EqM/prepare.py")
    settings = read_settings(folder)
    try:
        return Pack(folder, json.loads((folder / "index.json").read_text()))
    except (ValueError, KeyError, TypeError):
        command = settings.command(folder)
        raise UserError(f"{folder / 'index.json'} is damaged: run {command} again, which mends it") from None


def open_pack(folder: Path, show_progress: bool = True) -> Pack:
    """A pack to train from: every shard is there and, where its time has changed, has its checksum.

    Raises:
        UserError: as `read_pack`, and for a shard that is missing, truncated or changed.
    """
    pack = read_pack(folder)
    damage = find_damage(folder, dict(enumerate(pack.shard_records)), show_progress)
    if damage:
        first = min(damage)
        others = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise UserError(
            f"{shard_path(folder, first)}{others} {damage[first]}:"
            f" run {pack.settings.command(folder)} again, which mends just that"
        )
    return pack


def find_damage(
    folder: Path, records: dict[int, dict], show_progress: bool, trust_times: bool = True
) -> dict[int, str]:
    """What is wrong with shards, by number, from what was recorded when they were written.

    The checksum is computed, on all cores, where a shard's time is not the recorded one, or for all
    without `trust_times`.
    """
    damage, suspects = {}, []
    for number, record in records.items():
        path = shard_path(folder, number)
        if not path.is_file():
            damage[number] = "is missing"
            continue
        status = path.stat()
        if status.st_size != record["bytes"]:
            damage[number] = f"has {status.st_size:,} bytes, not the {record['bytes']:,} that were written"
        elif not (trust_times and status.st_mtime_ns == record["mtime_ns"]):
            suspects.append(number)
    total = sum(records[number]["bytes"] for number in suspects)
    hidden = not (show_progress and suspects)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc="checking the pack", unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        checksums = pool.map(lambda number: file_checksum(shard_path(folder, number)), suspects)
        for number, checksum in zip(suspects, checksums, strict=True):
            if checksum != records[number]["crc32"]:
                damage[number] = "has changed since it was written"
            bar.update(records[number]["bytes"])
    return damage


def file_checksum(path: Path) -> int:
    """CRC-32 over a file's bytes."""
    checksum, block = 0, memoryview(bytearray(CHECK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            checksum = zlib.crc32(block[:size], checksum)
    return checksum
