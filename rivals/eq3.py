"""Rivals: CG beside CG with plain attention, where Eq. 3 should matter most; ours, not the paper's.

    python evaluate.py swapped    # a product's prompt with another category's identifier: whose scene appears?

Eq. 3 keeps the product's words away from the background. So its effect should show where those words ask for another
scene than the identifier. Reading order: the comparison; the probe, which says whose scene a picture shows.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import AdDataset, prompt_texts
from programs.models import identifiers_of
from rivals.lab import Lab, choose, cutout_of, save
from rivals.metrics import interval, markdown_table, plus_minus
from support.datasets import Item, categories_of
from support.files import BadInput, write_text
from support.images import sheet, to_tensor
from support.plots import picture_of
from toy.products import PRODUCTS
from toy.world import BRANDS_PER_CATEGORY, draw_picture

COMPARED = {"Eq. 3": "cg", "Eq. 2": "cg-plain"}
PER_CATEGORY = 4  # products that get each other category's identifier
PLAIN_WALL = "plain wall"  # the toy's ninth scene, which is no category's
OUTCOMES = ["the identifier's scene", "the name's", "another", "a plain wall"]

# ---------------------------------------------------------------- the comparison


def swapped(lab: Lab) -> None:
    """Paints some products of each category with each other category's identifier, and counts whose scene appears.

    Writes a table and a sheet: products of the first half of the categories with the identifiers of the second half,
    by Eq. 3 and beside it by Eq. 2.
    """
    items = lab.items("bg1k")
    categories = categories_of(items)
    if len(categories) < 2:
        raise BadInput(f"{lab.data}: swapped needs products of two categories; raise --limit")
    products = [item for name in categories for item in [x for x in items if x.category == name][:PER_CATEGORY]]
    lab.check([*COMPARED.values()], products, with_clip=False)
    probe, exam = tested_probe(lab, categories)
    painted = [paint(lab, method, products) for method in COMPARED.values()]

    table = [["", *OUTCOMES]]
    for label, pictures in zip(COMPARED, painted):
        shares = outcomes(pictures, products, probe).unbind(dim=1)
        figures = [interval(lambda i, x=x: x[i].nanmean(), len(products)) for x in shares]
        table.append([label, *(f"{plus_minus(figure)} %" for figure in figures)])
    lines = [*markdown_table(table), "",
             f"{len(products)} products, each with {len(categories) - 1} identifiers; ± is half of a 95% interval over "
             f"the products. The probe is right for {exam}."]
    write_text("\n".join(lines) + "\n", lab.out / "swapped.md")
    print(*lines, "", lab.out / "swapped.md", sep="\n")

    rows, columns = categories[: len(categories) // 2], categories[len(categories) // 2 :]
    firsts = {item.category: item for item in reversed(products)}
    cells = [[cutout_of(firsts[row]), *(picture_of(pictures[firsts[row], column]) for pictures in painted
                                        for column in columns)] for row in rows]
    save(sheet(cells, ["product", *(f"{label}, {name}" for label in COMPARED for name in columns)], rows),
         lab.out / "swapped.png")


def paint(lab: Lab, method: str, products: list[Item]) -> dict[tuple[Item, str], Path]:
    """Paints each product with every other category's identifier, from the same noise. The pictures, by product and by
    the identifier's category.
    """
    categories, painted = categories_of(products), {}
    identifiers = identifiers_of({*categories}, lab.networks.given("cg"))
    for other in categories:
        texts = {name: prompt_texts(name, identifiers[other]) for name in categories}
        chosen = [i for i, item in enumerate(products) if item.category != other]
        paths = lab.pictures(method, products, f"swapped-{other}", chosen, texts)
        painted |= {(products[i], other): path for i, path in zip(chosen, paths)}
    return painted


def outcomes(painted: dict[tuple[Item, str], Path], products: list[Item], probe: Callable) -> Tensor:
    """(products, 4): how often, in percent, a product's pictures show each of OUTCOMES; NaN without a picture."""
    counts = torch.zeros(len(products), len(OUTCOMES))
    for (item, other), path in painted.items():
        if path.exists():
            scene, = probe(backgrounds(views([replace(item, image=path, mask=item.mask or item.image)])))
            counts[products.index(item), {other: 0, item.category: 1, PLAIN_WALL: 3}.get(scene, 2)] += 1
    return 100 * counts / counts.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------- the probe

