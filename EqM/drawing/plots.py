"""Plots for people: lines and histograms, drawn with matplotlib.

matplotlib is an optional package (requirements-plot.txt). It is imported when something is drawn, not before.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import UserError, shown
from runtime.files import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

INSTALL = "pip install -r requirements-plot.txt"
# Okabe & Ito (2008): people with colour blindness can tell these apart. Brown replaces yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
GRID = "#E4E4E4"
PLOT_SIZE = (7.0, 3.9)  # inches, of one plot with its labels
DPI = 120
FONT_SIZE = 10  # points
LETTER, LEGEND_GAP = 0.085, 0.8  # inches: about one letter of that size, and the space around a name in the legend
NAME_HEIGHT = 0.2  # inches, of one row of the legend
LONGEST_NAME = 76  # letters that the legend shows
MAX_BINS = 40
MARKED_POINTS = 12  # a line through so few points shows each of them

Points = Sequence[tuple[float, float]]


def can_plot() -> bool:
    """True where matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def check_plots(what: str) -> None:
    """Checks, before any work, that plots can be drawn.

    Args:
        what: what needs the plots, as the error names it.

    Raises:
        UserError: matplotlib is not installed.
    """
    if not can_plot():
        raise UserError(f"{what} needs matplotlib: {INSTALL}")


@dataclass(frozen=True)
class Lines:
    """A line through the points (x, y) of each series, by name. x counts something, as steps.

    Points that are not finite are left out. On a logarithmic axis, points that are not above 0 are left out too.
    """

    series: Mapping[str, Points]
    x_label: str
    y_label: str
    log_y: bool = False
    from_zero: bool = False  # the y axis starts at 0

    def points(self, name: str) -> list[tuple[float, float]]:
        """The points of one series that are drawn."""
        return [(x, y) for x, y in self.series[name] if math.isfinite(y) and (y > 0 or not self.log_y)]

    def draw(self, axes: "Axes") -> None:
        """Draws the lines."""
        axes.margins(x=0.01)
        for name, colour in coloured(self.series):
            points = self.points(name)
            marker = "o" if len(points) <= MARKED_POINTS else ""
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=4)
        axes.xaxis.set_major_locator(round_numbers(whole=True))
        axes.set_xlabel(self.x_label)
        axes.set_title(self.y_label, loc="left")
        if self.from_zero:
            axes.set_ylim(bottom=0)
        if self.log_y:
            axes.set_yscale("log")
            label_log_axis(axes.yaxis)


@dataclass(frozen=True)
class Histogram:
    """The outline of the histogram of each series, by name, over the same bins.

    A bin's height is its share of the values of the series, in %. Values that are not finite are left out.
    """

    series: Mapping[str, Sequence[float]]
    x_label: str
    whole_numbers: bool = False  # the values are: bins are centred on them

    def shares(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Each series' share of values in each bin, in % (B,), and the edges of the bins (B + 1,)."""
        finite = {name: [value for value in values if math.isfinite(value)] for name, values in self.series.items()}
        together = [value for values in finite.values() for value in values]
        if self.whole_numbers and together:
            low, high = min(together), max(together)
            width = math.ceil((high - low + 1) / MAX_BINS)
            edges = np.arange(low - 0.5, high + width, width)
        else:
            # Few values in many bins would show single values, not how they are spread.
            edges = np.histogram_bin_edges(together, min(MAX_BINS, 2 * math.isqrt(len(together)) + 1))
        shares = {n: np.histogram(values, edges)[0] / max(len(values), 1) * 100 for n, values in finite.items()}
        return shares, edges

    def draw(self, axes: "Axes") -> None:
        """Draws the outlines."""
        shares, edges = self.shares()
        for name, colour in coloured(shares):
            axes.stairs(shares[name], edges, fill=True, color=colour, alpha=0.2)
            axes.stairs(shares[name], edges, color=colour, linewidth=1.5)
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(round_numbers(self.whole_numbers))
        axes.set_xlabel(self.x_label)
        axes.set_title("% of each" if len(shares) > 1 else "%", loc="left")


def coloured(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name with the colour of its series; after the last colour the first comes again."""
    return list(zip(names, itertools.cycle(COLOURS), strict=False))


def round_numbers(whole: bool = False) -> "MaxNLocator":
    """Where an axis has numbers: at most seven round ones, whole ones if asked."""
    from matplotlib.ticker import MaxNLocator

    # One tick is enough: an axis from 59.5 to 60.5 shows 60, not 59.8 and 60.2.
    return MaxNLocator(7, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1 if whole else 2)


def label_log_axis(axis: "Axis") -> None:
    """Labels a logarithmic axis with round numbers, written out: 0.05, 0.1, 0.2."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 1:
        axis.set_major_locator(round_numbers())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:.6g}")


def figure_of(plots: Sequence[Lines | Histogram], columns: int = 1) -> "Figure":
    """Plots of the same series, row by row, with one legend above them.

    It uses matplotlib's objects, not pyplot, which keeps global state and may open windows.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(plots) / columns)
    width, height = PLOT_SIZE
    figure = Figure((columns * width, rows * height), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)  # (rows, columns) of Axes
    for plot, axes in zip(plots, grid.flat, strict=False):
        axes.tick_params(labelsize=FONT_SIZE)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.ticklabel_format(useOffset=False)
        plot.draw(axes)
    for axes in grid.flat[len(plots) :]:
        axes.remove()
    add_legend(figure, list(plots[0].series))
    return figure


def add_legend(figure: "Figure", names: Sequence[str]) -> None:
    """Puts the names of series, with their colours, above all plots, in as many columns as there is space for."""
    from matplotlib.lines import Line2D

    if not names:
        return
    labels = [shortened(shown(name)) for name in names]
    entry = LETTER * max(map(len, labels)) + LEGEND_GAP  # inches
    columns = max(1, min(len(labels), int(figure.get_figwidth() / entry)))
    figure.set_figheight(figure.get_figheight() + NAME_HEIGHT * math.ceil(len(labels) / columns))
    handles = [Line2D([], [], color=colour, linewidth=2.5) for _, colour in coloured(names)]
    # matplotlib before 3.10 skips a label that starts with _: the names are put in afterwards.
    numbers = [str(i) for i in range(len(labels))]
    legend = figure.legend(handles, numbers, loc="outside upper center", ncols=columns, frameon=False)
    for text, name in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # a name with two $ is no formula
        text.set_text(name)


def shortened(name: str) -> str:
    """A name that fits into the legend: of a long one, as a path, its start and its end."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def write_plots(path: Path, plots: Sequence[Lines | Histogram], columns: int = 1) -> None:
    """Draws plots of the same series into one PNG file, which is whole or absent.

    Raises:
        UserError: the file cannot be written.
    """
    figure = figure_of(plots, columns)
    write_output(path, lambda temporary: figure.savefig(temporary, format="png"))
