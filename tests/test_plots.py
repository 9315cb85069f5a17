"""Plots show their series where the axes say."""

import math

import numpy as np
import pytest
from PIL import ImageColor

from drawing.plots import COLOURS, HEIGHT, LEFT, TOP, WIDTH, Axis, histogram_plot, line_plot


def has_colour(picture: np.ndarray, column: float, row: float, colour: str = COLOURS[0]) -> bool:
    """Whether a place in the frame, of 0 to 1 from its lower left corner, has a colour within two pixels."""
    x, y = round(LEFT + column * WIDTH), round(TOP + (1 - row) * HEIGHT)
    part = picture[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].reshape(-1, 3).astype(int)
    return bool((abs(part - ImageColor.getrgb(colour)).sum(axis=1) < 60).any())


def test_a_line_goes_through_its_points():
    picture = line_plot({"a": [(0, 0.0), (5, 10.0), (10, 2.0)], "b": [(0, 4.0), (10, 4.0)]}, "step", "energy")
    assert has_colour(picture, 0.25, 0.5)
    assert has_colour(picture, 0.75, 0.6)
    assert has_colour(picture, 0.75, 0.4, COLOURS[1])
    assert not has_colour(picture, 0.25, 0.9)


def test_a_logarithmic_axis_makes_powers_a_straight_line():
    picture = line_plot({"a": [(i, 10.0**-i) for i in range(5)]}, "step", "norm", log_y=True)
    assert all(has_colour(picture, i / 4, 1 - i / 4) for i in (0.5, 1, 2, 3, 3.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_points_that_a_logarithmic_axis_cannot_show_are_left_out(bad):
    points = [(0, 1.0), (1, 0.1)]
    assert np.array_equal(
        line_plot({"a": [*points, (0.5, bad)]}, "x", "y", log_y=True), line_plot({"a": points}, "x", "y", log_y=True)
    )


def test_each_series_of_a_histogram_is_drawn_by_its_share():
    few, many = [0.0] * 3 + [10.0], [10.0] * 750 + [0.0] * 250
    picture = histogram_plot({"few": few}, "score", bins=10)
    assert has_colour(picture, 0.05, 1 / 1.05)
    assert has_colour(picture, 0.95, 1 / 3 / 1.05)
    assert not has_colour(picture, 0.5, 1 / 3 / 1.05)
    both = histogram_plot({"few": few, "many": many}, "score", bins=10)
    assert has_colour(both, 0.05, 1 / 1.05, COLOURS[0])
    assert has_colour(both, 0.95, 1 / 1.05, COLOURS[1])


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis(-13, 12), [-10, -5, 0, 5, 10]),
        (Axis(0.0004, 30, log=True), [0.001, 0.01, 0.1, 1, 10]),
        (Axis(0.03, 2.1, log=True), [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (Axis(10.8, 11.6, log=True), [10.8, 11, 11.2, 11.4, 11.6]),
    ],
    ids=str,
)
def test_ticks_are_round_numbers_within_the_axis(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, 2.0)]}, {"a": [(0, 2.0), (9, 2.0)]}], ids=str)
@pytest.mark.parametrize("log_y", [False, True])
def test_series_without_extent_are_drawn(series, log_y):
    assert (
        line_plot(series, "x", "y", log_y).shape
        == line_plot({"a": [(0, 1.0), (1, 2.0)]} if series else {}, "", "").shape
    )


@pytest.mark.parametrize("values", [[], [3.0], [math.nan, 1.0, 2.0]], ids=str)
def test_a_histogram_of_few_values_is_drawn(values):
    assert histogram_plot({"a": values}, "x").std() > 0
