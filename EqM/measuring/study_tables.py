"""Tables and curves of a study: qualities of variants, each the mean over seeds with its spread."""

import math
import statistics
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drawing.plots import line_plot


@dataclass(frozen=True)
class Cell:
    """One quality of one variant, over its seeds; NaN where it was left out."""

    values: tuple[float, ...]

    def known(self) -> list[float | None]:
        """The values, as JSON can have them."""
        return [None if math.isnan(value) else value for value in self.values]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; of one seed it is not known."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.inf

    def text(self, reference: "Cell") -> str:
        """Mean ± spread, bold where the mean differs from the reference's by more than both spreads together."""
        if math.isnan(self.mean):
            return "–"
        spread = f" ± {self.spread:.2g}" if len(self.values) > 1 else ""
        text = f"{self.mean:.4g}{spread}"
        # Of a difference of two: the root of the sum of squares.
        differs = abs(self.mean - reference.mean) > math.hypot(self.spread, reference.spread)
        return f"**{text}**" if differs else text


# By (trained, sampled) the cell of each quality, by name.
Cells = Mapping[tuple[str, str], Mapping[str, Cell]]


def tables(cells: Cells) -> Iterator[str]:
    """Markdown: for each quality a table of trainings by samplings where every pair was tried, else one table of all.

    What differs is told from the first variant.
    """
    reference = next(iter(cells.values()))
    trainings, samplings = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    if 1 in (len(trainings), len(samplings)) or len(cells) < len(trainings) * len(samplings):
        rows = [[*variant, *(row[name].text(reference[name]) for name in reference)] for variant, row in cells.items()]
        yield markdown(["trained", "sampled", *reference], rows)
        return
    for name in reference:
        rows = [
            [training, *(cells[training, sampling][name].text(reference[name]) for sampling in samplings)]
            for training in trainings
        ]
        yield f"{name}:\n\n" + markdown(["trained in", *(f"sampled in {sampling}" for sampling in samplings)], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def loss_curves(runs: Mapping[str, Sequence[Sequence[dict]]]) -> np.ndarray:
    """The loss by step, the mean over a variant's runs, from their metrics by name: a picture (H, W, 3) uint8."""
    series = {}
    for name, seeds in runs.items():
        losses: dict[float, list[float]] = {}
        for row in (row for rows in seeds for row in rows):
            losses.setdefault(row["step"], []).append(row["loss"])
        series[name] = [(step, statistics.mean(values)) for step, values in sorted(losses.items())]
    return line_plot(series, "step", "loss", log_y=True)


def quality_by_evaluations(cells: Cells, quality: str) -> np.ndarray:
    """A quality against the mean evaluations of a sample, by way of sampling: a picture (H, W, 3) uint8."""
    series: dict[str, list[tuple[float, float]]] = {}
    for (_, sampling), row in cells.items():
        way = "adaptive" if sampling.startswith("G") else "fixed steps"
        series.setdefault(way, []).append((row["evaluations"].mean, row[quality].mean))
    # The plots' font has no accents.
    label = unicodedata.normalize("NFKD", quality).encode("ascii", "ignore").decode()
    return line_plot({way: sorted(points) for way, points in series.items()}, "evaluations a sample", label)
