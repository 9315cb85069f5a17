"""Draws the loss, gradient norm, throughput, gradient scale and held-out loss of runs, by step, into one picture.

python EqM/plot.py results/000-EqM-S-4-Linear-velocity-None results/001-EqM-S-4-Linear-velocity-None
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drawing.plots import COLOURS, Lines, Points, check_plots, write_plots
from runs.record import read_metrics
from runtime import cli
from runtime.errors import UserError
from runtime.files import check_writable
from runtime.logs import log, start_log

# The name in metrics.jsonl, the title, whether it is smoothed, whether its axis starts at 0.
PANELS = (
    ("loss", "loss", True, False),
    ("grad_norm", "gradient norm", True, False),
    ("samples_per_second", "samples/s", False, True),
    ("scaler_scale", "scale of the gradient scaler (1: none)", False, False),
)
HELD_OUT = ("held_out_loss", "held-out loss", False, False)  # of runs with --eval-path, at some of their lines


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Draws the metrics of runs into one picture.")
    parser.add_argument("runs", nargs="+", type=cli.path, metavar="RUN", help="a run's folder, with metrics.jsonl")
    parser.add_argument("--output", type=cli.path, default=Path("plot.png"), help="the picture")
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
        raise UserError(f"--output {args.output} is not a .png file")
    check_plots("a plot")
    check_writable("--output", args.output)
    return args


def short_names(runs: list[Path]) -> list[str]:
    """The names of the folders. If two are the same, the whole paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def smoothed(values: list[float], count: int) -> list[float]:
    """The mean of each value and of those before it, at most `count` in all. Values that are not finite are skipped."""
    means = []
    for end in range(1, len(values) + 1):
        window = np.array(values[max(end - count, 0) : end])
        window = window[np.isfinite(window)]
        means.append(float(window.mean()) if len(window) else float("nan"))
    return means


def panels(runs: Mapping[str, list[dict[str, float]]], smooth: int) -> list[Lines]:
    """One plot for each quantity, with one line for each run.

    Args:
        runs: the lines of metrics of each run, by name.
        smooth: loss and gradient norm are means over so many lines.
    """
    plots = []
    is_held_out = any(HELD_OUT[0] in row for rows in runs.values() for row in rows)
    for quantity, title, is_smoothed, from_zero in (*PANELS, HELD_OUT) if is_held_out else PANELS:
        series: dict[str, Points] = {}
        for name, every_row in runs.items():
            rows = [row for row in every_row if quantity in row]
            values = smoothed([row[quantity] for row in rows], smooth if is_smoothed else 1)
            series[name] = list(zip([row["step"] for row in rows], values, strict=True))
        finite = [y for points in series.values() for _, y in points if math.isfinite(y)]
        # A loss with the dispersive term may fall below 0.
        log_y = not from_zero and min(finite, default=1.0) > 0
        plots.append(Lines(series, "step", title, log_y, from_zero))
    return plots


def main() -> None:
    args = parse_args()
    start_log()
    runs = {
        name: read_metrics(run, ("step", *(panel[0] for panel in PANELS)), HELD_OUT[:1])
        for name, run in zip(short_names(args.runs), args.runs, strict=True)
    }
    write_plots(args.output, panels(runs, args.smooth), columns=2)
    log.info("%s", args.output)


if __name__ == "__main__":
    cli.run(main, "draw fewer runs at once")
