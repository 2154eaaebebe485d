"""Toy: the products that ads show, each drawn in any of its colours.

A product is a function (canvas, colour, rng) that fills the canvas, and an entry in a table at the end of this file.
Each product in PRODUCTS is a category, and its entry names its scene.
"""

import math
import random
from collections import ChainMap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from toy.canvas import COLOURS, WHITE, Across, Canvas, another_colour, barrel, mix, shade, shades, tint


def laptop(canvas, colour, rng):
    hue = rng.random()
    canvas.rectangle(0.13, 0.0, 0.87, 0.78, shades(colour, 0.7, 0.9), radius=0.03)
    canvas.rectangle(0.145, 0.02, 0.855, 0.74, (20, 20, 26), radius=0.02)
    screen = canvas.rectangle(0.165, 0.05, 0.835, 0.68, [tint(hue, 0.65, 0.98), tint(hue + 0.2, 0.75, 0.6)])
    hills = [(0.1, 0.55), (0.35, 0.36), (0.55, 0.52), (0.85, 0.3), (0.95, 0.8), (0.1, 0.8)]
    canvas.blob(hills, tint(hue + 0.45, 0.55, 0.95), alpha=0.75, clip=screen)
    canvas.trapezium(0.0, 0.5, 0.68, 0.7, 0.24, 0.42, WHITE, alpha=0.14, clip=screen)
    canvas.trapezium(0.75, 0.13, 0.87, 0.95, 0.01, 0.99, shades(colour, 0.82, 1))
    canvas.trapezium(0.775, 0.18, 0.82, 0.865, 0.13, 0.87, shade(colour, 0.4))
    canvas.line(0.16, 0.82, 0.84, 0.82, shade(colour, 0.7), 0.006)
    canvas.trapezium(0.88, 0.4, 0.6, 0.93, 0.385, 0.615, shade(colour, 0.86))
    canvas.rectangle(0.005, 0.935, 0.995, 0.998, shades(colour, 0.95, 0.5), radius=0.02)


def rice_cooker(canvas, colour, rng):
    dark = sum(colour) < 330
    panel = (206, 208, 214) if dark else (40, 42, 50)
    canvas.rectangle(0.41, 0.0, 0.59, 0.12, barrel((84, 84, 92)), radius=0.04)
    canvas.ellipse(0.1, 0.04, 0.9, 0.56, barrel(shade(colour, 0.95)))
    for x in (0.14, 0.7):
        canvas.rectangle(x, 0.93, x + 0.16, 1.0, (44, 44, 48), radius=0.02)
    canvas.rectangle(0.0, 0.36, 1.0, 0.46, barrel(shade(colour, 0.8)), radius=0.05)
    body = canvas.rectangle(0.04, 0.3, 0.96, 0.97, barrel(colour), radius=0.2)
    canvas.rectangle(0.0, 0.3, 1.0, 0.36, barrel((186, 188, 196)), clip=body)
    canvas.rectangle(0.3, 0.46, 0.7, 0.86, panel, radius=0.06)
    canvas.rectangle(0.36, 0.52, 0.64, 0.66, tint(rng.uniform(0.3, 0.6), 0.55, 0.95), radius=0.02)
    for x, light in zip((0.39, 0.5, 0.61), ("red", "orange", "green")):
        canvas.circle(x, 0.755, 0.038, COLOURS[light])


