"""Support: t-SNE and the drawn figures; not needed to understand the paper."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from support.datasets import Item
from support.images import load_masked, open_image, thumbnail

TINY = 1e-300  # a divisor where there is no spread: n equal points
MARKS = {"centre": (20, 60), "CG": (12, 3), "ControlNet": (12, 4)}  # radius and corners
COLOURS = ("#8fb0d8", "#1f4e8c")

# ---------------------------------------------------------------- t-SNE


def tsne(x: Tensor, perplexity: float = 30.0, steps: int = 500) -> Tensor:
    """t-SNE (van der Maaten and Hinton 2008), exact. (n, d) -> (n, 2), both d and n at least 2.

    The positions y minimise KL(P ‖ Q): P holds how likely points are neighbours among the x, Q the same among the y,
    by Student's t. Gradient descent with momentum starts from the two principal components and has the usual two
    phases: in the first quarter P is exaggerated, which lets neighbours find each other. Only downhill steps are taken,
    so the descent cannot diverge. Each one raises the rate; a refused step halves it and drops the momentum.
    """
    P, n = neighbour_probabilities(x.double(), perplexity), len(x)
    gradient_and_loss = torch.func.grad_and_value(tsne_loss)
    U, S, _ = torch.linalg.svd(x.double() - x.double().mean(dim=0), full_matrices=False)
    y = (U * S)[:, :2]
    y = 1e-2 * y / y.std().clamp(min=TINY)
    for exaggeration, count in ((12, steps // 4), (1, steps - steps // 4)):
        # separates equal points and points on one line: no gradient does
        y = y + 1e-4 * torch.randn(n, 2, dtype=torch.float64, generator=Generator().manual_seed(0))
        gradient, loss = gradient_and_loss(y, P, exaggeration)
        velocity, rate = torch.zeros_like(y), n / 48
        for _ in range(count):
            velocity = 0.9 * velocity - rate * gradient
            moved_gradient, moved_loss = gradient_and_loss(y + velocity, P, exaggeration)
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


def tsne_loss(y: Tensor, P: Tensor, exaggeration: float = 1.0) -> Tensor:
    """KL(P ‖ Q) for positions y (n, 2), up to the constant entropy of P. exaggeration multiplies P.

    Q = w / Σ w with w = 1 / (1 + d²), so that −Σ P log Q = Σ P log(1 + d²) + log Σ w.
    """
    d2 = torch.cdist(y, y).square()
    w = 1 / (1 + d2)
    return exaggeration * (P * d2.log1p()).sum() + (w.sum() - w.trace()).log()


# ---------------------------------------------------------------- figures, drawn at twice their size


def scatter(y: Tensor, kinds: list[tuple[str, str]], categories: list[str]) -> Image.Image:
    """Draws points (n, 2) as in Fig. 5a, in a colour for each category: centres are circles, CG's points triangles,
    ControlNet's squares. kinds: the kind and category of each point.
    """
    page = Image.new("RGB", (2260, 1800), "white")  # a square of points, and the legend at its right
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(36)
    colours = {category: f"hsl({360 * i // len(categories)}, 75%, 45%)" for i, category in enumerate(categories)}

    def mark(kind: str, x: float, y: float, colour: str) -> None:
        radius, corners = MARKS[kind]
        draw.regular_polygon((x, y, radius), corners, fill=None if kind == "ControlNet" else colour,
                             outline="black" if kind == "centre" else colour, width=2)

    y = y - y.amin(0)
    places = (80 + 1640 * y / y.amax(0).clamp(min=TINY)).tolist()
    for (kind, category), place in sorted(zip(kinds, places), key=lambda point: point[0][0] == "centre"):
        mark(kind, *place, colours[category])
    entries = [(kind, kind, "gray") for kind in MARKS] + [("CG", *entry) for entry in colours.items()]
    for i, (kind, text, colour) in enumerate(entries):
        mark(kind, 1840, 100 + 68 * i, colour)
        draw.text((1890, 100 + 68 * i), text, "black", font, anchor="lm")
    return page.reduce(2)


def draw_curves(curves: dict[str, list[tuple[float, float]]], title: str, x_label: str) -> Image.Image:
    """Draws some lines by name, at most as many as COLOURS; a later one lies on top. The y axis leaves out 2% of the
    values at either end, so that one bad batch does not flatten a curve.
    """
    page = Image.new("RGB", (1800, 900), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(30)
    points = [point for line in curves.values() for point in line]
    last, values = max(x for x, _ in points), sorted(y for _, y in points)
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    margin = (high - low) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        up = (min(max(y, low), high) - low) / (high - low)
        return 180 + 1580 * x / last, 780 - 700 * up

    for i in range(5):
        x, y = last * i / 4, low + (high - low) * i / 4
        draw.line([place(0, y), place(last, y)], "#dddddd", 2)
        draw.text(place(0, y), f"{y:.3g}  ", "black", font, anchor="rm")
        draw.text(place(x, low), f"\n{x:,.0f}", "black", font, anchor="ma")
    draw.text((900, 900), x_label, "black", font, anchor="md")
    draw.text((180, 48), title, "black", font, anchor="ls")
    for i, (name, colour) in enumerate(zip(curves, COLOURS)):
        draw.line([place(*point) for point in curves[name]], colour, 4, joint="curve")
        draw.text((1760 - 300 * i, 48), name, colour, font, anchor="rs")
    return page.reduce(2)


# ---------------------------------------------------------------- small pictures


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
