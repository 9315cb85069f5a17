"""EqM/plot.py as people run it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from conftest import run_python, run_script
from drawing.pictures import read_png
from drawing.plots import BOTTOM, COLOURS, HEIGHT, LEFT, TOP, WIDTH
from plot import PANELS, smoothed
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
    return read_png(folder / "plot.png").astype(int)


def has_colour(picture: np.ndarray, panel: int, column: float, row: float, colour: str) -> bool:
    """Whether a place in a panel's frame, of 0 to 1 from its lower left corner, has a colour within three pixels."""
    size = (TOP + HEIGHT + BOTTOM, picture.shape[1] // 2)
    head = picture.shape[0] - 2 * size[0]
    x = (panel % 2) * size[1] + round(LEFT + column * WIDTH)
    y = head + (panel // 2) * size[0] + round(TOP + (1 - row) * HEIGHT)
    part = picture[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3)
    return bool((abs(part - ImageColor.getrgb(colour)).sum(axis=1) < 60).any())


def test_each_panel_shows_its_quantity_of_each_run_where_the_axes_say(tmp_path):
    write_run(tmp_path / "a", loss=[1.0, 10.0, 100.0, 10.0], samples_per_second=[0, 50, 100, 50.0])
    write_run(tmp_path / "b", grad_norm=[1.0, 2.0, 4.0, 2.0], scaler_scale=[1.0, 1024.0, 1.0, 1024.0])
    picture = plotted(tmp_path, "a", "b")
    low, middle, high = 0.04 / 1.08, 0.5, 1.04 / 1.08  # of an axis with margins
    for panel, colour, places in (
        (0, COLOURS[0], [(0.25, low), (0.5, middle), (0.75, high)]),
        (1, COLOURS[1], [(0.25, low), (0.5, middle), (0.75, high)]),
        (2, COLOURS[0], [(0.5, 0.5 / 1.04), (0.75, 1 / 1.04)]),
        (3, COLOURS[1], [(0.25, low), (0.5, high), (0.75, low)]),
    ):
        assert all(has_colour(picture, panel, *place, colour) for place in places), panel
        assert not has_colour(picture, panel, 0.1, 0.6, colour)
    assert has_colour(picture, 0, 0.6, low, COLOURS[1])


def test_a_real_run_is_drawn(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--max-steps", 3, "--log-every", 1)
    picture = plotted(tmp_path, run, "--smooth", 2)
    assert any(has_colour(picture, 3, column / 20, 0.5, COLOURS[0]) for column in range(10, 19))


def test_smoothing_is_the_mean_of_the_last_values_that_are_finite():
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1, 2, 4, 6]
    assert smoothed([1.0, float("nan"), 5.0], 2) == [1, 1, 5]
    values = [float("nan"), 2.0]
    np.testing.assert_array_equal(smoothed(values, 1), values)


def test_values_that_are_not_finite_or_not_above_0_are_drawn_around(tmp_path):
    write_run(tmp_path / "a", loss=[float("nan"), -1.0, 1.0, float("inf")])
    picture = plotted(tmp_path, "a")
    assert has_colour(picture, 0, 0.5, 0.04 / 1.08, COLOURS[0])
    assert has_colour(picture, 0, 0.75, 1.04 / 1.08, COLOURS[0])


def test_names_stand_above_the_panels_with_their_runs_colours(tmp_path):
    for folder in ("x/000-a", "y/000-a", "y/000-i"):
        write_run(tmp_path / folder, loss=[1.0, 2.0])
    alike, other = plotted(tmp_path, "x/000-a", "y/000-a"), plotted(tmp_path, "y/000-a", "x/000-a")
    apart = plotted(tmp_path, "x/000-a", "y/000-i")
    heads = [picture[: picture.shape[0] - 2 * (TOP + HEIGHT + BOTTOM)] for picture in (alike, other, apart)]
    assert not np.array_equal(heads[0], heads[1])  # by their paths, where the names are the same
    assert not np.array_equal(heads[0][:, :400], heads[2][:, :400])
    for colour in COLOURS[:2]:
        assert (abs(heads[0] - ImageColor.getrgb(colour)).sum(axis=2) == 0).any()
    assert not (abs(heads[0] - ImageColor.getrgb(COLOURS[2])).sum(axis=2) == 0).any()


def test_a_line_half_written_is_left_out_with_a_warning(tmp_path):
    folder = write_run(tmp_path / "a", loss=[1.0, 2.0])
    whole = plotted(tmp_path, "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    run = run_python("plot.py", "a", cwd=tmp_path)
    assert run.returncode == 0
    assert "WARNING a/metrics.jsonl: damaged lines are left out: 1, the first is line 3" in run.stdout
    assert np.array_equal(read_png(tmp_path / "plot.png"), whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a run's folder: it has no metrics.jsonl"),
        (["a/metrics.jsonl"], "a/metrics.jsonl is not a run's folder: it has no metrics.jsonl"),
        (["empty"], "empty/metrics.jsonl has no whole line: wait for the run's first, or give another run"),
        (["a", "a/"], "a RUN is given twice: give each once"),
        (["a", "--output", "none/plot.png"], "--output none/plot.png cannot be written: No such file or directory"),
        (["a", "--output", "plot.jpg"], "--output plot.jpg is no .png file"),
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
