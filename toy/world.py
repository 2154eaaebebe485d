"""The toy ad world: pictures drawn by code, clean enough for a tiny Stable Diffusion to learn on two CPU cores.

It has 8 product categories, each with its common scene, and any number of brands. A brand is a palette, a layout and a
set of elements, shared by all of its ads: what the Personality-Wise Generator must carry over from a reference.

    python toy/world.py --sheet sheet.png      # look at it: a row per category, a column per brand
    python toy/world.py --out toy/data         # write the base set, BG60k, BG1k and BG-pair
    python toy/world.py --samples toy/samples --size 512
"""

import argparse
import colorsys
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

SUPERSAMPLE = 2  # Pillow draws hard edges: pictures are drawn this much larger, products twice that again
FOLDER_SIZE = 2000  # images in each numbered folder of BG60k
BRANDS_PER_CATEGORY = 400  # training brands: seeds 0 .. 3199; each category's ads have their own 400
HELD_OUT_BRANDS = 1_000_000  # the first brand seed of BG1k and BG-pair
# Sample pictures, by file name: category, a product's seed, its reference's, the reference's brand (in no data set)
SAMPLES = {
    "laptop": ("laptop", 103, 107, 1_000_507), "rice_cooker": ("rice cooker", 104, 103, 1_000_603),
    "refrigerator": ("refrigerator", 104, 105, 1_000_705), "sneaker": ("sneaker", 105, 102, 1_000_902),
    "watch": ("watch", 103, 107, 1_001_007), "sunscreen": ("sunscreen", 101, 103, 1_001_103),
    "toy_car": ("toy car", 108, 109, 1_001_209), "perfume": ("perfume", 106, 108, 1_000_808),
    "perfume_2": ("perfume", 102, 101, 1_000_801), "perfume_3": ("perfume", 104, 100, 1_000_800),
    "perfume_4": ("perfume", 108, 104, 1_000_804),
}
WHITE, SHADOW = (255, 255, 255), (12, 8, 20)

HUES = {
    "red": 0.0, "orange": 0.07, "yellow": 0.135, "lime": 0.22, "green": 0.35, "teal": 0.455,
    "cyan": 0.525, "blue": 0.605, "violet": 0.69, "purple": 0.775, "magenta": 0.855, "pink": 0.935,
}
COLOURS = {
    "white": (242, 240, 236), "silver": (198, 202, 210), "gray": (122, 127, 138), "black": (52, 54, 62),
    "gold": (224, 186, 112), "red": (218, 62, 56), "orange": (246, 146, 50), "yellow": (250, 204, 72),
    "green": (76, 176, 104), "teal": (88, 186, 180), "blue": (66, 124, 218), "purple": (146, 98, 214),
    "pink": (246, 138, 172),
}


# ---------------------------------------------------------------- colours and curves


def tint(hue: float, saturation: float, value: float) -> tuple:
    """The RGB colour (0..255) of a hue, saturation and value in 0..1; hues wrap around."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def mix(a: tuple, b: tuple, t: float) -> tuple:
    """The colour a fraction t of the way from a to b."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def shade(colour: tuple, k: float) -> tuple:
    """The colour made darker (k < 1) or lighter (k > 1)."""
    return tuple(min(255, round(c * k)) for c in colour)


def barrel(colour: tuple) -> list:
    """The gradient across an upright cylinder lit from the left."""
    return [shade(colour, k) for k in (0.62, 1.0, 1.22, 1.05, 0.95, 0.62)]


def another(colour: tuple, names: tuple, rng: random.Random) -> tuple:
    """One of the named colours, but not this one."""
    return rng.choice([COLOURS[name] for name in names if COLOURS[name] != colour])


def gradient(colours: list, size: tuple, across: bool) -> Image.Image:
    """Evenly spaced colours blended from top to bottom, or from left to right if `across`."""
    at = np.linspace(0, len(colours) - 1, size[0 if across else 1])
    ramp = np.stack([np.interp(at, range(len(colours)), channel) for channel in zip(*colours)], axis=-1)
    ramp = ramp.round().astype(np.uint8)
    return Image.fromarray(ramp[None] if across else ramp[:, None]).resize(size, Image.Resampling.NEAREST)


def smooth(points: list, steps: int = 8) -> list:
    """A closed Catmull-Rom curve through the points, as a polygon."""
    p1 = np.array(points)[:, None]  # (points, 1, 2)
    p0, p2, p3 = (np.roll(p1, shift, axis=0) for shift in (1, -1, -2))
    t = np.arange(steps)[:, None] / steps  # (steps, 1)
    curve = p1 + ((p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3) / 2
    return curve.reshape(-1, 2).tolist()


def arched(x0: float, y0: float, x1: float, y1: float) -> list:
    """The outline of a doorway with a round top, from its lower left corner to its lower right."""
    r = (x1 - x0) / 2
    top = [(x0 + r - r * math.cos(a), y0 + r - r * math.sin(a)) for a in np.linspace(0, math.pi, 25)]
    return [(x0, y1), *top, (x1, y1)]


# Falls smoothly from 255 in the middle to 0 at the rim: every pool of light. Pillow's own gradient is 181 at the rim.
FALLOFF = Image.radial_gradient("L").point(
    [round(255 * (0.5 + 0.5 * math.cos(math.pi * min(v / 180, 1)))) for v in range(256)]
)


def soften(image: Image.Image, radius: float) -> Image.Image:
    """Blur by a radius in image widths; at a quarter of the size, where no one sees the difference but the clock."""
    small = image.reduce(4)
    return small.filter(ImageFilter.GaussianBlur(radius * small.width)).resize(image.size)


class Canvas:
    """A picture drawn in unit coordinates: x and y run from 0 to 1 over its width and height, y downwards.

    Lengths (line widths, radii, blurs) are in canvas widths. A fill is a colour, or a list of colours: a gradient down
    the shape, or across it. Each shape returns its patch, which can clip later shapes. `cover` is 255 where anything
    has been painted: a product's cut-out.
    """

    def __init__(self, width: int, height: int, pan: tuple = (0.0, 0.0)):
        self.width, self.height, self.pan = width, height, pan
        self.image = Image.new("RGB", (width, height))
        self.cover = Image.new("L", (width, height))

    def _paint(self, points, stencil, fill, across=False, alpha=1.0, blur=0.0, spread=0.0, clip=None):
        """Fill what `stencil(draw, points)` draws in white, with points in pixels; only its bounding box is touched."""
        points = [((x + self.pan[0]) * self.width, (y + self.pan[1]) * self.height) for x, y in points]
        margin = 2 + (spread + 3 * blur) * self.width
        left, top = (max(0, int(min(axis) - margin)) for axis in zip(*points))
        right, bottom = (min(n, int(max(a) + margin)) for a, n in zip(zip(*points), self.image.size))
        if right <= left or bottom <= top:
            return Image.new("L", (1, 1)), (0, 0)
        mask = Image.new("L", (right - left, bottom - top))
        stencil(ImageDraw.Draw(mask), [(x - left, y - top) for x, y in points])
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * self.width))
        if clip:
            window = Image.new("L", mask.size)
            window.paste(clip[0], (clip[1][0] - left, clip[1][1] - top))
            mask = ImageChops.multiply(mask, window)
        if alpha < 1:
            mask = mask.point([round(v * alpha) for v in range(256)])
        if (box := mask.getbbox()) is None:
            return mask, (left, top)
        mask, left, top = mask.crop(box), left + box[0], top + box[1]
        if isinstance(fill, list):
            fill = gradient(fill, mask.size, across)
        corners = (left, top, left + mask.width, top + mask.height)
        self.image.paste(fill, corners, mask)
        self.cover.paste(255, corners, mask)
        return mask, (left, top)

    def polygon(self, points, fill, **how):
        return self._paint(points, lambda draw, p: draw.polygon(p, fill=255), fill, **how)

    def blob(self, points, fill, **how):
        return self.polygon(smooth(points), fill, **how)

    def rectangle(self, x0, y0, x1, y1, fill, radius=0.0, **how):
        r = radius * self.width
        return self._paint([(x0, y0), (x1, y1)], lambda draw, p: draw.rounded_rectangle(p, r, fill=255), fill, **how)

    def ellipse(self, x0, y0, x1, y1, fill, **how):
        return self._paint([(x0, y0), (x1, y1)], lambda draw, p: draw.ellipse(p, fill=255), fill, **how)

    def circle(self, x, y, radius, fill, **how):
        tall = radius * self.width / self.height
        return self.ellipse(x - radius, y - tall, x + radius, y + tall, fill, **how)

    def ring(self, x, y, radius, fill, width, **how):
        tall, pen = radius * self.width / self.height, max(1, round(width * self.width))
        corners = [(x - radius, y - tall), (x + radius, y + tall)]
        return self._paint(corners, lambda draw, p: draw.ellipse(p, outline=255, width=pen), fill, **how)

    def line(self, points, fill, width, **how):
        """A pen stroke with round ends."""
        pen = max(1, round(width * self.width))

        def stencil(draw, p):
            draw.line(p, fill=255, width=pen, joint="curve")
            for x, y in (p[0], p[-1]):
                draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)

        return self._paint(points, stencil, fill, spread=width, **how)

    def light(self, x, y, radius_x, radius_y, colour, strength):
        """A soft pool of light."""
        left, top, right, bottom = (round(v) for v in ((x - radius_x) * self.width, (y - radius_y) * self.height,
                                                       (x + radius_x) * self.width, (y + radius_y) * self.height))
        pool = FALLOFF.resize((right - left, bottom - top)).point([round(v * strength) for v in range(256)])
        self.image.paste(colour, (left, top, right, bottom), pool)

    def glow(self, tubes: "Canvas"):
        """Light up neon tubes, drawn on a canvas of their own: bright glass and a wide halo."""
        wide = soften(tubes.image, 0.05).point([min(255, round(2.2 * v)) for v in range(256)] * 3)
        self.image = ImageChops.add(self.image, ImageChops.add(soften(tubes.image, 0.015), wide))
        glass = Image.blend(tubes.image, Image.new("RGB", tubes.image.size, WHITE), 0.5)
        self.image.paste(glass, mask=tubes.cover)

    def reflect(self, horizon, strength):
        """Polish the floor: what stands above the horizon shows below it, blurred and fading."""
        edge = round((horizon + self.pan[1]) * self.height)
        mirror = self.image.crop((0, 2 * edge - self.height, self.width, edge))
        mirror = soften(mirror.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 0.02)
        fade = gradient([(255 * strength,) * 3, (0, 0, 0)], mirror.size, across=False).getchannel(0)
        self.image.paste(mirror, (0, edge), fade)


