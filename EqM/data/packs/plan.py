"""What a pack will hold, decided before anything is written, and the same on every rank."""

import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.form import Form
from data.inputs.entries import Entries
from data.inputs.forms import BY_DEFAULT, Reading, find_entries
from data.latent_space import LatentSpace
from data.packs.format import APPENDED, FORMAT, VERSION, Settings, Windows, appended_folders, read_settings
from data.packs.pack import OF_PART, Pack, read_index
from runtime.errors import UserError, shown
from runtime.files import read_json
from runtime.size import ImageSize, plain


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


def check_same(folder: Path, found: dict, wanted: dict) -> None:
    """Raises UserError, with both values, if a pack was made with other settings."""
    for key, value in wanted.items():
        if found[key] != value:
            advice = "remove it" if folder.name.startswith(APPENDED) else "give a new folder"
            raise UserError(f"{folder} was made with {key} {found[key]}, and this run has {value}: {advice}")
