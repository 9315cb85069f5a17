"""Making a pack, from its plan to its index: what it will hold, which shards are missing, and when it is whole."""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.form import Form
from data.inputs.entries import Entries
from data.inputs.forms import BY_DEFAULT, Reading, find_entries
from data.latent_space import LatentSpace
from data.packs.checks import check_record
from data.packs.format import (
    APPENDED,
    FORMAT,
    VERSION,
    Settings,
    Windows,
    appended_folders,
    read_settings,
    shard_path,
)
from data.packs.latent_sums import LatentSums
from data.packs.pack import OF_PART, Pack, find_damage, read_index
from data.scan import check_readable
from runtime.errors import UserError, shown
from runtime.files import contents_checksum, leftovers, lock, read_json, write_json
from runtime.size import ImageSize, plain

PACK_FILES = ("settings.json", "index.json", "shard-*.bin", "shard-*.json")


@dataclass(frozen=True)
class PackPlan:
    """What to pack, the same on every rank: files in the order of the shards."""

    folder: Path
    settings: Settings
    entries: Entries

    def shard(self, number: int) -> range:
        """The files of one shard, by index."""
        count = self.settings.items_per_shard
        return range(self.settings.files)[number * count : (number + 1) * count]


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


def plan_pack(
    source: Path,
    folder: Path,
    form: Form,
    space: LatentSpace | None,
    windows: Windows | None = None,
    reading: Reading = BY_DEFAULT,
    pack: Pack | None = None,
) -> PackPlan | None:
    """Finds the files. Writes nothing.

    Args:
        source: class folders, videos with a CSV, or another form that `find_entries` knows.
        folder: gets the pack. Of one that was appended to, or that is such a part, the files that it has are planned.
        form: videos or images, and their size.
        space: the space of a VAE, to pack latents; None packs pixels.
        windows: which clips to pack, if the VAE encodes clips whole.
        reading: how the source is read.
        pack: the whole pack in the folder, to append to. None is returned if it has all files.

    Raises:
        UserError: as `find_entries` and `plan_append`; or an image size or a clip length that the VAE does not take.
    """
    entries = find_entries(source, form.video, reading)
    for note in entries.notes:
        tqdm.write(note)
    if not pack and (appended_folders(folder) or folder.name.startswith(APPENDED)):
        entries = those_in(folder, entries)
    plan = PackPlan(folder, settings_for(source, form, space, windows, reading, entries), entries)
    return plan_append(plan, pack) if pack else plan


def settings_for(
    source: Path,
    form: Form,
    space: LatentSpace | None,
    windows: Windows | None,
    reading: Reading,
    entries: Entries,
) -> Settings:
    """The settings of a pack of some files."""
    return Settings(
        format=FORMAT,
        version=VERSION,
        source=str(source.resolve()),
        video=form.video,
        image_size=form.image_size,
        values="latents" if space else "pixels",
        vae=vae_settings(space, form.image_size, windows) if space else {},
        classes=list(entries.classes),
        files=len(entries),
        names_crc32=names_checksum(entries),
        options=reading.words(),
    )


def names_checksum(entries: Entries) -> int:
    """CRC-32 over the names and class indices of all files."""
    pairs = zip(entries.names, entries.labels.tolist(), strict=True)
    return zlib.crc32(os.fsencode("\n".join(f"{name}\t{label}" for name, label in pairs)))


def those_in(folder: Path, entries: Entries) -> Entries:
    """The files that a whole pack was made from, without what its source has got since.

    Raises:
        UserError: a file has another class there.
    """
    settings = read_settings(folder)
    if not settings:
        return entries
    index = read_index(folder, settings)
    known: set[str] = set()
    for part in [index] if index else map(read_record, sorted(folder.glob("shard-*.json"))):
        known |= {*part["items"]["path"], *(name for name, _ in part["unreadable"])} if part else set()
    if not known:
        return entries
    chosen = [i for i, name in enumerate(entries.names) if name in known]
    lost = {entries.classes[entries.labels[i]] for i in chosen} - set(settings.classes)
    if lost:
        raise UserError(f"{folder} has files that are of the class {min(lost)} in the source: make a new pack")
    return entries.only(chosen, settings.classes)


def read_record(path: Path) -> dict | None:
    """The record of a shard; None if it is damaged."""
    with suppress(OSError, ValueError):
        return read_json(path)
    return None


def plan_append(plan: PackPlan, pack: Pack) -> PackPlan | None:
    """The plan for those files that a pack lacks, by their names. None if it has all of them.

    They get a folder inside the pack, which is a pack of its own: the pack stays whole until that is whole. The classes
    of the pack keep their numbers, and new ones follow.

    Raises:
        UserError: a file has another class in the pack, or the pack was made in another way.
    """
    ours, theirs = plan.settings, pack.settings
    wanted = {name: value for name, value in ours.identity().items() if name not in OF_PART}
    check_same(pack.folder, theirs.identity(), wanted)
    known = dict(zip(pack.paths, (pack.classes[label] for label in pack.labels.tolist()), strict=True))
    skipped = {name for name, _ in pack.unreadable}
    entries, new = plan.entries, []
    for i, name in enumerate(entries.names):
        label = entries.classes[entries.labels[i]]
        if known.get(name, label) != label:
            says = f"{name} is of the class {label} in the source, and of {known[name]} in {pack.folder}"
            raise UserError(shown(f"{says}: make a new pack"))
        if name not in known and name not in skipped:
            new.append(i)
    tqdm.write(f"{len(entries) - len(new):,} of {len(entries):,} files are in {pack.folder} already, by their names")
    if not new:
        return None
    used = {entries.classes[entries.labels[i]] for i in new}
    classes = [*pack.all_classes, *(name for name in entries.classes if name in used - set(pack.all_classes))]
    entries = entries.only(new, classes)
    settings = replace(ours, classes=classes, files=len(new), names_crc32=names_checksum(entries))
    return PackPlan(pack.folder / f"{APPENDED}{len(pack.parts):03d}", settings, entries)


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


def vae_settings(space: LatentSpace, image_size: ImageSize, windows: Windows | None) -> dict:
    """What a pack keeps of its VAE, as JSON gives it back.

    Raises:
        UserError: an image size or a clip length that the VAE does not take.
    """
    kept = {name: list(v) if isinstance(v, tuple) else v for name, v in space.as_dict().items()}
    kept["side"] = plain(space.size(image_size))
    del kept["downsampling"]
    if windows:
        space.frames(windows.clip_len)
        kept |= asdict(windows)
    return kept


def check_same(folder: Path, found: dict, wanted: dict) -> None:
    """Raises UserError, with both values, if a pack was made with other settings."""
    for key, value in wanted.items():
        if found[key] != value:
            advice = "remove it" if folder.name.startswith(APPENDED) else "give a new folder"
            raise UserError(f"{folder} was made with {key} {found[key]}, and this run has {value}: {advice}")


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
    pack = Pack((plan.folder, plan.settings, index))
    try:
        check_readable(replace(pack.found(), root=plan.settings.source), plan.settings.video)
    except UserError:
        for number, record in records.items():
            if record["unreadable"]:
                shard_path(plan.folder, number).with_suffix(".json").unlink(missing_ok=True)
        raise
    with disk_errors(plan.folder):
        # A whole pack is left alone: it may lie on a read-only disk.
        if read_index(plan.folder, plan.settings) != index:
            write_json(plan.folder / "index.json", index, replaces_streams=True)
        for names in PACK_FILES if alone else ():
            for left in leftovers(plan.folder, names):
                left.unlink()
    return pack
