"""Support: t-SNE and the drawn figures; not needed to understand the paper."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from support.datasets import Item
from support.images import load_masked, open_image, thumbnail


def tsne(x: Tensor, perplexity: float = 30.0, steps: int = 500) -> Tensor:
    """t-SNE (van der Maaten and Hinton 2008), exact. (n, d) -> (n, 2).

    Each point's neighbours get probabilities by a Gaussian whose width gives them the wanted perplexity; positions are
    moved until Student-t similarities match them. Starts from the two principal components.
    """
    x = x.double()
    n, d2 = len(x), torch.cdist(x, x).square()  # (n, n)
    apart = ~torch.eye(n, dtype=torch.bool)
    low, high = torch.zeros(n, 1).double(), torch.full((n, 1), 1e6).double() / d2.mean()
    for _ in range(60):  # bisection on the Gaussians' precisions
        beta = (low + high) / 2
        P = (-beta * (d2 - d2.masked_fill(~apart, math.inf).amin(1, keepdim=True))).exp() * apart
        P = P / P.sum(1, keepdim=True)
        wide = -(P * P.clamp(min=1e-12).log()).sum(1, keepdim=True) > math.log(min(perplexity, (n - 1) / 3))
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    P = (P + P.T) / (2 * n)
    y = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2].T
    y, velocity = 1e-2 * y / y.std(), torch.zeros(n, 2).double()
    for step in range(steps):
        w = apart / (1 + torch.cdist(y, y).square())
        force = ((12 if step < steps // 4 else 1) * P - w / w.sum()) * w  # exaggerated at first
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        velocity = (0.5 if step < steps // 4 else 0.8) * velocity - max(n / 12, 20) * gradient
        y = y + velocity
    return y.float()


def scatter(y: Tensor, kinds: list[tuple[str, str]], categories: list[str], side: int = 900) -> Image.Image:
    """Points (n, 2) as Fig. 5a draws them: centres as circles, CG's as triangles, ControlNet's as squares, a colour a
    category.
    """
    scale, edge, legend = 2, 40, 230  # drawn at twice the size
    page = Image.new("RGB", ((side + legend) * scale, side * scale), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18 * scale)
    low, high = y.amin(0), y.amax(0)
    place = ((y - low) / (high - low) * (side - 2 * edge) + edge).tolist()
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
    return thumbnail(open_image(path).convert("RGB")) if path and path.exists() else None


def cutout_of(item: Item) -> Tensor:
    rgb, mask = load_masked(item.image, item.mask, inverted=item.inverted)
    return rgb * mask + 1 - mask


def drawn(items: list, count: int) -> list:
    """`count` of the items, the same ones every time; not at even distances: lists often go round the categories."""
    chosen = torch.randperm(len(items), generator=Generator().manual_seed(0))[:count]
    return [items[i] for i in sorted(chosen.tolist())]
