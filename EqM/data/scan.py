"""Finds the files of a data set and their classes, and opens each file once to check it."""

import csv
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data.file_list import Found, Item
from data.images import probe_image
from data.untrusted import Unreadable
from data.video import probe_video
from runtime.errors import UserError

VIDEO_EXTENSIONS = (".avi", ".mp4", ".mkv", ".webm", ".mov")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
UCF_NAME = re.compile(r"v_(?P<label>\w+)_g\d+_c\d+")
MAX_UNREADABLE = 0.1  # share of a set; training stops if more cannot be read
SPLIT_NAMES = {"train", "test", "val", "valid", "validation"}


def find_files(root: Path, video: bool) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Class names, and (path, class index) of every file. Opens no file.

    Class folders give the classes. Without such folders, a CSV or UCF-101 file names give the classes of videos.

    Raises:
        UserError: there are no files, or no classes for them.
    """
    if not root.is_dir():
        raise UserError(f"--data-path {root} is not a folder: give one that holds class folders")
    extensions = VIDEO_EXTENSIONS if video else IMAGE_EXTENSIONS
    if any(entry.is_dir() for entry in root.iterdir()):
        # A folder without such files is not a class.
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        labelled = [(path, name) for name in folders for path in walk(root / name, extensions)]
        if labelled and {label for _, label in labelled} <= SPLIT_NAMES:
            raise UserError(f"{root} holds splits, not classes: give one split, for example {root / labelled[0][1]}")
        if labelled:
            return index_labels(labelled)
    if not video:
        raise UserError(f"no class folders of images in {root} (for videos add --video)")
    table = find_table(root)
    rows = read_table(table, root) if table else []
    flat = sorted(path for path in root.iterdir() if path.suffix.lower() in extensions)
    # A train.csv beside this folder may describe only the training folder.
    if any(Path(path).is_file() for path, _ in rows) or (rows and not flat):
        return index_labels(rows)
    if not flat:
        raise UserError(f"no videos ({' '.join(VIDEO_EXTENSIONS)}) in {root} or its class folders")
    names = [(str(path), UCF_NAME.match(path.name)) for path in flat]
    unnamed = [path for path, match in names if not match]
    if unnamed:
        raise UserError(f"{unnamed[0]} has no class: use class folders, {root.name}.csv, or UCF-101 file names")
    return index_labels((path, match["label"]) for path, match in names)


def walk(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """The files with these extensions in a folder and below, sorted, folder by folder."""
    found = []
    for below, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [os.path.join(below, name) for name in sorted(names) if name.lower().endswith(extensions)]  # noqa: PTH118
    return found


def find_loose_files(root: Path, video: bool) -> list[tuple[str, str]]:
    """(path, class name) of every video, or of every image, in a folder and below, sorted.

    The class name is that of the class folder, "" for a file directly in `root`.

    Raises:
        UserError: there is no such folder, or no such file.
    """
    kinds = [("videos", VIDEO_EXTENSIONS), ("images", IMAGE_EXTENSIONS)]
    (kind, extensions), (other_kind, other_extensions) = kinds if video else kinds[::-1]
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give one of {kind}")
    files = sorted(Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    found = [path for path in files if path.suffix.lower() in extensions]
    if not found:
        instead = f", but {other_kind}" if any(path.suffix.lower() in other_extensions for path in files) else ""
        raise UserError(f"no {kind} ({' '.join(extensions)}) in {root}{instead}: give a folder of {kind}")
    return [(str(path), path.relative_to(root).parts[0] if path.parent != root else "") for path in found]


def index_labels(samples: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The sorted class names, and (path, class index) in place of each (path, class name)."""
    samples = list(samples)
    classes = tuple(sorted({label for _, label in samples}))
    index = {label: i for i, label in enumerate(classes)}
    return classes, [(path, index[label]) for path, label in samples]


def find_table(root: Path) -> Path | None:
    """The CSV named after the folder, or train.csv, inside the folder or beside it."""
    names = dict.fromkeys([f"{root.resolve().name}.csv", "train.csv"])
    tables = [folder / name for name in names for folder in (root, root.resolve().parent)]
    return next((table for table in tables if table.is_file()), None)


def read_table(table: Path, root: Path) -> list[tuple[str, str]]:
    """(path, class name) for every row of a CSV.

    Raises:
        UserError: it is not a CSV in UTF-8, its columns are unknown, it has no rows, or a row has an empty cell.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if {"video_name", "tag"} <= columns:
                rows = [(row["video_name"], row["tag"]) for row in reader]
            elif {"clip_name", "clip_path", "label"} <= columns:
                rows = [(row["clip_path"], row["label"]) for row in reader]
            else:
                raise UserError(f"{table} needs the columns video_name,tag or clip_name,clip_path,label")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV in UTF-8: {error}") from None
    if not rows:
        raise UserError(f"{table} has no rows")
    incomplete = next((i for i, row in enumerate(rows) if not all(row)), None)
    if incomplete is not None:
        raise UserError(f"{table}: row {incomplete + 1} lacks a file or a class: fill it in")
    return [(str(resolve(root, name)), label) for name, label in rows]


def resolve(root: Path, name: str) -> Path:
    """The file that a CSV names: by a path from the folder or from its parent, or by its last part alone."""
    relative = name.lstrip("/")
    from_parent = root.resolve().parent / relative
    candidates = [root / relative, root / Path(name).name]
    if from_parent.is_relative_to(root.resolve()):
        candidates.insert(1, from_parent)
    return next((path for path in candidates if path.is_file()), candidates[0])


def scan(root: Path, video: bool, show_progress: bool = True) -> Found:
    """Finds every file and checks that it can be read.

    Raises:
        UserError: there are no files, or no classes for them.
    """
    classes, samples = find_files(root, video)
    items, unreadable = check_files(samples, video, show_progress)
    return Found.of_items(str(root), classes, items, unreadable)


def check_files(
    samples: list[tuple[str, int]], video: bool, show_progress: bool = True
) -> tuple[tuple[Item, ...], tuple[tuple[str, str], ...]]:
    """Opens every (path, class index). Returns the readable ones as items, and the others as (path, reason)."""

    def check(sample: tuple[str, int]) -> Item | tuple[str, str]:
        path, label = sample
        try:
            if video:
                return Item(path, label, probe_video(path))
            probe_image(path)
            return Item(path, label, None)
        except Unreadable as error:
            return path, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks, total = pool.map(check, samples), len(samples)
        results = list(tqdm(checks, "checking files", total, unit="file", disable=not show_progress))
    items = tuple(result for result in results if isinstance(result, Item))
    unreadable = tuple(result for result in results if not isinstance(result, Item))
    return items, unreadable


def scan_for_training(root: Path, video: bool, show_progress: bool = True) -> Found:
    """`scan`, then `check_readable`."""
    found = scan(root, video, show_progress)
    check_readable(found, video)
    return found


def check_readable(found: Found, video: bool) -> None:
    """Raises UserError if no file can be read, or if more than MAX_UNREADABLE of them cannot."""
    if not found.unreadable:
        return
    path, reason = found.unreadable[0]
    if not len(found):
        raise UserError(f"no readable {'clip' if video else 'image'} in {found.root}: {path}: {reason}")
    total = len(found) + len(found.unreadable)
    if len(found.unreadable) > MAX_UNREADABLE * total:
        raise UserError(
            f"{len(found.unreadable)} of {total} files in {found.root} cannot be read, for example {path}: {reason}"
            " (python EqM/check_data.py lists them)"
        )
