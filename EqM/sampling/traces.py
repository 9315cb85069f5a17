"""Norms and energies of the first samples by step, and the evaluations of all samples: a table and plots."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing.pictures import write_png
from drawing.plots import histogram_plot, line_plot

QUANTITIES = ("norm", "energy")


def write_trace(folder: Path, traces: Mapping[int, list[list[float]]]) -> list[Path]:
    """Writes a table of norm and energy by sample and step, from 1, and a plot of each, beside the samples' folder.

    Args:
        traces: norm and energy at each step, by the sample's index.

    Returns:
        What it wrote, the table first.
    """
    table = folder.with_name(folder.name + "-trace.csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "step", *QUANTITIES])
        for sample, steps in sorted(traces.items()):
            for step, numbers in enumerate(steps, start=1):
                writer.writerow([sample, step, *(f"{number:.6g}" for number in numbers)])
    plots = [folder.with_name(f"{folder.name}-trace-{name}.png") for name in QUANTITIES]
    for column, (plot, name) in enumerate(zip(plots, QUANTITIES, strict=True)):
        series = {
            f"sample {sample}": [(step, numbers[column]) for step, numbers in enumerate(steps, start=1)]
            for sample, steps in sorted(traces.items())
        }
        write_png(plot, line_plot(series, "step", name, log_y=name == "norm"))
    return [table, *plots]


def write_evaluations(folder: Path, counts: Sequence[int]) -> Path:
    """Draws how often each sample's field was evaluated, beside the samples' folder, and returns the plot's path."""
    path = folder.with_name(folder.name + "-evaluations.png")
    write_png(path, histogram_plot({f"{len(counts)} samples": [float(count) for count in counts]}, "evaluations"))
    return path