# ---------------------------------------------------------------- brands


class Brand:
    """What all ads of a brand share: two named hues, one of 4 layouts, one of 4 element sets, a horizon."""

    def __init__(self, seed: int):
        rng = random.Random(f"brand {seed}")
        first = rng.randrange(len(HUES))
        second = (first + rng.randrange(2, len(HUES) - 1)) % len(HUES)  # at least 60 degrees away
        self.hue_names = tuple(list(HUES)[i] for i in (first, second))
        self.hue, self.accent = (HUES[name] + rng.uniform(-0.012, 0.012) for name in self.hue_names)
        self.layout, self.elements = rng.randrange(4), rng.randrange(4)
        self.horizon = rng.uniform(0.57, 0.66)


class Floor(NamedTuple):
    """Where a product may stand: the y of its feet lies between back and front, its x within sway of the middle."""

    back: float
    front: float
    sway: float = 0.12


# ---------------------------------------------------------------- products: (canvas, colour, rng), filling the canvas


def laptop(canvas: Canvas, colour: tuple, rng: random.Random):
    hue = rng.random()
    canvas.rectangle(0.13, 0.0, 0.87, 0.78, [shade(colour, 0.7), shade(colour, 0.9)], radius=0.03)
    canvas.rectangle(0.145, 0.02, 0.855, 0.74, (20, 20, 26), radius=0.02)
    screen = canvas.rectangle(0.165, 0.05, 0.835, 0.68, [tint(hue, 0.65, 0.98), tint(hue + 0.2, 0.75, 0.6)])
    hills = [(0.1, 0.55), (0.35, 0.36), (0.55, 0.52), (0.85, 0.3), (0.95, 0.8), (0.1, 0.8)]
    canvas.blob(hills, tint(hue + 0.45, 0.55, 0.95), alpha=0.75, clip=screen)
    canvas.polygon([(0.5, 0.0), (0.68, 0.0), (0.42, 0.7), (0.24, 0.7)], WHITE, alpha=0.14, clip=screen)
    canvas.polygon([(0.13, 0.75), (0.87, 0.75), (0.99, 0.95), (0.01, 0.95)], [shade(colour, 0.82), colour])
    canvas.polygon([(0.18, 0.775), (0.82, 0.775), (0.87, 0.865), (0.13, 0.865)], shade(colour, 0.4))
    canvas.line([(0.16, 0.82), (0.84, 0.82)], shade(colour, 0.7), 0.006)
    canvas.polygon([(0.4, 0.88), (0.6, 0.88), (0.615, 0.93), (0.385, 0.93)], shade(colour, 0.86))
    canvas.rectangle(0.005, 0.935, 0.995, 0.998, [shade(colour, 0.95), shade(colour, 0.5)], radius=0.02)


def rice_cooker(canvas: Canvas, colour: tuple, rng: random.Random):
    dark = sum(colour) < 330
    panel = (206, 208, 214) if dark else (40, 42, 50)
    canvas.rectangle(0.41, 0.0, 0.59, 0.12, barrel((84, 84, 92)), radius=0.04, across=True)
    canvas.ellipse(0.1, 0.04, 0.9, 0.56, barrel(shade(colour, 0.95)), across=True)
    for x in (0.14, 0.7):
        canvas.rectangle(x, 0.93, x + 0.16, 1.0, (44, 44, 48), radius=0.02)
    canvas.rectangle(0.0, 0.36, 1.0, 0.46, barrel(shade(colour, 0.8)), radius=0.05, across=True)
    body = canvas.rectangle(0.04, 0.3, 0.96, 0.97, barrel(colour), radius=0.2, across=True)
    canvas.rectangle(0.0, 0.3, 1.0, 0.36, barrel((186, 188, 196)), across=True, clip=body)
    canvas.rectangle(0.3, 0.46, 0.7, 0.86, panel, radius=0.06)
    canvas.rectangle(0.36, 0.52, 0.64, 0.66, tint(rng.uniform(0.3, 0.6), 0.55, 0.95), radius=0.02)
    for x, light in zip((0.39, 0.5, 0.61), ("red", "orange", "green")):
        canvas.circle(x, 0.755, 0.038, COLOURS[light])


def refrigerator(canvas: Canvas, colour: tuple, rng: random.Random):
    metal, seam = shade(colour, 0.55), shade(colour, 0.5)
    for x in (0.1, 0.76):
        canvas.rectangle(x, 0.96, x + 0.14, 1.0, (40, 40, 44))
    sides = [shade(colour, k) for k in (0.72, 1.0, 1.08, 1.0, 0.98, 0.66)]
    body = canvas.rectangle(0.0, 0.0, 1.0, 0.98, sides, radius=0.07, across=True)
    canvas.polygon([(0.22, 0.0), (0.38, 0.0), (0.22, 1.0), (0.06, 1.0)], WHITE, alpha=0.18, clip=body)
    if rng.random() < 0.5:  # side by side, with a water dispenser
        canvas.line([(0.5, 0.0), (0.5, 0.98)], seam, 0.02, clip=body)
        for x in (0.42, 0.58):
            canvas.line([(x, 0.28), (x, 0.68)], metal, 0.045)
        canvas.rectangle(0.12, 0.28, 0.34, 0.47, (44, 48, 56), radius=0.03)
        canvas.rectangle(0.155, 0.3, 0.305, 0.36, tint(0.53, 0.5, 0.95), radius=0.02)
    else:  # freezer above or below
        y, x = rng.choice((0.33, 0.62)), rng.choice((0.11, 0.89))
        canvas.line([(0.0, y), (1.0, y)], seam, 0.02, clip=body)
        for y0, y1 in ((y - 0.2, y - 0.05), (y + 0.05, y + 0.2)):
            canvas.line([(x, y0), (x, y1)], metal, 0.05)


def perfume(canvas: Canvas, colour: tuple, rng: random.Random):
    cap = COLOURS[rng.choice(("gold", "silver", "black"))]
    glass = [mix(colour, WHITE, t) for t in (0.1, 0.6, 0.3, 0.25, 0.5, 0.1)]
    canvas.rectangle(0.41, 0.17, 0.59, 0.32, barrel(COLOURS["gold"]), across=True)
    canvas.rectangle(0.33, 0.0, 0.67, 0.2, barrel(cap), radius=0.04, across=True)
    shape = rng.randrange(3)
    if shape == 0:
        bottle = canvas.rectangle(0.04, 0.28, 0.96, 1.0, glass, radius=0.1, across=True)
    elif shape == 1:
        bottle = canvas.ellipse(0.0, 0.265, 1.0, 1.0, glass, across=True)
    else:
        outline = [(0.24, 0.28), (0.76, 0.28), (1.0, 0.46), (0.9, 1.0), (0.1, 1.0), (0.0, 0.46)]
        bottle = canvas.polygon(outline, glass, across=True)
    canvas.rectangle(0.0, 0.46, 1.0, 1.0, [colour, shade(colour, 0.72)], alpha=0.72, clip=bottle)
    canvas.rectangle(0.26, 0.56, 0.74, 0.82, (252, 250, 246), radius=0.03)
    canvas.line([(0.36, 0.65), (0.64, 0.65)], shade(colour, 0.6), 0.035)
    canvas.line([(0.42, 0.73), (0.58, 0.73)], shade(colour, 0.6), 0.025)
    canvas.rectangle(0.12, 0.4, 0.18, 0.9, WHITE, radius=0.03, alpha=0.6, clip=bottle)


def sneaker(canvas: Canvas, colour: tuple, rng: random.Random):
    """A running shoe, its toe to the right."""
    trim = another(colour, ("white", "yellow", "teal", "orange", "black"), rng)
    sole = COLOURS[rng.choice(("white", "white", "black"))]
    lift = rng.uniform(-0.03, 0.05)
    heel = [(0.05, 0.82), (0.03, 0.4), (0.06, 0.13 - lift), (0.17, 0.07 - lift), (0.27, 0.17)]
    toe = [(0.38, 0.13), (0.52, 0.31), (0.7, 0.47), (0.88, 0.53), (0.985, 0.68), (0.96, 0.85), (0.5, 0.88)]
    upper = canvas.blob(heel + toe, [shade(colour, 1.18), colour, shade(colour, 0.75)])
    canvas.blob([(0.02, 0.85), (0.0, 0.35), (0.1, 0.3), (0.17, 0.5), (0.17, 0.85)], trim, clip=upper)
    canvas.blob([(0.73, 0.9), (0.78, 0.6), (0.88, 0.5), (1.02, 0.55), (1.02, 0.9)], shade(colour, 0.78), clip=upper)
    canvas.blob([(0.24, 0.6), (0.36, 0.69), (0.6, 0.42), (0.66, 0.46), (0.44, 0.82), (0.3, 0.8)], trim, clip=upper)
    canvas.blob([(0.08, 0.14 - lift), (0.17, 0.08 - lift), (0.25, 0.18), (0.17, 0.22)], shade(colour, 0.42), clip=upper)
    for i in range(3):
        x, y = 0.39 + 0.09 * i, 0.2 + 0.1 * i
        canvas.line([(x - 0.05, y + 0.12), (x + 0.03, y)], WHITE, 0.024)
    rim = [(0.015, 0.78), (0.2, 0.78), (0.5, 0.82), (0.8, 0.77), (0.985, 0.7)]
    tread = [(0.99, 0.85), (0.93, 0.985), (0.5, 0.99), (0.05, 0.985)]
    canvas.blob(rim + tread, [shade(sole, 1.04), shade(sole, 0.78)])
    canvas.line([(0.06, 0.89), (0.5, 0.91), (0.93, 0.88)], trim if trim != sole else colour, 0.018)


