"""Making a pack by its plan: locking the folder, which shards are missing, and the index that makes it whole."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from data.packs.checks import check_record
from data.packs.format import read_settings, shard_path
from data.packs.latent_sums import LatentSums
from data.packs.pack import Pack, find_damage, read_index
from data.packs.plan import PackPlan, check_same
from data.scan import check_readable
from runtime.errors import UserError
from runtime.files import contents_checksum, leftovers, lock, read_json, write_json

PACK_FILES = ("settings.json", "index.json", "shard-*.bin", "shard-*.json")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of the disk, such as a full one, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}: make room and run the same command again,"
            " which keeps the finished shards"
        ) from None


def lock_pack(folder: Path, shared: bool = False) -> None:
    """Makes a folder if there is none, and locks it until this process and its workers end.

    `shared` locks are for runs that pack parts of one pack.

    Raises:
        UserError: another run has locked it, or it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = lock(folder, shared)
    if not free:
        raise UserError(f"another run is packing into {folder}: let it end, then run the same command again")


def begin_pack(plan: PackPlan) -> None:
    """Writes the settings into the locked folder, which is empty or has a pack of the same settings.

    Raises:
        UserError: the folder has something else, or a pack with other settings or of other files.
    """
    with disk_errors(plan.folder):
        plan.folder.mkdir(exist_ok=True)
        found = read_settings(plan.folder)
        if not found:
            there = set(plan.folder.iterdir()) - set(leftovers(plan.folder, "settings.json"))
            found = read_settings(plan.folder)  # another part of the work may have written them by now
            if there and not found:
                raise UserError(f"{plan.folder} holds something else than a pack: give another folder")
            if not found:
                write_json(plan.folder / "settings.json", plan.settings.contents())
    check_same(plan.folder, (found or plan.settings).identity(), plan.settings.identity())


def read_shard_records(plan: PackPlan, wanted: Iterable[int] | None = None) -> dict[int, dict]:
    """The record beside each shard, or beside those that are wanted, by the shard's number.

    Leaves out records that are missing, damaged, wrong, or of a pack with other settings.
    """
    records, ours = {}, contents_checksum(plan.settings.identity())
    for number in range(plan.settings.num_shards) if wanted is None else wanted:
        with suppress(OSError, ValueError, KeyError, TypeError):  # such a shard is packed again
            record = read_json(shard_path(plan.folder, number).with_suffix(".json"))
            check_record(record, plan.settings)
            if record.get("settings_crc32", ours) == ours:  # the first packs of this version did not keep it
                records[number] = record
    return records


def missing_shards(plan: PackPlan, part: int = 1, parts: int = 1) -> list[int]:
    """The numbers of the shards that are missing or damaged. Reads every byte of a whole pack.

    Of several parts of the work, which are numbered from 1, looks at the shards of one.
    """
    wanted = range(part - 1, plan.settings.num_shards, parts)
    whole = (plan.folder / "index.json").is_file()
    records = read_shard_records(plan, wanted)
    numbers = {shard_path(plan.folder, number): number for number in records}
    damage = find_damage({path: records[numbers[path]] for path in numbers}, True, trust_times=not whole)
    for path, problem in sorted(damage.items()):
        tqdm.write(f"{path} {problem}: it is made anew")
    return sorted({numbers[path] for path in damage} | set(wanted) - records.keys())


def build_index(plan: PackPlan, records: dict[int, dict]) -> dict:
    """The index of a pack, from the records of all its shards.

    Raises:
        UserError: a shard was removed since it was written.
    """
    index: dict = {"settings": plan.settings.identity(), "shards": [], "items": {}, "unreadable": []}
    for number in range(plan.settings.num_shards):
        if number not in records:
            raise UserError(f"{shard_path(plan.folder, number)} was removed or damaged: run the same command again")
        record = records[number]
        columns = record["items"] | {"shard": [number] * len(record["items"]["path"])}
        for name, column in columns.items():
            index["items"].setdefault(name, []).extend(column)
        index["shards"].append({name: record[name] for name in ("bytes", "crc32", "mtime_ns")})
        index["unreadable"].extend(record["unreadable"])
    sums = [records[number].get("latents") for number in range(plan.settings.num_shards)]
    if all(sums):  # the first packs of this version did not keep them
        index["latents"] = sum(map(LatentSums.read, sums), start=LatentSums()).as_dict()
    return index


def finish(plan: PackPlan, alone: bool = True) -> Pack:
    """Makes a pack whole once every shard is written: writes its index and, if `alone`, removes what killed runs left.

    Raises:
        UserError: a shard is missing, or too many files could not be read. A later run tries those files again.
    """
    records = read_shard_records(plan)
    index = build_index(plan, records)
    source = plan.settings.source
    unreadable = [(str(Path(source, path)), reason) for path, reason in index["unreadable"]]
    try:
        check_readable(len(index["items"]["path"]), unreadable, source, plan.settings.video)
    except UserError:
        for number, record in records.items():
            if record["unreadable"]:
                shard_path(plan.folder, number).with_suffix(".json").unlink(missing_ok=True)
        raise
    pack = Pack((plan.folder, plan.settings, index))
    with disk_errors(plan.folder):
        # A whole pack is left alone: it may lie on a read-only disk.
        if read_index(plan.folder, plan.settings) != index:
            write_json(plan.folder / "index.json", index, replaces_streams=True)
        for names in PACK_FILES if alone else ():
            for left in leftovers(plan.folder, names):
                left.unlink()
    return pack