def refrigerator(canvas, colour, rng):
    metal, seam = shade(colour, 0.55), shade(colour, 0.5)
    for x in (0.1, 0.76):
        canvas.rectangle(x, 0.96, x + 0.14, 1.0, (40, 40, 44))
    sides = Across(shades(colour, 0.72, 1.0, 1.08, 1.0, 0.98, 0.66))
    body = canvas.rectangle(0.0, 0.0, 1.0, 0.98, sides, radius=0.07)
    canvas.trapezium(0.0, 0.22, 0.38, 1.0, 0.06, 0.22, WHITE, alpha=0.18, clip=body)
    if rng.random() < 0.5:  # side by side, with a water dispenser
        canvas.line(0.5, 0.0, 0.5, 0.98, seam, 0.02, clip=body)
        for x in (0.42, 0.58):
            canvas.line(x, 0.28, x, 0.68, metal, 0.045)
        canvas.rectangle(0.12, 0.28, 0.34, 0.47, (44, 48, 56), radius=0.03)
        canvas.rectangle(0.155, 0.3, 0.305, 0.36, tint(0.53, 0.5, 0.95), radius=0.02)
    else:  # freezer above or below
        y, x = rng.choice((0.33, 0.62)), rng.choice((0.11, 0.89))
        canvas.line(0.0, y, 1.0, y, seam, 0.02, clip=body)
        for y0, y1 in ((y - 0.2, y - 0.05), (y + 0.05, y + 0.2)):
            canvas.line(x, y0, x, y1, metal, 0.05)


def perfume(canvas, colour, rng):
    cap = COLOURS[rng.choice(("gold", "silver", "black"))]
    glass = Across(mix(colour, WHITE, t) for t in (0.1, 0.6, 0.3, 0.25, 0.5, 0.1))
    canvas.rectangle(0.41, 0.17, 0.59, 0.32, barrel(COLOURS["gold"]))
    canvas.rectangle(0.33, 0.0, 0.67, 0.2, barrel(cap), radius=0.04)
    shape = rng.randrange(3)
    if shape == 0:
        bottle = canvas.rectangle(0.04, 0.28, 0.96, 1.0, glass, radius=0.1)
    elif shape == 1:
        bottle = canvas.ellipse(0.0, 0.265, 1.0, 1.0, glass)
    else:
        outline = [(0.24, 0.28), (0.76, 0.28), (1.0, 0.46), (0.9, 1.0), (0.1, 1.0), (0.0, 0.46)]
        bottle = canvas.polygon(outline, glass)
    canvas.rectangle(0.0, 0.46, 1.0, 1.0, shades(colour, 1, 0.72), alpha=0.72, clip=bottle)
    canvas.rectangle(0.26, 0.56, 0.74, 0.82, (252, 250, 246), radius=0.03)
    canvas.line(0.36, 0.65, 0.64, 0.65, shade(colour, 0.6), 0.035)
    canvas.line(0.42, 0.73, 0.58, 0.73, shade(colour, 0.6), 0.025)
    canvas.rectangle(0.12, 0.4, 0.18, 0.9, WHITE, radius=0.03, alpha=0.6, clip=bottle)


def sneaker(canvas, colour, rng):
    """A running shoe, its toe to the right."""
    trim = another_colour(colour, "white yellow teal orange black", rng)
    sole = COLOURS[rng.choice(("white", "white", "black"))]
    lift = rng.uniform(-0.03, 0.05)
    heel = [(0.05, 0.82), (0.03, 0.4), (0.06, 0.13 - lift), (0.17, 0.07 - lift), (0.27, 0.17)]
    toe = [(0.38, 0.13), (0.52, 0.31), (0.7, 0.47), (0.88, 0.53), (0.985, 0.68), (0.96, 0.85), (0.5, 0.88)]
    upper = canvas.blob(heel + toe, shades(colour, 1.18, 1, 0.75))
    canvas.blob([(0.02, 0.85), (0.0, 0.35), (0.1, 0.3), (0.17, 0.5), (0.17, 0.85)], trim, clip=upper)
    canvas.blob([(0.73, 0.9), (0.78, 0.6), (0.88, 0.5), (1.02, 0.55), (1.02, 0.9)], shade(colour, 0.78), clip=upper)
    canvas.blob([(0.24, 0.6), (0.36, 0.69), (0.6, 0.42), (0.66, 0.46), (0.44, 0.82), (0.3, 0.8)], trim, clip=upper)
    canvas.blob([(0.08, 0.14 - lift), (0.17, 0.08 - lift), (0.25, 0.18), (0.17, 0.22)], shade(colour, 0.42), clip=upper)
    for i in range(3):
        x, y = 0.39 + 0.09 * i, 0.2 + 0.1 * i
        canvas.line(x - 0.05, y + 0.12, x + 0.03, y, WHITE, 0.024)
    rim = [(0.015, 0.78), (0.2, 0.78), (0.5, 0.82), (0.8, 0.77), (0.985, 0.7)]
    tread = [(0.99, 0.85), (0.93, 0.985), (0.5, 0.99), (0.05, 0.985)]
    canvas.blob(rim + tread, shades(sole, 1.04, 0.78))
    canvas.stroke([(0.06, 0.89), (0.5, 0.91), (0.93, 0.88)], trim if trim != sole else colour, 0.018)


