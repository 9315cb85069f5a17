"""Norms and energies of the first samples by step, and the evaluations of all samples: a table and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing.plots import Histogram, Lines, write_plots
from runtime.files import write_csv

QUANTITIES = ("norm", "energy")


def write_trace(folder: Path, traces: Mapping[int, list[list[float]]]) -> list[Path]:
    """Writes norms and energies of samples beside the folder of the samples: one table, and one plot of each.

    Steps are counted from 1.

    Args:
        traces: norm and energy at each step, by the index of the sample.

    Returns:
        The files, the table first.
    """
    table = folder.with_name(folder.name + "-trace.csv")
    rows = [
        [sample, step, *(f"{number:.6g}" for number in numbers)]
        for sample, steps in sorted(traces.items())
        for step, numbers in enumerate(steps, start=1)
    ]
    write_csv(table, [["sample", "step", *QUANTITIES], *rows])
    pictures = [folder.with_name(f"{folder.name}-trace-{name}.png") for name in QUANTITIES]
    for picture, plot in zip(pictures, trace_plots(traces), strict=True):
        write_plots(picture, [plot])
    return [table, *pictures]


def trace_plots(traces: Mapping[int, list[list[float]]]) -> list[Lines]:
    """One plot of each of QUANTITIES by step, from 1, with one line for each sample; `traces` as for write_trace."""
    plots = []
    for column, name in enumerate(QUANTITIES):
        series = {
            f"sample {sample}": [(step, numbers[column]) for step, numbers in enumerate(steps, start=1)]
            for sample, steps in sorted(traces.items())
        }
        plots.append(Lines(series, "step", name, log_y=name == "norm"))
    return plots


def write_evaluations(folder: Path, counts: Sequence[int]) -> Path:
    """Draws a histogram of how often the field was evaluated for each sample.

    Returns:
        The picture, beside the folder of the samples.
    """
    path = folder.with_name(folder.name + "-evaluations.png")
    write_plots(path, [Histogram({f"{len(counts)} samples": list(counts)}, "evaluations", whole_numbers=True)])
    return path