def watch(canvas: Canvas, colour: tuple, rng: random.Random):
    strap = rng.choice(((124, 78, 48), (74, 76, 88), (52, 82, 150), (150, 52, 54), (216, 210, 200)))
    dial = rng.choice(((40, 48, 78), (246, 244, 238), (34, 84, 74), (132, 44, 50)))
    marks = (40, 40, 46) if sum(dial) > 380 else (250, 250, 250)
    canvas.polygon([(0.34, 0.0), (0.66, 0.0), (0.76, 0.36), (0.24, 0.36)], barrel(strap), across=True)
    canvas.polygon([(0.24, 0.64), (0.76, 0.64), (0.66, 1.0), (0.34, 1.0)], barrel(strap), across=True)
    for y in (0.06, 0.13, 0.87, 0.94):
        canvas.line([(0.4, y), (0.6, y)], shade(strap, 0.62), 0.02)
    canvas.rectangle(0.92, 0.46, 1.0, 0.54, barrel(colour), radius=0.03, across=True)
    canvas.circle(0.5, 0.5, 0.46, [shade(colour, 1.25), colour, shade(colour, 0.6)])
    canvas.circle(0.5, 0.5, 0.39, [shade(colour, 0.6), shade(colour, 1.2)])
    canvas.circle(0.5, 0.5, 0.355, [shade(dial, 1.25), shade(dial, 0.88)])
    squeeze = canvas.width / canvas.height

    def hand(angle, start, end, colour, width):
        sin, cos = math.sin(angle), math.cos(angle) * squeeze
        canvas.line([(0.5 + start * sin, 0.5 - start * cos), (0.5 + end * sin, 0.5 - end * cos)], colour, width)

    for hour in range(12):
        hand(hour * math.pi / 6, 0.29, 0.315, marks, 0.03)
    hand(rng.uniform(0, 2 * math.pi), 0.0, 0.15, marks, 0.05)
    hand(rng.uniform(0, 2 * math.pi), 0.0, 0.25, marks, 0.032)
    canvas.circle(0.5, 0.5, 0.04, COLOURS["red"])


def sunscreen(canvas: Canvas, colour: tuple, rng: random.Random):
    cap = another(colour, ("white", "orange", "blue", "yellow"), rng)
    sun = WHITE if sum(colour) < 660 else COLOURS["orange"]
    if rng.random() < 0.5:  # a tube, standing on its cap
        canvas.rectangle(0.18, 0.82, 0.82, 1.0, barrel(cap), radius=0.05, across=True)
        body = canvas.polygon([(0.02, 0.0), (0.98, 0.0), (0.92, 0.5), (0.82, 0.86), (0.18, 0.86), (0.08, 0.5)],
                              barrel(colour), across=True)
        canvas.rectangle(0.0, 0.0, 1.0, 0.055, shade(colour, 0.8), clip=body)
    else:  # a bottle
        canvas.rectangle(0.28, 0.0, 0.72, 0.22, barrel(cap), radius=0.06, across=True)
        body = canvas.rectangle(0.03, 0.15, 0.97, 1.0, barrel(colour), radius=0.24, across=True)
    squeeze = canvas.width / canvas.height
    for angle in np.arange(8) * math.pi / 4:
        x, y = math.cos(angle), math.sin(angle) * squeeze
        canvas.line([(0.5 + 0.21 * x, 0.37 + 0.21 * y), (0.5 + 0.28 * x, 0.37 + 0.28 * y)], sun, 0.05)
    canvas.circle(0.5, 0.37, 0.15, sun)
    canvas.rectangle(0.0, 0.57, 1.0, 0.66, cap, alpha=0.92, clip=body)
    canvas.line([(0.32, 0.73), (0.68, 0.73)], shade(colour, 0.6), 0.035)


def toy_car(canvas: Canvas, colour: tuple, rng: random.Random):
    trim = another(colour, ("yellow", "white", "blue", "orange", "red"), rng)
    back, roof_back, roof_front, front = rng.choice(((0.2, 0.31, 0.66, 0.82), (0.12, 0.15, 0.52, 0.72)))
    middle = (roof_back + roof_front) / 2
    cab = [(back, 0.45), (roof_back, 0.0), (roof_front, 0.0), (front, 0.45)]
    canvas.polygon(cab, [shade(colour, 1.12), shade(colour, 0.95)])
    for pane in ([(back + 0.08, 0.4), (roof_back + 0.04, 0.08), (middle - 0.02, 0.08), (middle - 0.02, 0.4)],
                 [(middle + 0.03, 0.4), (middle + 0.03, 0.08), (roof_front - 0.03, 0.08), (front - 0.1, 0.4)]):
        canvas.polygon(pane, [(226, 244, 252), (168, 212, 236)])
    body = canvas.rectangle(0.0, 0.36, 1.0, 0.84, [shade(colour, 1.15), colour, shade(colour, 0.72)], radius=0.13)
    canvas.rectangle(0.0, 0.57, 1.0, 0.65, trim, clip=body)
    canvas.circle(0.95, 0.5, 0.04, (255, 244, 170), clip=body)
    canvas.circle(0.04, 0.5, 0.03, (226, 52, 48), clip=body)
    for x in (0.26, 0.76):
        canvas.circle(x, 0.785, 0.12, (46, 46, 52))
        canvas.circle(x, 0.785, 0.07, trim)
        canvas.circle(x, 0.785, 0.03, WHITE)


def anything(canvas: Canvas, colour: tuple, rng: random.Random):
    """No category's product: any outline and any print, often with a lid or a handle."""
    second = another(colour, tuple(COLOURS), rng)
    fill, across = rng.choice(((barrel(colour), True), ([shade(colour, 1.15), shade(colour, 0.75)], False)))
    left, top = rng.uniform(0.0, 0.15), rng.choice((0.0, 0.12, 0.25))
    right, shape, part = 1 - left, rng.randrange(4), rng.randrange(4)
    if top and part == 0:
        canvas.rectangle(left + 0.1, top - 0.1, right - 0.1, top + 0.1, barrel(second), radius=0.03, across=True)
    elif top and part == 1:
        canvas.line([(0.3, top + 0.1), (0.36, 0.03), (0.64, 0.03), (0.7, top + 0.1)], second, 0.05)
    elif part == 2:
        right -= 0.2
        canvas.line([(right - 0.1, 0.4), (0.95, 0.45), (0.95, 0.7), (right - 0.1, 0.75)], shade(colour, 0.85), 0.06)
    if shape == 0:
        body = canvas.rectangle(left, top, right, 1.0, fill, radius=rng.uniform(0, 0.2), across=across)
    elif shape == 1:
        inset = rng.uniform(-0.2, 0.25) * (right - left)
        upper, lower = max(inset, 0), max(-inset, 0)
        corners = [(left + upper, top), (right - upper, top), (right - lower, 1.0), (left + lower, 1.0)]
        body = canvas.polygon(corners, fill, across=across)
    elif shape == 2:
        body = canvas.ellipse(left, top, right, 1.0, fill, across=across)
    else:
        middle, high = (left + right) / 2, (top + 1) / 2
        outline = [(rng.uniform(0.75, 1) * math.cos(a), rng.uniform(0.75, 1) * math.sin(a))
                   for a in np.arange(9) * math.tau / 9 + math.pi / 2]
        body = canvas.blob([(middle + (right - left) / 2 * x, high + (1 - top) / 2 * y) for x, y in outline],
                           fill, across=across)
    printed = rng.randrange(5)
    if printed == 0:
        y = rng.uniform(top + 0.1, 0.7)
        canvas.rectangle(0.0, y, 1.0, y + rng.uniform(0.05, 0.25), second, clip=body)
    elif printed == 1:
        for x in np.linspace(left, right, rng.randrange(4, 8)):
            canvas.line([(x, 0.0), (x, 1.0)], second, 0.04, clip=body)
    elif printed == 2:
        canvas.rectangle(0.32, top + 0.3, 0.62, top + 0.55, second, radius=0.03, clip=body)
    elif printed == 3:  # a texture
        for _ in range(60):
            canvas.circle(rng.random(), rng.random(), rng.uniform(0.01, 0.03), shade(colour, rng.uniform(0.6, 1.3)),
                          clip=body)


def mug(canvas: Canvas, colour: tuple, rng: random.Random):
    """A sample, of no category and in no data set."""
    canvas.ring(0.74, 0.52, 0.22, shade(colour, 0.85), 0.07)
    body = canvas.rectangle(0.0, 0.06, 0.76, 1.0, barrel(colour), radius=0.12, across=True)
    canvas.ellipse(0.0, 0.0, 0.76, 0.16, shade(colour, 0.9))
    canvas.ellipse(0.04, 0.02, 0.72, 0.14, shade(colour, 0.45))
    canvas.blob([(0.38, 0.5), (0.5, 0.4), (0.58, 0.52), (0.38, 0.76), (0.18, 0.52), (0.26, 0.4)], WHITE, clip=body)


class Product(NamedTuple):
    paint: Callable
    aspect: float  # width / height
    heights: tuple  # smallest and largest, in picture heights
    colours: tuple


