"""Plots show their series as asked, and commands that draw them say at once where matplotlib is missing."""

import errno
import importlib
import math
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from conftest import ROOT, run_command
from drawing.plots import COLOURS, LONGEST_NAME, Histogram, Lines, figure_of, write_plots
from runtime import cli
from runtime.errors import UserError


def drawn_lines(figure: Figure, plot: int = 0) -> dict[str, list[tuple[float, float]]]:
    """The points of each line of a plot, by colour."""
    return {line.get_color(): [tuple(point) for point in line.get_xydata()] for line in figure.axes[plot].lines}


def tick_labels(figure: Figure) -> list[str]:
    """The numbers of the first plot's y axis, between its ends."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    ticks = zip(axes.yaxis.get_majorticklocs(), axes.yaxis.get_majorticklabels(), strict=True)
    return [label.get_text() for value, label in ticks if low <= value <= high]


def legend_names(figure: Figure) -> dict[str, str]:
    """The colour of each name in the legend."""
    (legend,) = figure.legends
    colours = [handle.get_color() for handle in legend.get_lines()]
    return dict(zip([text.get_text() for text in legend.get_texts()], colours, strict=True))


def test_each_series_is_a_line_through_its_points_in_a_colour_of_its_own():
    series = {"a": [(0, 0.0), (5, 10.0), (10, 2.0)], "b": [(0, 4.0), (10, 4.0)]}
    figure = figure_of([Lines(series, "step", "energy")])
    assert drawn_lines(figure) == {COLOURS[0]: series["a"], COLOURS[1]: series["b"]}
    assert legend_names(figure) == {"a": COLOURS[0], "b": COLOURS[1]}
    assert figure.axes[0].get_xlabel() == "step"
    assert figure.axes[0].get_title(loc="left") == "energy"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_points_that_a_logarithmic_axis_cannot_show_are_left_out(bad):
    figure = figure_of([Lines({"a": [(0, 1.0), (0.5, bad), (1, 0.1)]}, "x", "y", log_y=True)])
    assert figure.axes[0].get_yscale() == "log"
    assert drawn_lines(figure) == {COLOURS[0]: [(0, 1.0), (1, 0.1)]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_that_are_not_finite_are_left_out(bad):
    figure = figure_of([Lines({"a": [(0, -1.0), (0.5, bad), (1, 0.0)]}, "x", "y")])
    assert drawn_lines(figure) == {COLOURS[0]: [(0, -1.0), (1, 0.0)]}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.04, 5), ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"]),
        ((0.0004, 30), ["0.001", "0.01", "0.1", "1", "10"]),
        ((10.8, 11.6), ["10.8", "11", "11.2", "11.4", "11.6"]),
        ((1, 65536), ["1", "10", "100", "1000", "10000", "100000"]),
    ],
    ids=str,
)
def test_a_logarithmic_axis_has_round_numbers_written_out(values, labels):
    figure = figure_of([Lines({"a": list(enumerate(values))}, "x", "y", log_y=True)])
    assert tick_labels(figure) == labels


def test_an_axis_starts_at_zero_if_asked():
    points = {"a": [(0, 90.0), (1, 100.0)]}
    starts = [figure_of([Lines(points, "x", "y", from_zero=zero)]).axes[0].get_ylim()[0] for zero in (True, False)]
    assert starts[0] == 0
    assert starts[1] > 80


def test_the_heights_of_a_histogram_are_shares_of_each_series_over_the_same_bins():
    series = {"few": [0.0] * 3 + [10.0, math.nan], "many": [10.0] * 750 + [0.0] * 250}
    shares, edges = Histogram(series, "score").shares()
    assert (edges[0], edges[-1]) == (0, 10)
    assert (shares["few"][0], shares["few"][-1]) == (75, 25)
    assert (shares["many"][0], shares["many"][-1]) == (25, 75)
    assert not shares["few"][1:-1].any()
    figure = figure_of([Histogram(series, "score")])
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert [patch.get_data().values[-1] for patch in outlines] == [25, 75]


@pytest.mark.parametrize(("counts", "width"), [([82, 84, 84, 100], 1), ([1, 250, 250, 250], 7)], ids=str)
def test_bins_of_whole_numbers_hold_as_many_of_them_each(counts, width):
    shares, edges = Histogram({"a": counts}, "evaluations", whole_numbers=True).shares()
    assert set(np.diff(edges)) == {width}
    assert edges[0] == min(counts) - 0.5
    assert max(counts) < edges[-1] <= max(counts) + width
    assert shares["a"].sum() == 100


def test_an_axis_of_whole_numbers_has_no_others():
    for counts in ([60, 60], [59, 60], [59, 61], list(range(1, 300, 7))):
        figure = figure_of([Histogram({"a": counts}, "evaluations", whole_numbers=True)])
        figure.draw_without_rendering()
        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert labels
        assert not any("." in label for label in labels)


def test_plots_stand_in_columns_under_one_legend():
    plots = [Lines({"a": [(0, float(i)), (1, 5.0)]}, "step", str(i)) for i in range(3)]
    figure = figure_of(plots, columns=2)
    figure.draw_without_rendering()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["0", "1", "2"]
    first, second, third = (axes.get_position() for axes in figure.axes)
    assert first.x1 < second.x0
    assert third.y1 < first.y0
    assert figure.legends[0].get_window_extent().y0 > first.y1 * figure.bbox.height


@pytest.mark.parametrize("count", [2, 8])
def test_the_legend_lies_within_the_picture_whatever_the_names(count):
    names = ["_hidden", "a$b$c", *(f"{i}/" + "folder/" * 30 + f"000-{i}" for i in range(count - 2))]
    figure = figure_of([Lines({name: [(0, 1.0)] for name in names}, "x", "y")])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert figure.axes[0].get_window_extent().height > 200
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    shown = list(legend_names(figure))
    assert shown[:2] == names[:2]
    assert all(len(name) <= LONGEST_NAME + 1 for name in shown)
    assert [(name[:8], name[-5:]) for name in shown] == [(name[:8], name[-5:]) for name in names]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "plot",
    [
        *(
            Lines(s, "x", "y", log)
            for s in ({}, {"a": []}, {"a": [(1, 2.0)]}, {"a": [(0, 2), (9, 2)]})
            for log in (0, 1)
        ),
        *(Histogram({"a": v}, "x", whole) for v in ([], [3.0], [math.nan, 1.0, 2.0]) for whole in (False, True)),
    ],
    ids=str,
)
def test_series_without_extent_are_drawn_without_a_warning(plot, tmp_path):
    write_plots(tmp_path / "plot.png", [plot])
    with Image.open(tmp_path / "plot.png") as picture:
        assert np.asarray(picture).std() > 0


def test_a_picture_shows_lines_in_their_colours_and_is_a_png(tmp_path):
    write_plots(tmp_path / "plot.png", [Lines({"a": [(0, 1.0), (1, 2.0)], "b": [(0, 2.0), (1, 1.0)]}, "x", "é")])
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        pixels = {pixel for _, pixel in picture.convert("RGB").getcolors(2**24)}
    assert {ImageColor.getrgb(colour) for colour in COLOURS[:2]} <= pixels
    assert ImageColor.getrgb(COLOURS[2]) not in pixels


def test_a_picture_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def disk_full(figure: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", disk_full)
    with pytest.raises(UserError, match="plot.png cannot be written: No space left"):
        write_plots(tmp_path / "plot.png", [Lines({"a": [(0, 1.0)]}, "x", "y")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["plot", "nowhere"], "a plot"),
        (["score", "--ckpt", "nowhere.pt", "a", "b"], "comparing two paths"),
        (["sample_gd", "--ckpt", "nowhere.pt", "--trace"], "--trace"),
        (["study", "adaptive", "data"], "a study"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_draws_says_first_that_matplotlib_is_missing(tmp_path, monkeypatch, capsys, command, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    name, *arguments = command
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.run(importlib.import_module(name).main, "")
    assert end.value.code == 1
    said = f"{name}.py: error: {what} needs matplotlib: pip install -r requirements-plot.txt\n"
    assert capsys.readouterr() == ("", said)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "train"]


def test_adaptive_samples_need_no_matplotlib_and_their_plot_is_left_out(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "matplotlib.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    flags = ["--ckpt", checkpoint, "--num-fid-samples", 1, "--num-sampling-steps", 2, "--adaptive", 1]
    run = run_command(sys.executable, ROOT / "EqM" / "sample_gd.py", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = "matplotlib is missing, so the plot of evaluations is left out: pip install -r requirements-plot.txt"
    assert said in run.stdout.splitlines()[1]  # before any work
    assert (tmp_path / "samples" / "samples.csv").exists()
    assert not (tmp_path / "samples-evaluations.png").exists()


def test_no_command_imports_matplotlib_before_it_draws(tmp_path):
    names = [path.stem for path in (ROOT / "EqM").glob("*.py")]
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'EqM')!r}); import {', '.join(names)}; "
    program += "print([name for name in sys.modules if name.startswith('matplotlib')])"
    run = run_command(sys.executable, "-c", program, cwd=tmp_path)
    assert run.stdout == "[]\n", run.stderr
