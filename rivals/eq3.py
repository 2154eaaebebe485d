"""Rivals: CG beside CG with plain attention, where Eq. 3 should matter most; ours, not the paper's.

    python evaluate.py swapped    # a product's prompt with another category's identifier: whose scene appears?

Eq. 3 keeps the product's words away from the background. So its effect should show where those words ask for another
scene than the rest of the prompt. The scene of a picture is that of the category whose ads' backgrounds are nearest.
"""

import torch
from torch import Tensor

from data import prompt_texts
from programs.gallery import save
from programs.models import identifiers_of
from rivals.lab import Lab
from support.datasets import Item
from support.files import BadInput, write_text
from support.images import sheet
from support.metrics import interval, markdown_table, plus_minus
from support.plots import cutout_of, picture_of

COMPARED = {"CG": "cg", "CG with plain attention": "cg-plain"}
PER_CATEGORY = 4  # products that stand in each other category's scene


def swapped(lab: Lab) -> None:
    """Paints some products of each category with each other category's identifier, and counts whose scene appears.
    Writes a table and, for each method, a sheet with a row per product and a column per scene.
    """
    items = lab.items("bg1k")
    products = {name: [item for item in items if item.category == name] for name in sorted({i.category for i in items})}
    if len(products) < 2:
        raise BadInput(f"{lab.data}: swapped needs products of two categories; raise --limit")
    lab.check([*COMPARED.values()], items)
    lines = [["method", "the identifier's scene", "the product's", "another", "pictures"]]
    for label, method in COMPARED.items():
        found = scenes(lab, method, products)  # (n, 3)
        shares = [interval(lambda i, x=x: x[i].mean(), len(x)) for x in found.unbind(dim=1)]
        lines.append([label, *(f"{plus_minus(share)} %" for share in shares), str(len(found))])
    write_text("\n".join(markdown_table(lines)) + "\n", lab.out / "swapped.md")
    print(*markdown_table(lines), "", lab.out / "swapped.md", sep="\n")


def scenes(lab: Lab, method: str, products: dict[str, list[Item]]) -> Tensor:
    """Paints by one method and draws its sheet. Returns (n, 3): 100 where the scene is the one that was asked for, the
    product's, or another, else 0. Pictures that can't be painted or read are reported and left out.
    """
    categories, centres = lab.centres
    identifiers = identifiers_of({*products}, lab.networks.given("cg"))
    rows, found = {name: [cutout_of(products[name][0])] for name in products}, []
    for other in products:
        texts = {name: prompt_texts(name, identifiers[other]) for name in products}
        items = [item for name in products if name != other for item in products[name][:PER_CATEGORY]]
        paths = lab.pictures(method, items, f"swapped-{other}", texts=texts)
        x, kept = lab.backgrounds(zip(paths, items))
        for item, nearest in zip(kept, torch.cdist(x, centres).argmin(dim=1).tolist()):
            scene = categories[nearest]
            found.append([scene == other, scene == item.category, scene not in (other, item.category)])
        first = dict(zip([item.category for item in reversed(items)], reversed(paths)))
        for name, row in rows.items():
            row.append(picture_of(first.get(name)))
    save(sheet([*rows.values()], ["", *rows]), lab.out / f"swapped-{method}.png")
    return 100 * torch.tensor(found).float()
