"""Support: draws a training run's loss; not needed to understand the paper."""

import math

from PIL import Image, ImageDraw, ImageFont

SIZE, SCALE = (900, 450), 2  # in pixels; it is drawn SCALE times as large, then reduced
LEFT, TOP, RIGHT, BOTTOM = 90, 40, 20, 60  # the margins
RAW, SMOOTH = "#8fb0d8", "#1f4e8c"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    wanted = (high - low) / count or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(wanted))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= wanted * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


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
    low, high, last = low - margin, high + margin, max(steps)

    page = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15 * SCALE)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def place(step: float, loss: float) -> tuple[float, float]:
        y = 1 - (min(max(loss, low), high) - low) / (high - low)
        return (LEFT + step / last * width) * SCALE, (TOP + y * height) * SCALE

    def write(x: float, y: float, text: str, anchor: str, colour: str = "black") -> None:
        draw.text((x, y), text, colour, font, anchor=anchor)

    for value in ticks(low, high):
        (x0, y), (x1, _) = place(0, value), place(last, value)
        draw.line([(x0, y), (x1, y)], "#dddddd", SCALE)
        write(x0 - 8 * SCALE, y, f"{value:.4g}", "rm")
    for value in ticks(0, last, 8):
        if value == int(value):
            x, y = place(value, low)
            draw.line([(x, y), (x, y + 5 * SCALE)], "black", SCALE)
            write(x, y + 8 * SCALE, f"{value:,.0f}", "mt")
    draw.line([place(0, high), place(0, low), place(last, low)], "black", SCALE)
    for losses, colour, thickness in ((raw, RAW, 1), (smooth, SMOOTH, 2)):
        draw.line([place(*point) for point in zip(steps, losses)], colour, thickness * SCALE, joint="curve")
    x, y = place(last, smooth[-1])
    draw.ellipse([x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE], SMOOTH)
    write((LEFT + width / 2) * SCALE, (SIZE[1] - 8) * SCALE, "step", "mb")
    write(LEFT * SCALE, 10 * SCALE, title, "lt")
    write((SIZE[0] - RIGHT) * SCALE, 10 * SCALE, "smoothed", "rt", SMOOTH)
    write((SIZE[0] - RIGHT - 90) * SCALE, 10 * SCALE, "raw", "rt", RAW)
    return page.resize(SIZE, Image.LANCZOS)
