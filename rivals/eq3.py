"""Rivals: CG beside CG with plain attention, where Eq. 3 should matter most; ours, not the paper's.

    python evaluate.py swapped    # a product's prompt with another category's identifier: whose scene appears?
    python evaluate.py words      # a scene in words in place of the identifier: does the product disturb it?
    python evaluate.py few-ads    # both trained on 10, 30 and 100 ads per category
    python evaluate.py duplicates --size 256    # larger than trained: does the background show further products?

Eq. 3 keeps the product's words away from the background. So its effect should show where those words ask for another
scene than the rest of the prompt, where there are too few ads to learn which words matter, and where there is room for
what the words name: on a canvas larger than those of the training. The scene of a picture is that of the category whose
ads' backgrounds are nearest, see Lab.nearest_category. Products are found by rivals/segmenter.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import prompt_texts, save
from rivals.methods import FEW_ADS, FEW_SEEDS, Lab, few_ads_folder
from rivals.segmenter import Segmenter, load_segmenter
from support.datasets import Item
from support.figures import cutout_of, picture_of
from support.files import BadInput, write_json, write_text
from support.images import load_masked, resize, sheet, to_tensor
from support.machine import barrier, processes
from support.metrics import interval, markdown_table, plus_minus, similarity
from support.models import identifiers_of
from support.opening import open_image
from toy.products import PRODUCTS
from toy.scenes import SCENES
from toy.world import write_world

COMPARED = {"CG": "cg", "CG with plain attention": "cg-plain"}
PER_CATEGORY = 4  # products that stand in each other category's scene
SQUARE = 4  # a product counts if it has a square of so many of the segmenter's places, each 4 pixels wide
APART = 2  # and lies so many places away from the picture's own product
DRAWN = 64  # pictures on a sheet of duplicates


def swapped(lab: Lab) -> None:
    """The texts of a product's own category, and the identifier of another one."""
    identifiers = identifiers_of({item.category for item in lab.items("bg1k")}, lab.networks.given("cg"))
    texts = {other: {category: prompt_texts(category, identifier) for category in identifiers}
             for other, identifier in identifiers.items()}
    whose_scene(lab, "swapped", texts, "the identifier's")


def words(lab: Lab) -> None:
    """The texts of a product's own category, and another category's scene in words, as the base's captions have it."""
    texts, categories = {}, sorted({item.category for item in lab.items("bg1k")})
    if unknown := [category for category in categories if category not in PRODUCTS]:
        raise BadInput(f"{lab.data}: words knows only the toy's scenes, not {unknown[0]}'s; try swapped")
    for other in categories:
        background = f"in the background of {SCENES[PRODUCTS[other].scene].phrase}"
        texts[other] = {category: (f"A photo of {category}, {background}", f"A photo of {category}", background)
                        for category in categories}
    whose_scene(lab, "words", texts, "the words'")


def whose_scene(lab: Lab, name: str, texts: dict[str, dict[str, tuple[str, str, str]]], asked: str) -> None:
    """Paints some products of each category with the texts for each other one, texts[other][category], and counts whose
    scene appears. Writes a table and, for each method, a sheet with a row per product and a column per scene.
    """
    products: dict[str, list[Item]] = {}
    for item in lab.items("bg1k"):
        products.setdefault(item.category, []).append(item)
    if len(products) < 2:
        raise BadInput(f"{lab.data}: {name} needs products of two categories; raise --limit")
    lab.check([*COMPARED.values()], lab.items("bg1k"))
    lines = [["method", f"{asked} scene", "the product's", "another", "pictures"]]
    for label, method in COMPARED.items():
        cells = {category: [cutout_of(items[0])] for category, items in sorted(products.items())}
        found = []  # (asked for, product's) of each picture
        for other in sorted(products):
            items = [item for category in cells if category != other for item in products[category][:PER_CATEGORY]]
            painted = zip(lab.pictures(method, items, f"{name}-{other}", texts=texts[other]), items)
            if not (kept := [(path, item) for path, item in painted if path.exists()]):
                continue  # each item was reported
            paths, items = map(list, zip(*kept))
            nearest = lab.nearest_category(paths, items)
            found += [(scene == other, scene == item.category) for scene, item in zip(nearest, items)]
            first = {item.category: path for path, item in reversed([*zip(paths, items)])}
            for category, row in cells.items():
                row.append(picture_of(first[category]) if category in first else None)
        counts = 100 * torch.tensor(found, dtype=torch.float32)  # (n, 2)
        shares = [interval(lambda i, x=x: x[i].mean(), len(x))
                  for x in (*counts.T, 100 - counts.sum(dim=1))]
        lines.append([label, *(f"{plus_minus(share)} %" for share in shares), str(len(found))])
        save(sheet([*cells.values()], ["", *sorted(products)]), lab.out / f"{name}-{method}.png")
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / f"{name}.md")
    print(*markdown_table(lines), "", lab.out / f"{name}.md", sep="\n")


