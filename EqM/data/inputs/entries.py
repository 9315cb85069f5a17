"""The files of a data set of any form, in the order in which a pack holds them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.file_list import Names
from data.untrusted import File
from runtime.cli import MAX_COUNT
from runtime.errors import UserError, shown

MAX_NAME = 200  # letters of a class's name


@dataclass(frozen=True)
class Frames:
    """Pixels in memory, (H, W, 3) of an image or (T, H, W, 3) of a clip, uint8, and the clip's frames a second."""

    pixels: np.ndarray
    frames_per_second: float


@dataclass(frozen=True)
class Row:
    """A file that was found: its class by number or name, its name inside the set, and its name for people."""

    label: int | str
    name: str
    shown: str


@dataclass(frozen=True, eq=False)
class Entries:
    """The files of a data set, in the order in which a pack holds them.

    Attributes:
        classes: names of the classes.
        names: the files, relative to the source.
        labels: their class indices, (N,) int64.
        files: all files that were found: a sequence that opens one only when it is asked for it.
        places: where each of the N files is in `files`, (N,) int64.
        notes: lines for people: what is left out, and what looks like a mistake.
    """

    classes: tuple[str, ...]
    names: Names
    labels: np.ndarray
    files: Sequence[File | Frames]
    places: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def open(self, index: int) -> File | Frames:
        """What readers take for a file: its path, or its contents. Raises Unreadable."""
        return self.files[int(self.places[index])]

    def only(self, chosen: Sequence[int], classes: Sequence[str]) -> "Entries":
        """Some of the files, in the same order, with classes numbered by `classes`, which has all of theirs."""
        index = {name: i for i, name in enumerate(classes)}
        labels = np.array([index[self.classes[self.labels[i]]] for i in chosen], np.int64)
        names = Names(self.names[i] for i in chosen)
        return replace(self, classes=tuple(classes), names=names, labels=labels, places=self.places[list(chosen)])


def checked_label(value: object, where: str) -> int | str:
    """A class's number or name, as a file gives it.

    Raises:
        UserError: it is of another type, or no number or name that a class can have.
    """
    if isinstance(value, str):
        value = value.strip()
        if value and len(value) <= MAX_NAME and "\n" not in value:
            return value
        found = f"a text of {len(value)} letters"
    elif isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < MAX_COUNT:
            return value
        found = str(value)[:MAX_NAME]
    else:
        found = f"of type {type(value).__name__}"
    raise UserError(f"{shown(where)}: the label is {found}: give a class's number from 0 on, or its name in one line")


def arranged(
    rows: Sequence[Row],
    files: Sequence[File | Frames],
    notes: Sequence[str],
    known: Sequence[str] = (),
    stored: bool = False,
) -> Entries:
    """Numbers the classes of all rows, and orders the rows by class, folder and name, as class folders are.

    Args:
        rows: one for each of `files`.
        known: names of classes in their order, where the set says it. Labels may be numbers of these.
        stored: keeps the order of the rows.

    Raises:
        UserError: some labels are numbers without a name, and others are names; or a label is not among `known`.
    """
    texts = {row.label: row for row in reversed(rows) if isinstance(row.label, str)}
    numbers = {row.label: row for row in reversed(rows) if isinstance(row.label, int)}
    if known:
        unknown = [row for label, row in (texts | numbers).items() if label not in known and label not in numbers]
        unknown += [row for label, row in numbers.items() if label >= len(known)]
        if unknown:
            says = f"{unknown[0].shown}: the label {unknown[0].label} is none of the {len(known)} classes"
            raise UserError(shown(f"{says} that the set names"))
        used = {known[number] for number in numbers} | set(texts)
        classes = [name for name in dict.fromkeys(known) if name in used]
        number = {name: i for i, name in enumerate(classes)}
        index = number | {label: number[known[label]] for label in numbers}
    elif texts and numbers:
        text, other = next(iter(texts.values())), next(iter(numbers.values()))
        says = f"{text.shown} has the label {text.label!r}, and {other.shown} the number {other.label}"
        raise UserError(shown(f"{says}: give all of them names, or all of them numbers"))
    else:
        labels = sorted(texts or numbers)
        classes, index = [str(label) for label in labels], {label: i for i, label in enumerate(labels)}
    order = range(len(rows))
    if not stored:
        order = sorted(order, key=lambda i: (index[rows[i].label], *os.path.split(rows[i].name), rows[i].shown))
    labels = np.array([index[rows[i].label] for i in order], np.int64)  # (N,)
    names = Names(rows[i].shown for i in order)
    return Entries(tuple(classes), names, labels, files, np.array(order, np.int64), tuple(map(shown, notes)))
