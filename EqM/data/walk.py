"""Walks a folder: which of its files are taken, and what is left out."""

import heapq
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.disk_calls import DiskCalls
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


@dataclass(frozen=True)
class Folder:
    """The wanted files of one folder.

    Attributes:
        name: the class, "" for none.
        path: the folder.
        files: their names, sorted, with a NUL between them. A string for each would take three times the memory.
    """

    name: str
    path: str
    files: bytes

    def paths(self) -> Iterator[str]:
        """The files' paths, in order."""
        prefix = joined(self.path, "")
        return (prefix + name for name in os.fsdecode(self.files).split("\0"))

    def encoded(self) -> bytes:
        """The files' paths, in order, with a NUL between them."""
        prefix = os.fsencode(joined(self.path, ""))
        return prefix + self.files.replace(b"\0", b"\0" + prefix)


@dataclass
class Looked:
    """What one folder holds: names, and for `files` as `Folder.files` has them."""

    key: tuple[int, int]
    files: bytes = b""
    file_links: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    folder_links: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)


@dataclass
class Walk:
    """What lies in a folder and below it. The class of a file is the folder directly in the root, "" for none.

    Attributes:
        files: the files with a wanted extension, sorted by class and folder.
        folders: by class, the folders that hold such files; an empty set for a class without any.
        others: how many files have another extension, by (extension, class).
        hidden: paths whose names begin with ".", and __MACOSX.
        again: links to what was found before.
        closed: folders that cannot be listed.
    """

    files: list[Folder] = field(default_factory=list)
    folders: dict[str, set[str]] = field(default_factory=dict)
    others: Counter = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    @property
    def taken(self) -> Iterator[tuple[str, str]]:
        """(path, class) of the wanted files, sorted by class, folder and name."""
        return ((path, folder.name) for folder in self.files for path in folder.paths())

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
    found, wanted = Walk(), frozenset(extensions)
    files: dict[tuple[str, str], bytes] = {}  # by class and folder
    file_links: list[tuple[str, str]] = []  # path, class
    seen = {key_of(above) for above in root.resolve().parents}
    waiting, links = [("" if root == Path() else str(root), "")], []

    def look(place: tuple[str, str]) -> Looked | None:
        return look_into(*place, wanted, seen)

    with DiskCalls() as calls:
        while waiting or links:
            # Links wait until all folders that are reached without them are found.
            places, waiting = waiting or [heapq.heappop(links)], []
            for (folder, name), looked in zip(places, calls.map(look, places), strict=True):
                if looked is None:
                    found.closed.append(folder)
                    continue
                if looked.key in seen:
                    found.again.append(folder)
                    continue
                seen.add(looked.key)
                waiting += [(joined(folder, each), name or each) for each in looked.folders]
                for each in looked.folder_links:
                    heapq.heappush(links, (joined(folder, each), name or each))
                file_links += [(joined(folder, each), name) for each in looked.file_links]
                found.others += looked.others
                found.hidden += looked.hidden
                files[name, folder] = looked.files
        linked: dict[tuple[str, str], list[str]] = {}  # by class and folder
        for path, name in links_to_new_files(file_links, [folder for _, folder in files], wanted, found.again, calls):
            folder, each = os.path.split(path)
            linked.setdefault((name, folder), []).append(each)
    for place, names in linked.items():
        files[place] = in_order([*filter(None, os.fsdecode(files[place]).split("\0")), *names])
    found.folders = {name: set() for name, _ in files}
    found.files = [Folder(name, folder, files[name, folder]) for name, folder in sorted(files) if files[name, folder]]
    for each in found.files:
        found.folders[each.name].add(each.path)
    return found


def in_order(names: list[str]) -> bytes:
    """Names as `Folder.files` has them."""
    return os.fsencode("\0".join(sorted(names)))


def look_into(folder: str, name: str, wanted: frozenset[str], seen: set[tuple[int, int]]) -> Looked | None:
    """What a folder of a class holds; nothing if it was seen, and None if it cannot be listed."""
    try:
        looked = Looked(key_of(folder or "."))
        if looked.key in seen:
            return looked
        with os.scandir(folder or ".") as entries:
            looked.files = in_order([each for entry in entries if (each := take(entry, name, wanted, looked))])
        return looked
    except OSError:
        return None


def take(entry: os.DirEntry, name: str, wanted: frozenset[str], looked: Looked) -> str | None:
    """The name of an entry that is a wanted file. Adds others to `looked`. Asks the disk only about links."""
    each = entry.name
    if each[0] == "." or each == "__MACOSX":
        looked.hidden.append(entry.path)
    elif entry.is_dir(follow_symlinks=False):
        looked.folders.append(each)
    elif entry.is_symlink() and leads_to_folder(entry):
        looked.folder_links.append(each)
    elif each[each.rfind(".") :].lower() not in wanted:
        looked.others[Path(each).suffix.lower(), name] += 1
    elif entry.is_symlink():
        looked.file_links.append(each)
    else:
        return each
    return None


def joined(folder: str, name: str) -> str:
    """The path of a name in a folder. Not of type Path, which takes ten times as long."""
    return os.path.join(folder, name)  # noqa: PTH118


def key_of(path: str | Path) -> tuple[int, int]:
    """What tells a file or a folder from all others, whatever names it has. Raises OSError."""
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def leads_to_folder(link: os.DirEntry) -> bool:
    """Whether a link leads to a folder. One that leads nowhere does not."""
    try:
        return link.is_dir()
    except OSError:
        return False


def links_to_new_files(
    links: Iterable[tuple[str, str]],
    folders: Iterable[str],
    wanted: frozenset[str],
    again: list[str],
    calls: DiskCalls,
) -> list[tuple[str, str]]:
    """Those (path, class) whose file is neither in the folders nor behind an earlier link. Adds others to `again`."""

    def key_behind(link: tuple[str, str]) -> tuple[int, int] | None:
        try:
            return key_of(link[0])
        except OSError:
            return None

    first: dict[tuple[int, int], tuple[str, str]] = {}
    new, links = [], sorted(links)
    for link, key in zip(links, calls.map_short(key_behind, links), strict=True):
        if key is None:  # it leads nowhere: reading it says so
            new.append(link)
            continue
        if key in first:
            again.append(link[0])
        first.setdefault(key, link)
    inodes = {inode for _, inode in first}
    for folder in folders if first else ():
        for entry in os.scandir(folder or "."):
            is_file = entry.inode() in inodes and not entry.is_symlink()
            if is_file and entry.name[entry.name.rfind(".") :].lower() in wanted and entry.name[0] != ".":
                link = first.pop(key_of(joined(folder, entry.name)), None)
                again += [link[0]] if link else []
    return new + list(first.values())
