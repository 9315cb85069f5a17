"""Draws runs' loss, gradient norm, throughput and gradient scale by step into one picture.

python EqM/plot.py results/000-EqM-S-4-Linear-velocity-None results/001-EqM-S-4-Linear-velocity-None
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drawing.pictures import write_png
from drawing.plots import COLOURS, Axis, Points, panels, plot
from runs.record import read_metrics
from runtime import cli
from runtime.errors import UserError
from runtime.logs import log, start_log

# What metrics.jsonl calls it, what a panel is called, whether it is smoothed, whether its axis begins at 0.
PANELS = (
    ("loss", "loss", True, False),
    ("grad_norm", "gradient norm", True, False),
    ("samples_per_second", "samples/s", False, True),
    ("scaler_scale", "scale of the gradient scaler (1: none)", False, False),
)
MARGIN = 0.04  # of an axis, beyond the lowest and the highest value


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Draws the metrics of runs into one picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, with metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("plot.png"), help="the picture")
    parser.add_argument(
        "--smooth",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="draw loss and gradient norm as means over N lines of metrics",
    )
    args = parser.parse_args()
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise UserError("a RUN is given twice: give each once")
    if len(args.runs) > len(COLOURS):
        raise UserError(f"{len(args.runs)} runs are more than the {len(COLOURS)} colours: draw fewer at once")
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output} is no .png file")
    return args


def short_names(runs: list[Path]) -> list[str]:
    """The folders' names, or where two are alike their whole paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def smoothed(values: list[float], count: int) -> list[float]:
    """The mean of each value and those before it, `count` at most; values that are not finite do not count."""
    means = []
    for end in range(1, len(values) + 1):
        window = np.array(values[max(end - count, 0) : end])
        window = window[np.isfinite(window)]
        means.append(float(window.mean()) if len(window) else float("nan"))
    return means


def draw(runs: Mapping[str, list[dict]], smooth: int) -> np.ndarray:
    """A panel for each quantity, and in it a line for each run's rows of metrics, by name: (H, W, 3) uint8."""

    def series(quantity: str, count: int) -> dict[str, Points]:
        steps = {name: [row["step"] for row in rows] for name, rows in runs.items()}
        values = {name: smoothed([row[quantity] for row in rows], count) for name, rows in runs.items()}
        points = {name: zip(steps[name], values[name], strict=True) for name in runs}
        return {name: [point for point in each if math.isfinite(point[1])] for name, each in points.items()}

    pictures, last = [], max(row["step"] for rows in runs.values() for row in rows)
    for quantity, title, is_smoothed, from_zero in PANELS:
        lines = series(quantity, smooth if is_smoothed else 1)
        values = [y for points in lines.values() for _, y in points]
        # A loss with the dispersive term may fall below 0.
        log_y = not from_zero and min(values, default=1.0) > 0
        axis = Axis.around(values + [0.0] * from_zero, log_y).wider(0 if from_zero else MARGIN, MARGIN)
        pictures.append(plot(lines, Axis.around([0.0, last]), axis, "step", title, named=False))
    return panels(pictures, list(runs))


def main() -> None:
    args = parse_args()
    start_log()
    runs = {
        name: read_metrics(run, ("step", *(panel[0] for panel in PANELS)))
        for name, run in zip(short_names(args.runs), args.runs, strict=True)
    }
    try:
        write_png(args.output, draw(runs, args.smooth))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error.strerror}") from None
    log.info("%s", args.output)


if __name__ == "__main__":
    cli.run(main, "draw fewer runs at once")
