"""Lists that name files and their classes: those of UCF-101, Kinetics and Something-Something, and plain CSVs."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from data.inputs.entries import Entries, Row, arranged, checked_label
from data.tables import COLUMNS, WANTED, described
from data.walk import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, walk
from runtime.errors import UserError, first_line, shown
from runtime.files import open_regular

KINETICS = ("label", "youtube_id", "time_start", "time_end")
MAX_LIST = 2**30  # bytes
KINDS = "a list of UCF-101 (.txt), a CSV, or a JSON as of Something-Something"

Classes = dict[str, str]  # the class by the file's name without its ending


def read_list(path: Path) -> tuple[Classes, list[str]]:
    """The classes of files by their names without endings, and the order of the classes if it is known.

    Raises:
        UserError: the list cannot be read, or says something wrong.
    """
    readers = {".txt": read_ucf, ".csv": read_rows, ".json": read_json_list}
    if path.suffix.lower() not in readers:
        raise UserError(f"--labels {path} is none of the known lists: give {KINDS}")
    return readers[path.suffix.lower()](path, read_text(path))


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises UserError."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_LIST + 1)
        if len(data) > MAX_LIST:
            raise UserError(f"{path} has over {MAX_LIST:,} bytes, which is no list")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None


def parse_json(path: Path) -> object:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {first_line(error)}") from None


def collected(path: Path, pairs: Iterable[tuple[str, object]]) -> Classes:
    """(name, class) of a list, by name. Raises UserError for a name with two classes, or a wrong class."""
    classes: Classes = {}
    for number, (name, label) in enumerate(pairs, 1):
        stem, label = PurePosixPath(name).stem, str(checked_label(label, f"{path}, entry {number}"))
        if classes.setdefault(stem, label) != label:
            raise UserError(shown(f"{path}: {stem} is listed as {classes[stem]} and as {label}: keep one of them"))
    if not classes:
        raise UserError(f"{path} lists no files")
    return classes


def read_ucf(path: Path, text: str) -> tuple[Classes, list[str]]:
    """trainlist01.txt: `Class/v_Class_g08_c01.avi 1`, where the number counts the classes of classInd.txt."""
    order: dict[str, str] = {}
    if (table := path.with_name("classInd.txt")).is_file():
        for line in filter(str.strip, read_text(table).splitlines()):
            number, _, name = line.strip().partition(" ")
            if not (number.isdecimal() and name):
                raise UserError(shown(f"{table}: {line[:80]!r} is no number and class"))
            order[number] = name.strip()
    pairs = []
    for line in filter(str.strip, text.splitlines()):
        name, _, number = line.strip().partition(" ")
        label = PurePosixPath(name).parent.name
        if not label or (order and order.get(number, label) != label) or (number and order and number not in order):
            raise UserError(shown(f"{path}: {line[:80]!r} is no Class/file that fits {table.name}"))
        pairs.append((name, label))
    return collected(path, pairs), list(order.values())


def read_rows(path: Path, text: str) -> tuple[Classes, list[str]]:
    """A CSV: Kinetics names files ID_START_END, in six digits each. Others have columns as training's own CSV."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = reader.fieldnames or []
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is no CSV: {error}") from None
    if set(KINETICS) <= set(columns):
        try:
            times = [f"{int(row[KINETICS[2]]):06d}_{int(row[KINETICS[3]]):06d}" for row in rows]
        except (TypeError, ValueError):
            raise UserError(f"{path}: its times are not whole seconds") from None
        pairs = [(f"{row[KINETICS[1]]}_{time}.mp4", row["label"]) for row, time in zip(rows, times, strict=True)]
        return collected(path, pairs), []
    pair = next((pair for pair in COLUMNS if set(pair) <= set(columns)), None)
    if not pair:
        raise UserError(f"{path} needs the columns {','.join(KINETICS)}, {WANTED}, and has {described(columns)}")
    return collected(path, [(row[pair[0]] or "", row[pair[1]]) for row in rows]), []


def read_json_list(path: Path, text: str) -> tuple[Classes, list[str]]:
    """Something-Something: a list of objects with `id`, and `template` or `label`. labels.json numbers the classes."""
    order: list[str] = []
    if (table := path.with_name("labels.json")).is_file() and table != path:
        numbers = parse_json(table)
        if not (isinstance(numbers, dict) and all(str(number).isdecimal() for number in numbers.values())):
            raise UserError(f"{table} is no object of classes and their numbers")
        order = [plain(name) for name in sorted(numbers, key=lambda name: int(numbers[name]))]
    entries = parse_json(path)
    if not (isinstance(entries, list) and all(isinstance(entry, dict) and "id" in entry for entry in entries)):
        raise UserError(f"{path} is no list of objects with an id and a label")
    pairs = [(f"{entry['id']}.webm", entry.get("template", entry.get("label"))) for entry in entries]
    classes = collected(path, [(name, plain(label) if isinstance(label, str) else label) for name, label in pairs])
    unknown = sorted(set(classes.values()) - set(order)) if order else []
    if unknown:
        raise UserError(shown(f"{path} has the class {unknown[0]!r}, which {table} does not name"))
    return classes, order


def plain(template: str) -> str:
    """A class's name without the brackets around what it leaves open."""
    return template.replace("[", "").replace("]", "")


def read_listed(root: Path, path: Path, video: bool) -> Entries:
    """The files of a folder, and below it, that a list names.

    Raises:
        UserError: there is no folder, the list cannot be used, or none of its files is there.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the one that holds the files of {path}")
    classes, order = read_list(path)
    found = walk(root, VIDEO_EXTENSIONS if video else IMAGE_EXTENSIONS)
    files = [(file, Path(file).stem) for file, _ in found.taken]
    chosen = [(file, classes[stem]) for file, stem in files if stem in classes]
    if not chosen:
        there = f", and there is {files[0][0]}" if files else ""
        raise UserError(shown(f"{root} has none of the files of {path}: looked for {next(iter(classes))}{there}"))
    names = [str(Path(file).relative_to(root)) for file, _ in chosen]
    rows = [Row(label, name, name) for (_, label), name in zip(chosen, names, strict=True)]
    there = {stem for _, stem in files}
    missing = [name for name in classes if name not in there]
    notes = [f"left out: {len(files) - len(chosen)} files that {path} does not list"] * (len(chosen) < len(files))
    if missing:
        notes.append(f"not there: {len(missing)} of {len(classes)} listed files (such as {missing[0]})")
    return arranged(rows, [file for file, _ in chosen], notes + found.left_out(), order)
