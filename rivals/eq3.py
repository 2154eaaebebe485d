"""Rivals: CG beside CG with plain attention, where Eq. 3 should matter most; ours, not the paper's.

    python evaluate.py swapped    # a product's prompt with another category's identifier: whose scene appears?
    python evaluate.py words      # a scene in words in place of the identifier: does the product disturb it?
    python evaluate.py few-ads    # both trained on 10, 30 and 100 ads per category
    python evaluate.py duplicates --size 256    # larger than trained: does the background show further products?
    python evaluate.py swapped-seeds            # by three trainings of each on 100 ads per category; duplicates-seeds

Eq. 3 keeps the product's words away from the background. So its effect should show where those words ask for another
scene than the rest of the prompt, where there are too few ads to learn which words matter, and where there is room for
what the words name: on a canvas larger than those of the training. The scene of a picture is that of the category whose
ads' backgrounds are nearest, see Lab.nearest_category. Products are found by rivals/segmenter.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import prompt_texts, save
from programs.models import identifiers_of
from rivals.lab import FEW, FEW_ADS, FEW_SEEDS, Lab, few_ads_folder
from rivals.segmenter import Segmenter, load_segmenter
from support.datasets import Item
from support.files import BadInput, write_json, write_text
from support.images import load_masked, open_image, resize, sheet, to_tensor
from support.machine import barrier, processes
from support.metrics import interval, markdown_table, plus_minus, similarity
from support.plots import cutout_of, picture_of
from toy.products import PRODUCTS
from toy.scenes import SCENES
from toy.world import write_world

COMPARED = {"CG": ["cg"], "CG with plain attention": ["cg-plain"]}  # the trainings of each
WITH_CONTROLNET = {"ControlNet": ["controlnet"], **COMPARED}
PER_CATEGORY = 4  # products that stand in each other category's scene
SQUARE = 4  # a product counts if it has a square of so many of the segmenter's places, each 4 pixels wide
APART = 2  # and lies so many places away from the picture's own product
DRAWN = 64  # pictures on a sheet of duplicates


def on_few_ads(count: int) -> dict[str, list[str]]:
    """Both, trained on `count` ads per category: names in rivals.lab.METHODS."""
    return {label: [f"{name}-{count}-{seed}" for seed in range(FEW_SEEDS)] for label, (name,) in COMPARED.items()}


def check(lab: Lab, methods: dict[str, list[str]], with_clip: bool = True) -> None:
    """Lab.check for all trainings; draws the ads of those on few ads."""
    names = [name for trainings in methods.values() for name in trainings]
    lab.check(names, lab.items("bg1k"), with_clip)
    for count in sorted({FEW[name][1] for name in names if name in FEW}) if processes()[0] == 0 else ():
        write_world(few_ads_folder(count).parent, ads=count * len(PRODUCTS), bg1k=0, pairs=0, parts=("ads",))
    barrier()


def swapped(lab: Lab, name: str = "swapped", methods: dict[str, list[str]] = COMPARED) -> None:
    """The texts of a product's own category, and the identifier of another one."""
    identifiers = identifiers_of({item.category for item in lab.items("bg1k")}, lab.networks.given("cg"))
    texts = {other: {category: prompt_texts(category, identifier) for category in identifiers}
             for other, identifier in identifiers.items()}
    whose_scene(lab, name, methods, texts, "the identifier's")


def words(lab: Lab) -> None:
    """The texts of a product's own category, and another category's scene in words, as the base's captions have it."""
    texts, categories = {}, sorted({item.category for item in lab.items("bg1k")})
    if unknown := [category for category in categories if category not in PRODUCTS]:
        raise BadInput(f"{lab.data}: words knows only the toy's scenes, not {unknown[0]}'s; try swapped")
    for other in categories:
        background = f"in the background of {SCENES[PRODUCTS[other].scene].phrase}"
        texts[other] = {category: (f"A photo of {category}, {background}", f"A photo of {category}", background)
                        for category in categories}
    whose_scene(lab, "words", COMPARED, texts, "the words'")


def whose_scene(lab: Lab, name: str, methods: dict[str, list[str]], texts: dict[str, dict[str, tuple[str, str, str]]],
                asked: str) -> None:
    """Paints some products of each category with the texts for each other one, texts[other][category], and counts whose
    scene appears. Writes a table and, for each training, a sheet with a row per product and a column per scene.
    """
    products: dict[str, list[Item]] = {}
    for item in lab.items("bg1k"):
        products.setdefault(item.category, []).append(item)
    if len(products) < 2:
        raise BadInput(f"{lab.data}: {name} needs products of two categories; raise --limit")
    check(lab, methods)
    lines = [["method", f"{asked} scene", "the product's", "another", "pictures"]]
    for label, trainings in methods.items():
        found = torch.stack([scenes(lab, name, method, products, texts) for method in trainings])
        found = found[:, found.isfinite().all(dim=(0, 2))]  # (trainings, n, 3)
        lines.append([label, *(each_training(share, " %") for share in found.unbind(dim=2)), str(found.shape[1])])
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / f"{name}.md")
    print(*markdown_table(lines), "", lab.out / f"{name}.md", sep="\n")


