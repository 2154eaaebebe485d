"""Support: t-SNE and the drawn figures; not needed to understand the paper."""


import math
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from support.datasets import Item
from support.images import load_masked, open_image, thumbnail

TINY = 1e-300  # a divisor where there is no spread: n equal points


def tsne(x: Tensor, perplexity: float = 30.0, steps: int = 500) -> Tensor:
    """t-SNE (van der Maaten and Hinton 2008), exact. (n, d) -> (n, 2), both d and n at least 2.

    The positions y minimise KL(P ‖ Q): P holds how likely points are neighbours among the x, Q the same among the y,
    by Student's t. Gradient descent with momentum starts from the two principal components and has the usual two
    phases: in the first quarter P is exaggerated, which lets neighbours find each other. Only downhill steps are taken,
    so the descent cannot diverge. Each one raises the rate; a refused step halves it and drops the momentum.
    """
    P, n = neighbour_probabilities(x.double(), perplexity), len(x)
    U, S, _ = torch.linalg.svd(x.double() - x.double().mean(dim=0), full_matrices=False)
    y = (U * S)[:, :2]
    y = 1e-2 * y / y.std().clamp(min=TINY)
    for exaggeration, count in ((12, steps // 4), (1, steps - steps // 4)):
        # separates equal points and points on one line: no gradient does
        y = y + 1e-4 * torch.randn(n, 2, dtype=torch.float64, generator=Generator().manual_seed(0))
        loss, gradient = tsne_loss(y, P, exaggeration)
        velocity, rate = torch.zeros_like(y), n / 48
        for _ in range(count):
            velocity = 0.9 * velocity - rate * gradient
            moved_loss, moved_gradient = tsne_loss(y + velocity, P, exaggeration)
            if moved_loss <= loss:
                y, loss, gradient, rate = y + velocity, moved_loss, moved_gradient, 1.05 * rate
            else:
                velocity, rate = torch.zeros_like(y), rate / 2
    return y.float()


def neighbour_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """P of t-SNE: how likely two points are neighbours; symmetric, and its sum is 1. (n, d) -> (n, n)

    A Gaussian around each point weights the others. Its width is the one that gives the wanted perplexity, which is at
    most (n − 1) / 3.
    """
    n, d2 = len(x), torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    d2 = d2 / d2.mean().clamp(min=TINY)
    d2.fill_diagonal_(math.inf)  # no point is its own neighbour
    low, high = torch.full((n, 1), -30.0).to(d2), torch.full((n, 1), 30.0).to(d2)
    for _ in range(60):  # bisection on the logarithm of the Gaussians' precisions
        middle = (low + high) / 2
        P = torch.softmax(-middle.exp() * d2, dim=1)
        wide = torch.special.entr(P).sum(dim=1, keepdim=True) > math.log(min(perplexity, (n - 1) / 3))
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (P + P.T) / (2 * n)


def tsne_loss(y: Tensor, P: Tensor, exaggeration: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL(P ‖ Q) for positions y (n, 2), up to the constant entropy of P, and its gradient (n, 2).

    Q = w / Σ w with w = 1 / (1 + d²), so that −Σ P log Q = Σ P log(1 + d²) + log Σ w. exaggeration multiplies P.
    """
    d2 = torch.cdist(y, y).square()
    w = (1 / (1 + d2)).fill_diagonal_(0)
    force = 4 * (exaggeration * P - w / w.sum()) * w
    return exaggeration * (P * d2.log1p()).sum() + w.sum().log(), force.sum(dim=1, keepdim=True) * y - force @ y


def scatter(y: Tensor, kinds: list[tuple[str, str]], categories: list[str], side: int = 900) -> Image.Image:
    """Draws points (n, 2) as in Fig. 5a, in a colour for each category: centres are circles, CG's points triangles,
    ControlNet's squares. kinds: the kind and category of each point.
    """
    scale, edge, legend = 2, 40, 230  # drawn at twice the size
    page = Image.new("RGB", ((side + legend) * scale, side * scale), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18 * scale)
    low, high = y.amin(0), y.amax(0)
    place = ((y - low) / (high - low).clamp(min=1e-30) * (side - 2 * edge) + edge).tolist()
    colours = {c: f"hsl({360 * i // len(categories)}, 75%, 45%)" for i, c in enumerate(categories)}

    def mark(kind: str, x: float, y: float, colour: str) -> None:
        x, y, r = x * scale, y * scale, 5 * scale
        if kind == "centre":
            draw.ellipse([x - 2 * r, y - 2 * r, x + 2 * r, y + 2 * r], outline="black", fill=colour, width=2 * scale)
        elif kind == "CG":
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
        else:
            draw.rectangle([x - r, y - r, x + r, y + r], outline=colour, width=scale)

    for (kind, category), (px, py) in sorted(zip(kinds, place), key=lambda point: point[0][0] == "centre"):
        mark(kind, px, py, colours[category])
    entries = [(kind, kind, "gray") for kind in ("centre", "CG", "ControlNet")]
    entries += [("CG", category, colour) for category, colour in colours.items()]
    for i, (kind, text, colour) in enumerate(entries):
        mark(kind, side + 20, 50 + 34 * i, colour)
        draw.text(((side + 45) * scale, (50 + 34 * i) * scale), text, "black", font, anchor="lm")
    return page.resize((side + legend, side), Image.LANCZOS)


def picture_of(path: Path | None) -> Image.Image | None:
    """The picture in a file as a thumbnail; None if there is no file."""
    return thumbnail(open_image(path).convert("RGB")) if path and path.exists() else None


def cutout_of(item: Item) -> Tensor:
    """An item's product on white, (3, H, W)."""
    rgb, mask = load_masked(item.image, item.mask, inverted=item.inverted)
    return rgb * mask + 1 - mask


def choose(items: list, count: int, seed: int = 0) -> list:
    """`count` of the items, drawn at random by the seed and kept in order. Evenly spaced ones would not do: lists often
    go round the categories.
    """
    chosen = torch.randperm(len(items), generator=Generator().manual_seed(seed))[:count]
    return [items[i] for i in sorted(chosen.tolist())]


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