def watch(canvas, colour, rng):
    strap = rng.choice(((124, 78, 48), (74, 76, 88), (52, 82, 150), (150, 52, 54), (216, 210, 200)))
    dial = rng.choice(((40, 48, 78), (246, 244, 238), (34, 84, 74), (132, 44, 50)))
    marks = (40, 40, 46) if sum(dial) > 380 else (250, 250, 250)
    canvas.trapezium(0.0, 0.34, 0.66, 0.36, 0.24, 0.76, barrel(strap))
    canvas.trapezium(0.64, 0.24, 0.76, 1.0, 0.34, 0.66, barrel(strap))
    for y in (0.06, 0.13, 0.87, 0.94):
        canvas.line(0.4, y, 0.6, y, shade(strap, 0.62), 0.02)
    canvas.rectangle(0.92, 0.46, 1.0, 0.54, barrel(colour), radius=0.03)
    canvas.circle(0.5, 0.5, 0.46, shades(colour, 1.25, 1, 0.6))
    canvas.circle(0.5, 0.5, 0.39, shades(colour, 0.6, 1.2))
    canvas.circle(0.5, 0.5, 0.355, shades(dial, 1.25, 0.88))
    squeeze = canvas.width / canvas.height

    def hand(angle, start, end, colour, width):
        sin, cos = math.sin(angle), math.cos(angle) * squeeze
        canvas.line(0.5 + start * sin, 0.5 - start * cos, 0.5 + end * sin, 0.5 - end * cos, colour, width)

    for hour in range(12):
        hand(hour * math.pi / 6, 0.29, 0.315, marks, 0.03)
    hand(rng.uniform(0, 2 * math.pi), 0.0, 0.15, marks, 0.05)
    hand(rng.uniform(0, 2 * math.pi), 0.0, 0.25, marks, 0.032)
    canvas.circle(0.5, 0.5, 0.04, COLOURS["red"])


def sunscreen(canvas, colour, rng):
    cap = another_colour(colour, "white orange blue yellow", rng)
    sun = WHITE if sum(colour) < 660 else COLOURS["orange"]
    if rng.random() < 0.5:  # a tube, standing on its cap
        canvas.rectangle(0.18, 0.82, 0.82, 1.0, barrel(cap), radius=0.05)
        body = canvas.polygon([(0.02, 0.0), (0.98, 0.0), (0.92, 0.5), (0.82, 0.86), (0.18, 0.86), (0.08, 0.5)],
                              barrel(colour))
        canvas.rectangle(0.0, 0.0, 1.0, 0.055, shade(colour, 0.8), clip=body)
    else:  # a bottle
        canvas.rectangle(0.28, 0.0, 0.72, 0.22, barrel(cap), radius=0.06)
        body = canvas.rectangle(0.03, 0.15, 0.97, 1.0, barrel(colour), radius=0.24)
    squeeze = canvas.width / canvas.height
    for angle in np.arange(8) * math.pi / 4:
        x, y = math.cos(angle), math.sin(angle) * squeeze
        canvas.line(0.5 + 0.21 * x, 0.37 + 0.21 * y, 0.5 + 0.28 * x, 0.37 + 0.28 * y, sun, 0.05)
    canvas.circle(0.5, 0.37, 0.15, sun)
    canvas.rectangle(0.0, 0.57, 1.0, 0.66, cap, alpha=0.92, clip=body)
    canvas.line(0.32, 0.73, 0.68, 0.73, shade(colour, 0.6), 0.035)