SIDE, GRID = 64, 16  # pixels: pictures are loaded at one size, and the probe sees their backgrounds at the other
DRAWN = 120  # pictures of each scene that the toy's probe is fitted to
RIDGE = 0.003

View = tuple[Tensor, Tensor, str]  # a picture (3, SIDE, SIDE), M (1, SIDE, SIDE), and whose scene it is, or should be


def views(items: list[Item]) -> list[View]:
    """Ads, each in its category's scene."""
    return [(ad["image"], ad["mask"], items[ad["index"]].category) for ad in AdDataset(items, SIDE)]


def drawn_views() -> list[View]:
    """The toy's: any category's product in any category's scene and before a plain wall, in training brands."""
    rng, drawn = random.Random(0), []
    scenes = {product.scene: category for category, product in PRODUCTS.items()} | {PLAIN_WALL: PLAIN_WALL}
    for scene in DRAWN * [*scenes]:
        brand, seed = rng.randrange(BRANDS_PER_CATEGORY * len(PRODUCTS)), rng.randrange(2**31)
        picture = draw_picture(rng.choice([*PRODUCTS]), scene, brand, seed, SIDE)
        drawn.append((*map(to_tensor, picture), scenes[scene]))
    return drawn


def backgrounds(views: list[View], twice: bool = False) -> Tensor:
    """Backgrounds at 16 x 16 pixels, of one colour, their mean, where the product hides them: (n, 3 · 16 · 16).

    twice: each is masked also by the product of a random view of another scene.
    """
    rng, rows = random.Random(0), []
    for rgb, mask, scene in views:
        if twice:
            mask = mask.maximum(rng.choice([other for _, other, its in views if its != scene] or [mask]))
        free = (mask == 0).float()  # soft edges have the product's colours, too
        seen = F.adaptive_avg_pool2d(torch.cat([rgb * free, free]), GRID)
        colours, shares = seen[:3], seen[3:]
        mean = colours.sum((1, 2), keepdim=True) / shares.sum()
        rows.append((colours + mean * (1 - shares)).flatten())
    return torch.stack(rows)


def fit_probe(x: Tensor, scenes: list[str]) -> Callable[[Tensor], list[str]]:
    """A linear classifier of backgrounds (n, d), by least squares: the own scene scores 1, the others 0."""
    names, mean = sorted({*scenes}), x.mean(dim=0)
    scores = F.one_hot(torch.tensor([names.index(scene) for scene in scenes])).to(x)
    x = x - mean
    weights = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ scores)
    return lambda x: [names[k] for k in ((x - mean) @ weights).argmax(dim=1).tolist()]


def tested_probe(lab: Lab, categories: list[str]) -> tuple[Callable[[Tensor], list[str]], str]:
    """The probe, and in words how often it is right on held-out ads, masked once and twice.

    A category's ads have its product's outline, and only its scene: a probe could know the scene by the hole. So the
    toy's probe is fitted to any product in any scene, and any other to ads that are masked twice.
    """
    held_out = lab.all_items("bg1k")
    if lab.networks.options["weights"]:
        ads = lab.other_ads
        if not ads:  # none is held out: one half is
            ads, held_out = held_out, choose(held_out, len(held_out) // 2)
        known = views([ad for ad in ads if ad.category in categories and ad not in held_out])
    else:
        known = drawn_views()
    probe = fit_probe(backgrounds(known, twice=True), [scene for *_, scene in known])
    exam = views(held_out)
    once, twice = (sum(named == scene for named, (*_, scene) in zip(probe(backgrounds(exam, twice)), exam))
                   for twice in (False, True))
    return probe, f"{once} of {len(exam)} held-out ads, and for {twice} with another category's product masked too"
