"""How the first samples' fields change along the way, and how long all samples took: a table and plots."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from pictures import write_png
from plots import histogram_plot, line_plot

TRACED = 8  # how many of the first samples


def write_trace(folder: Path, columns: Mapping[str, Mapping[int, list[float]]]) -> list[Path]:
    """Writes a table of quantities by sample and step, from 1, and a plot of each, beside the folder.

    Args:
        folder: the samples'.
        columns: by a quantity's name, its value at each step by the sample's index. A norm is plotted on a
            logarithmic axis; the other plots have the quantity's name in theirs.

    Returns:
        What it wrote, the table first.
    """
    path = folder.with_name(folder.name + "-trace.csv")
    first = next(iter(columns.values()))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "step", *columns])
        for sample in sorted(first):
            for step in range(len(first[sample])):
                writer.writerow([sample, step + 1, *(f"{column[sample][step]:.6g}" for column in columns.values())])
    plots = [folder.with_name(f"{folder.name}-trace{'' if name == 'norm' else '-' + name}.png") for name in columns]
    for plot, (name, column) in zip(plots, columns.items(), strict=True):
        series = {f"sample {i}": list(enumerate(column[i], start=1)) for i in sorted(column)}
        write_png(plot, line_plot(series, "step", name, log_y=name == "norm"))
    return [path, *plots]


def write_evaluations(folder: Path, counts: Sequence[int]) -> Path:
    """Draws how often each sample's field was evaluated, beside the samples' folder, and returns the plot's path."""
    path = folder.with_name(folder.name + "-evaluations.png")
    write_png(path, histogram_plot({f"{len(counts)} samples": [float(count) for count in counts]}, "evaluations"))
    return path
