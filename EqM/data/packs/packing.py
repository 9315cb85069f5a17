"""Making a pack, from its plan to its index: what it will hold, which shards are missing, and when it is whole."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.form import Form
from data.latent_space import LatentSpace
from data.packs.checks import check_record
from data.packs.format import FORMAT, VERSION, Settings, Windows, read_settings, shard_path
from data.packs.latent_sums import LatentSums
from data.packs.pack import Pack, find_damage, read_index
from data.scan import check_readable, find_files
from runtime.errors import UserError
from runtime.files import contents_checksum, leftovers, lock, read_json, write_json

PACK_FILES = ("settings.json", "index.json", "shard-*.bin", "shard-*.json")


@dataclass(frozen=True)
class PackPlan:
    """What to pack, the same on every rank: files as (path, class index), in the order of the shards."""

    folder: Path
    settings: Settings
    source: Path
    samples: list[tuple[str, int]]

    def shard(self, number: int) -> list[tuple[str, int]]:
        """The files of one shard."""
        count = self.settings.items_per_shard
        return self.samples[number * count : (number + 1) * count]


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


def name_in(source: Path, path: str) -> str:
    """A file's path relative to the source. The path may begin with the source or with what its links lead to."""
    # Not os.path.relpath: it shortens a/.. to nothing, which is another folder if a is a link.
    root = source if Path(path).is_relative_to(source) else source.resolve()
    return str(Path(path).relative_to(root))


def plan_pack(
    source: Path, folder: Path, form: Form, space: LatentSpace | None, windows: Windows | None = None
) -> PackPlan:
    """Finds the files. Writes nothing.

    Args:
        source: class folders, or videos with a CSV.
        folder: gets the pack.
        form: videos or images, and their size.
        space: the space of a VAE, to pack latents; None packs pixels.
        windows: which clips to pack, if the VAE encodes clips whole.

    Raises:
        UserError: no files, or an image size or a clip length that the VAE does not take.
    """
    listing = find_files(source, form.video)
    for note in listing.notes:
        tqdm.write(note)
    samples = listing.samples
    names = "\n".join(f"{name_in(source, path)}\t{label}" for path, label in samples)
    settings = Settings(
        format=FORMAT,
        version=VERSION,
        source=str(source.resolve()),
        video=form.video,
        image_size=form.image_size,
        values="latents" if space else "pixels",
        vae=vae_settings(space, form.image_size, windows) if space else {},
        classes=list(listing.classes),
        files=len(samples),
        names_crc32=zlib.crc32(os.fsencode(names)),
    )
    return PackPlan(folder, settings, source, samples)


def lock_pack(folder: Path) -> None:
    """Makes a folder if there is none, and locks it until this process and its workers end.

    Raises:
        UserError: another run has locked it, or it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        alone = lock(folder)
    if not alone:
        raise UserError(f"another run is packing into {folder}: let it end, then run the same command again")


def begin_pack(plan: PackPlan) -> None:
    """Writes the settings into the locked folder, which is empty or has a pack of the same settings.

    Raises:
        UserError: the folder has something else, or a pack with other settings or of other files.
    """
    with disk_errors(plan.folder):
        found = read_settings(plan.folder)
        if not found:
            if set(plan.folder.iterdir()) - set(leftovers(plan.folder, "settings.json")):
                raise UserError(f"{plan.folder} holds something else than a pack: give another folder")
            write_json(plan.folder / "settings.json", asdict(plan.settings))
    check_same(plan.folder, (found or plan.settings).identity(), plan.settings.identity())


def vae_settings(space: LatentSpace, image_size: int, windows: Windows | None) -> dict:
    """What a pack keeps of its VAE, as JSON gives it back.

    Raises:
        UserError: an image size or a clip length that the VAE does not take.
    """
    kept = {name: list(v) if isinstance(v, tuple) else v for name, v in space.as_dict().items()}
    kept["side"] = space.side(image_size)
    del kept["downsampling"]
    if windows:
        space.frames(windows.clip_len)
        kept |= asdict(windows)
    return kept


def check_same(folder: Path, found: dict, wanted: dict) -> None:
    """Raises UserError, with both values, if a pack was made with other settings."""
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(f"{folder} was made with {key} {found[key]}, and this run has {value}: give a new folder")


def read_shard_records(plan: PackPlan) -> dict[int, dict]:
    """The record beside each shard, by the shard's number.

    Leaves out records that are missing, damaged, wrong, or of a pack with other settings.
    """
    records, ours = {}, contents_checksum(plan.settings.identity())
    for number in range(plan.settings.num_shards):
        with suppress(OSError, ValueError, KeyError, TypeError):  # such a shard is packed again
            record = read_json(shard_path(plan.folder, number).with_suffix(".json"))
            check_record(record, plan.settings)
            if record.get("settings_crc32", ours) == ours:  # the first packs of this version did not keep it
                records[number] = record
    return records


def missing_shards(plan: PackPlan) -> list[int]:
    """The numbers of the shards that are missing or damaged. Reads every byte of a whole pack."""
    whole = (plan.folder / "index.json").is_file()
    records = read_shard_records(plan)
    damage = find_damage(plan.folder, records, show_progress=True, trust_times=not whole)
    for number, problem in sorted(damage.items()):
        tqdm.write(f"{shard_path(plan.folder, number)} {problem}: it is made anew")
    return sorted(damage.keys() | set(range(plan.settings.num_shards)) - records.keys())


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


def finish(plan: PackPlan) -> Pack:
    """Makes a pack whole once every shard is written: writes its index and removes what killed runs left.

    Raises:
        UserError: a shard is missing, or too many files could not be read. A later run tries those files again.
    """
    records = read_shard_records(plan)
    index = build_index(plan, records)
    pack = Pack(plan.folder, plan.settings, index)
    try:
        check_readable(replace(pack.found(), root=plan.settings.source), plan.settings.video)
    except UserError:
        for number, record in records.items():
            if record["unreadable"]:
                shard_path(plan.folder, number).with_suffix(".json").unlink()
        raise
    with disk_errors(plan.folder):
        # A whole pack is left alone: it may lie on a read-only disk.
        if read_index(plan.folder, plan.settings) != index:
            write_json(plan.folder / "index.json", index, replaces_streams=True)
        for names in PACK_FILES:
            for left in leftovers(plan.folder, names):
                left.unlink()
    return pack