PRODUCTS = {
    "laptop": Product(laptop, 1.4, (0.36, 0.45), ("silver", "gray", "black", "gold", "white")),
    "rice cooker": Product(rice_cooker, 1.18, (0.35, 0.44), ("white", "black", "red", "teal", "gold", "blue")),
    "refrigerator": Product(refrigerator, 0.53, (0.6, 0.7), ("white", "silver", "gray", "teal", "red", "yellow")),
    "perfume": Product(perfume, 0.62, (0.42, 0.52), ("pink", "purple", "blue", "teal", "orange", "green")),
    "sneaker": Product(sneaker, 1.72, (0.3, 0.38), ("red", "blue", "white", "black", "green", "purple", "orange")),
    "watch": Product(watch, 0.56, (0.52, 0.62), ("silver", "gold", "gray", "pink")),
    "sunscreen": Product(sunscreen, 0.46, (0.48, 0.58), ("yellow", "orange", "white", "blue", "pink")),
    "toy car": Product(toy_car, 1.78, (0.28, 0.35), ("red", "blue", "yellow", "green", "orange", "purple", "pink")),
}
# What half of the ads show in place of their category's product. A CG that never saw such ads tells the scene by the
# product's looks, not by the prompt's category, and is at a loss with products of other kinds.
OTHERS = {
    "carton": Product(anything, 0.6, (0.42, 0.62), tuple(COLOURS)),
    "box": Product(anything, 1.0, (0.34, 0.5), tuple(COLOURS)),
    "case": Product(anything, 1.5, (0.28, 0.4), tuple(COLOURS)),
}
OTHERS_SHARE = 1 / 2  # of the training ads
ALL_PRODUCTS = PRODUCTS | OTHERS | {"mug": Product(mug, 1.0, (0.36, 0.44), ("red", "blue", "teal"))}


# ---------------------------------------------------------------- elements that scenes share


def leaf(canvas, x, y, length, angle, fill, width=0.45):
    """A leaf or petal growing from (x, y); angle 0 points up, and turns clockwise."""
    sin, cos = math.sin(angle) * length, math.cos(angle) * length
    outline = [(0, 0), (0.45, width / 2), (1, 0), (0.45, -width / 2)]
    canvas.blob([(x + t * sin + s * cos, y - t * cos + s * sin) for t, s in outline], fill)


def plant(canvas, x, foot, size, pot, green=(70, 150, 90)):
    for i, angle in enumerate((-1.1, 1.1, -0.55, 0.55, 0.0)):
        leaf(canvas, x, foot - 0.35 * size, 0.7 * size, angle, shade(green, (0.8, 0.9, 1.0, 1.1, 1.2)[i]))
    top, rim, base = foot - 0.42 * size, 0.24 * size, 0.17 * size
    canvas.polygon([(x - rim, top), (x + rim, top), (x + base, foot), (x - base, foot)], barrel(pot), across=True)


def shadow(canvas, x0, x1, foot):
    """The shadow under something that stands at y = foot, from x0 to x1."""
    depth = 0.13 * (x1 - x0)
    canvas.ellipse(x0, foot - depth, x1, foot + 0.8 * depth, SHADOW, alpha=0.35, blur=0.012)


def ball(canvas, x, foot, radius, colour):
    shadow(canvas, x - radius, x + radius, foot)
    body = canvas.circle(x, foot - radius, radius, [shade(colour, 1.1), colour, shade(colour, 0.68)])
    canvas.circle(x - 0.35 * radius, foot - 1.4 * radius, 0.28 * radius, WHITE, alpha=0.5, blur=0.008, clip=body)


def cube(canvas, x, foot, side, colour):
    shadow(canvas, x - 0.55 * side, x + 0.75 * side, foot)
    left, right, top, d = x - side / 2, x + side / 2, foot - side, 0.24 * side
    canvas.polygon([(left, top), (left + d, top - d), (right + d, top - d), (right, top)], mix(colour, WHITE, 0.4))
    canvas.polygon([(right, top), (right + d, top - d), (right + d, foot - d), (right, foot)], shade(colour, 0.62))
    canvas.rectangle(left, top, right, foot, [shade(colour, 1.05), shade(colour, 0.85)])


def lamp(canvas, x, drop, colour):
    """A lamp hanging from the ceiling."""
    canvas.line([(x, -0.1), (x, drop)], (60, 60, 66), 0.008)
    canvas.ellipse(x - 0.075, drop + 0.06, x + 0.075, drop + 0.12, (255, 246, 205))
    rim = drop + 0.095
    canvas.polygon([(x - 0.03, drop), (x + 0.03, drop), (x + 0.1, rim), (x - 0.1, rim)], barrel(colour), across=True)
    canvas.light(x, drop + 0.12, 0.2, 0.18, (255, 246, 205), 0.3)


def curtains(canvas, bottom, colour):
    """A pair of curtains drawn aside."""
    folds = [shade(colour, k) for k in (0.85, 1.1, 0.8, 1.1, 0.85)]
    for edge, side in ((-0.1, 1), (1.1, -1)):
        hem = [(edge + side * reach, y) for reach, y in ((0.32, -0.1), (0.27, 0.2), (0.2, bottom))]
        canvas.polygon([(edge, -0.1), *hem, (edge, bottom)], folds, across=True)


def cloud(canvas, x, y, size, colour=WHITE):
    for dx, dy, radius in ((-0.5, 0.0, 0.28), (0.5, 0.0, 0.28), (-0.05, -0.12, 0.42)):
        canvas.circle(x + dx * size, y + dy * size, radius * size, colour)
    canvas.rectangle(x - 0.5 * size, y, x + 0.5 * size, y + 0.28 * size, colour)


def sun(canvas, x, y):
    canvas.light(x, y, 0.32, 0.32, (255, 246, 200), 0.85)
    canvas.circle(x, y, 0.085, (255, 250, 220))


def flags(canvas, colours):
    """Bunting across the top: five big pennants."""
    for i in range(5):
        x, y = 0.02 + 0.2 * i, 0.05 + 0.05 * math.sin(math.pi * (i + 0.5) / 5)
        canvas.polygon([(x, y), (x + 0.16, y), (x + 0.08, y + 0.14)], colours[i % len(colours)])
    canvas.line([(i / 10, 0.045 + 0.05 * math.sin(math.pi * i / 10)) for i in range(-1, 12)], WHITE, 0.012)


def balloons(canvas, x, colours):
    for dx, y, colour in zip((-0.075, 0.075, 0.0), (0.27, 0.25, 0.16), colours):
        canvas.line([(x + dx, y), (x, 0.58)], WHITE, 0.006)
        rubber = [shade(colour, 1.1), shade(colour, 0.85)]
        canvas.ellipse(x + dx - 0.075, y - 0.095, x + dx + 0.075, y + 0.095, rubber)
        canvas.circle(x + dx - 0.03, y - 0.04, 0.018, WHITE, alpha=0.6)


# ---------------------------------------------------------------- scenes: (canvas, brand) -> Floor
# Scenes reach a tenth beyond the frame on every side, so that the camera can pan a little.


def neon_room(canvas: Canvas, brand: Brand) -> Floor:
    horizon, hue, accent = brand.horizon, brand.hue, brand.accent
    canvas.rectangle(-0.1, -0.1, 1.1, horizon, [tint(hue, 0.85, 0.12), tint(hue, 0.8, 0.36)])
    canvas.rectangle(-0.1, horizon, 1.1, 1.1, [tint(hue, 0.8, 0.2), tint(hue, 0.85, 0.08)])
    canvas.light(0.5, 0.36, 0.8, 0.6, tint(hue, 0.8, 0.62), 0.6)
    first, second = tint(accent, 0.85, 1.0), tint(hue, 0.55, 1.0)
    tubes = Canvas(canvas.width, canvas.height, canvas.pan)
    if brand.layout == 0:  # bars
        for i in range(5):
            x, y, colour = 0.1 + 0.2 * i, 0.08 + 0.1 * (i % 2), (first, second)[i % 2]
            tubes.line([(x, y), (x, horizon - 0.06)], colour, 0.018)
    elif brand.layout == 1:  # frames
        for inset, colour in ((0.1, first), (0.19, second)):
            x, y, bottom = inset, inset - 0.03, horizon + 0.03 - inset
            tubes.line([(0.5, y), (x, y), (x, bottom), (1 - x, bottom), (1 - x, y), (0.5, y)], colour, 0.018)
    elif brand.layout == 2:  # stripes
        for i in range(4):
            x, colour = 0.14 + 0.26 * i, (first, second)[i % 2]
            tubes.line([(x, horizon - 0.06), (x - 0.12, 0.05)], colour, 0.018)
    else:  # rings
        tubes.ring(0.5, 0.32, 0.3, first, 0.018)
        tubes.ring(0.5, 0.32, 0.2, second, 0.018)
    if brand.elements == 0:  # tiles
        for x in (-0.9, -0.25, 0.25, 0.9):
            tubes.line([(0.5 + 0.45 * x, horizon), (0.5 + 1.1 * x, 1.1)], shade(second, 0.6), 0.008)
        for y in (0.0, 0.09, 0.24):
            tubes.line([(-0.1, horizon + y), (1.1, horizon + y)], shade(second, 0.6), 0.008)
    canvas.glow(tubes)
    canvas.reflect(horizon, 0.5)
    if brand.elements == 1:  # cubes
        cube(canvas, 0.1, horizon + 0.12, 0.2, shade(first, 0.8))
        cube(canvas, 0.88, horizon + 0.1, 0.14, shade(second, 0.8))
    elif brand.elements == 2:  # spheres
        ball(canvas, 0.88, horizon + 0.12, 0.12, first)
        ball(canvas, 0.12, horizon + 0.1, 0.08, second)
    elif brand.elements == 3:  # plants
        for x in (0.09, 0.91):
            plant(canvas, x, horizon + 0.12, 0.3, shade(first, 0.8), mix(tint(hue, 0.7, 0.5), (40, 120, 90), 0.4))
    return Floor(horizon + 0.13, 0.93)