def few_ads(lab: Lab) -> None:
    """Table 1's similarity by the number of ads per category that both were trained on, and by the training's seed."""
    items, results = lab.items("bg1k"), []
    lab.check([f"{method}-{count}-0" for method in COMPARED.values() for count in FEW_ADS], items)
    for count in FEW_ADS if processes()[0] == 0 else ():
        write_world(few_ads_folder(count).parent, ads=count * len(PRODUCTS), bg1k=0, pairs=0, parts=("ads",))
    barrier()
    lines = [["ads per category", *COMPARED, "CG is ahead by"]]
    originals = lab.embeddings([item.image for item in items])
    for count in FEW_ADS:
        measured = []  # (methods, seeds, n)
        for method in COMPARED.values():
            names = [f"{method}-{count}-{seed}" for seed in range(FEW_SEEDS)]
            measured.append([similarity(lab.embeddings(lab.pictures(n, items, "bg1k")), originals) for n in names])
        x = torch.stack([torch.stack(row) for row in measured])
        lines.append([str(count), *(each_seed(row) for row in x), each_seed(x[0] - x[1])])
        results.append({"ads": count, "similarity": x.mean(dim=2).tolist()})
    write_json({"seeds": FEW_SEEDS, "methods": [*COMPARED.values()], "rows": results}, lab.out / "few-ads.json")
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / "few-ads.md")
    print(*markdown_table(lines), "", lab.out / "few-ads.md", lab.out / "few-ads.json", sep="\n")


def duplicates(lab: Lab) -> None:
    """Counts the pictures whose background shows another product: of any category, and of the product's (Fig. 5b). The
    ads themselves have none, so what is found there is an error. Draws the first pictures, with what was found in red.
    """
    items, methods = lab.items("bg1k"), {"ControlNet": "controlnet", **COMPARED}
    lab.check([*methods.values()], items, with_clip=False)
    segmenter, found = load_segmenter(lab.networks.path("segmenter")), {}
    for label, method in {"the ads themselves": None, **methods}.items():
        paths = lab.pictures(method, items, "bg1k") if method else [item.image for item in items]
        pictures = [(to_tensor(open_image(path).convert("RGB")), load_masked(item.image, item.mask)[1], item.category)
                    for path, item in zip(paths, items) if path.exists()]
        places = [further_products(segmenter, picture, M) for picture, M, _ in pictures]
        own = [1 + segmenter.config["categories"].index(category) for *_, category in pictures]
        found[label] = torch.tensor([[has_square(x > 0), has_square(x == c)] for x, c in zip(places, own)]).float()
        cells = [in_red(picture, x > 0) for (picture, *_), x in zip(pictures, places)][:DRAWN]
        save(sheet([cells[i : i + 8] for i in range(0, len(cells), 8)]), lab.out / f"duplicates-{method or 'ads'}.png")
    lines = [["method", "another product", "of the same category", "pictures", "CG has fewer by"]]
    for label, x in found.items():
        shares = [plus_minus(interval(lambda i, y=y: y[i].mean(), len(y))) for y in 100 * x.T]
        fewer = ""
        if len(x) == len(found["CG"]) and label not in ("CG", "the ads themselves"):
            difference = 100 * (x - found["CG"])[:, 0]
            fewer = plus_minus(interval(lambda i, d=difference: d[i].mean(), len(difference)))
        lines.append([label, *(f"{share} %" for share in shares), str(len(x)), fewer])
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / "duplicates.md")
    print(*markdown_table(lines), "", lab.out / "duplicates.md", sep="\n")


@torch.inference_mode()
def further_products(segmenter: Segmenter, picture: Tensor, M: Tensor) -> Tensor:
    """Where a picture (3, H, W) shows products away from its own, whose mask is M: (h, w) of 0 or 1 + category."""
    found = segmenter(picture[None])[0].argmax(dim=0)
    own = F.adaptive_max_pool2d(M, found.shape) > 0
    return found * (F.max_pool2d(own.float(), 2 * APART + 1, stride=1, padding=APART)[0] == 0)


def has_square(found: Tensor) -> bool:
    """Whether a map (h, w) is true on a whole square of SQUARE places."""
    return bool((F.avg_pool2d(found[None].float(), SQUARE, stride=1) == 1).any())


def in_red(picture: Tensor, found: Tensor) -> Tensor:
    """A picture (3, H, W), half red where `found` (h, w) is true."""
    red = resize(found[None].float(), *picture.shape[1:]) / 2
    return picture * (1 - red) + red * torch.tensor([1.0, 0, 0]).view(3, 1, 1)


def each_seed(x: torch.Tensor) -> str:
    """(seeds, n) -> the mean with its interval over items, then each seed's mean."""
    whole = interval(lambda i: x[:, i].mean(), x.shape[1])
    return f"{plus_minus(whole)} ({', '.join(f'{seed:.1f}' for seed in x.mean(dim=1).tolist())})"
