"""Toy: the scenes. A scene is what the ads of a category have in common, and each brand shows it in its own way.

A scene is a function (canvas, brand, layout, elements) -> Floor, and an entry in SCENES at the end of this file. It
uses the brand's two hues, and paints the layout and the elements that the entry's words name. It extends beyond the
frame by a tenth on every side, so that the camera can pan a little.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from toy.canvas import COLOURS, HUES, SHADOW, WHITE, Across, Canvas, arched, barrel, mix, shade, shades, tint


class Brand:
    """What all ads of a brand share: two named hues, one of 4 layouts, one of 4 element sets, a horizon."""

    def __init__(self, seed: int):
        rng = random.Random(f"brand {seed}")
        names, first = [*HUES], rng.randrange(len(HUES))
        second = (first + rng.randrange(2, len(HUES) - 1)) % len(HUES)  # at least 60 degrees away
        self.hue_names = names[first], names[second]
        self.hue, self.accent = (HUES[name] + rng.uniform(-0.012, 0.012) for name in self.hue_names)
        self.layout, self.elements = rng.randrange(4), rng.randrange(4)
        self.horizon = rng.uniform(0.57, 0.66)


class Floor(NamedTuple):
    """Where a product may stand: the y of its feet lies between back and front, its x within sway of the middle."""

    back: float
    front: float
    sway: float = 0.12


# ---------------------------------------------------------------- what stands and hangs in several scenes


def leaf(canvas, x, y, length, angle, fill, width=0.45):
    """A leaf or petal that grows from (x, y). Angle 0 points up; larger angles turn clockwise."""
    sin, cos = math.sin(angle) * length, math.cos(angle) * length
    outline = [(0, 0), (0.45, width / 2), (1, 0), (0.45, -width / 2)]
    canvas.blob([(x + t * sin + s * cos, y - t * cos + s * sin) for t, s in outline], fill)


def plant(canvas, x, foot, size, pot, green=(70, 150, 90)):
    for i, angle in enumerate((-1.1, 1.1, -0.55, 0.55, 0.0)):
        leaf(canvas, x, foot - 0.35 * size, 0.7 * size, angle, shade(green, (0.8, 0.9, 1.0, 1.1, 1.2)[i]))
    top, rim, base = foot - 0.42 * size, 0.24 * size, 0.17 * size
    canvas.trapezium(top, x - rim, x + rim, foot, x - base, x + base, barrel(pot))


def shadow(canvas, x0, x1, foot):
    """The shadow under something that stands at y = foot, from x0 to x1."""
    depth = 0.13 * (x1 - x0)
    canvas.ellipse(x0, foot - depth, x1, foot + 0.8 * depth, SHADOW, alpha=0.35, blur=0.012)


def ball(canvas, x, foot, radius, colour):
    shadow(canvas, x - radius, x + radius, foot)
    body = canvas.circle(x, foot - radius, radius, shades(colour, 1.1, 1, 0.68))
    canvas.circle(x - 0.35 * radius, foot - 1.4 * radius, 0.28 * radius, WHITE, alpha=0.5, blur=0.008, clip=body)


def cube(canvas, x, foot, side, colour):
    shadow(canvas, x - 0.55 * side, x + 0.75 * side, foot)
    left, right, top, d = x - side / 2, x + side / 2, foot - side, 0.24 * side
    canvas.trapezium(top - d, left + d, right + d, top, left, right, mix(colour, WHITE, 0.4))
    canvas.polygon([(right, top), (right + d, top - d), (right + d, foot - d), (right, foot)], shade(colour, 0.62))
    canvas.rectangle(left, top, right, foot, shades(colour, 1.05, 0.85))


def lamp(canvas, x, drop, colour):
    """A lamp hanging from the ceiling."""
    canvas.line(x, -0.1, x, drop, (60, 60, 66), 0.008)
    canvas.ellipse(x - 0.075, drop + 0.06, x + 0.075, drop + 0.12, (255, 246, 205))
    canvas.trapezium(drop, x - 0.03, x + 0.03, drop + 0.095, x - 0.1, x + 0.1, barrel(colour))
    canvas.light(x, drop + 0.12, 0.2, 0.18, (255, 246, 205), 0.3)


def curtains(canvas, bottom, colour):
    """A pair of curtains drawn aside."""
    folds = Across(shades(colour, 0.85, 1.1, 0.8, 1.1, 0.85))
    for edge, side in ((-0.1, 1), (1.1, -1)):
        hem = [(edge + side * reach, y) for reach, y in ((0.32, -0.1), (0.27, 0.2), (0.2, bottom))]
        canvas.polygon([(edge, -0.1), *hem, (edge, bottom)], folds)


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
    canvas.stroke([(i / 10, 0.045 + 0.05 * math.sin(math.pi * i / 10)) for i in range(-1, 12)], WHITE, 0.012)


def balloons(canvas, x, colours):
    for dx, y, colour in zip((-0.075, 0.075, 0.0), (0.27, 0.25, 0.16), colours):
        canvas.line(x + dx, y, x, 0.58, WHITE, 0.006)
        rubber = shades(colour, 1.1, 0.85)
        canvas.ellipse(x + dx - 0.075, y - 0.095, x + dx + 0.075, y + 0.095, rubber)
        canvas.circle(x + dx - 0.03, y - 0.04, 0.018, WHITE, alpha=0.6)


# ---------------------------------------------------------------- scenes


def neon_room(canvas, brand, layout, elements):
    horizon, hue, accent = brand.horizon, brand.hue, brand.accent
    canvas.band(-0.1, horizon, [tint(hue, 0.85, 0.12), tint(hue, 0.8, 0.36)])
    canvas.band(horizon, 1.1, [tint(hue, 0.8, 0.2), tint(hue, 0.85, 0.08)])
    canvas.light(0.5, 0.36, 0.8, 0.6, tint(hue, 0.8, 0.62), 0.6)
    first, second = tint(accent, 0.85, 1.0), tint(hue, 0.55, 1.0)
    tubes = Canvas(canvas.width, canvas.height, canvas.pan)
    if layout == "bars":
        for i in range(5):
            x, y, colour = 0.1 + 0.2 * i, 0.08 + 0.1 * (i % 2), (first, second)[i % 2]
            tubes.line(x, y, x, horizon - 0.06, colour, 0.018)
    elif layout == "frames":
        for inset, colour in ((0.1, first), (0.19, second)):
            x, y, bottom = inset, inset - 0.03, horizon + 0.03 - inset
            tubes.stroke([(0.5, y), (x, y), (x, bottom), (1 - x, bottom), (1 - x, y), (0.5, y)], colour, 0.018)
    elif layout == "stripes":
        for i in range(4):
            x, colour = 0.14 + 0.26 * i, (first, second)[i % 2]
            tubes.line(x, horizon - 0.06, x - 0.12, 0.05, colour, 0.018)
    elif layout == "rings":
        tubes.circle(0.5, 0.32, 0.3, first, rim=0.018)
        tubes.circle(0.5, 0.32, 0.2, second, rim=0.018)
    if elements == "tiles":
        for x in (-0.9, -0.25, 0.25, 0.9):
            tubes.line(0.5 + 0.45 * x, horizon, 0.5 + 1.1 * x, 1.1, shade(second, 0.6), 0.008)
        for y in (0.0, 0.09, 0.24):
            tubes.level(horizon + y, shade(second, 0.6), 0.008)
    canvas.glow(tubes)
    canvas.reflect(horizon, 0.5)
    if elements == "cubes":
        cube(canvas, 0.1, horizon + 0.12, 0.2, shade(first, 0.8))
        cube(canvas, 0.88, horizon + 0.1, 0.14, shade(second, 0.8))
    elif elements == "spheres":
        ball(canvas, 0.88, horizon + 0.12, 0.12, first)
        ball(canvas, 0.12, horizon + 0.1, 0.08, second)
    elif elements == "plants":
        for x in (0.09, 0.91):
            plant(canvas, x, horizon + 0.12, 0.3, shade(first, 0.8), mix(tint(hue, 0.7, 0.5), (40, 120, 90), 0.4))
    return Floor(horizon + 0.13, 0.93)


def wooden_table(canvas, brand, layout, elements):
    horizon, wall, accent = brand.horizon, tint(brand.hue, 0.42, 0.88), tint(brand.accent, 0.6, 0.85)
    canvas.band(-0.1, horizon + 0.1, shades(wall, 1.05, 0.88))
    bottom, frame = horizon - 0.08, (252, 250, 246)
    windows = {
        "wide": [[(0.16, 0.08), (0.84, 0.08), (0.84, bottom), (0.16, bottom)]],
        "arch": [arched(0.26, 0.05, 0.74, bottom)],
        "twin": [[(x, 0.09), (x + 0.27, 0.09), (x + 0.27, bottom), (x, bottom)] for x in (0.18, 0.55)],
        "round": [[(0.5 + 0.24 * math.sin(a), 0.29 - 0.24 * math.cos(a)) for a in np.arange(48) * math.pi / 24]],
    }[layout]
    for outline in windows:
        (x0, y0), (x1, y1) = (tuple(f(axis) for axis in zip(*outline)) for f in (min, max))
        glass = canvas.polygon(outline, [(176, 216, 246), (250, 250, 236)])
        canvas.circle(x0 + 0.06, y1 + 0.04, 0.2, (150, 196, 140), clip=glass)
        canvas.circle(x1 - 0.04, y1 + 0.06, 0.19, (122, 180, 128), clip=glass)
        middle, bar = (x0 + x1) / 2, y0 + 0.4 * (y1 - y0)
        canvas.line(middle, y0, middle, y1, frame, 0.016)
        canvas.line(x0, bar, x1, bar, frame, 0.016)
        canvas.stroke([*outline, outline[0]], frame, 0.026)
    wood = mix((186, 124, 74), tint(brand.accent, 0.55, 0.72), 0.35)
    canvas.band(horizon, 1.1, shades(wood, 1.12, 0.82))
    for y in (0.07, 0.16, 0.28):
        canvas.level(horizon + y, shade(wood, 0.76), 0.008)
    canvas.level(horizon, shade(wood, 1.35), 0.016)
    canvas.trapezium(horizon + 0.03, 0.3, 0.7, 1.1, 0.35, 0.95, (255, 250, 225), alpha=0.25, blur=0.02)
    if elements == "plant":
        plant(canvas, 0.13, horizon + 0.08, 0.32, accent)
    elif elements == "lamp":
        lamp(canvas, 0.86, 0.16, accent)
    elif elements == "curtains":
        curtains(canvas, horizon - 0.01, accent)
    elif elements == "fruit":
        for x, lift, name in ((0.82, 0.03, "red"), (0.9, 0.03, "green"), (0.86, 0.08, "orange")):
            canvas.circle(x, horizon - lift, 0.055, shades(COLOURS[name], 1, 0.78))
        rim, foot = horizon - 0.02, horizon + 0.09
        canvas.blob([(0.7, rim), (1.02, rim), (0.94, foot), (0.78, foot)], barrel(accent))
    return Floor(horizon + 0.13, 0.93)


def kitchen(canvas, brand, layout, elements):
    horizon, wall, accent = brand.horizon + 0.08, tint(brand.hue, 0.34, 0.94), tint(brand.accent, 0.6, 0.74)
    canvas.band(-0.1, 1.1, shades(wall, 1.05, 0.9))
    if elements == "tiles":
        for i in range(-1, 9):
            x, joint = 0.06 + 0.125 * i, mix(wall, WHITE, 0.6)
            canvas.level(0.02 + 0.1 * i, joint, 0.01)
            canvas.line(x, -0.1, x, horizon, joint, 0.01)
    elif elements == "clock":
        clear = {"left": (0.7, 0.17), "right": (0.3, 0.17), "sides": (0.32, 0.17), "counter": (0.2, 0.3)}
        x, y = clear[layout]  # free of cupboards and product
        canvas.circle(x, y, 0.11, accent)
        canvas.circle(x, y, 0.085, (252, 250, 244))
        canvas.stroke([(x, y - 0.06), (x, y), (x + 0.04, y + 0.02)], (60, 60, 66), 0.014)
    counters = {"left": [(-0.1, 0.36)], "right": [(0.64, 1.1)], "sides": [(-0.1, 0.2), (0.8, 1.1)],
                "counter": [(-0.1, 1.1)]}[layout]
    for x0, x1 in counters:
        doors = max(1, round((x1 - x0) / 0.24))
        step = (x1 - x0) / doors
        canvas.rectangle(x0, horizon - 0.25, x1, horizon, shades(accent, 1.08, 0.85))
        if layout != "counter":  # wall cupboards
            canvas.rectangle(x0, -0.1, x1, 0.24, shades(accent, 0.92, 1.08))
        for i in range(doors):
            left, right = x0 + i * step + 0.02, x0 + (i + 1) * step - 0.02
            canvas.rectangle(left, horizon - 0.22, right, horizon - 0.03, shade(accent, 1.18), radius=0.01)
            canvas.line(left + 0.07, horizon - 0.18, right - 0.07, horizon - 0.18, (246, 228, 180), 0.014)
            if layout != "counter":
                canvas.rectangle(left, -0.1, right, 0.215, shade(accent, 1.18), radius=0.01)
        canvas.rectangle(x0 - 0.02, horizon - 0.285, x1 + 0.02, horizon - 0.245, (246, 242, 234))
    if layout == "counter":  # all along the wall, below an open shelf
        canvas.band(0.16, 0.19, shade(accent, 0.85))
        for x in (0.08, 0.2, 0.8, 0.92):
            jar = barrel(tint(brand.hue, 0.5, 0.8))
            canvas.rectangle(x - 0.045, 0.06, x + 0.045, 0.16, jar, radius=0.015)
    if elements == "lamps":
        for x in (0.34, 0.66):
            lamp(canvas, x, 0.08, tint(brand.accent, 0.7, 0.8))
    elif elements == "plants":
        for x0, x1 in counters if layout != "counter" else [(-0.1, 0.2), (0.8, 1.1)]:
            plant(canvas, (max(x0, 0) + min(x1, 1)) / 2, horizon - 0.28, 0.24, tint(brand.hue, 0.55, 0.85))
    light, dark = (248, 246, 242), tint(brand.hue, 0.45, 0.68)
    canvas.band(horizon, 1.1, light)
    rows = [horizon + (1.1 - horizon) * t for t in (0.0, 0.16, 0.4, 1.0)]
    for row, (y0, y1) in enumerate(zip(rows, rows[1:])):
        for k in range(row % 2 - 6, 6, 2):
            far, near = (0.14 + 0.4 * (y - horizon) for y in (y0, y1))
            canvas.trapezium(y0, 0.5 + k * far, 0.5 + (k + 1) * far, y1, 0.5 + k * near, 0.5 + (k + 1) * near, dark)
    canvas.level(horizon, (252, 250, 246), 0.022)
    return Floor(horizon + 0.08, 0.95)


def podium(canvas, brand, layout, elements):
    horizon, base, accent = brand.horizon, tint(brand.hue, 0.36, 0.97), tint(brand.accent, 0.4, 0.97)
    canvas.band(-0.1, horizon, [mix(base, WHITE, 0.3), base])
    if layout == "disc":
        canvas.circle(0.5, 0.38, 0.33, shades(accent, 1, 0.92))
    elif layout == "arch":
        canvas.polygon(arched(0.18, 0.05, 0.82, horizon), shades(accent, 1, 0.92))
    elif layout == "columns":
        for x in (0.02, 0.78):
            canvas.rectangle(x, 0.1, x + 0.2, horizon + 0.02, barrel(accent), radius=0.02)
            canvas.rectangle(x - 0.03, 0.05, x + 0.23, 0.12, barrel(accent), radius=0.02)
    elif layout == "stripes":
        for i in range(-1, 6):
            canvas.rectangle(0.02 + 0.2 * i, -0.1, 0.12 + 0.2 * i, horizon, accent)
    if elements == "curtains":
        curtains(canvas, horizon, shade(accent, 0.95))
    canvas.band(horizon, 1.1, [shade(base, 0.86), mix(base, WHITE, 0.2)])
    if elements == "leaves":
        for x, side in ((0.0, 1), (1.0, -1)):
            for angle, k in ((0.9, 0.75), (0.5, 0.88), (0.1, 1.0)):
                leaf(canvas, x, horizon + 0.12, 0.4, side * angle, shade((110, 186, 140), k), width=0.32)
    elif elements == "spheres":
        ball(canvas, 0.1, horizon + 0.13, 0.1, shade(accent, 0.95))
        ball(canvas, 0.91, horizon + 0.12, 0.08, mix(base, WHITE, 0.5))
    top = horizon + 0.02
    stone = mix(tint(brand.accent, 0.2, 1.0), WHITE, 0.25)
    side = barrel(shade(stone, 0.9))
    tiers = [(0.38, top, top + 0.16)]
    if elements == "steps":
        tiers = [(0.45, top + 0.13, top + 0.26), (0.34, top, top + 0.13)]
    for reach, y, foot in tiers:
        x0, x1 = 0.5 - reach, 0.5 + reach
        canvas.ellipse(x0 - 0.02, foot, x1 + 0.06, foot + 0.16, shade(base, 0.5), alpha=0.35, blur=0.02)
        canvas.ellipse(x0, foot, x1, foot + 0.13, side)
        canvas.rectangle(x0, y + 0.065, x1, foot + 0.065, side)
        canvas.ellipse(x0, y, x1, y + 0.13, [shade(stone, 0.97), mix(stone, WHITE, 0.6)])
    for x, y, angle in ((0.08, 0.3, 0.6), (0.2, 0.12, 2.2), (0.9, 0.2, -0.5),
                        (0.8, 0.42, 1.0), (0.07, 0.95, 1.3), (0.93, 0.93, -0.9)):
        leaf(canvas, x, y, 0.09, angle, tint(brand.accent, 0.62, 0.95), width=0.6)
    return Floor(top + 0.07, top + 0.1, sway=0.05)


def running_track(canvas, brand, layout, elements):
    horizon, sky, track = brand.horizon - 0.1, tint(brand.hue, 0.5, 0.97), tint(brand.accent, 0.66, 0.84)
    canvas.band(-0.1, horizon, [sky, mix(sky, WHITE, 0.65)])
    if elements == "sun":
        sun(canvas, 0.78, 0.13)
    elif elements == "clouds":
        for x, y in ((0.22, 0.1), (0.78, 0.16)):
            cloud(canvas, x, y, 0.16)
    far = mix(tint(brand.hue, 0.5, 0.55), sky, 0.3)
    if layout == "city":
        for i, height in enumerate((0.16, 0.28, 0.2, 0.12, 0.18, 0.3, 0.22)):
            x = -0.06 + 0.16 * i
            canvas.rectangle(x, horizon - height, x + 0.14, horizon, shades(far, 1.15, 1))
    elif layout == "hills":
        canvas.ellipse(-0.35, horizon - 0.24, 0.55, horizon + 0.24, shades(far, 1, 1.1))
        canvas.ellipse(0.35, horizon - 0.3, 1.35, horizon + 0.3, shades(far, 1.12, 1.25))
    elif layout == "trees":
        for i in range(7):
            x, top, green = -0.04 + 0.18 * i, horizon - 0.22 - 0.05 * (i % 2), mix((64, 140, 84), far, 0.25)
            crown = [shade(green, 1 + 0.2 * (i % 2)), shade(green, 0.8)]
            canvas.ellipse(x - 0.12, top, x + 0.12, horizon + 0.05, crown)
    elif layout == "stands":
        for edge, side in ((-0.1, 1), (1.1, -1)):
            for i, colour in enumerate((far, mix(far, WHITE, 0.4), track)):
                high, low, end = horizon - 0.3 + 0.1 * i, horizon - 0.06 + 0.02 * i, edge + side * (0.44 + 0.02 * i)
                canvas.polygon([(edge, high), (end, low), (end, horizon), (edge, horizon)], colour)
    if elements == "flags":
        flags(canvas, [track, WHITE])
    elif elements == "balloons":
        balloons(canvas, 0.85, [shade(track, 1.15), WHITE, tint(brand.accent, 0.45, 1.0)])
    canvas.band(horizon, horizon + 0.07, [(126, 190, 96), (92, 164, 80)])
    lanes = canvas.band(horizon + 0.06, 1.1, shades(track, 1.15, 0.88))
    for i in (-3, -2, -1, 0, 1, 2, 3):
        x0, x1, far = 0.5 + 0.05 * (i + 0.5), 0.5 + 0.42 * (i + 0.5), horizon - 0.04
        canvas.trapezium(far, x0 - 0.003, x0 + 0.003, 1.1, x1 - 0.022, x1 + 0.022, (254, 252, 248), clip=lanes)
    return Floor(horizon + 0.22, 0.93)


def dark_marble(canvas, brand, layout, elements):
    horizon, hue = brand.horizon, brand.hue
    canvas.band(-0.1, horizon, [tint(hue, 0.7, 0.18), tint(hue, 0.65, 0.44)])
    vein = mix(tint(hue, 0.35, 0.75), tint(brand.accent, 0.4, 0.9), 0.4)
    for start, middle, end in (((-0.1, 0.2), (0.12, 0.34), (0.2, 0.62)), ((0.3, -0.1), (0.2, 0.1), (-0.1, 0.05)),
                               ((0.72, -0.1), (0.84, 0.14), (1.1, 0.24)), ((1.1, 0.42), (0.9, 0.46), (0.8, 0.68))):
        canvas.stroke([start, middle, end], vein, 0.012, alpha=0.55)
    metal = tint(brand.accent, 0.5, 0.92)
    polished = [mix(metal, WHITE, 0.4), metal, shade(metal, 0.7)]
    if layout == "rings":
        canvas.circle(0.5, 0.36, 0.32, polished, rim=0.022)
    elif layout == "columns":
        for x in (0.04, 0.8):
            canvas.rectangle(x, -0.1, x + 0.16, horizon, barrel(shade(metal, 0.62)))
            canvas.rectangle(x - 0.03, horizon - 0.06, x + 0.19, horizon, barrel(shade(metal, 0.7)))
    elif layout == "disc":
        canvas.light(0.5, 0.36, 0.5, 0.5, metal, 0.5)
        canvas.circle(0.5, 0.36, 0.28, shades(metal, 1, 0.5))
    elif layout == "arch":
        canvas.stroke(arched(0.2, 0.06, 0.8, horizon), polished, 0.022)
    if elements == "curtains":
        curtains(canvas, horizon, shade(metal, 0.5))
    canvas.band(horizon, 1.1, [tint(hue, 0.6, 0.34), tint(hue, 0.7, 0.12)])
    canvas.reflect(horizon, 0.4)
    lit = mix(metal, (255, 248, 230), 0.65)
    canvas.trapezium(-0.1, 0.46, 0.54, horizon + 0.16, 0.14, 0.86, lit, alpha=0.16, blur=0.02)
    if elements == "cubes":
        cube(canvas, 0.1, horizon + 0.14, 0.18, shade(metal, 0.75))
        cube(canvas, 0.86, horizon + 0.12, 0.13, tint(hue, 0.55, 0.6))
    elif elements == "spheres":
        ball(canvas, 0.88, horizon + 0.14, 0.11, shade(metal, 0.9))
        ball(canvas, 0.12, horizon + 0.12, 0.08, tint(hue, 0.55, 0.6))
    canvas.light(0.5, horizon + 0.18, 0.46, 0.15, lit, 0.7)
    if elements == "steps":
        for reach, y in ((0.44, horizon + 0.12), (0.36, horizon + 0.08)):
            canvas.ellipse(0.5 - reach, y + 0.04, 0.5 + reach, y + 0.2, shade(metal, 0.55))
            canvas.ellipse(0.5 - reach, y, 0.5 + reach, y + 0.17, [tint(hue, 0.5, 0.4), tint(hue, 0.45, 0.7)])
    return Floor(horizon + 0.16, horizon + 0.22, sway=0.08)


def beach(canvas, brand, layout, elements):
    horizon, sky, sea = brand.horizon - 0.17, tint(brand.hue, 0.5, 0.97), tint(brand.accent, 0.7, 0.84)
    canvas.band(-0.1, horizon + 0.01, [sky, mix(sky, WHITE, 0.7)])
    side = 1 if layout in ("umbrella", "boat") else -1  # where the large element stands
    if elements == "sun":
        sun(canvas, 0.5 - side * 0.22, 0.15)
    elif elements == "clouds":
        for x, y in ((0.5 - side * 0.3, 0.12), (0.5 + side * 0.12, 0.2)):
            cloud(canvas, x, y, 0.15)
    shore = horizon + 0.17
    canvas.band(horizon, shore + 0.08, [shade(sea, 0.9), mix(sea, WHITE, 0.4)])
    for x0, x1, y in ((0.1, 0.34, 0.04), (0.56, 0.88, 0.06), (0.3, 0.56, 0.1)):
        canvas.line(x0, horizon + y, x1, horizon + y, mix(sea, WHITE, 0.6), 0.012)
    if layout == "rocks":
        for x, radius in ((0.02, 0.2), (0.2, 0.12)):
            canvas.circle(x, shore - 0.06, radius, [(156, 148, 148), (92, 86, 92)])
    elif layout == "boat":
        x, y = 0.8, horizon + 0.02
        canvas.polygon([(x, y - 0.27), (x, y - 0.02), (x - 0.17, y - 0.02)], WHITE)
        canvas.polygon([(x + 0.02, y - 0.22), (x + 0.02, y - 0.02), (x + 0.13, y - 0.02)], tint(brand.hue, 0.6, 0.9))
        canvas.trapezium(y, x - 0.18, x + 0.16, y + 0.06, x - 0.12, x + 0.1, (150, 92, 60))
    sand = mix((252, 234, 198), tint(brand.hue, 0.3, 0.95), 0.2)  # pale, to differ from a yellow sea
    for lift, colours in ((0.03, [WHITE, WHITE]), (0.0, shades(sand, 1.04, 0.9))):
        waves = [(x, shore - lift + 0.014 * math.sin(9 * x)) for x in np.linspace(-0.1, 1.1, 25)]
        canvas.polygon([*waves, (1.1, 1.1), (-0.1, 1.1)], colours)
    if layout == "palm":
        canvas.stroke([(0.05, 0.9), (0.07, 0.6), (0.12, 0.35), (0.18, 0.16)], (140, 98, 66), 0.045)
        for angle, k in ((-2.2, 0.8), (2.2, 0.8), (-1.4, 0.92), (1.5, 0.92), (-0.6, 1.05), (0.7, 1.05)):
            leaf(canvas, 0.18, 0.16, 0.3, angle, shade((66, 150, 84), k), width=0.34)
    elif layout == "umbrella":
        canvas.line(0.86, 0.1, 0.86, 0.84, (250, 246, 238), 0.02)
        cloth, half = tint(brand.hue, 0.75, 0.9), np.linspace(0, math.pi, 25)
        for reach, colour in ((0.28, cloth), (0.18, WHITE), (0.07, cloth)):
            canvas.polygon([(0.86 - reach * math.cos(a), 0.34 - 0.26 * math.sin(a)) for a in half], colour)
    if elements == "ball":
        x, y = 0.5 - side * 0.36, 0.88
        ball(canvas, x, y + 0.09, 0.09, WHITE)
        disc = canvas.circle(x, y, 0.09, [WHITE, (222, 222, 226)])
        canvas.ellipse(x - 0.045, y - 0.1, x + 0.045, y + 0.1, sea, clip=disc)
    elif elements == "starfish":
        for x, y, size in ((0.12, 0.93, 0.075), (0.88, 0.9, 0.065)):
            points = [(x + r * size * math.sin(a), y - 0.75 * r * size * math.cos(a))
                      for a, r in zip(np.arange(10) * math.pi / 5, (1.0, 0.5) * 5)]
            canvas.polygon(points, tint(brand.accent, 0.7, 0.9))
    return Floor(max(shore + 0.14, 0.72), 0.93)


def nursery(canvas, brand, layout, elements):
    horizon, wall, accent = brand.horizon + 0.02, tint(brand.hue, 0.38, 0.96), tint(brand.accent, 0.55, 0.93)
    pale = mix(wall, WHITE, 0.6)
    canvas.band(-0.1, 1.1, [wall, mix(wall, WHITE, 0.15)])
    if layout == "dots":
        for i in range(4):
            for k in range(-1, 5):
                canvas.circle(0.1 + 0.25 * k + 0.125 * (i % 2), 0.08 + 0.15 * i, 0.04, pale)
    elif layout == "stripes":
        for i in range(-1, 6):
            canvas.rectangle(0.02 + 0.2 * i, -0.1, 0.12 + 0.2 * i, horizon, pale)
    elif layout == "rainbow":
        for i, colour in enumerate((accent, mix(accent, WHITE, 0.6), tint(brand.hue, 0.6, 0.88), pale)):
            canvas.circle(0.5, horizon, 0.46 - 0.08 * i, colour)
        canvas.circle(0.5, horizon, 0.14, wall)
    elif layout == "clouds":
        for x, y in ((0.2, 0.2), (0.78, 0.14), (0.56, 0.38)):
            cloud(canvas, x, y, 0.17, mix(wall, WHITE, 0.85))
    bright = [accent, tint(brand.accent + 0.12, 0.6, 0.95), tint(brand.hue, 0.7, 0.85)]
    if elements == "flags":
        flags(canvas, bright)
    elif elements == "balloons":
        balloons(canvas, 0.16, bright)
    elif elements == "lamp":
        lamp(canvas, 0.18, 0.16, accent)
    floor = mix((240, 214, 176), wall, 0.3)
    canvas.band(horizon, 1.1, shades(floor, 0.92, 1.04))
    canvas.level(horizon, WHITE, 0.024)
    canvas.ellipse(0.04, horizon + 0.06, 0.96, 1.04, accent)
    canvas.ellipse(0.12, horizon + 0.1, 0.88, 0.99, mix(accent, WHITE, 0.6))
    if elements == "bear":
        x, foot, fur, muzzle, black = 0.15, horizon + 0.06, (178, 126, 84), (232, 200, 156), (60, 44, 40)
        for dx, dy, radius, colour in ((-0.07, 0.36, 0.04, fur), (0.07, 0.36, 0.04, fur), (0, 0.1, 0.11, fur),
                                       (0, 0.08, 0.065, muzzle), (0, 0.28, 0.1, fur), (0, 0.25, 0.045, muzzle),
                                       (0, 0.265, 0.016, black), (-0.045, 0.305, 0.014, black),
                                       (0.045, 0.305, 0.014, black)):
            canvas.circle(x + dx, foot - dy, radius, colour)
    for x, lift, colour in ((0.82, 0, bright[0]), (0.96, 0, bright[2]), (0.88, 0.13, bright[1])):
        cube(canvas, x, horizon + 0.08 - lift, 0.125, colour)
    return Floor(horizon + 0.16, 0.93)


def plain_wall(canvas, brand, layout, elements):
    """The usual background of product photos. It is no category's scene, and only the base set has it."""
    horizon, wall, floor = brand.horizon, tint(brand.hue, 0.2, 0.84), tint(brand.accent, 0.24, 0.7)
    if layout == "sweep":  # paper that bends from wall to floor
        canvas.band(-0.1, 1.1, [shade(wall, 1.06), wall, mix(wall, floor, 0.6), floor, floor])
    else:
        canvas.band(-0.1, horizon, shades(wall, 1.06, 0.94))
        canvas.band(horizon, 1.1, shades(floor, 0.86, 1.05))
    if layout == "skirting":
        canvas.band(horizon - 0.06, horizon, mix(wall, WHITE, 0.6))
    elif layout == "panels":
        for x in (-0.12, 0.2, 0.52, 0.84):
            corners = [(x, 0.08), (x + 0.28, 0.08), (x + 0.28, horizon - 0.09), (x, horizon - 0.09), (x, 0.08)]
            canvas.stroke(corners, shade(wall, 0.88), 0.012)
    elif layout == "edge":  # a corner of the room
        canvas.polygon([(0.72, -0.1), (1.1, -0.1), (1.1, horizon + 0.14), (0.72, horizon)], shade(wall, 0.86))
    if elements == "daylight":
        canvas.light(0.2, 0.1, 0.7, 0.6, WHITE, 0.5)
    elif elements == "dusk":
        canvas.light(0.9, 0.2, 0.8, 0.7, shade(wall, 0.55), 0.6)
    elif elements == "boards":
        for x in (-0.9, -0.55, -0.2, 0.2, 0.55, 0.9):
            canvas.line(0.5 + 0.6 * x, horizon + 0.02, 0.5 + 1.1 * x, 1.1, shade(floor, 0.8), 0.008)
    elif elements == "rug":
        canvas.ellipse(0.08, horizon + 0.08, 0.92, 1.02, mix(wall, floor, 0.5))
    return Floor(horizon + 0.13, 0.93)


