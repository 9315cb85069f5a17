"""Reads packs: data sets decoded once, as shards of frames. EqM/prepare.py makes them.

A pack is a folder of

    settings.json     what it is made from and how; written first
    shard-00000.bin   the frames of some items, one after another
    shard-00000.json  the shard's record: its items, size and checksum; a shard without a record does not count
    index.json        all records in one file; written last, so a pack with an index is whole

A frame is (H, W, 3) uint8 pixels, or (2, 2, C, h, w) float16 latents. The first axis of latents is the frame as it
is and mirrored, the second is mean and standard deviation. If the VAE encodes clips whole, a window of the video,
(2, 2, C, t, h, w), stands in the place of a frame. Every .json file has a checksum of its contents.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.file_list import Found, Names, Videos
from data.packs.checks import check_index
from data.packs.format import Settings, read_settings, shard_path
from data.packs.latent_sums import LatentSums
from data.video import VideoInfo
from runtime.errors import UserError
from runtime.files import file_checksum, read_json


def read_index(folder: Path, settings: Settings) -> dict | None:
    """The index of a whole pack. None if it is missing, damaged, unreadable or of another pack."""
    try:
        index = read_json(folder / "index.json")
    except (OSError, ValueError):
        return None
    return index if index.get("settings") == settings.identity() else None


class Pack:
    """A whole pack, as its index describes it.

    Attributes, with one value an item in the order of the source's files:
        paths: the file, relative to the source.
        labels: its class index, into `classes`, (N,) int64.
        lengths: its frames, or windows, (N,) int64.
        rates: its frames a second, 0 for an image, (N,) float64.
        shards: the shard that holds it, (N,) int64.
        first_frames: the place of its first frame in that shard, (N,) int64.
    and, of all latents:
        latent_sums: their means and deviations; None for pixels, and if the pack is of an earlier version.

    Raises:
        ValueError, KeyError, TypeError: the index says something wrong, or lacks something.
    """

    def __init__(self, folder: Path, settings: Settings, index: dict):
        self.folder, self.settings = folder, settings
        columns = check_index(index, settings)
        self.shard_records, self.unreadable, self.paths = index["shards"], index["unreadable"], index["items"]["path"]
        # As in a scan, a class without a readable file is none.
        used, self.labels = np.unique(columns["label"], return_inverse=True)  # (N,)
        self.classes = tuple(settings.classes[i] for i in used)
        self.lengths = columns["frames"]
        self.rates, self.shards = columns["frames_per_second"], columns["shard"]
        self.first_frames = columns["offset"] // self.settings.frame_bytes  # (N,)
        self.latent_sums = LatentSums.read(index["latents"]) if "latents" in index else None

    def __len__(self) -> int:
        return len(self.labels)

    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(record["bytes"] for record in self.shard_records)

    def describe(self) -> str:
        """One line for people: the kind of values, the size, and the source."""
        settings = self.settings
        kind = f"{settings.image_size}×{settings.image_size} pixels"
        if settings.values == "latents":
            shape = "×".join(map(str, settings.frame_shape[2:]))
            kind = f"{shape} latents of {kind} by the VAE {settings.vae['name']}"
        size = f"{self.num_bytes():,} bytes in {settings.num_shards} shards"
        return f"a pack of {kind}: {self.count_text()}, {size}, made from {settings.source}"

    def count_text(self) -> str:
        """How many frames, or windows, it holds, for people."""
        windows = self.settings.windows
        of = f" of {windows.clip_len} frames, {windows.frame_interval} apart" if windows else ""
        return f"{self.lengths.sum():,} {self.settings.unit}{of}"

    def latent_report(self) -> list[str]:
        """Lines for people: mean and deviation of the latents by channel, and a warning if they are far off."""
        return list(self.latent_sums.report(self.settings.space)) if self.latent_sums else []

    def found(self) -> Found:
        """The items of the pack, in the form that `data.scan` gives for files."""
        source, video = self.settings.source, self.settings.video
        paths = Names(os.path.join(source, path) for path in self.paths)  # noqa: PTH118
        pairs = zip(self.lengths.tolist(), self.rates.tolist(), strict=True)
        videos = Videos(VideoInfo(range(length), rate) for length, rate in pairs) if video else None
        unreadable = tuple((str(Path(source, path)), reason) for path, reason in self.unreadable)
        return Found(str(self.folder), self.classes, paths, self.labels, videos, unreadable)


def is_pack(folder: Path) -> bool:
    """True for a whole pack, False for any other folder.

    Raises:
        UserError: the pack is half-made, has damaged settings, or is of another version.
    """
    settings = read_settings(folder)
    if settings and not (folder / "index.json").exists():
        raise UserError(f"{folder} is a half-made pack: run {settings.command(folder)} again to finish it")
    return settings is not None


def read_pack(folder: Path) -> Pack:
    """Reads a pack's index. Does not check the shards.

    Raises:
        UserError: there is no pack, or it is half-made, damaged, or of another version.
    """
    settings = read_settings(folder) if is_pack(folder) else None
    if not settings:
        raise UserError(f"{folder} is not a pack: make one with EqM/prepare.py")
    index = read_index(folder, settings)
    try:
        if index:
            return Pack(folder, settings, index)
    except (ValueError, KeyError, TypeError):  # its checksum is right, and what it says is not
        pass
    raise UserError(
        f"{folder / 'index.json'} is damaged or may not be read: run {settings.command(folder)} again, which mends it"
    )


def open_pack(folder: Path, show_progress: bool = True) -> Pack:
    """Reads a pack to train from, and checks its shards. Computes the checksum of a shard if its time has changed.

    Raises:
        UserError: as `read_pack`; or a shard is missing, truncated or changed.
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
    """Compares shards with their records, and says what is wrong with the damaged ones, by number.

    Computes checksums, on all cores, of the shards whose time is not the recorded one. Without `trust_times`, of all.
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
        elif not (trust_times and status.st_mtime_ns == record["mtime_ns"] and os.access(path, os.R_OK)):
            suspects.append(number)
    total = sum(records[number]["bytes"] for number in suspects)
    hidden = not (show_progress and suspects)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc="checking the pack", unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        checksums = pool.map(lambda number: try_checksum(shard_path(folder, number)), suspects)
        for number, checksum in zip(suspects, checksums, strict=True):
            if isinstance(checksum, str):
                damage[number] = checksum
            elif checksum != records[number]["crc32"]:
                damage[number] = "has changed since it was written"
            bar.update(records[number]["bytes"])
    return damage


def try_checksum(path: Path) -> int | str:
    """`file_checksum`, or why the file cannot be read."""
    try:
        return file_checksum(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
