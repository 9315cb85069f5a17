"""What a benchmark has measured: tables on the screen, and a JSON file that always holds all of it."""

import json
from collections.abc import Sequence
from pathlib import Path


class Results:
    """What goes to the file `path` as JSON is in `content`; `differs` says that results differ that must agree."""

    def __init__(self, path: Path):
        self.path, self.differs = path, False
        self.content: dict = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def print(self, text: str = "") -> None:
        print(text, flush=True)

    def print_row(self, cells: Sequence[str]) -> None:
        self.print("| " + " | ".join(cells) + " |")

    def print_heading(self, cells: Sequence[str]) -> None:
        self.print_row(cells)
        self.print_row(["---"] * len(cells))
