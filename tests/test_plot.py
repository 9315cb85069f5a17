"""EqM/plot.py as people run it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from conftest import run_python, run_script
from drawing.pictures import read_png
from drawing.plots import COLOURS, write_plots
from plot import PANELS, panels, short_names, smoothed
from runs.record import read_metrics
from test_train import trained


def write_run(folder: Path, **values: list[float]) -> Path:
    """A run's folder whose lines, 10 steps apart, have these values, and 1 for all others."""
    folder.mkdir(parents=True)
    count = len(next(iter(values.values())))
    rows = [
        {name: values.get(name, [1.0] * count)[i] for name, *_ in PANELS} | {"step": 10 * i + 10} for i in range(count)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plotted(folder: Path, *arguments: object) -> np.ndarray:
    run = run_script("plot.py", *arguments, cwd=folder)
    assert run.returncode == 0, run.stderr
    return read_png(folder / "plot.png")


def colours(picture: np.ndarray) -> set[str]:
    """Which of the lines' colours a picture shows, but for black, which text has too."""
    seen = {tuple(pixel) for pixel in np.unique(picture.reshape(-1, 3), axis=0).tolist()}
    return {colour for colour in COLOURS if colour != "#000000" and ImageColor.getrgb(colour) in seen}


def test_each_panel_has_its_quantity_of_each_run_by_step():
    rows = {
        name: [
            {"step": 10 * i, "loss": i * a, "grad_norm": i + a, "samples_per_second": a, "scaler_scale": i}
            for i in (1, 2)
        ]
        for name, a in (("a", 5.0), ("b", 8.0))
    }
    found = {panel.y_label: panel for panel in panels(rows, 1)}
    assert found["loss"].series == {"a": [(10, 5.0), (20, 10.0)], "b": [(10, 8.0), (20, 16.0)]}
    assert found["gradient norm"].series == {"a": [(10, 6.0), (20, 7.0)], "b": [(10, 9.0), (20, 10.0)]}
    assert found["samples/s"].series == {"a": [(10, 5.0), (20, 5.0)], "b": [(10, 8.0), (20, 8.0)]}
    assert found["scale of the gradient scaler (1: none)"].series == {"a": [(10, 1), (20, 2)], "b": [(10, 1), (20, 2)]}
    assert [(panel.log_y, panel.from_zero) for panel in found.values()] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
    ]


def test_only_loss_and_gradient_norm_are_smoothed():
    values = {"loss": 4.0, "grad_norm": 4.0, "samples_per_second": 4.0, "scaler_scale": 4.0}
    rows = [{"step": 1.0} | values, {"step": 2.0} | dict.fromkeys(values, 8.0)]
    assert [panel.series["a"][-1] for panel in panels({"a": rows}, 2)] == [(2, 6), (2, 6), (2, 8), (2, 8)]


def test_a_held_out_loss_has_a_panel_of_its_own_with_the_lines_that_have_it():
    rows = [{"step": float(step), **dict.fromkeys([panel[0] for panel in PANELS], 1.0)} for step in (1, 2, 3)]
    held = [rows[0], rows[1] | {"held_out_loss": 5.0}, rows[2]]
    assert [panel.y_label for panel in panels({"a": rows}, 1)] == [panel[1] for panel in PANELS]
    last = panels({"a": rows, "b": held}, 1)[-1]
    assert (last.y_label, last.series) == ("held-out loss", {"a": [], "b": [(2.0, 5.0)]})


def test_four_panels_show_runs_in_their_colours(tmp_path):
    write_run(tmp_path / "a", loss=[1.0, 10.0, 100.0, 10.0])
    write_run(tmp_path / "b", loss=[2.0, 20.0, 200.0, 20.0])  # all else is the same, so that b hides a
    picture = plotted(tmp_path, "a", "b")
    height, width = picture.shape[:2]
    panels = (
        picture[top : top + height // 2 - 50, left : left + width // 2]
        for top in (50, height // 2)
        for left in (0, width // 2)
    )
    assert [colours(panel) for panel in panels] == [set(COLOURS[:2]), {COLOURS[1]}, {COLOURS[1]}, {COLOURS[1]}]


def test_a_real_run_is_drawn(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--max-steps", 3, "--log-every", 1)
    assert colours(plotted(tmp_path, run, "--smooth", 2)) == {COLOURS[0]}


def test_smoothing_is_the_mean_of_the_last_values_that_are_finite():
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1, 2, 4, 6]
    assert smoothed([1.0, float("nan"), 5.0], 2) == [1, 1, 5]
    values = [float("nan"), 2.0]
    np.testing.assert_array_equal(smoothed(values, 1), values)


def test_a_loss_that_falls_below_0_has_a_linear_axis_whatever_is_not_finite():
    rows = [{"step": float(i)} | dict.fromkeys((panel[0] for panel in PANELS), 1.0) for i in range(4)]
    for row, loss, norm in zip(rows, [math.nan, -1.0, 1.0, math.inf], [math.nan, 1.0, 2.0, -math.inf], strict=True):
        row.update(loss=loss, grad_norm=norm)
    assert [panel.log_y for panel in panels({"a": rows}, 1)] == [False, True, False, True]


def test_runs_are_called_by_their_folders_or_where_two_are_alike_by_their_paths():
    assert short_names([Path("x/000-a"), Path("y/001-a")]) == ["000-a", "001-a"]
    assert short_names([Path("x/000-a"), Path("y/000-a")]) == ["x/000-a", "y/000-a"]


def test_a_line_half_written_is_left_out_with_a_warning(tmp_path):
    folder = write_run(tmp_path / "a", loss=[1.0, 2.0])
    write_plots(
        tmp_path / "whole.png", panels({"a": read_metrics(folder, ["step", *(row[0] for row in PANELS)])}, 1), 2
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    run = run_python("plot.py", "a", cwd=tmp_path)
    assert run.returncode == 0
    assert "WARNING a/metrics.jsonl: damaged lines are left out: 1, the first is line 3" in run.stdout
    assert np.array_equal(read_png(tmp_path / "plot.png"), read_png(tmp_path / "whole.png"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a run's folder: it has no metrics.jsonl"),
        (["a/metrics.jsonl"], "a/metrics.jsonl is not a run's folder: it has no metrics.jsonl"),
        (["empty"], "empty/metrics.jsonl has no whole line: wait for the first line of the run, or give another run"),
        (["a", "a/"], "a RUN is given twice: give each once"),
        (
            ["a", "--output", "a/metrics.jsonl/plot.png"],
            "--output a/metrics.jsonl/plot.png cannot be written: Not a directory",
        ),
        (["a", "--output", "plot.jpg"], "--output plot.jpg is not a .png file"),
        ([f"run{i}" for i in range(9)], "9 runs are more than the 8 colours: draw fewer at once"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, arguments, said):
    write_run(tmp_path / "a", loss=[1.0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    run = run_script("plot.py", *arguments, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [f"plot.py: error: {said}"]
