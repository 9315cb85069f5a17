"""The results of a benchmark: tables on the screen, and a JSON file that is always complete."""

import json
from collections.abc import Sequence
from pathlib import Path

from runtime.files import check_writable, write_text


class Results:
    """`content` goes to the file `path` as JSON. `differs` is True if results differ that must agree."""

    def __init__(self, path: Path):
        self.path, self.differs = path, False
        self.content: dict = {}
        check_writable("--output", path)

    def save(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def print(self, text: str = "") -> None:
        print(text, flush=True)

    def print_row(self, cells: Sequence[str]) -> None:
        self.print("| " + " | ".join(cells) + " |")

    def print_heading(self, cells: Sequence[str]) -> None:
        self.print_row(cells)
        self.print_row(["---"] * len(cells))