def toy_car(canvas, colour, rng):
    trim = another_colour(colour, "yellow white blue orange red", rng)
    back, roof_back, roof_front, front = rng.choice(((0.2, 0.31, 0.66, 0.82), (0.12, 0.15, 0.52, 0.72)))
    middle = (roof_back + roof_front) / 2
    canvas.trapezium(0.0, roof_back, roof_front, 0.45, back, front, shades(colour, 1.12, 0.95))
    for pane in ([(back + 0.08, 0.4), (roof_back + 0.04, 0.08), (middle - 0.02, 0.08), (middle - 0.02, 0.4)],
                 [(middle + 0.03, 0.4), (middle + 0.03, 0.08), (roof_front - 0.03, 0.08), (front - 0.1, 0.4)]):
        canvas.polygon(pane, [(226, 244, 252), (168, 212, 236)])
    body = canvas.rectangle(0.0, 0.36, 1.0, 0.84, shades(colour, 1.15, 1, 0.72), radius=0.13)
    canvas.rectangle(0.0, 0.57, 1.0, 0.65, trim, clip=body)
    canvas.circle(0.95, 0.5, 0.04, (255, 244, 170), clip=body)
    canvas.circle(0.04, 0.5, 0.03, (226, 52, 48), clip=body)
    for x in (0.26, 0.76):
        canvas.circle(x, 0.785, 0.12, (46, 46, 52))
        canvas.circle(x, 0.785, 0.07, trim)
        canvas.circle(x, 0.785, 0.03, WHITE)


def anything(canvas, colour, rng):
    """A product of no category: any outline and any print, often with a lid or a handle."""
    second = another_colour(colour, " ".join(COLOURS), rng)
    fill = rng.choice((barrel(colour), shades(colour, 1.15, 0.75)))
    left, top = rng.uniform(0.0, 0.15), rng.choice((0.0, 0.12, 0.25))
    right, shape, part = 1 - left, rng.randrange(4), rng.randrange(4)
    if top and part == 0:
        canvas.rectangle(left + 0.1, top - 0.1, right - 0.1, top + 0.1, barrel(second), radius=0.03)
    elif top and part == 1:
        canvas.stroke([(0.3, top + 0.1), (0.36, 0.03), (0.64, 0.03), (0.7, top + 0.1)], second, 0.05)
    elif part == 2:
        right -= 0.2
        canvas.stroke([(right - 0.1, 0.4), (0.95, 0.45), (0.95, 0.7), (right - 0.1, 0.75)], shade(colour, 0.85), 0.06)
    if shape == 0:
        body = canvas.rectangle(left, top, right, 1.0, fill, radius=rng.uniform(0, 0.2))
    elif shape == 1:
        inset = rng.uniform(-0.2, 0.25) * (right - left)
        upper, lower = max(inset, 0), max(-inset, 0)
        body = canvas.trapezium(top, left + upper, right - upper, 1.0, left + lower, right - lower, fill)
    elif shape == 2:
        body = canvas.ellipse(left, top, right, 1.0, fill)
    else:
        middle, high = (left + right) / 2, (top + 1) / 2
        outline = [(rng.uniform(0.75, 1) * math.cos(a), rng.uniform(0.75, 1) * math.sin(a))
                   for a in np.arange(9) * math.tau / 9 + math.pi / 2]
        body = canvas.blob([(middle + (right - left) / 2 * x, high + (1 - top) / 2 * y) for x, y in outline],
                           fill)
    printed = rng.randrange(5)
    if printed == 0:
        y = rng.uniform(top + 0.1, 0.7)
        canvas.rectangle(0.0, y, 1.0, y + rng.uniform(0.05, 0.25), second, clip=body)
    elif printed == 1:
        for x in np.linspace(left, right, rng.randrange(4, 8)):
            canvas.line(x, 0.0, x, 1.0, second, 0.04, clip=body)
    elif printed == 2:
        canvas.rectangle(0.32, top + 0.3, 0.62, top + 0.55, second, radius=0.03, clip=body)
    elif printed == 3:  # a texture
        for _ in range(60):
            canvas.circle(rng.random(), rng.random(), rng.uniform(0.01, 0.03), shade(colour, rng.uniform(0.6, 1.3)),
                          clip=body)


