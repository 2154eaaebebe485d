"""Toy: drawing by code: colours, curves, and a canvas in unit coordinates on which Pillow fills soft-edged shapes."""

import colorsys
import math
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

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


def shades(colour: tuple, *factors: float) -> list:
    """A fill: a gradient of the colour, darker or lighter by these factors."""
    return [shade(colour, k) for k in factors]


class Across(list):
    """A fill: a gradient from left to right."""


def barrel(colour: tuple) -> Across:
    """A fill: the gradient across an upright cylinder that is lit from the left."""
    return Across(shades(colour, 0.62, 1.0, 1.22, 1.05, 0.95, 0.62))


def another_colour(colour: tuple, names: str, rng: random.Random) -> tuple:
    """One of the named colours, but not this one."""
    return rng.choice([COLOURS[name] for name in names.split() if COLOURS[name] != colour])


def gradient(colours: list, size: tuple) -> Image.Image:
    """Evenly spaced colours blended from top to bottom, or, if the list is Across, from left to right."""
    across = isinstance(colours, Across)
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


# The shape of every pool of light: from 255 in the middle smoothly to 0 at the rim. Pillow's gradient ends at 181.
FALLOFF = Image.radial_gradient("L").point(lambda v: 255 * (0.5 + 0.5 * math.cos(math.pi * min(v / 180, 1))))


def soften(image: Image.Image, radius: float) -> Image.Image:
    """Blur by a radius in image widths, at a quarter of the size: it looks the same and is faster."""
    small = image.reduce(4)
    return small.filter(ImageFilter.GaussianBlur(radius * small.width)).resize(image.size)


class Canvas:
    """A picture drawn in unit coordinates: x and y run from 0 to 1 over its width and height, y downwards.

    Lengths (line widths, radii, blurs) are in canvas widths. A fill is a colour, or a list of colours: a gradient down
    the shape, or Across it. Each shape takes _paint's options, and returns its patch, which can clip later shapes.
    `cover` is 255 where anything has been painted: a product's cut-out.
    """

    def __init__(self, width: int, height: int, pan: tuple = (0.0, 0.0)):
        self.width, self.height, self.pan = width, height, pan
        self.image = Image.new("RGB", (width, height))
        self.cover = Image.new("L", (width, height))

    def _paint(self, points, stencil, fill, alpha=1.0, blur=0.0, spread=0.0, clip=None):
        """Fill what `stencil(draw, points)` draws in white, points in pixels -> its patch: (mask, top left corner).

        alpha: opacity. blur: of the edge. spread: how far the stencil reaches beyond the points. clip: a patch that
        bounds this one. Only the bounding box is touched.
        """
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
            mask = mask.point(lambda v: v * alpha)
        if (box := mask.getbbox()) is None:
            return mask, (left, top)
        mask, left, top = mask.crop(box), left + box[0], top + box[1]
        if isinstance(fill, list):
            fill = gradient(fill, mask.size)
        self.image.paste(fill, (left, top), mask)
        self.cover.paste(255, (left, top), mask)
        return mask, (left, top)

    def pen(self, width):
        """The width of a pen in pixels."""
        return max(1, round(width * self.width))

    def polygon(self, points, fill, **how):
        return self._paint(points, lambda draw, p: draw.polygon(p, fill=255), fill, **how)

    def trapezium(self, y0, left0, right0, y1, left1, right1, fill, **how):
        """Four corners: the ends of a level edge at y0, and of one at y1."""
        return self.polygon([(left0, y0), (right0, y0), (right1, y1), (left1, y1)], fill, **how)

    def blob(self, points, fill, **how):
        """A closed smooth curve through the points."""
        return self.polygon(smooth(points), fill, **how)

    def rectangle(self, x0, y0, x1, y1, fill, radius=0.0, **how):
        r = radius * self.width
        return self._paint([(x0, y0), (x1, y1)], lambda draw, p: draw.rounded_rectangle(p, r, fill=255), fill, **how)

    def band(self, y0, y1, fill):
        """A rectangle from edge to edge, and beyond the frame."""
        return self.rectangle(-0.1, y0, 1.1, y1, fill)

    def ellipse(self, x0, y0, x1, y1, fill, rim=None, **how):
        """Filled, or with a `rim` of this width only the rim."""
        pen = {"outline": 255, "width": self.pen(rim)} if rim else {"fill": 255}
        return self._paint([(x0, y0), (x1, y1)], lambda draw, p: draw.ellipse(p, **pen), fill, **how)

    def circle(self, x, y, radius, fill, **how):
        tall = radius * self.width / self.height
        return self.ellipse(x - radius, y - tall, x + radius, y + tall, fill, **how)

    def line(self, x0, y0, x1, y1, fill, width, **how):
        return self.stroke([(x0, y0), (x1, y1)], fill, width, **how)

    def level(self, y, fill, width):
        """A level line from edge to edge, and beyond the frame."""
        self.line(-0.1, y, 1.1, y, fill, width)

    def stroke(self, points, fill, width, **how):
        """A pen stroke through the points with round ends."""
        pen = self.pen(width)

        def stencil(draw, p):
            draw.line(p, fill=255, width=pen, joint="curve")
            for x, y in (p[0], p[-1]):
                draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)

        return self._paint(points, stencil, fill, spread=width, **how)

    def light(self, x, y, radius_x, radius_y, colour, strength):
        """A soft pool of light."""
        left, top, right, bottom = (round(v) for v in ((x - radius_x) * self.width, (y - radius_y) * self.height,
                                                       (x + radius_x) * self.width, (y + radius_y) * self.height))
        pool = FALLOFF.resize((right - left, bottom - top)).point(lambda v: v * strength)
        self.image.paste(colour, (left, top), pool)

    def glow(self, tubes: "Canvas"):
        """Light up neon tubes, which are drawn on a canvas of their own: bright glass and a wide halo."""
        wide = soften(tubes.image, 0.05).point(lambda v: min(255, 2.2 * v))
        self.image = ImageChops.add(self.image, ImageChops.add(soften(tubes.image, 0.015), wide))
        glass = Image.blend(tubes.image, Image.new("RGB", tubes.image.size, WHITE), 0.5)
        self.image.paste(glass, mask=tubes.cover)

    def reflect(self, horizon, strength):
        """Polish the floor: it mirrors what stands above the horizon, blurred and fading."""
        edge = round((horizon + self.pan[1]) * self.height)
        mirror = self.image.crop((0, 2 * edge - self.height, self.width, edge))
        mirror = soften(mirror.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 0.02)
        fade = gradient([(255 * strength,) * 3, (0, 0, 0)], mirror.size).getchannel(0)
        self.image.paste(mirror, (0, edge), fade)
