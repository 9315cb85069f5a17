"""Walks a folder: which of its files are taken, and what is left out."""

import heapq
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.images import IMAGE_FORMATS
from runtime.errors import shown

# What the readers open: each name is of one of untrusted.VIDEO_FORMATS, or of IMAGE_FORMATS. A GIF is a video where
# videos are asked for, and its first frame is an image where images are.
VIDEO_EXTENSIONS = (".avi", ".divx", ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".wmv")
VIDEO_EXTENSIONS += (".asf", ".flv", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".ogv", ".gif")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
IMAGE_EXTENSIONS += (".tif", ".tiff", ".webp", ".gif") + (".avif",) * ("AVIF" in IMAGE_FORMATS)
MAX_NAMED = 3  # examples in a line
MISTAKE = "looks like a mistake: "


@dataclass
class Walk:
    """What lies in a folder and below it. The class of a file is the folder directly in the root, "" for none.

    Attributes:
        taken: (path, class) of the files with a wanted extension, sorted by class, folder and name.
        folders: by class, the folders that hold such files; an empty set for a class without any.
        others: how many files have another extension, by (extension, class).
        hidden: paths whose names begin with ".", and __MACOSX.
        again: links to what was found before.
        closed: folders that cannot be listed.
    """

    taken: list[tuple[str, str]] = field(default_factory=list)
    folders: dict[str, set[str]] = field(default_factory=dict)
    others: Counter = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """Lines for people, none if nothing is left out."""
        count: Counter = Counter()
        places: dict[str, list[str]] = {}
        for (extension, name), files in sorted((+self.others).items()):
            count[extension] += files
            places.setdefault(extension, []).append(name or "the folder itself")
        kinds = [f"{n} {kind or 'without extension'} (in {listed(places[kind])})" for kind, n in count.most_common()]
        parts = [", ".join(kinds[:MAX_NAMED]) + f" and {len(kinds) - MAX_NAMED} other kinds" * (len(kinds) > MAX_NAMED)]
        for what, paths in (
            ("hidden", self.hidden),
            ("links to what is counted already", self.again),
            ("folders that cannot be opened", self.closed),
        ):
            parts.append(f"{len(paths)} {what} (such as {min(paths)})" if paths else "")
        parts = [shown(part) for part in parts if part]
        return ["left out: " + "; ".join(parts)] if parts else []


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return shown(", ".join(names[:MAX_NAMED]) + more)


def walk(root: Path, extensions: tuple[str, ...]) -> Walk:
    """Finds the files with these extensions in a folder and below. Opens none.

    Names that begin with "." and __MACOSX are passed over. Links are followed, but no folder and no file is found
    twice. A folder counts by its own place, if it has one below the root, and not by a link to it.
    """
    found, top = Walk(), "" if root == Path() else str(root)
    folders: list[tuple[str, str, list[str], list[int]]] = []  # class, path, names of files, their inodes
    file_links: list[tuple[str, str]] = []  # path, class
    seen = {key_of(above) for above in root.resolve().parents}
    waiting, links = [(top, "")], []
    while waiting or links:
        # Links wait until all folders that are reached without them are found.
        folder, name = waiting.pop() if waiting else heapq.heappop(links)
        try:
            key = key_of(folder or ".")
            entries = [] if key in seen else list(os.scandir(folder or "."))
        except OSError:
            found.closed.append(folder)
            continue
        if key in seen:
            found.again.append(folder)
            continue
        seen.add(key)
        names, inodes = [], []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                found.hidden.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append((joined(folder, entry.name), name or entry.name))
            elif leads_to_folder(entry):
                heapq.heappush(links, (joined(folder, entry.name), name or entry.name))
            elif not entry.name.lower().endswith(extensions):
                found.others[Path(entry.name).suffix.lower(), name] += 1
            elif entry.is_symlink():
                file_links.append((joined(folder, entry.name), name))
            else:
                names.append(entry.name)
                inodes.append(entry.inode())
        folders.append((name, folder, names, inodes))
    taken = [(name, folder, each) for name, folder, names, _ in folders for each in names]
    for path, name in links_to_new_files(file_links, folders, found.again):
        taken.append((name, *os.path.split(path)))
    found.folders = {name: set() for name, _, _, _ in folders}
    for name, folder, _ in taken:
        found.folders[name].add(folder)
    found.taken = [(joined(folder, each), name) for name, folder, each in sorted(taken)]
    return found


def joined(folder: str, name: str) -> str:
    """The path of a name in a folder. Not of type Path, which takes ten times as long."""
    return os.path.join(folder, name)  # noqa: PTH118


def key_of(path: str | Path) -> tuple[int, int]:
    """What tells a file or a folder from all others, whatever names it has. Raises OSError."""
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def leads_to_folder(entry: os.DirEntry) -> bool:
    """Whether it is a link to a folder. One that leads nowhere is none."""
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:
        return False


def links_to_new_files(
    links: Iterable[tuple[str, str]], folders: Iterable[tuple[str, str, list[str], list[int]]], again: list[str]
) -> list[tuple[str, str]]:
    """Those (path, class) whose file is neither in the folders nor behind an earlier link. Adds others to `again`."""
    first: dict[tuple[int, int], tuple[str, str]] = {}
    new = []
    for link in sorted(links):
        try:
            key = key_of(link[0])
        except OSError:  # it leads nowhere: reading it says so
            new.append(link)
            continue
        if key in first:
            again.append(link[0])
        first.setdefault(key, link)
    inodes = {inode for _, inode in first}
    for _, folder, names, numbers in folders if first else ():
        for name, number in zip(names, numbers, strict=True):
            if number in inodes:
                link = first.pop(key_of(joined(folder, name)), None)
                again += [link[0]] if link else []
    return new + list(first.values())