def scenes(lab: Lab, name: str, method: str, products: dict[str, list[Item]],
           texts: dict[str, dict[str, tuple[str, str, str]]]) -> Tensor:
    """Paints by one training and draws its sheet. Returns (n, 3): 100 where the scene is the one that was asked for,
    the product's, or another, else 0; NaN where there is no picture, which was reported.
    """
    cells, found = {category: [cutout_of(products[category][0])] for category in sorted(products)}, []
    for other in cells:
        items = [item for category in cells if category != other for item in products[category][:PER_CATEGORY]]
        paths = lab.pictures(method, items, f"{name}-{other}", texts=texts[other])
        for item, scene in zip(items, lab.nearest_category(paths, items)):
            whose = (scene == other, scene == item.category, scene not in (other, item.category))
            found.append([100.0 * it for it in whose] if scene else [math.nan] * 3)
        first = {item.category: path for path, item in reversed([*zip(paths, items)]) if path.exists()}
        for category, row in cells.items():
            row.append(picture_of(first[category]) if category in first else None)
    save(sheet([*cells.values()], ["", *cells]), lab.out / f"{name}-{method}.png")
    return torch.tensor(found)


def few_ads(lab: Lab) -> None:
    """Table 1's similarity by the number of ads per category that both were trained on, and by training."""
    items, results = lab.items("bg1k"), []
    for count in FEW_ADS:
        check(lab, on_few_ads(count))
    lines = [["ads per category", *COMPARED, "CG is ahead by"]]
    originals = lab.embeddings([item.image for item in items])
    for count in FEW_ADS:
        x = torch.stack([torch.stack([similarity(lab.embeddings(lab.pictures(name, items, "bg1k")), originals)
                                      for name in trainings]) for trainings in on_few_ads(count).values()])
        lines.append([str(count), *map(each_training, x), each_training(x[0] - x[1])])  # x: (methods, trainings, n)
        results.append({"ads": count, "similarity": x.mean(dim=2).tolist()})
    write_json({"methods": [*COMPARED], "rows": results}, lab.out / "few-ads.json")
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / "few-ads.md")
    print(*markdown_table(lines), "", lab.out / "few-ads.md", lab.out / "few-ads.json", sep="\n")


def duplicates(lab: Lab, name: str = "duplicates", methods: dict[str, list[str]] = WITH_CONTROLNET) -> None:
    """Counts the pictures whose background shows another product: of any category, and of the product's (Fig. 5b). The
    ads themselves have none, so what is found there is an error.
    """
    check(lab, methods, with_clip=False)
    segmenter = load_segmenter(lab.networks.path("segmenter"))
    found = {label: torch.stack([with_another(lab, name, segmenter, method) for method in trainings])
             for label, trainings in {"the ads themselves": [None], **methods}.items()}  # (trainings, n, 2)
    lines = [["method", "another product", "of the same category", "pictures", "CG has fewer by"]]
    for label, x in found.items():
        fewer = (x - found["CG"])[:, :, 0]
        x, fewer = x[:, x.isfinite().all(dim=(0, 2))], fewer[:, fewer.isfinite().all(dim=0)]
        lines.append([label, *(each_training(share, " %") for share in x.unbind(dim=2)), str(x.shape[1]),
                      each_training(fewer) if label not in ("CG", "the ads themselves") else ""])
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / f"{name}.md")
    print(*markdown_table(lines), "", lab.out / f"{name}.md", sep="\n")


def with_another(lab: Lab, name: str, segmenter: Segmenter, method: str | None) -> Tensor:
    """The pictures painted by one training, or the ads themselves: (n, 2), 100 where one shows another product, and one
    of the same category, else 0; NaN where there is no picture. Draws the first, with what was found in red.
    """
    items, categories = lab.items("bg1k"), segmenter.config["categories"]
    paths, found, cells = lab.pictures(method, items, "bg1k") if method else [item.image for item in items], [], []
    for path, item in zip(paths, items):
        if not path.exists():
            found.append([math.nan] * 2)
            continue
        picture, M = to_tensor(open_image(path).convert("RGB")), load_masked(item.image, item.mask)[1]
        products = further_products(segmenter, picture, M)
        found.append([100.0 * has_square(x) for x in (products > 0, products == 1 + categories.index(item.category))])
        if len(cells) < DRAWN:
            cells.append(in_red(picture, products > 0))
    save(sheet([cells[i : i + 8] for i in range(0, len(cells), 8)]), lab.out / f"{name}-{method or 'ads'}.png")
    return torch.tensor(found)


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


def each_training(x: Tensor, unit: str = "") -> str:
    """(trainings, n) -> the mean with its interval over items; of several trainings also each one's mean."""
    whole = plus_minus(interval(lambda i: x[:, i].mean(), x.shape[1])) + unit
    return whole if len(x) == 1 else f"{whole} ({', '.join(f'{mean:.1f}' for mean in x.mean(dim=1).tolist())})"