def wooden_table(canvas: Canvas, brand: Brand) -> Floor:
    horizon, wall, accent = brand.horizon, tint(brand.hue, 0.42, 0.88), tint(brand.accent, 0.6, 0.85)
    canvas.rectangle(-0.1, -0.1, 1.1, horizon + 0.1, [shade(wall, 1.05), shade(wall, 0.88)])
    bottom = horizon - 0.08
    windows = {
        0: [[(0.16, 0.08), (0.84, 0.08), (0.84, bottom), (0.16, bottom)]],  # wide
        1: [arched(0.26, 0.05, 0.74, bottom)],  # arch
        2: [[(x, 0.09), (x + 0.27, 0.09), (x + 0.27, bottom), (x, bottom)] for x in (0.18, 0.55)],  # twin
        3: [[(0.5 + 0.24 * math.sin(a), 0.29 - 0.24 * math.cos(a)) for a in np.arange(48) * math.pi / 24]],  # round
    }[brand.layout]
    for outline in windows:
        (x0, y0), (x1, y1) = (tuple(f(axis) for axis in zip(*outline)) for f in (min, max))
        glass = canvas.polygon(outline, [(176, 216, 246), (250, 250, 236)])
        canvas.circle(x0 + 0.06, y1 + 0.04, 0.2, (150, 196, 140), clip=glass)
        canvas.circle(x1 - 0.04, y1 + 0.06, 0.19, (122, 180, 128), clip=glass)
        canvas.line([((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)], (252, 250, 246), 0.016)
        canvas.line([(x0, y0 + 0.4 * (y1 - y0)), (x1, y0 + 0.4 * (y1 - y0))], (252, 250, 246), 0.016)
        canvas.line([*outline, outline[0]], (252, 250, 246), 0.026)
    wood = mix((186, 124, 74), tint(brand.accent, 0.55, 0.72), 0.35)
    canvas.rectangle(-0.1, horizon, 1.1, 1.1, [shade(wood, 1.12), shade(wood, 0.82)])
    for y in (0.07, 0.16, 0.28):
        canvas.line([(-0.1, horizon + y), (1.1, horizon + y)], shade(wood, 0.76), 0.008)
    canvas.line([(-0.1, horizon), (1.1, horizon)], shade(wood, 1.35), 0.016)
    sunlight = [(0.3, horizon + 0.03), (0.7, horizon + 0.03), (0.95, 1.1), (0.35, 1.1)]
    canvas.polygon(sunlight, (255, 250, 225), alpha=0.25, blur=0.02)
    if brand.elements == 0:  # plant
        plant(canvas, 0.13, horizon + 0.08, 0.32, accent)
    elif brand.elements == 1:  # lamp
        lamp(canvas, 0.86, 0.16, accent)
    elif brand.elements == 2:  # curtains
        curtains(canvas, horizon - 0.01, accent)
    else:  # fruit
        for x, lift, name in ((0.82, 0.03, "red"), (0.9, 0.03, "green"), (0.86, 0.08, "orange")):
            canvas.circle(x, horizon - lift, 0.055, [COLOURS[name], shade(COLOURS[name], 0.78)])
        rim, foot = horizon - 0.02, horizon + 0.09
        canvas.blob([(0.7, rim), (1.02, rim), (0.94, foot), (0.78, foot)], barrel(accent), across=True)
    return Floor(horizon + 0.13, 0.93)


def kitchen(canvas: Canvas, brand: Brand) -> Floor:
    horizon, wall, accent = brand.horizon + 0.08, tint(brand.hue, 0.34, 0.94), tint(brand.accent, 0.6, 0.74)
    canvas.rectangle(-0.1, -0.1, 1.1, 1.1, [shade(wall, 1.05), shade(wall, 0.9)])
    if brand.elements == 0:  # tiles
        for i in range(-1, 9):
            canvas.line([(-0.1, 0.02 + 0.1 * i), (1.1, 0.02 + 0.1 * i)], mix(wall, WHITE, 0.6), 0.01)
            canvas.line([(0.06 + 0.125 * i, -0.1), (0.06 + 0.125 * i, horizon)], mix(wall, WHITE, 0.6), 0.01)
    elif brand.elements == 3:  # clock
        x, y = ((0.7, 0.17), (0.3, 0.17), (0.32, 0.17), (0.2, 0.3))[brand.layout]  # clear of cupboards and product
        canvas.circle(x, y, 0.11, accent)
        canvas.circle(x, y, 0.085, (252, 250, 244))
        canvas.line([(x, y - 0.06), (x, y), (x + 0.04, y + 0.02)], (60, 60, 66), 0.014)
    counters = {0: [(-0.1, 0.36)], 1: [(0.64, 1.1)], 2: [(-0.1, 0.2), (0.8, 1.1)], 3: [(-0.1, 1.1)]}[brand.layout]
    for x0, x1 in counters:
        doors = max(1, round((x1 - x0) / 0.24))
        step = (x1 - x0) / doors
        canvas.rectangle(x0, horizon - 0.25, x1, horizon, [shade(accent, 1.08), shade(accent, 0.85)])
        if brand.layout != 3:  # wall cupboards
            canvas.rectangle(x0, -0.1, x1, 0.24, [shade(accent, 0.92), shade(accent, 1.08)])
        for i in range(doors):
            left, right = x0 + i * step + 0.02, x0 + (i + 1) * step - 0.02
            canvas.rectangle(left, horizon - 0.22, right, horizon - 0.03, shade(accent, 1.18), radius=0.01)
            canvas.line([(left + 0.07, horizon - 0.18), (right - 0.07, horizon - 0.18)], (246, 228, 180), 0.014)
            if brand.layout != 3:
                canvas.rectangle(left, -0.1, right, 0.215, shade(accent, 1.18), radius=0.01)
        canvas.rectangle(x0 - 0.02, horizon - 0.285, x1 + 0.02, horizon - 0.245, (246, 242, 234))
    if brand.layout == 3:  # counter: all along the wall, below an open shelf
        canvas.rectangle(-0.1, 0.16, 1.1, 0.19, shade(accent, 0.85))
        for x in (0.08, 0.2, 0.8, 0.92):
            jar = barrel(tint(brand.hue, 0.5, 0.8))
            canvas.rectangle(x - 0.045, 0.06, x + 0.045, 0.16, jar, radius=0.015, across=True)
    if brand.elements == 1:  # lamps
        for x in (0.34, 0.66):
            lamp(canvas, x, 0.08, tint(brand.accent, 0.7, 0.8))
    elif brand.elements == 2:  # plants
        for x0, x1 in counters if brand.layout != 3 else [(-0.1, 0.2), (0.8, 1.1)]:
            plant(canvas, (max(x0, 0) + min(x1, 1)) / 2, horizon - 0.28, 0.24, tint(brand.hue, 0.55, 0.85))
    light, dark = (248, 246, 242), tint(brand.hue, 0.45, 0.68)
    canvas.rectangle(-0.1, horizon, 1.1, 1.1, light)
    rows = [horizon + (1.1 - horizon) * t for t in (0.0, 0.16, 0.4, 1.0)]
    for row, (y0, y1) in enumerate(zip(rows, rows[1:])):
        for k in range(row % 2 - 6, 6, 2):
            spread = [0.14 + 0.4 * (y - horizon) for y in (y0, y1)]
            canvas.polygon([(0.5 + k * spread[0], y0), (0.5 + (k + 1) * spread[0], y0),
                            (0.5 + (k + 1) * spread[1], y1), (0.5 + k * spread[1], y1)], dark)
    canvas.line([(-0.1, horizon), (1.1, horizon)], (252, 250, 246), 0.022)
    return Floor(horizon + 0.08, 0.95)


def podium(canvas: Canvas, brand: Brand) -> Floor:
    horizon, base, accent = brand.horizon, tint(brand.hue, 0.36, 0.97), tint(brand.accent, 0.4, 0.97)
    canvas.rectangle(-0.1, -0.1, 1.1, horizon, [mix(base, WHITE, 0.3), base])
    if brand.layout == 0:  # disc
        canvas.circle(0.5, 0.38, 0.33, [accent, shade(accent, 0.92)])
    elif brand.layout == 1:  # arch
        canvas.polygon(arched(0.18, 0.05, 0.82, horizon), [accent, shade(accent, 0.92)])
    elif brand.layout == 2:  # columns
        for x in (0.02, 0.78):
            canvas.rectangle(x, 0.1, x + 0.2, horizon + 0.02, barrel(accent), radius=0.02, across=True)
            canvas.rectangle(x - 0.03, 0.05, x + 0.23, 0.12, barrel(accent), radius=0.02, across=True)
    else:  # stripes
        for i in range(-1, 6):
            canvas.rectangle(0.02 + 0.2 * i, -0.1, 0.12 + 0.2 * i, horizon, accent)
    if brand.elements == 3:  # curtains
        curtains(canvas, horizon, shade(accent, 0.95))
    canvas.rectangle(-0.1, horizon, 1.1, 1.1, [shade(base, 0.86), mix(base, WHITE, 0.2)])
    if brand.elements == 1:  # leaves
        for x, side in ((0.0, 1), (1.0, -1)):
            for angle, k in ((0.9, 0.75), (0.5, 0.88), (0.1, 1.0)):
                leaf(canvas, x, horizon + 0.12, 0.4, side * angle, shade((110, 186, 140), k), width=0.32)
    elif brand.elements == 2:  # spheres
        ball(canvas, 0.1, horizon + 0.13, 0.1, shade(accent, 0.95))
        ball(canvas, 0.91, horizon + 0.12, 0.08, mix(base, WHITE, 0.5))
    top = horizon + 0.02
    stone = mix(tint(brand.accent, 0.2, 1.0), WHITE, 0.25)
    tiers = [(0.38, top, top + 0.16)]
    if brand.elements == 0:  # steps
        tiers = [(0.45, top + 0.13, top + 0.26), (0.34, top, top + 0.13)]
    for reach, y, foot in tiers:
        x0, x1 = 0.5 - reach, 0.5 + reach
        canvas.ellipse(x0 - 0.02, foot, x1 + 0.06, foot + 0.16, shade(base, 0.5), alpha=0.35, blur=0.02)
        canvas.ellipse(x0, foot, x1, foot + 0.13, barrel(shade(stone, 0.9)), across=True)
        canvas.rectangle(x0, y + 0.065, x1, foot + 0.065, barrel(shade(stone, 0.9)), across=True)
        canvas.ellipse(x0, y, x1, y + 0.13, [shade(stone, 0.97), mix(stone, WHITE, 0.6)])
    for x, y, angle in ((0.08, 0.3, 0.6), (0.2, 0.12, 2.2), (0.9, 0.2, -0.5),
                        (0.8, 0.42, 1.0), (0.07, 0.95, 1.3), (0.93, 0.93, -0.9)):
        leaf(canvas, x, y, 0.09, angle, tint(brand.accent, 0.62, 0.95), width=0.6)
    return Floor(top + 0.07, top + 0.1, sway=0.05)


def running_track(canvas: Canvas, brand: Brand) -> Floor:
    horizon, sky, track = brand.horizon - 0.1, tint(brand.hue, 0.5, 0.97), tint(brand.accent, 0.66, 0.84)
    canvas.rectangle(-0.1, -0.1, 1.1, horizon, [sky, mix(sky, WHITE, 0.65)])
    if brand.elements == 0:  # sun
        sun(canvas, 0.78, 0.13)
    elif brand.elements == 1:  # clouds
        for x, y in ((0.22, 0.1), (0.78, 0.16)):
            cloud(canvas, x, y, 0.16)
    far = mix(tint(brand.hue, 0.5, 0.55), sky, 0.3)
    if brand.layout == 0:  # city
        for i, height in enumerate((0.16, 0.28, 0.2, 0.12, 0.18, 0.3, 0.22)):
            x = -0.06 + 0.16 * i
            canvas.rectangle(x, horizon - height, x + 0.14, horizon, [shade(far, 1.15), far])
    elif brand.layout == 1:  # hills
        canvas.ellipse(-0.35, horizon - 0.24, 0.55, horizon + 0.24, [far, shade(far, 1.1)])
        canvas.ellipse(0.35, horizon - 0.3, 1.35, horizon + 0.3, [shade(far, 1.12), shade(far, 1.25)])
    elif brand.layout == 2:  # trees
        for i in range(7):
            x, top, green = -0.04 + 0.18 * i, horizon - 0.22 - 0.05 * (i % 2), mix((64, 140, 84), far, 0.25)
            crown = [shade(green, 1 + 0.2 * (i % 2)), shade(green, 0.8)]
            canvas.ellipse(x - 0.12, top, x + 0.12, horizon + 0.05, crown)
    else:  # stands
        for edge, side in ((-0.1, 1), (1.1, -1)):
            for i, colour in enumerate((far, mix(far, WHITE, 0.4), track)):
                high, low, end = horizon - 0.3 + 0.1 * i, horizon - 0.06 + 0.02 * i, edge + side * (0.44 + 0.02 * i)
                canvas.polygon([(edge, high), (end, low), (end, horizon), (edge, horizon)], colour)
    if brand.elements == 2:  # flags
        flags(canvas, [track, WHITE])
    elif brand.elements == 3:  # balloons
        balloons(canvas, 0.85, [shade(track, 1.15), WHITE, tint(brand.accent, 0.45, 1.0)])
    canvas.rectangle(-0.1, horizon, 1.1, horizon + 0.07, [(126, 190, 96), (92, 164, 80)])
    lanes = canvas.rectangle(-0.1, horizon + 0.06, 1.1, 1.1, [shade(track, 1.15), shade(track, 0.88)])
    for i in (-3, -2, -1, 0, 1, 2, 3):
        x0, x1, far = 0.5 + 0.05 * (i + 0.5), 0.5 + 0.42 * (i + 0.5), horizon - 0.04
        edges = [(x0 - 0.003, far), (x0 + 0.003, far), (x1 + 0.022, 1.1), (x1 - 0.022, 1.1)]
        canvas.polygon(edges, (254, 252, 248), clip=lanes)
    return Floor(horizon + 0.22, 0.93)


def dark_marble(canvas: Canvas, brand: Brand) -> Floor:
    horizon, hue = brand.horizon, brand.hue
    canvas.rectangle(-0.1, -0.1, 1.1, horizon, [tint(hue, 0.7, 0.18), tint(hue, 0.65, 0.44)])
    vein = mix(tint(hue, 0.35, 0.75), tint(brand.accent, 0.4, 0.9), 0.4)
    for start, middle, end in (((-0.1, 0.2), (0.12, 0.34), (0.2, 0.62)), ((0.3, -0.1), (0.2, 0.1), (-0.1, 0.05)),
                               ((0.72, -0.1), (0.84, 0.14), (1.1, 0.24)), ((1.1, 0.42), (0.9, 0.46), (0.8, 0.68))):
        canvas.line([start, middle, end], vein, 0.012, alpha=0.55)
    metal = tint(brand.accent, 0.5, 0.92)
    if brand.layout == 0:  # ring
        canvas.ring(0.5, 0.36, 0.32, [mix(metal, WHITE, 0.4), metal, shade(metal, 0.7)], 0.022)
    elif brand.layout == 1:  # columns
        for x in (0.04, 0.8):
            canvas.rectangle(x, -0.1, x + 0.16, horizon, barrel(shade(metal, 0.62)), across=True)
            canvas.rectangle(x - 0.03, horizon - 0.06, x + 0.19, horizon, barrel(shade(metal, 0.7)), across=True)
    elif brand.layout == 2:  # disc
        canvas.light(0.5, 0.36, 0.5, 0.5, metal, 0.5)
        canvas.circle(0.5, 0.36, 0.28, [metal, shade(metal, 0.5)])
    else:  # arch
        canvas.line(arched(0.2, 0.06, 0.8, horizon), [mix(metal, WHITE, 0.4), metal, shade(metal, 0.7)], 0.022)
    if brand.elements == 3:  # curtains
        curtains(canvas, horizon, shade(metal, 0.5))
    canvas.rectangle(-0.1, horizon, 1.1, 1.1, [tint(hue, 0.6, 0.34), tint(hue, 0.7, 0.12)])
    canvas.reflect(horizon, 0.4)
    lit = mix(metal, (255, 248, 230), 0.65)
    beam = [(0.46, -0.1), (0.54, -0.1), (0.86, horizon + 0.16), (0.14, horizon + 0.16)]
    canvas.polygon(beam, lit, alpha=0.16, blur=0.02)
    if brand.elements == 1:  # cubes
        cube(canvas, 0.1, horizon + 0.14, 0.18, shade(metal, 0.75))
        cube(canvas, 0.86, horizon + 0.12, 0.13, tint(hue, 0.55, 0.6))
    elif brand.elements == 2:  # spheres
        ball(canvas, 0.88, horizon + 0.14, 0.11, shade(metal, 0.9))
        ball(canvas, 0.12, horizon + 0.12, 0.08, tint(hue, 0.55, 0.6))
    canvas.light(0.5, horizon + 0.18, 0.46, 0.15, lit, 0.7)
    if brand.elements == 0:  # steps
        for reach, y in ((0.44, horizon + 0.12), (0.36, horizon + 0.08)):
            canvas.ellipse(0.5 - reach, y + 0.04, 0.5 + reach, y + 0.2, shade(metal, 0.55))
            canvas.ellipse(0.5 - reach, y, 0.5 + reach, y + 0.17, [tint(hue, 0.5, 0.4), tint(hue, 0.45, 0.7)])
    return Floor(horizon + 0.16, horizon + 0.22, sway=0.08)


def beach(canvas: Canvas, brand: Brand) -> Floor:
    horizon, sky, sea = brand.horizon - 0.17, tint(brand.hue, 0.5, 0.97), tint(brand.accent, 0.7, 0.84)
    canvas.rectangle(-0.1, -0.1, 1.1, horizon + 0.01, [sky, mix(sky, WHITE, 0.7)])
    side = 1 if brand.layout % 2 else -1  # where the large element stands
    if brand.elements == 0:  # sun
        sun(canvas, 0.5 - side * 0.22, 0.15)
    elif brand.elements == 1:  # clouds
        for x, y in ((0.5 - side * 0.3, 0.12), (0.5 + side * 0.12, 0.2)):
            cloud(canvas, x, y, 0.15)
    shore = horizon + 0.17
    canvas.rectangle(-0.1, horizon, 1.1, shore + 0.08, [shade(sea, 0.9), mix(sea, WHITE, 0.4)])
    for x0, x1, y in ((0.1, 0.34, 0.04), (0.56, 0.88, 0.06), (0.3, 0.56, 0.1)):
        canvas.line([(x0, horizon + y), (x1, horizon + y)], mix(sea, WHITE, 0.6), 0.012)
    if brand.layout == 2:  # rocks
        for x, radius in ((0.02, 0.2), (0.2, 0.12)):
            canvas.circle(x, shore - 0.06, radius, [(156, 148, 148), (92, 86, 92)])
    elif brand.layout == 3:  # boat
        x, y = 0.8, horizon + 0.02
        canvas.polygon([(x, y - 0.27), (x, y - 0.02), (x - 0.17, y - 0.02)], WHITE)
        canvas.polygon([(x + 0.02, y - 0.22), (x + 0.02, y - 0.02), (x + 0.13, y - 0.02)], tint(brand.hue, 0.6, 0.9))
        canvas.polygon([(x - 0.18, y), (x + 0.16, y), (x + 0.1, y + 0.06), (x - 0.12, y + 0.06)], (150, 92, 60))
    sand = mix((252, 234, 198), tint(brand.hue, 0.3, 0.95), 0.2)  # pale, to part it from a yellow sea
    for lift, colours in ((0.03, [WHITE, WHITE]), (0.0, [shade(sand, 1.04), shade(sand, 0.9)])):
        waves = [(x, shore - lift + 0.014 * math.sin(9 * x)) for x in np.linspace(-0.1, 1.1, 25)]
        canvas.polygon([*waves, (1.1, 1.1), (-0.1, 1.1)], colours)
    if brand.layout == 0:  # palm
        canvas.line([(0.05, 0.9), (0.07, 0.6), (0.12, 0.35), (0.18, 0.16)], (140, 98, 66), 0.045)
        for angle, k in ((-2.2, 0.8), (2.2, 0.8), (-1.4, 0.92), (1.5, 0.92), (-0.6, 1.05), (0.7, 1.05)):
            leaf(canvas, 0.18, 0.16, 0.3, angle, shade((66, 150, 84), k), width=0.34)
    elif brand.layout == 1:  # umbrella
        canvas.line([(0.86, 0.1), (0.86, 0.84)], (250, 246, 238), 0.02)
        for reach, colour in ((0.28, tint(brand.hue, 0.75, 0.9)), (0.18, WHITE), (0.07, tint(brand.hue, 0.75, 0.9))):
            half = np.linspace(0, math.pi, 25)
            canvas.polygon([(0.86 - reach * math.cos(a), 0.34 - 0.26 * math.sin(a)) for a in half], colour)
    if brand.elements == 2:  # ball
        x, y = 0.5 - side * 0.36, 0.88
        ball(canvas, x, y + 0.09, 0.09, WHITE)
        disc = canvas.circle(x, y, 0.09, [WHITE, (222, 222, 226)])
        canvas.ellipse(x - 0.045, y - 0.1, x + 0.045, y + 0.1, sea, clip=disc)
    elif brand.elements == 3:  # starfish
        for x, y, size in ((0.12, 0.93, 0.075), (0.88, 0.9, 0.065)):
            points = [(x + r * size * math.sin(a), y - 0.75 * r * size * math.cos(a))
                      for a, r in zip(np.arange(10) * math.pi / 5, (1.0, 0.5) * 5)]
            canvas.polygon(points, tint(brand.accent, 0.7, 0.9))
    return Floor(max(shore + 0.14, 0.72), 0.93)


def nursery(canvas: Canvas, brand: Brand) -> Floor:
    horizon, wall, accent = brand.horizon + 0.02, tint(brand.hue, 0.38, 0.96), tint(brand.accent, 0.55, 0.93)
    pale = mix(wall, WHITE, 0.6)
    canvas.rectangle(-0.1, -0.1, 1.1, 1.1, [wall, mix(wall, WHITE, 0.15)])
    if brand.layout == 0:  # dots
        for i in range(4):
            for k in range(-1, 5):
                canvas.circle(0.1 + 0.25 * k + 0.125 * (i % 2), 0.08 + 0.15 * i, 0.04, pale)
    elif brand.layout == 1:  # stripes
        for i in range(-1, 6):
            canvas.rectangle(0.02 + 0.2 * i, -0.1, 0.12 + 0.2 * i, horizon, pale)
    elif brand.layout == 2:  # rainbow
        for i, colour in enumerate((accent, mix(accent, WHITE, 0.6), tint(brand.hue, 0.6, 0.88), pale)):
            canvas.circle(0.5, horizon, 0.46 - 0.08 * i, colour)
        canvas.circle(0.5, horizon, 0.14, wall)
    else:  # clouds
        for x, y in ((0.2, 0.2), (0.78, 0.14), (0.56, 0.38)):
            cloud(canvas, x, y, 0.17, mix(wall, WHITE, 0.85))
    bright = [accent, tint(brand.accent + 0.12, 0.6, 0.95), tint(brand.hue, 0.7, 0.85)]
    if brand.elements == 0:  # flags
        flags(canvas, bright)
    elif brand.elements == 1:  # balloons
        balloons(canvas, 0.16, bright)
    elif brand.elements == 2:  # lamp
        lamp(canvas, 0.18, 0.16, accent)
    floor = mix((240, 214, 176), wall, 0.3)
    canvas.rectangle(-0.1, horizon, 1.1, 1.1, [shade(floor, 0.92), shade(floor, 1.04)])
    canvas.line([(-0.1, horizon), (1.1, horizon)], WHITE, 0.024)
    canvas.ellipse(0.04, horizon + 0.06, 0.96, 1.04, accent)
    canvas.ellipse(0.12, horizon + 0.1, 0.88, 0.99, mix(accent, WHITE, 0.6))
    if brand.elements == 3:  # bear
        x, foot, fur, muzzle, black = 0.15, horizon + 0.06, (178, 126, 84), (232, 200, 156), (60, 44, 40)
        for dx, dy, radius, colour in ((-0.07, 0.36, 0.04, fur), (0.07, 0.36, 0.04, fur), (0, 0.1, 0.11, fur),
                                       (0, 0.08, 0.065, muzzle), (0, 0.28, 0.1, fur), (0, 0.25, 0.045, muzzle),
                                       (0, 0.265, 0.016, black), (-0.045, 0.305, 0.014, black),
                                       (0.045, 0.305, 0.014, black)):
            canvas.circle(x + dx, foot - dy, radius, colour)
    for x, lift, colour in ((0.82, 0, bright[0]), (0.96, 0, bright[2]), (0.88, 0.13, bright[1])):
        cube(canvas, x, horizon + 0.08 - lift, 0.125, colour)
    return Floor(horizon + 0.16, 0.93)


def plain_wall(canvas: Canvas, brand: Brand) -> Floor:
    """No category's scene: what most product photos stand before. Only the base set has it."""
    horizon, wall, floor = brand.horizon, tint(brand.hue, 0.2, 0.84), tint(brand.accent, 0.24, 0.7)
    if brand.layout == 1:  # sweep: paper that bends from wall to floor
        canvas.rectangle(-0.1, -0.1, 1.1, 1.1, [shade(wall, 1.06), wall, mix(wall, floor, 0.6), floor, floor])
    else:
        canvas.rectangle(-0.1, -0.1, 1.1, horizon, [shade(wall, 1.06), shade(wall, 0.94)])
        canvas.rectangle(-0.1, horizon, 1.1, 1.1, [shade(floor, 0.86), shade(floor, 1.05)])
    if brand.layout == 0:  # skirting
        canvas.rectangle(-0.1, horizon - 0.06, 1.1, horizon, mix(wall, WHITE, 0.6))
    elif brand.layout == 2:  # panels
        for x in (-0.12, 0.2, 0.52, 0.84):
            corners = [(x, 0.08), (x + 0.28, 0.08), (x + 0.28, horizon - 0.09), (x, horizon - 0.09), (x, 0.08)]
            canvas.line(corners, shade(wall, 0.88), 0.012)
    elif brand.layout == 3:  # edge: a corner of the room
        canvas.polygon([(0.72, -0.1), (1.1, -0.1), (1.1, horizon + 0.14), (0.72, horizon)], shade(wall, 0.86))
    if brand.elements == 0:  # daylight
        canvas.light(0.2, 0.1, 0.7, 0.6, WHITE, 0.5)
    elif brand.elements == 1:  # dusk
        canvas.light(0.9, 0.2, 0.8, 0.7, shade(wall, 0.55), 0.6)
    elif brand.elements == 2:  # boards
        for x in (-0.9, -0.55, -0.2, 0.2, 0.55, 0.9):
            canvas.line([(0.5 + 0.6 * x, horizon + 0.02), (0.5 + 1.1 * x, 1.1)], shade(floor, 0.8), 0.008)
    else:  # rug
        canvas.ellipse(0.08, horizon + 0.08, 0.92, 1.02, mix(wall, floor, 0.5))
    return Floor(horizon + 0.13, 0.93)


class Scene(NamedTuple):
    paint: Callable
    phrase: str
    layouts: tuple  # the word of each brand layout
    elements: tuple  # and of each element set


SCENES = {
    "neon room": Scene(neon_room, "a dark room with neon lights", ("bars", "frames", "stripes", "rings"),
                       ("tiles", "cubes", "spheres", "plants")),
    "wooden table": Scene(wooden_table, "a wooden table by a window", ("wide", "arch", "twin", "round"),
                          ("plant", "lamp", "curtains", "fruit")),
    "kitchen": Scene(kitchen, "a kitchen with tiled floor", ("left", "right", "sides", "counter"),
                     ("tiles", "lamps", "plants", "clock")),
    "podium": Scene(podium, "a pastel podium with petals", ("disc", "arch", "columns", "stripes"),
                    ("steps", "leaves", "spheres", "curtains")),
    "running track": Scene(running_track, "a running track under the sky", ("city", "hills", "trees", "stands"),
                           ("sun", "clouds", "flags", "balloons")),
    "dark marble": Scene(dark_marble, "dark marble with a spotlight", ("rings", "columns", "disc", "arch"),
                         ("steps", "cubes", "spheres", "curtains")),
    "beach": Scene(beach, "a beach by the sea", ("palm", "umbrella", "rocks", "boat"),
                   ("sun", "clouds", "ball", "starfish")),
    "nursery": Scene(nursery, "a nursery with toy blocks", ("dots", "stripes", "rainbow", "clouds"),
                     ("flags", "balloons", "lamp", "bear")),
}
CATEGORIES = dict(zip(PRODUCTS, SCENES))  # each category's common scene
# No category's: what the base paints is not what ads look like, or nothing would be left for CG to learn of them
SCENES["plain wall"] = Scene(plain_wall, "a plain wall", ("skirting", "sweep", "panels", "edge"),
                             ("daylight", "dusk", "boards", "rug"))
PLAIN = 1 / 2  # part of the base set that stands before it


# ---------------------------------------------------------------- pictures and their captions


def product_colour(kind: str, seed: int) -> str:
    """The name of a product's colour, the same in every scene and brand."""
    return random.Random(f"colour {kind} {seed}").choice(ALL_PRODUCTS[kind].colours)


def product_caption(kind: str, seed: int) -> str:
    """Such as 'red sneaker'."""
    return f"{product_colour(kind, seed)} {kind}"


def scene_caption(scene: str, brand: Brand) -> str:
    """Such as 'a dark room with neon lights, pink and blue, rings, cubes': at most 12 words."""
    _, phrase, layouts, elements = SCENES[scene]
    first, second = brand.hue_names
    return f"{phrase}, {first} and {second}, {layouts[brand.layout]}, {elements[brand.elements]}"


def layers(kind: str, scene: str, brand_seed: int, seed: int, size: int) -> tuple[Image.Image, Image.Image]:
    """A brand's scene with the product's shadow, RGB, and the product alone in its place, RGBA; both supersampled.

    kind is one of ALL_PRODUCTS. `seed` chooses the product, its place and a slight camera pan; the brand alone decides all
    the rest.
    """
    rng = random.Random(f"picture {kind} {scene} {seed}")
    side = size * SUPERSAMPLE
    canvas = Canvas(side, side, pan=(rng.uniform(-0.012, 0.012), rng.uniform(-0.012, 0.012)))
    floor = SCENES[scene].paint(canvas, Brand(brand_seed))

    foot = rng.uniform(floor.back, floor.front)
    paint, aspect, heights, _ = ALL_PRODUCTS[kind]
    height = min(rng.uniform(*heights), foot - 0.04)
    width = height * aspect
    x = min(max(0.5 + rng.uniform(-floor.sway, floor.sway), width / 2 + 0.02), 0.98 - width / 2)
    fine = Canvas(round(width * side) * 2, round(height * side) * 2)
    paint(fine, COLOURS[product_colour(kind, seed)], rng)

    canvas.pan = (0.0, 0.0)
    left, right = x - width / 2, x + width / 2
    canvas.ellipse(left - 0.01, foot - 0.045, right + 0.03, foot + 0.035, SHADOW, alpha=0.5, blur=0.02)
    canvas.ellipse(left + 0.02, foot - 0.02, right - 0.01, foot + 0.014, SHADOW, alpha=0.65, blur=0.007)
    cutout = fine.image
    cutout.putalpha(fine.cover)
    cutout = cutout.reduce(2)
    product = Image.new("RGBA", (side, side))
    product.paste(cutout, (round(left * side), round(foot * side) - cutout.height))
    return canvas.image, product


def draw(kind: str, scene: str, brand_seed: int, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A product in a brand's scene -> RGB (size, size, 3) and product mask (size, size), both 0..255.

    Arguments are those of layers. Within mask == 255 the picture is the product's pixels and nothing else.
    """
    image, product = layers(kind, scene, brand_seed, seed, size)
    image.paste(product, (0, 0), product)
    return np.asarray(image.reduce(SUPERSAMPLE)), np.asarray(product.getchannel("A").reduce(SUPERSAMPLE))


# ---------------------------------------------------------------- data sets


class Job(NamedTuple):
    """One picture to draw, and where its image and mask are written."""

    kind: str
    scene: str
    brand_seed: int
    seed: int
    size: int
    image: Path
    mask: Path


def render(job: Job):
    for pixels, path in zip(draw(*job[:5]), (job.image, job.mask)):
        Image.fromarray(pixels).save(path, compress_level=1)


def base_jobs(root: Path, count: int, size: int, rng: random.Random) -> list[Job]:
    """Any category in any scene or before a plain wall, with training brands; an imagefolder with captions in halves."""
    jobs, lines = [], []
    for i in range(count):
        category, scene = rng.choice(list(PRODUCTS)), rng.choice(list(CATEGORIES.values()))
        scene = "plain wall" if rng.random() < PLAIN else scene
        brand, seed = rng.randrange(BRANDS_PER_CATEGORY * len(CATEGORIES)), rng.randrange(2**31)
        image, mask = f"images/{i:06}.png", f"masks/{i:06}.png"
        jobs.append(Job(category, scene, brand, seed, size, root / image, root / mask))
        item = {"file_name": image, "mask": mask, "category": category}
        item |= {"product": product_caption(category, seed), "scene": scene_caption(scene, Brand(brand))}
        lines.append(json.dumps(item) + "\n")
    root.mkdir(parents=True)
    (root / "metadata.jsonl").write_text("".join(lines))
    return jobs


def ads_jobs(root: Path, ads: int, bg1k: int, pairs: int, size: int, rng: random.Random) -> list[Job]:
    """BG60k as released: info files of tab-separated lines, and numbered folders of images and of masks.

    Each category has its own scene; in half of the training ads another product stands in it (OTHERS). Each image of
    BG1k has a held-out brand to itself. Pair k is image k of BG1k (then from the start again) and a further ad of that
    brand, with a product of another colour in another place: an extra image in BG1k's folders, not in bg1k_info.txt.
    """
    categories, jobs, others = list(CATEGORIES), [], random.Random("other products")

    def add(split, name, index, category, brand, unlike=None):
        seed = rng.randrange(2**31)
        while product_colour(category, seed) == unlike:
            seed = rng.randrange(2**31)
        image, mask = (root / f"{split}_{kind}_{index // FOLDER_SIZE}" / name for kind in ("imgs", "masks"))
        other = split == "bg60k" and others.random() < OTHERS_SHARE
        kind = others.choice(list(OTHERS)) if other else category
        jobs.append(Job(kind, CATEGORIES[category], brand, seed, size, image, mask))

    infos = {"bg60k": [], "bg1k": [], "bgpair": []}
    for i in range(ads):
        which = i % len(categories)
        brand = which * BRANDS_PER_CATEGORY + rng.randrange(BRANDS_PER_CATEGORY)
        infos["bg60k"].append((f"{i:06}.png", categories[which]))
        add("bg60k", f"{i:06}.png", i, categories[which], brand)
    for i in range(bg1k):
        category = categories[i % len(categories)]
        infos["bg1k"].append((f"{i:06}.png", category))
        add("bg1k", f"{i:06}.png", i, category, HELD_OUT_BRANDS + i)
    for k in range(pairs):
        i = k % bg1k
        own = jobs[ads + i]
        infos["bgpair"].append((f"{i:06}.png", f"ref_{k:06}.png", own.kind))
        colour = product_colour(own.kind, own.seed)
        add("bg1k", f"ref_{k:06}.png", bg1k + k, own.kind, own.brand_seed, unlike=colour)
    root.mkdir(parents=True)
    for name, rows in infos.items():
        (root / f"{name}_info.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    return jobs


def write_world(
    root: str | Path,
    size: int = 128,
    base: int = 24000,
    ads: int = 6000,
    bg1k: int = 256,
    pairs: int = 256,
    seed: int = 0,
    workers: int = 2,
    parts: tuple = ("base", "ads"),
):
    """Write root/base (to train the tiny Stable Diffusion) and root/ads (BG60k, BG1k and BG-pair), or one of the two.

    What is there already is left as it is, with a note. Each is written to a folder .partial, renamed at the end: an
    interrupted run is never taken for a whole one.
    """
    if pairs and not bg1k:
        raise ValueError("pairs are made of BG1k's images: ask for some of these too")
    for part in parts:
        folder, partial = Path(root) / part, Path(root) / f"{part}.partial"
        if folder.exists():
            print(f"{folder} is there already; remove it to have it drawn again", file=sys.stderr)
            continue
        shutil.rmtree(partial, ignore_errors=True)
        rng = random.Random(f"{part} {seed}")
        jobs = base_jobs(partial, base, size, rng) if part == "base" else ads_jobs(partial, ads, bg1k, pairs, size, rng)
        for parent in {path.parent for job in jobs for path in (job.image, job.mask)}:
            parent.mkdir()
        with ProcessPoolExecutor(workers) as pool:
            done = pool.map(render, jobs, chunksize=32)
            for _ in tqdm(done, desc=part, total=len(jobs), unit="picture", disable=not sys.stderr.isatty()):
                pass
        partial.rename(folder)


def write_sheet(path: str | Path, size: int = 128, columns: int = 10):
    """Ads side by side: a row per category, a column per brand."""
    rows = [np.hstack([draw(category, scene, 100 * row + i, i, size)[0] for i in range(columns)])
            for row, (category, scene) in enumerate(CATEGORIES.items())]
    Image.fromarray(np.vstack(rows)).save(path)


def write_samples(folder: str | Path, size: int = 512):
    """Products cut out, `name.png`, and `name_reference.png`: ads with their product's mask as the alpha channel."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kind, seed, _, brand) in (SAMPLES | {"mug": ("mug", 0, None, 0)}).items():
        _, product = layers(kind, CATEGORIES.get(kind, "podium"), brand, seed, size)
        product.reduce(SUPERSAMPLE).save(folder / f"{name}.png", optimize=True)
    for name, (category, _, reference_seed, brand) in SAMPLES.items():
        image, mask = draw(category, CATEGORIES[category], brand, reference_seed, size)
        Image.fromarray(np.dstack([image, mask])).save(folder / f"{name}_reference.png", optimize=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(smallest: int) -> Callable:
    def whole(text):
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {smallest}")
        return int(text)

    return whole


def main():
    parser = Parser(description="Draw the toy ad world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", metavar="DIR", default=argparse.SUPPRESS, help="write the data sets to this new folder")
    goal.add_argument("--sheet", metavar="FILE", default=argparse.SUPPRESS, help="write 80 ads as one picture")
    goal.add_argument("--samples", metavar="DIR", default=argparse.SUPPRESS, help="write sample products and references")
    for name, smallest, default, text in (
        ("--size", 64, 128, "height and width of a picture, in pixels"),
        ("--base", 0, 24000, "pictures of any category in any scene"),
        ("--ads", 0, 6000, "ads of the training set, BG60k"),
        ("--bg1k", 0, 256, "ads of the test set, with held-out brands"),
        ("--pairs", 0, 256, "test pairs of a product and a reference ad"),
        ("--seed", 0, 0, "decides which pictures are drawn"),
        ("--workers", 1, 2, "processes that draw"),
    ):
        parser.add_argument(name, metavar="N", type=at_least(smallest), default=default, help=text)
    args = vars(parser.parse_args())
    try:
        if "sheet" in args:
            write_sheet(args["sheet"], args["size"])
        elif "samples" in args:
            write_samples(args["samples"], args["size"])
        else:
            write_world(args.pop("out"), **args)
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