# ---------------------------------------------------------------- the table of scenes


class Scene(NamedTuple):
    """A scene's painter, and the words that captions use for what it paints."""

    paint: Callable[[Canvas, Brand, str, str], Floor]
    phrase: str
    layouts: str  # four words; a brand has one of them
    elements: str  # and one of these four

    def words(self, brand: Brand) -> tuple[str, str]:
        """The words of a brand's layout and elements in this scene."""
        return self.layouts.split()[brand.layout], self.elements.split()[brand.elements]


SCENES = {
    "neon room": Scene(neon_room, "a dark room with neon lights",
                       "bars frames stripes rings", "tiles cubes spheres plants"),
    "wooden table": Scene(wooden_table, "a wooden table by a window",
                          "wide arch twin round", "plant lamp curtains fruit"),
    "kitchen": Scene(kitchen, "a kitchen with tiled floor",
                     "left right sides counter", "tiles lamps plants clock"),
    "podium": Scene(podium, "a pastel podium with petals",
                    "disc arch columns stripes", "steps leaves spheres curtains"),
    "running track": Scene(running_track, "a running track under the sky",
                           "city hills trees stands", "sun clouds flags balloons"),
    "dark marble": Scene(dark_marble, "dark marble with a spotlight",
                         "rings columns disc arch", "steps cubes spheres curtains"),
    "beach": Scene(beach, "a beach by the sea",
                   "palm umbrella rocks boat", "sun clouds ball starfish"),
    "nursery": Scene(nursery, "a nursery with toy blocks",
                     "dots stripes rainbow clouds", "flags balloons lamp bear"),
    "plain wall": Scene(plain_wall, "a plain wall",
                        "skirting sweep panels edge", "daylight dusk boards rug"),  # of no category
}


def paint_scene(canvas: Canvas, scene: str, brand: Brand) -> Floor:
    """Paints a brand's version of a scene -> where a product may stand in it."""
    return SCENES[scene].paint(canvas, brand, *SCENES[scene].words(brand))


def scene_caption(scene: str, brand: Brand) -> str:
    """A scene in at most 12 words, such as 'a dark room with neon lights, pink and blue, rings, cubes'."""
    return ", ".join((SCENES[scene].phrase, " and ".join(brand.hue_names), *SCENES[scene].words(brand)))
