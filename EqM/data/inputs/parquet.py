"""Parquet files with images or videos in a column, as the Hugging Face hub stores them."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from data.file_list import Names
from data.inputs.entries import Entries, Row, arranged, checked_label
from data.untrusted import MAX_MEMBER, Contents, Unreadable
from data.walk import listed
from runtime.errors import UserError, first_line, shown

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import FileMetaData, ParquetFile

MAX_GROUP = 2**33  # bytes of a row group, of all columns
BATCH_ROWS = 1024  # of labels and paths, read together
OFTEN = 3  # times that each row group is read, from which on it is worth a word

_reading = threading.local()  # the row group that this thread reads


class Cells(Sequence[Contents]):
    """Cells of a column. Each is read when it is asked for.

    A thread reads on from the cell that it read last if the next one stands behind it in the same row group, and else
    from the row group's start.
    """

    def __init__(self, files: Sequence[Path], column: str, groups: np.ndarray, names: Sequence[str]):
        self.files, self.column, self.names = files, column, names
        self.groups = groups  # (G, 3): the file, the number in it and the rows of each row group
        self.ends = np.cumsum(groups[:, 2])  # (G,)

    def __len__(self) -> int:
        return len(self.names)

    def group(self, index: int) -> int:
        """The row group of a cell."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def __getitem__(self, index: int) -> Contents:
        group = self.group(index)
        row = index - int(self.ends[group] - self.groups[group, 2])
        key = os.getpid(), id(self), group
        if getattr(_reading, "key", None) != key or _reading.row > row:
            _reading.key, _reading.row, _reading.cells = key, 0, self.cells(group)
        cell = None
        try:
            while _reading.row <= row:
                cell = next(_reading.cells)
                _reading.row += 1
        except Exception as error:
            _reading.key = None
            raise Unreadable(f"its row group is damaged: {first_line(error)}") from None
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise Unreadable("the row has no bytes")
        if len(data) > MAX_MEMBER:
            raise Unreadable(f"it has {len(data):,} bytes, and a cell may have {MAX_MEMBER:,}")
        return Contents(self.names[index].rpartition("/")[2], data)

    def cells(self, group: int) -> Iterator[dict | bytes | None]:
        """The cells of a row group, of which it holds one page in memory."""
        file, number, _ = self.groups[group].tolist()
        with opened(self.files[file]) as parquet:
            options = {"row_groups": [number], "columns": [self.column], "use_threads": False}
            for batch in parquet.iter_batches(1, **options):
                yield batch.column(0)[0].as_py()


@contextmanager
def opened(path: Path) -> Iterator["ParquetFile"]:
    """An open parquet file. Raises UserError if pyarrow is missing."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading parquet needs pyarrow: pip install -r requirements-data.txt") from None
    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        yield file


def read_parquet(files: Sequence[Path], column: str, label: str, stored: bool) -> Entries:
    """Finds the rows of parquet files, and reads their labels and paths.

    Args:
        column: holds the files: bytes, or a struct of `bytes` and `path`.
        label: holds numbers or names of classes. Numbers may have names in the metadata of the Hugging Face hub.
        stored: keeps the order of the files and of their rows.

    Raises:
        UserError: a file is damaged, lacks a column, has one of another type, or a row without a label.
    """
    rows: list[Row] = []
    groups: list[tuple[int, int, int]] = []
    known: list[str] | None = None
    for number, path in enumerate(tqdm(files, "reading parquet", unit="file", disable=len(files) < 2)):
        try:
            with opened(path) as file:
                classes = check_schema(path, file.schema_arrow, column, label)
                if known not in (None, classes):
                    raise UserError(f"{path} names other classes than {files[0]}: give files of one set")
                known = classes
                groups += [(number, i, size) for i, size in enumerate(group_sizes(path, file.metadata))]
                rows += read_rows(path, file, column, label)
        except UserError:
            raise
        except Exception as error:  # damaged files raise errors of many types
            raise UserError(f"{path} is damaged, or no parquet: {first_line(error)}") from None
    if not rows:
        raise UserError(f"{files[0]} has no rows")
    cells = Cells(files, column, np.array(groups, np.int64), Names(row.shown for row in rows))
    entries = arranged(rows, cells, [], known or (), stored)
    at = np.searchsorted(cells.ends, entries.places, side="right")  # (N,): the row group of each
    readings = 1 + int(((np.diff(at) != 0) | (np.diff(entries.places) < 0)).sum())
    if readings < OFTEN * len(groups):
        return entries
    note = f"the rows are not stored by class and name: row groups are read {readings / len(groups):.0f} times each"
    return arranged(rows, cells, [f"{note}; --order stored reads them once"], known or (), stored)


def check_schema(path: Path, schema: "Schema", column: str, label: str) -> list[str]:
    """Raises UserError for a column that is missing or of another type. Returns the names of the classes, if known."""
    from pyarrow import types

    for name, flag in ((column, "--column"), (label, "--label")):
        if name not in schema.names:
            raise UserError(shown(f"{path} has no column {name!r}, but {listed(schema.names)}: name it with {flag}"))
    cells = schema.field(column).type
    if types.is_struct(cells) and cells.get_field_index("bytes") >= 0:
        cells = cells.field("bytes").type
    if not (types.is_binary(cells) or types.is_large_binary(cells)):
        raise UserError(shown(f"{path}: the column {column!r} holds {cells}, not files: name theirs with --column"))
    kind = schema.field(label).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise UserError(shown(f"{path}: the column {label!r} holds {kind}, not classes: name theirs with --label"))
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):  # not of the hub, or labels without names
        return []
    if not (isinstance(names, list) and len(set(map(str, names))) == len(names)):
        raise UserError(f"{path}: its metadata 'huggingface' name the classes of {label!r} wrongly")
    return [str(checked_label(name, str(path))) for name in names]


def group_sizes(path: Path, metadata: "FileMetaData") -> Iterator[int]:
    """The rows of each row group. Raises UserError for one that takes too much memory."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        # Not the bytes of one column: pyarrow 26 ends the process when it describes a damaged one.
        if group.total_byte_size > MAX_GROUP:
            says = f"{path}: a row group has {group.total_byte_size:,} bytes, over the limit of {MAX_GROUP:,}"
            raise UserError(f"{says}: write it with smaller row groups")
        yield group.num_rows


def read_rows(path: Path, file: "ParquetFile", column: str, label: str) -> Iterator[Row]:
    """The rows of an open parquet file, without their files."""
    cells = file.schema_arrow.field(column).type
    has_paths = "path" in [cells.field(i).name for i in range(cells.num_fields)]
    columns, number = [label, f"{column}.path"][: 2 if has_paths else 1], 0
    for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
        labels = batch.column(label).to_pylist()
        structs = batch.column(column).to_pylist() if has_paths else [None] * len(labels)
        for value, struct in zip(labels, structs, strict=True):
            yield row_of(path, number, value, (struct or {}).get("path"))
            number += 1


def row_of(path: Path, number: int, label: object, name: str | None) -> Row:
    """A row of a parquet file, by its number, its label, and the path that it says, if any."""
    says = f"/{os.path.basename(name)}" if name else ""  # noqa: PTH119
    return Row(checked_label(label, f"{path}, row {number}"), name or "", f"{path.name}/{number:08d}{says}")
