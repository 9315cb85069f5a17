"""Tables that name the files of a data set and their classes: CSV files, and the lists of UCF-101."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from data.walk import MISTAKE
from runtime.errors import UserError, shown

# The columns of the file and of its class.
COLUMNS = (("video_name", "tag"), ("clip_path", "label"))
WANTED = "video_name,tag or clip_name,clip_path,label"
UCF_LISTS = "ucfTrainTestlist"  # the folder that the lists are published in


def find_table(root: Path) -> Path | None:
    """The CSV named after the folder, or train.csv, inside the folder or beside it."""
    names = dict.fromkeys([f"{root.resolve().name}.csv", "train.csv"])
    tables = [folder / name for name in names for folder in (root, root.resolve().parent)]
    return next((table for table in tables if table.is_file()), None)


def read_table(table: Path, root: Path) -> tuple[str, list[tuple[str, str]]]:
    """The columns of a CSV, as text, and (path, class name) for every row.

    Raises:
        UserError: it is not a CSV in UTF-8, its columns are unknown, it has no rows, a row has an empty cell, or a row
            leads out of the folder.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            pair = next((pair for pair in COLUMNS if set(pair) <= set(columns)), None)
            if not pair:
                raise UserError(f"{table} needs the columns {WANTED}, and has {described(columns)}")
            rows = [(row[pair[0]], row[pair[1]]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV in UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{table} has no rows")
    for number, (name, label) in enumerate(rows, 1):
        if not (name and label):
            raise UserError(f"{table}: row {number} lacks a file or a class: fill it in")
        if ".." in PurePath(name).parts:
            raise UserError(f"{table}: row {number} names {brief(name)}, with '..' in its path: name files in {root}")
    return brief(",".join(columns)), [(str(resolve(root, name)), label) for name, label in rows]


def described(columns: Sequence[str]) -> str:
    """A table's columns, for an error that does not find those that are wanted."""
    if not columns:
        return "none: it is empty"
    found = brief(",".join(columns))
    other = next((name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if sign in columns[0]), None)
    return f"'{found}'" + (f": separate them by commas, not by {other}" if other and len(columns) == 1 else "")


def brief(text: str, letters: int = 200) -> str:
    """The beginning of a text that may be long, as it can be shown."""
    return shown(text[:letters]) + "…" * (len(text) > letters)


def resolve(root: Path, name: str) -> Path:
    """The file that a CSV names: by a path from the folder or from its parent, or by its last part alone."""
    relative = name.lstrip("/")
    from_parent = root.resolve().parent / relative
    candidates = [root / relative, root / Path(name).name]
    if from_parent.is_relative_to(root.resolve()):
        candidates.insert(1, from_parent)
    # Not Path.is_file: it raises OSError for names that are too long.
    return next((path for path in candidates if os.path.isfile(path)), candidates[0])  # noqa: PTH113


def no_match(table: Path, columns: str, rows: Sequence[tuple[str, str]], files: Sequence[str]) -> str:
    """The error of a table that names no file that is there. `files` are those that are."""
    looked_for, there = rows[0][0], f", and there is {shown(files[0])}" if files else ""
    ending = ": name files with their ending" if Path(looked_for).stem in {Path(file).stem for file in files} else ""
    says = f"{table} (columns {columns}): none of its rows ({len(rows)}) names a file"
    return f"{says}: looked for {brief(looked_for)}{there}{ending}"


def repeated(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines about files that have several rows."""
    classes: dict[str, set[str]] = {}
    twice: dict[str, None] = {}
    for path, label in rows:
        if path in classes:
            twice[path] = None
        classes.setdefault(path, set()).add(label)
    if not twice:
        return []
    worst = next((path for path in twice if len(classes[path]) > 1), next(iter(twice)))
    names = " and as ".join(shown(name) for name in sorted(classes[worst]))
    return [f"{MISTAKE}{len(twice)} files are listed more than once, such as {brief(worst)} as {names}"]


def find_list(root: Path) -> Path | None:
    """The list of UCF-101 for a folder: testlist01.txt for a folder `test`, else trainlist01.txt.

    It lies inside the folder or beside it, or there in a folder `ucfTrainTestlist`. Of several it is the first.
    """
    split = "test" if root.resolve().name.lower().startswith("test") else "train"
    places = [place / below for place in (root, root.resolve().parent) for below in ("", UCF_LISTS)]
    return next((path for place in places for path in sorted(place.glob(f"{split}list0*.txt")) if path.is_file()), None)


def chosen_by(table: Path | None, rows: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Those (path, class) that a list of UCF-101 names, and a line about the others.

    A list that names none of them, such as that of another folder beside it, chooses all.

    Raises:
        UserError: the list is not text.
    """
    if not table:
        return rows, []
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read as a list of files: {error}") from None
    names = {PurePath(line.split()[0]).name for line in lines if line.strip()}
    chosen = [row for row in rows if Path(row[0]).name in names]
    if not chosen or len(chosen) == len(rows):
        return rows, []
    return chosen, [f"left out: {len(rows) - len(chosen)} of {len(rows)} videos, which {table} does not name"]
