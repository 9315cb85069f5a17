"""Finds the files of a data set and their classes, and checks that they can be read."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.file_list import Found, Names
from data.index import check_known
from data.opening import READABLE, Results, check_files
from data.tables import chosen_by, find_list, find_table, no_match, read_table, repeated
from data.walk import IMAGE_EXTENSIONS, MISTAKE, VIDEO_EXTENSIONS, Folder, Walk, listed, walk
from runtime.errors import UserError, shown

UCF_NAME = re.compile(r"v_(?P<label>\w+)_g\d+_c\d+")
MAX_UNREADABLE = 0.1  # share of a set; training stops if more cannot be read, and more than one file
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}
JOIN_FRAMES = "join frames to videos first (ffmpeg -framerate 25 -pattern_type glob -i 'FOLDER/*.png' CLIP.mp4)"


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of a folder, before any is opened.

    Attributes:
        classes: names of the classes, sorted.
        paths: every file, N of them.
        labels: their class indices, (N,) int64.
        notes: lines for people: what is left out, and what looks like a mistake.
    """

    classes: tuple[str, ...]
    paths: Names
    labels: np.ndarray
    notes: tuple[str, ...]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, class index) of every file."""
        return list(zip(self.paths, self.labels.tolist(), strict=True))

    @staticmethod
    def of_rows(rows: Iterable[tuple[str, str]], notes: Iterable[str]) -> "Listing":
        """Numbers the classes of (path, class name)."""
        rows = list(rows)
        classes = tuple(sorted({label for _, label in rows}))
        index = {label: i for i, label in enumerate(classes)}
        labels = np.array([index[label] for _, label in rows], np.int64)  # (N,)
        return Listing(classes, Names(path for path, _ in rows), labels, tuple(map(shown, notes)))

    @staticmethod
    def of_folders(folders: Sequence[Folder], notes: Iterable[str]) -> "Listing":
        """Numbers the classes of folders."""
        classes = tuple(sorted({folder.name for folder in folders}))
        index = {label: i for i, label in enumerate(classes)}
        counts = [folder.files.count(b"\0") + 1 for folder in folders]
        labels = np.repeat(np.array([index[folder.name] for folder in folders], np.int64), counts)  # (N,)
        return Listing(classes, Names.of_lists(map(Folder.encoded, folders)), labels, tuple(map(shown, notes)))


def find_files(root: Path, video: bool) -> Listing:
    """Finds every file and its class. Opens no file.

    Class folders give the classes. Without such folders, a CSV or UCF-101 file names give the classes of videos. A list
    of UCF-101 (trainlist01.txt) chooses among the videos.

    Raises:
        UserError: there are no files, or no classes for them.
    """
    if not root.is_dir():
        raise UserError(f"--data-path {root} is not a folder: give one that holds class folders")
    found = walk(root, VIDEO_EXTENSIONS if video else IMAGE_EXTENSIONS)
    folders = [folder for folder in found.files if folder.name]
    flat = [path for folder in found.files if not folder.name for path in folder.paths()]
    if folders:
        notes = check_class_folders(root, found)
        notes += [f"left out: {len(flat)} files in no class folder (such as {shown(flat[0])})"] if flat else []
    elif video:
        rows, notes = read_flat(root, flat, found)
    else:
        raise UserError(no_images(root, flat, found))
    others = count_media(found)
    if others:
        kind, advice = ("images", "leave out --video") if video else ("videos", "add --video")
        notes.append(f"{MISTAKE}{others} {kind} are left out: {advice} to train on them in place of these")
    chooser = find_list(root) if video else None
    if folders and not chooser:
        return Listing.of_folders(folders, notes + found.left_out())
    rows, unlisted = chosen_by(chooser, [row for row in found.taken if row[1]] if folders else rows)
    return Listing.of_rows(rows, notes + unlisted + found.left_out())


def count_media(found: Walk) -> int:
    """How many videos, if images were looked for, or how many images, lie in a folder."""
    return sum(files for (ending, _), files in found.others.items() if ending in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)


def check_class_folders(root: Path, found: Walk) -> list[str]:
    """Lines about class folders that look like something else.

    Raises:
        UserError: they are splits, or the class folders lie in a folder of their own.
    """
    places = {name: folders for name, folders in found.folders.items() if name and folders}
    names, splits = sorted(places), sorted(name for name in places if name.lower() in SPLIT_NAMES)
    if splits == names:
        raise UserError(f"{root} holds splits, not classes: give one split, for example {root / names[0]}")
    inner = {name: {Path(folder).relative_to(root / name).parts[:1] for folder in places[name]} for name in names}
    common = set.intersection(*inner.values()) - {()}
    notes = []
    if len(names) == 1 and common:
        top = Path(os.path.commonpath(places[names[0]]))
        below = {Path(folder).relative_to(top).parts[:1] for folder in places[names[0]]}
        says = f"all files lie in {len(below)} folders in {shown(top)}: if these are the classes, give {shown(top)}"
        if len(below) > 1 and () not in below:
            # Numbers may be parts of one large class, as well as the names of classes.
            if not all(name.isdigit() for (name,) in below):
                one = f"{root} holds one class, {names[0]}, and {says}; if not, put all files directly into"
                raise UserError(f"{one} {root / names[0]}")
            notes.append(MISTAKE + says)
    elif len(common) > 1:
        notes.append(f"{MISTAKE}all class folders hold the same folders, such as {shown(min(common)[0])}")
    if len(splits) > 1:
        notes.append(f"{MISTAKE}{listed(splits)} are classes")
    frames = [name for name in names if name.lower().endswith(VIDEO_EXTENSIONS)]
    if frames:
        notes.append(f"{MISTAKE}the classes {listed(frames)} are named as videos: {JOIN_FRAMES}")
    empty = sorted(name for name, folders in found.folders.items() if name and not folders)
    return notes + ([f"{MISTAKE}folders without any of these files are no classes: {listed(empty)}"] if empty else [])


def read_flat(root: Path, files: list[str], found: Walk) -> tuple[list[tuple[str, str]], list[str]]:
    """(path, class name) of videos without class folders, from a CSV or from names as those of UCF-101; and notes.

    Raises:
        UserError: there are no videos, no classes for them, or a CSV that cannot be used.
    """
    table = find_table(root)
    columns, rows = read_table(table, root) if table else ("", [])
    # A train.csv beside this folder may describe only the training folder.
    if any(os.path.isfile(path) for path, _ in rows):  # noqa: PTH113
        found.others[".csv", ""] -= table.parent == root
        unlisted = {Path(path).name for path in files} - {Path(path).name for path, _ in rows}
        notes = [f"left out: {len(unlisted)} videos that {table} does not list"] if unlisted else []
        return rows, repeated(rows) + notes
    matches = [(path, UCF_NAME.match(Path(path).name)) for path in files]
    if rows and not (files and all(match for _, match in matches)):
        raise UserError(no_match(table, columns, rows, files))
    if not files:
        images = f", but {count_media(found)} images: leave out --video, or {JOIN_FRAMES}" if count_media(found) else ""
        raise UserError("; ".join([f"no videos in {root} or its class folders{images}", *found.left_out()]))
    unnamed = [path for path, match in matches if not match]
    if unnamed:
        raise UserError(
            f"{shown(unnamed[0])} has no class: put it into a folder of its class, {root / 'ClassName'}, list it in"
            f" {root.resolve().name}.csv (columns video_name,tag), or name it as UCF-101 does"
        )
    return [(path, match["label"]) for path, match in matches], []


def no_images(root: Path, files: list[str], found: Walk) -> str:
    """The error of a folder without class folders of images."""
    says = f"no class folders of images in {root}"
    if files:
        target = root / "ClassName" / Path(files[0]).name
        return f"{says}, but {len(files)} images: move each into a folder of its class, such as {shown(target)}"
    return "; ".join([f"{says} (for videos add --video)", *found.left_out()])


def find_loose_files(root: Path, video: bool) -> list[tuple[str, str]]:
    """(path, class name) of every video, or of every image, in a folder and below, sorted.

    The class name is that of the class folder, "" for a file directly in `root`.

    Raises:
        UserError: there is no such folder, or no such file.
    """
    kinds = ("videos", "images") if video else ("images", "videos")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give one of {kinds[0]}")
    found = walk(root, VIDEO_EXTENSIONS if video else IMAGE_EXTENSIONS)
    if not found.files:
        instead = f", but {kinds[1]}" if count_media(found) else ""
        raise UserError(
            "; ".join([f"no {kinds[0]} in {root}{instead}: give a folder of {kinds[0]}", *found.left_out()])
        )
    return sorted(found.taken, key=lambda row: Path(row[0]))


def scan(root: Path, video: bool, show_progress: bool = True, decode: bool = False) -> Found:
    """Finds every file and checks that it can be read. Leaves out classes without a readable file, if others have one.

    Opens only the files that the folder's index does not know as they are.

    Args:
        decode: open and decode all of each file. Without it, damage behind a file's header may stay unseen.

    Raises:
        UserError: there are no files, or no classes for them.
    """
    listing = find_files(root, video)
    if decode:
        results = check_files(listing.paths, video, show_progress, decode)
    else:
        results = check_known(root, listing.paths, video, show_progress)
    return collect(str(root), listing, results).without_empty_classes()


def collect(root: str, listing: Listing, results: Results) -> Found:
    """The files of a listing that could be read, and what was found about all."""
    readable = results.are(READABLE)
    videos = results.videos.take(np.flatnonzero(readable)) if results.videos and readable.any() else None
    notes = (f"{count} files: {shown(text)}" for text, count in results.remarks().items())
    unreadable = tuple(results.unreadable(listing.paths))
    paths, labels = listing.paths.where(readable), listing.labels[readable]
    return Found(root, listing.classes, paths, labels, videos, unreadable, (*listing.notes, *notes))


def scan_for_training(root: Path, video: bool, show_progress: bool = True) -> Found:
    """`scan`, then `check_readable`."""
    found = scan(root, video, show_progress)
    check_readable(len(found), found.unreadable, found.root, video)
    return found


def too_many(unreadable: int, total: int) -> bool:
    """Whether a set has so many unreadable files that something else is wrong. One file is never too many."""
    return unreadable > max(1, MAX_UNREADABLE * total)


def check_readable(readable: int, unreadable: Sequence[tuple[str, str]], root: str, video: bool) -> None:
    """Checks how many files of a folder can be read.

    Args:
        readable: how many can be read.
        unreadable: the path of each other file, and the reason.

    Raises:
        UserError: none can be read, or `too_many` cannot.
    """
    if not unreadable:
        return
    path, reason = map(shown, unreadable[0])
    if not readable:
        raise UserError(f"no readable {'clip' if video else 'image'} in {root}: {path}: {reason}")
    total = readable + len(unreadable)
    if too_many(len(unreadable), total):
        raise UserError(
            f"{len(unreadable)} of {total} files in {root} cannot be read, for example {path}: {reason}"
            " (python EqM/check_data.py lists them)"
        )
