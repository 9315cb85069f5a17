"""Tables and curves of a study: mean and spread of each quality over seeds, for each variant."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from drawing.plots import Lines


@dataclass(frozen=True)
class Cell:
    """One quality of one variant: a value for each seed; NaN: not measured."""

    values: tuple[float, ...]

    def known(self) -> list[float | None]:
        """The values for a JSON file. JSON has no NaN, so they become None."""
        return [None if math.isnan(value) else value for value in self.values]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; infinite for one seed, because it is not known."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.inf

    def text(self, reference: "Cell") -> str:
        """Mean ± spread. Bold if the mean differs from the reference's mean by more than both spreads together."""
        if math.isnan(self.mean):
            return "–"
        spread = f" ± {self.spread:.2g}" if len(self.values) > 1 else ""
        text = f"{self.mean:.4g}{spread}"
        # The spread of a difference is the root of the sum of squares.
        differs = abs(self.mean - reference.mean) > math.hypot(self.spread, reference.spread)
        return f"**{text}**" if differs else text

    def difference(self, reference: "Cell") -> str:
        """The mean over seeds of the difference from the reference, ± its standard error. Bold beyond two of them."""
        differences = Cell(tuple(mine - other for mine, other in zip(self.values, reference.values, strict=True)))
        if math.isnan(differences.mean):
            return "–"
        error = differences.spread / math.sqrt(len(self.values))
        text = f"{differences.mean:+.3g} ± {error:.2g}"
        return f"**{text}**" if abs(differences.mean) > 2 * error else text


# By variant (trained, sampled), the cell of each quality by name.
Cells = Mapping[tuple[str, str], Mapping[str, Cell]]


def report_values(report: dict) -> dict[str, float]:
    """What a report of EqM/evaluate.py says, by name: each metric, NaN if left out, and the judge's shares.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: it is no such report.
    """
    values = {
        f"{metric['metric']}, {comparison['features']}": metric.get("value", math.nan)
        for comparison in report["comparisons"]
        for metric in comparison["metrics"]
    }
    values |= {f"{part} right": found["share"] for part, found in report["judge"]["generated"].items()}
    if not all(math.isnan(value) or math.isfinite(value) for value in values.values()):
        raise ValueError("a value is infinite")
    return values


def tables(cells: Cells) -> Iterator[str]:
    """Markdown tables of all qualities. The first variant is the reference for all others.

    If each training was sampled in each way, each quality has a table: a row for each training, a column for each way
    to sample. Otherwise one table has a row for each variant and a column for each quality.
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


def differences(cells: Cells) -> Iterator[str]:
    """A Markdown table of the differences from the first variant, seed by seed; none for one seed or one variant."""
    (first, reference), *others = cells.items()
    if len(next(iter(reference.values())).values) > 1 and others:
        rows = [[*variant, *(row[name].difference(reference[name]) for name in reference)] for variant, row in others]
        about = f"differences from {', '.join(first)}, each seed from the same seed, ± standard error:\n\n"
        yield about + markdown(["trained", "sampled", *reference], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def loss_curves(
    runs: Mapping[str, Sequence[Sequence[dict[str, float]]]], name: str = "loss", label: str = "loss"
) -> Lines:
    """The loss of each variant by step, as the mean over its runs.

    Args:
        runs: by the name of the variant, the lines of metrics of each of its runs.
        name, label: of another number than the loss, in the lines and on the picture.
    """
    series = {}
    for variant, seeds in runs.items():
        losses: dict[float, list[float]] = {}
        for row in (row for rows in seeds for row in rows):
            losses.setdefault(row["step"], []).append(row[name])
        series[variant] = [(step, statistics.mean(values)) for step, values in sorted(losses.items())]
    return Lines(series, "step", label, log_y=True)


def quality_by_evaluations(cells: Cells, quality: str) -> Lines:
    """A quality by the mean evaluations a sample: one line for fixed steps, one for adaptive sampling."""
    series: dict[str, list[tuple[float, float]]] = {}
    for (_, sampling), row in cells.items():
        way = "adaptive" if sampling.startswith("G") else "fixed steps"
        series.setdefault(way, []).append((row["evaluations"].mean, row[quality].mean))
    return Lines({way: sorted(points) for way, points in series.items()}, "evaluations a sample", quality)
