"""Support: draws curves: a training run's loss, similarity by steps; not needed to understand the paper."""

import math
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

SIZE, SCALE = (900, 450), 2  # in pixels; it is drawn SCALE times as large, then reduced
LEFT, TOP, RIGHT, BOTTOM = 90, 40, 20, 60  # the margins
RAW, SMOOTH = "#8fb0d8", "#1f4e8c"
COLOURS = (SMOOTH, "#c2521a", "#3c8c4e", "#7d3c98")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    wanted = (high - low) / count or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(wanted))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= wanted * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axes:
    """A page with two axes to draw lines on: x from 0 to `last`, y from `low` to `high`."""

    def __init__(self, last: float, low: float, high: float, title: str, x_label: str):
        self.last, self.low, self.high = last, low, high
        self.page = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
        self.draw, self.font = ImageDraw.Draw(self.page), ImageFont.load_default(15 * SCALE)
        for value in ticks(low, high):
            (x0, y), (x1, _) = self.place(0, value), self.place(last, value)
            self.draw.line([(x0, y), (x1, y)], "#dddddd", SCALE)
            self.write(x0 - 8 * SCALE, y, f"{value:.4g}", "rm")
        for value in ticks(0, last, 8):
            if value == int(value):
                x, y = self.place(value, low)
                self.draw.line([(x, y), (x, y + 5 * SCALE)], "black", SCALE)
                self.write(x, y + 8 * SCALE, f"{value:,.0f}", "mt")
        self.draw.line([self.place(0, high), self.place(0, low), self.place(last, low)], "black", SCALE)
        self.write((LEFT + SIZE[0] - RIGHT) / 2 * SCALE, (SIZE[1] - 8) * SCALE, x_label, "mb")
        self.write(LEFT * SCALE, 24 * SCALE, title, "ls")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies on the page; one that is too high or too low is moved to the margin."""
        down = 1 - (min(max(y, self.low), self.high) - self.low) / (self.high - self.low)
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return (LEFT + x / self.last * width) * SCALE, (TOP + down * height) * SCALE

    def write(self, x: float, y: float, text: str, anchor: str, colour: str = "black") -> None:
        self.draw.text((x, y), text, colour, self.font, anchor=anchor)

    def line(self, points: Iterable[tuple[float, float]], colour: str, thickness: int = 2, dot: bool = True) -> None:
        """A line through points; a dot marks its end."""
        places = [self.place(*point) for point in points]
        self.draw.line(places, colour, thickness * SCALE, joint="curve")
        (x, y), r = places[-1], 4 * SCALE
        if dot:
            self.draw.ellipse([x - r, y - r, x + r, y + r], colour)

    def finish(self, names: dict[str, str]) -> Image.Image:
        """The page, with the lines' names, by colour, at the upper right."""
        x = (SIZE[0] - RIGHT) * SCALE
        for colour, name in names.items():
            self.write(x, 24 * SCALE, name, "rs", colour)
            x -= self.font.getlength(name) + 20 * SCALE
        return self.page.resize(SIZE, Image.LANCZOS)


def draw_curve(lines: list[dict], title: str) -> Image.Image:
    """Draws the losses in a log's lines over the steps. Each line has "step", "loss" (smoothed) and "raw" (the mean
    since the line before; older versions did not log it). The loss axis leaves out 2% of the values at either end, so
    one bad batch does not flatten the curve.
    """
    steps = [line["step"] for line in lines]
    smooth, raw = [line["loss"] for line in lines], [line.get("raw", line["loss"]) for line in lines]
    values = sorted(smooth + raw)
    beyond = len(values) // 50
    low, high = values[beyond], values[-1 - beyond]
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    axes = Axes(max(steps), low - margin, high + margin, title, "step")
    axes.line(zip(steps, raw), RAW, 1, dot=False)
    axes.line(zip(steps, smooth), SMOOTH)
    return axes.finish({SMOOTH: "smoothed", RAW: "raw"})


def draw_curves(curves: dict[str, list[tuple[float, float]]], title: str, x_label: str) -> Image.Image:
    """Draws some lines, at most four, by name."""
    values = [y for points in curves.values() for _, y in points]
    margin = (max(values) - min(values)) * 0.05 or 1.0
    axes = Axes(max(x for points in curves.values() for x, _ in points), min(values) - margin, max(values) + margin,
                title, x_label)
    colours = dict(zip(COLOURS, curves))
    for colour, name in colours.items():
        axes.line(curves[name], colour)
    return axes.finish(colours)
