"""The page of samples beside their folder: what it shows, and whether it holds their files."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from data.video import probe_video
from drawing.page import Card, Picture, page
from runtime.files import write_text
from sampling.method import Method
from sampling.outputs import WRITERS, Output, SampleLog
from sampling.plan import Plan

PAGE_SAMPLES = 1000  # the page shows so many of the first samples
EMBEDDED_BYTES = 15 * 2**20  # of files inside a page, which is a third larger: most mail takes 20 MiB
STARTS_READ = 16  # at once; few, because those that no longer fit are read for nothing
TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}


def write_page(output: Output, plan: Plan, method: Method, samples: SampleLog) -> Path:
    """Writes the page of the first samples beside their folder, and returns its path.

    The page holds the files if they are few and small, so that it can be sent alone. Otherwise it names them by paths
    relative to itself. What samples start from lies nowhere as a browser could show it, so the page holds it, for the
    first samples, as far as there is room.

    Raises:
        UserError: the page cannot be written, or a file that samples started from can no longer be read.
    """
    indices = sorted(samples.descents)[:PAGE_SAMPLES]
    sizes = sum(output.path(index).stat().st_size for index in indices)
    embedded = sizes <= EMBEDDED_BYTES
    pictures = [picture_of(output, index, embedded) for index in indices]
    room = EMBEDDED_BYTES - sizes if embedded else EMBEDDED_BYTES
    starts = fitting(encoded_starts(output, plan, indices), room)
    cards = [
        Card(plan.caption(index), facts_of(plan, samples, index), picture, start)
        for index, picture, start in zip(indices, pictures, [*starts, *[None] * len(indices)], strict=False)
    ]
    kept = plan.starts.kept.frames if plan.starts.kept else 0
    given = kept / len(probe_video(output.path(indices[0])).times) if kept else 0.0
    notes = notes_of(output, len(samples.descents), len(indices), embedded)
    if plan.starts.items:
        notes.append(f"What a sample started from stands to its left, for {len(starts)} of {len(indices)} samples.")
    if kept:
        notes.append(f"The first {kept} frames were given: their border and bar are coloured.")
    about = f"{len(samples.descents)} samples of {method.sampler}, {method.steps} steps, guidance {method.cfg_scale:g}"
    path = output.beside(".html")
    size = samples.shown[indices[0]].shape[1:3]
    write_text(path, page(output.folder.name, [about], cards, size, notes, given))
    return path


def facts_of(plan: Plan, samples: SampleLog, index: int) -> str:
    """A line about a sample: index, seed, evaluations, and the file it started from."""
    facts = [f"{index}", f"seed {plan.starts.seed}", f"{samples.descents[index][0]} evaluations"]
    if plan.starts.items:
        facts.append(f"from {Path(plan.starts.item(index).path).name}")
    return " · ".join(facts)


def notes_of(output: Output, total: int, shown: int, embedded: bool) -> list[str]:
    """What a reader of the page should know about its files."""
    where = "inside this page: it can be sent alone"
    if not embedded:
        where = f"in {output.folder.name}, beside this page: keep both together"
    some = f"The first {shown} of {total} samples. " if shown < total else ""
    return [f"{some}The files are {where}."]


def picture_of(output: Output, index: int, embedded: bool) -> Picture:
    """A sample's file, or its address from a page beside the folder."""
    path = output.path(index)
    if embedded:
        return Picture(TYPES[output.suffix], path.read_bytes())
    return Picture(TYPES[output.suffix], "./" + quote(os.fsencode(f"{output.folder.name}/{path.name}")))


def encoded_starts(output: Output, plan: Plan, indices: Sequence[int]) -> Iterator[Picture]:
    """Yields what samples started from, in their format; nothing if they started from noise."""

    def encode(index: int) -> Picture:
        with tempfile.TemporaryDirectory() as folder:
            alone = Output(Path(folder), output.suffix, output.frames_per_second)
            alone.write(0, plan.starts.given(index))
            return picture_of(alone, 0, embedded=True)

    period = len(plan.starts.items)  # then the same files come again
    encoded: list[Picture] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for place, index in enumerate(indices if period else ()):
            if place == len(encoded) < period:
                encoded += pool.map(encode, indices[place : min(place + STARTS_READ, period)])
            yield encoded[index % period]


def fitting(pictures: Iterator[Picture], room: int) -> list[Picture]:
    """The first pictures, as many as there is room for, in bytes."""
    taken = []
    for picture in pictures:
        room -= len(picture.source)
        if room < 0:
            break
        taken.append(picture)
    return taken
