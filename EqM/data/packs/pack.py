"""Reads packs: data sets decoded once, as shards of frames. EqM/prepare.py makes them.

A pack is a folder of

    settings.json     what it is made from and how; written first
    shard-00000.bin   the frames of some items, one after another
    shard-00000.json  the shard's record: its items, size and checksum; a shard without a record does not count
    index.json        all records in one file; written last, so a pack with an index is whole
    more-001          what was appended, a pack of its own whose classes begin with those of the pack

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
from data.packs.format import Settings, appended_folders, read_settings, shard_path
from data.packs.latent_sums import LatentSums
from data.video import VideoInfo
from runtime.errors import UserError
from runtime.files import file_checksum, read_json
from runtime.size import spelt

OF_PART = {"classes", "files", "names_crc32"}  # settings in which parts of a pack differ


def read_index(folder: Path, settings: Settings) -> dict | None:
    """The index of a whole pack. None if it is missing, damaged, unreadable or of another pack."""
    try:
        index = read_json(folder / "index.json")
    except (OSError, ValueError):
        return None
    return index if index.get("settings") == settings.identity() else None


class Pack:
    """A whole pack, as the indices of its parts describe it: the first one, and those that were appended.

    Attributes:
        parts: folder, settings and index of each part.
        shard_files, shard_records: of all shards, in the order of the parts.
        all_classes: names of the classes, also of those that have no readable file.
        classes: names of the other classes.

    Attributes with one value an item, in the order of the source's files:
        paths: the file, relative to the source.
        labels: its class index, into `classes`, (N,) int64.
        lengths: its frames, or windows, (N,) int64.
        rates: its frames a second, 0 for an image, (N,) float64.
        shards: the shard that holds it, into `shard_files`, (N,) int64.
        first_frames: the place of its first frame in that shard, (N,) int64.
    and, of all latents:
        latent_sums: their means and deviations; None for pixels, and if the pack is of an earlier version.

    Raises:
        ValueError, KeyError, TypeError: the index says something wrong, or lacks something.
    """

    def __init__(self, *parts: tuple[Path, Settings, dict]):
        self.parts, (self.folder, self.settings, _) = parts, parts[0]
        checked = [check_index(index, settings) for _, settings, index in parts]
        columns = {name: np.concatenate([part[name] for part in checked]) for name in checked[0]}
        self.shard_records = [record for _, _, index in parts for record in index["shards"]]
        self.shard_files = [shard_path(folder, i) for folder, _, index in parts for i in range(len(index["shards"]))]
        self.unreadable = [pair for _, _, index in parts for pair in index["unreadable"]]
        self.paths = [path for _, _, index in parts for path in index["items"]["path"]]
        before = np.cumsum([0, *(len(index["shards"]) for _, _, index in parts[:-1])])
        self.shards = columns["shard"] + np.repeat(before, [len(part["shard"]) for part in checked])
        # As in a scan, a class without a readable file is none.
        used, self.labels = np.unique(columns["label"], return_inverse=True)  # (N,)
        self.all_classes = parts[-1][1].classes
        self.classes = tuple(self.all_classes[i] for i in used)
        self.lengths, self.rates = columns["frames"], columns["frames_per_second"]
        self.first_frames = columns["offset"] // self.settings.frame_bytes  # (N,)
        sums = [LatentSums.read(index["latents"]) for _, _, index in parts if "latents" in index]
        self.latent_sums = sum(sums, start=LatentSums()) if len(sums) == len(parts) else None

    def __len__(self) -> int:
        return len(self.labels)

    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(record["bytes"] for record in self.shard_records)

    def describe(self) -> str:
        """One line for people: the kind of values, the size, and the source."""
        settings = self.settings
        kind = f"{spelt(settings.image_size)} pixels"
        if settings.values == "latents":
            shape = "×".join(map(str, settings.frame_shape[2:]))
            kind = f"{shape} latents of {kind} by the VAE {settings.vae['name']}"
        size = f"{self.num_bytes():,} bytes in {len(self.shard_files)} shards"
        return f"a pack of {kind}: {self.count_text()}, {size}, made from {settings.source}"

    def count_text(self) -> str:
        """How many frames, or windows, it holds, for people."""
        windows = self.settings.windows
        of = f" of {windows.clip_len} frames, {windows.frame_interval} apart" if windows else ""
        return f"{self.lengths.sum():,} {self.settings.unit}{of}"

    def latent_report(self) -> list[str]:
        """Lines for people: mean and deviation of the latents by channel, and a warning if they are far off."""
        return list(self.latent_sums.report(self.settings.space)) if self.latent_sums else []

    def command(self, shard: Path) -> str:
        """The command line that mends one of the shards."""
        settings = next(settings for folder, settings, _ in self.parts if folder == shard.parent)
        return settings.command(shard.parent)

    def found(self) -> Found:
        """The items of the pack, in the form that `data.scan` gives for files."""
        video = self.settings.video
        paths = Names(
            os.path.join(settings.source, path)  # noqa: PTH118
            for _, settings, index in self.parts
            for path in index["items"]["path"]
        )
        pairs = zip(self.lengths.tolist(), self.rates.tolist(), strict=True)
        videos = Videos(VideoInfo(range(length), rate) for length, rate in pairs) if video else None
        unreadable = tuple(
            (str(Path(settings.source, path)), reason)
            for _, settings, index in self.parts
            for path, reason in index["unreadable"]
        )
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
    parts: list[tuple[Path, Settings, dict]] = []
    for part in (folder, *appended_folders(folder)):
        of_part = settings if part == folder else read_settings(part)
        if part != folder and not (of_part and (part / "index.json").exists()):
            break  # it is being appended: until that has ended, the pack is as it was before
        index = read_index(part, of_part)
        try:
            Pack((part, of_part, index))
            check_part(of_part, parts)
        except (ValueError, KeyError, TypeError):  # its checksum is right, and what it says is not
            problem = f"{part / 'index.json'} is damaged or may not be read"
            raise UserError(f"{problem}: run {of_part.command(part)} again, which mends it") from None
        parts.append((part, of_part, index))
    return Pack(*parts)


def check_part(settings: Settings, before: list[tuple[Path, Settings, dict]]) -> None:
    """Raises ValueError if a part does not go on from the parts before it."""
    for _, other, _ in before:
        wanted, found = other.identity(), settings.identity()
        if any(found[key] != wanted[key] for key in wanted.keys() - OF_PART):
            raise ValueError("it is of another kind")
        if settings.classes[: len(other.classes)] != other.classes:
            raise ValueError("its classes do not begin with those before")


def open_pack(folder: Path, show_progress: bool = True) -> Pack:
    """Reads a pack to train from, and checks its shards. Computes the checksum of a shard if its time has changed.

    Raises:
        UserError: as `read_pack`; or a shard is missing, truncated or changed.
    """
    pack = read_pack(folder)
    damage = find_damage(dict(zip(pack.shard_files, pack.shard_records, strict=True)), show_progress)
    if damage:
        first = next(path for path in pack.shard_files if path in damage)
        others = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise UserError(f"{first}{others} {damage[first]}: run {pack.command(first)} again, which mends just that")
    return pack


def find_damage(records: dict[Path, dict], show_progress: bool, trust_times: bool = True) -> dict[Path, str]:
    """Compares shards with their records, and says what is wrong with the damaged ones.

    Computes checksums, on all cores, of the shards whose time is not the recorded one. Without `trust_times`, of all.
    """
    damage, suspects = {}, []
    for path, record in records.items():
        if not path.is_file():
            damage[path] = "is missing"
            continue
        status = path.stat()
        if status.st_size != record["bytes"]:
            damage[path] = f"has {status.st_size:,} bytes, not the {record['bytes']:,} that were written"
        elif not (trust_times and status.st_mtime_ns == record["mtime_ns"] and os.access(path, os.R_OK)):
            suspects.append(path)
    total = sum(records[path]["bytes"] for path in suspects)
    hidden = not (show_progress and suspects)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc="checking the pack", unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        for path, checksum in zip(suspects, pool.map(try_checksum, suspects), strict=True):
            if isinstance(checksum, str):
                damage[path] = checksum
            elif checksum != records[path]["crc32"]:
                damage[path] = "has changed since it was written"
            bar.update(records[path]["bytes"])
    return damage


def try_checksum(path: Path) -> int | str:
    """`file_checksum`, or why the file cannot be read."""
    try:
        return file_checksum(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