def mug(canvas, colour, rng):
    canvas.circle(0.74, 0.52, 0.22, shade(colour, 0.85), rim=0.07)
    body = canvas.rectangle(0.0, 0.06, 0.76, 1.0, barrel(colour), radius=0.12)
    canvas.ellipse(0.0, 0.0, 0.76, 0.16, shade(colour, 0.9))
    canvas.ellipse(0.04, 0.02, 0.72, 0.14, shade(colour, 0.45))
    canvas.blob([(0.38, 0.5), (0.5, 0.4), (0.58, 0.52), (0.38, 0.76), (0.18, 0.52), (0.26, 0.4)], WHITE, clip=body)


# ---------------------------------------------------------------- the tables of products


class Product(NamedTuple):
    """How a product is drawn, and the scene that it is shown in."""

    paint: Callable[[Canvas, tuple, random.Random], None]
    scene: str  # a key of SCENES
    aspect: float  # width / height
    heights: tuple[float, float]  # smallest and largest, in picture heights
    colours: str  # their names


# The categories. Their order decides only which pictures a seed draws.
PRODUCTS = {
    "laptop": Product(laptop, "neon room", 1.4, (0.36, 0.45), "silver gray black gold white"),
    "rice cooker": Product(rice_cooker, "wooden table", 1.18, (0.35, 0.44), "white black red teal gold blue"),
    "refrigerator": Product(refrigerator, "kitchen", 0.53, (0.6, 0.7), "white silver gray teal red yellow"),
    "perfume": Product(perfume, "podium", 0.62, (0.42, 0.52), "pink purple blue teal orange green"),
    "sneaker": Product(sneaker, "running track", 1.72, (0.3, 0.38), "red blue white black green purple orange"),
    "watch": Product(watch, "dark marble", 0.56, (0.52, 0.62), "silver gold gray pink"),
    "sunscreen": Product(sunscreen, "beach", 0.46, (0.48, 0.58), "yellow orange white blue pink"),
    "toy car": Product(toy_car, "nursery", 1.78, (0.28, 0.35), "red blue yellow green orange purple pink"),
}
# Products of no category. Half of the training ads show one of these in the category's scene. Without such ads, CG
# would find the scene by the product's looks, not by the prompt's category, and fail on products of other kinds.
OTHERS = {
    "carton": Product(anything, "plain wall", 0.6, (0.42, 0.62), " ".join(COLOURS)),
    "box": Product(anything, "plain wall", 1.0, (0.34, 0.5), " ".join(COLOURS)),
    "case": Product(anything, "plain wall", 1.5, (0.28, 0.4), " ".join(COLOURS)),
}
# Products in no data set, to try a trained CG with
UNSEEN = {"mug": Product(mug, "podium", 1.0, (0.36, 0.44), "red blue teal")}
ALL_PRODUCTS = ChainMap(PRODUCTS, OTHERS, UNSEEN)


def product_colour(name: str, seed: int) -> str:
    """The name of a product's colour, the same in every scene and brand."""
    return random.Random(f"colour {name} {seed}").choice(ALL_PRODUCTS[name].colours.split())


def product_caption(name: str, seed: int) -> str:
    """Such as 'red sneaker'."""
    return f"{product_colour(name, seed)} {name}"
