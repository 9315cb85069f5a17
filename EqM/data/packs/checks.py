"""Checks what the index of a pack and the records of its shards say: a right checksum does not make numbers right."""

import numpy as np

from data.packs.format import Settings, is_texts, is_whole
from data.packs.latent_sums import LatentSums

MAX_LENGTH = 2**32  # frames of an item; keeps sums below 2^63
COLUMNS = {"path", "label", "frames", "frames_per_second", "offset"}


def check_index(index: dict, settings: Settings) -> dict[str, np.ndarray]:
    """Checks an index whose settings are those of the pack, and returns its columns of numbers, (N,) each.

    Raises:
        ValueError, KeyError, TypeError: a value is missing, of another type, or wrong.
    """
    shards = index["shards"]
    require(isinstance(shards, list) and len(shards) == settings.num_shards and len(index["items"]["path"]) > 0)
    require(set(index["items"]) == COLUMNS | {"shard"})
    for record in shards:
        check_file(record)
    check_unreadable(index["unreadable"])
    return check_items(index["items"], [record["bytes"] for record in shards], settings)


def check_record(record: dict, settings: Settings) -> None:
    """Checks the record of one shard. Raises as `check_index`."""
    check_file(record)
    check_unreadable(record["unreadable"])
    require(set(record["items"]) == COLUMNS)
    if "latents" in record:
        LatentSums.read(record["latents"])
    alone = record["items"] | {"shard": [0] * len(record["items"]["path"])}
    check_items(alone, [record["bytes"]], settings)


def check_file(record: dict) -> None:
    """Checks what a record says of the shard's file."""
    require(is_whole(record["bytes"], 0, 2**62) and is_whole(record["crc32"], 0, 2**32 - 1))
    require(is_whole(record["mtime_ns"], -(2**63), 2**63 - 1))


def check_unreadable(pairs: list) -> None:
    """Checks the files that were left out, with the reasons."""
    require(isinstance(pairs, list) and all(is_texts(pair) and len(pair) == 2 for pair in pairs))


def check_items(items: dict, shard_bytes: list[int], settings: Settings) -> dict[str, np.ndarray]:
    """Checks the columns of items: the items of each shard follow one another and fill it, shard by shard."""
    count = len(items["path"])
    require(is_texts(items["path"]))
    labels, lengths, offsets, shards = (
        whole_numbers(items[name], count) for name in ("label", "frames", "offset", "shard")
    )  # (N,) each
    rates = np.array(items["frames_per_second"])  # (N,)
    require(rates.shape == (count,) and (not count or rates.dtype.kind in "if"))
    require(bool((np.isfinite(rates) & ((rates > 0) == settings.video) & (rates >= 0)).all()))
    require(in_range(labels, len(settings.classes)) and in_range(lengths - 1, MAX_LENGTH))
    require(in_range(shards, len(shard_bytes)) and bool((np.diff(shards) >= 0).all()))
    before = np.cumsum(lengths) - lengths  # (N,): frames of all items before this one
    first = np.searchsorted(shards, shards)  # (N,): the first item of the same shard
    require(bool((offsets == (before - before[first]) * settings.frame_bytes).all()))
    frames = np.zeros(len(shard_bytes), np.int64)
    np.add.at(frames, shards, lengths)
    require([number * settings.frame_bytes for number in frames.tolist()] == shard_bytes)
    rates = rates.astype(np.float64)
    return {"label": labels, "frames": lengths, "frames_per_second": rates, "offset": offsets, "shard": shards}


def whole_numbers(column: list, count: int) -> np.ndarray:
    """A column as (count,) int64. Raises ValueError for other numbers, and for none of them."""
    values = np.array(column)
    require(values.shape == (count,) and (not count or values.dtype.kind == "i"))
    return values.astype(np.int64, copy=False)


def in_range(values: np.ndarray, end: int) -> bool:
    """Whether all are 0 or more, and below `end`."""
    return bool(((values >= 0) & (values < end)).all())


def require(holds: bool) -> None:
    """Raises ValueError if something does not hold."""
    if not holds:
        raise ValueError("a value is missing, of another type, or wrong")
