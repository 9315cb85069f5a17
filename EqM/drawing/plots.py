"""Plots for people, drawn with Pillow: lines and histograms. Pictures are (H, W, 3) uint8 RGB."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 800, 420  # pixels of the axes' frame
LEFT, TOP, BOTTOM = 76, 40, 52  # pixels around it
FINE = 3  # lines are drawn so many times as large, and made smaller to be smooth
# Okabe & Ito 2008, which people who see fewer colours tell apart; without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
GRID, INK = "#E4E4E4", "#303030"
FONT_SIZE, LABEL_SIZE = 13, 14

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A range of numbers, on a linear or logarithmic scale."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def around(values: Sequence[float], log: bool = False) -> "Axis":
        """An axis that just holds the values, and has a length where they have none."""
        low, high = (min(values), max(values)) if values else (1.0, 1.0)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        return Axis(low, high, log)

    def wider(self, low: float, high: float) -> "Axis":
        """The axis with so many times its length more below it and above it."""
        a, b = (math.log(v) if self.log else v for v in (self.low, self.high))
        ends = a - low * (b - a), b + high * (b - a)
        return Axis(*(math.exp(v) if self.log else v for v in ends), self.log)

    def place(self, value: float) -> float:
        """Where on the axis a number is: 0 at its low end, 1 at its high end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers within the range, about five; powers of ten on a long logarithmic axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(decades) // 6)
            for factors in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
                found = [f * 10.0**d for d in decades[::every] for f in factors]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) >= 3:
                    return found
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = unit * min((1, 2, 5, 10), key=lambda factor: abs(factor - rough / unit))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)  # the ends round, too
        return [i * step for i in range(first, last + 1)]


def line_plot(series: Mapping[str, Points], x_label: str, y_label: str, log_y: bool = False) -> np.ndarray:
    """A line for each series of points (x, y), with its name beside the plot.

    Points that are not finite are left out, and on a logarithmic axis those that are not above 0.
    """

    def shown(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log_y)

    drawn = {name: [point for point in points if shown(point[1])] for name, points in series.items()}
    points = [point for each in drawn.values() for point in each]
    x_axis, y_axis = Axis.around([x for x, _ in points]), Axis.around([y for _, y in points], log_y)
    return plot(drawn, x_axis, y_axis, x_label, y_label)


def panels(pictures: Sequence[np.ndarray], names: Sequence[str], columns: int = 2) -> np.ndarray:
    """Plots of the same series, all of one size and drawn without names, in rows, and the names once above them."""
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    body = np.concatenate(rows)  # (H, W, 3)
    font, width = ImageFont.load_default(LABEL_SIZE), body.shape[1]
    places, left, row = [], LEFT, 0
    for name in names:
        wide = 24 + math.ceil(font.getlength(name)) + 28
        if left > LEFT and left + wide > width:
            left, row = LEFT, row + 1
        places.append((left, row))
        left += wide
    head = Image.new("RGB", (width, 20 + (row + 1) * (LABEL_SIZE + 8)), "white")
    draw = ImageDraw.Draw(head)
    for i, (name, (left, row)) in enumerate(zip(names, places, strict=True)):
        draw_name(draw, i, name, left, 20 + row * (LABEL_SIZE + 8))
    return np.concatenate([np.asarray(head), body])


def histogram_plot(series: Mapping[str, Sequence[float]], x_label: str, bins: int = 40) -> np.ndarray:
    """The outline of each series' histogram, over the same bins; its height is the share of the series' values.

    Values that are not finite are left out.
    """
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in series.items()}
    x_axis = Axis.around([value for values in finite.values() for value in values])
    edges = np.linspace(x_axis.low, x_axis.high, bins + 1)
    outlines = {}
    for name, values in finite.items():
        shares = np.histogram(values, edges)[0] / max(len(values), 1) * 100
        heights = np.concatenate([[0], shares.repeat(2), [0]])
        outlines[name] = list(zip(edges.repeat(2).tolist(), heights.tolist(), strict=True))
    highest = max([y for points in outlines.values() for _, y in points], default=0) or 1
    return plot(outlines, x_axis, Axis(0, 1.05 * highest), x_label, "% of each", filled=True)


def plot(
    series: Mapping[str, Points],
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    y_label: str,
    filled: bool = False,
    named: bool = True,
) -> np.ndarray:
    """Axes with numbers and labels, a line for each series, filled down to the lower axis if asked, and their names."""
    names = ImageFont.load_default(LABEL_SIZE)
    right = 44 + math.ceil(max([names.getlength(name) for name in series if named], default=0))
    size = (LEFT + WIDTH + right, TOP + HEIGHT + BOTTOM)
    picture = Image.new("RGB", size, "white")
    draw_grid(ImageDraw.Draw(picture), x_axis, y_axis)

    def pixels(points: Points) -> list[tuple[float, float]]:
        places = [(LEFT + x_axis.place(x) * WIDTH, TOP + (1 - y_axis.place(y)) * HEIGHT) for x, y in points]
        return [(FINE * column, FINE * row) for column, row in places]

    for i, points in enumerate(series.values()):
        colour = COLOURS[i % len(COLOURS)]
        mask = Image.new("L", (FINE * size[0], FINE * size[1]))
        draw = ImageDraw.Draw(mask)
        path = pixels(points)
        if filled and len(path) > 2:
            draw.polygon(path, fill=50)
        if len(path) == 1:
            column, row = path[0]
            draw.ellipse((column - 3 * FINE, row - 3 * FINE, column + 3 * FINE, row + 3 * FINE), fill=255)
        elif path:
            draw.line(path, fill=255, width=2 * FINE, joint="curve")
        picture.paste(colour, mask=mask.resize(size, Image.Resampling.BOX))

    draw = ImageDraw.Draw(picture)
    draw.rectangle((LEFT, TOP, LEFT + WIDTH, TOP + HEIGHT), outline=INK)
    draw.text((LEFT + WIDTH / 2, size[1] - 6), x_label, fill=INK, font=names, anchor="ms")
    draw.text((LEFT, TOP - 12), y_label, fill=INK, font=names, anchor="ls")
    for i, name in enumerate(series if named else ()):
        draw_name(draw, i, name, LEFT + WIDTH + 10, TOP + 10 + i * (LABEL_SIZE + 6))
    return np.asarray(picture)


def draw_name(draw: ImageDraw.ImageDraw, i: int, name: str, left: int, row: int) -> None:
    """A series' colour and name, from `left` on, about a row of pixels."""
    draw.line((left, row, left + 18, row), fill=COLOURS[i % len(COLOURS)], width=3)
    draw.text((left + 24, row), name, fill=INK, font=ImageFont.load_default(LABEL_SIZE), anchor="lm")


def draw_grid(draw: ImageDraw.ImageDraw, x_axis: Axis, y_axis: Axis) -> None:
    """A line and its number for each tick."""
    font = ImageFont.load_default(FONT_SIZE)
    for value in x_axis.ticks():
        column = LEFT + x_axis.place(value) * WIDTH
        draw.line((column, TOP, column, TOP + HEIGHT), fill=GRID)
        draw.text((column, TOP + HEIGHT + 6), f"{value:.6g}", fill=INK, font=font, anchor="ma")
    for value in y_axis.ticks():
        row = TOP + (1 - y_axis.place(value)) * HEIGHT
        draw.line((LEFT, row, LEFT + WIDTH, row), fill=GRID)
        draw.text((LEFT - 6, row), f"{value:.6g}", fill=INK, font=font, anchor="rm")
