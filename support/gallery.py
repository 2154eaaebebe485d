"""Support: several products and references: what to paint, file names, a sheet; not needed to understand the paper."""

import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from data import Ad
from support.datasets import Item
from support.files import BadInput
from support.images import load_cutout, load_masked, sheet, thumbnail, to_tensor
from support.names import result_name
from support.opening import open_image

SHEET = "sheet.png"


class Job(NamedTuple):
    """One picture to paint."""

    name: str  # of its file
    ad: Ad
    item: Item  # the files it is painted from


@dataclass(frozen=True)
class Gallery:
    """Every product in the style of every reference, where there are any, for every seed."""

    items: list[Item]  # the products' files; categories are added by `jobs`
    references: list[tuple[Path, Path | None]]  # ads and their masks
    categories: list[list[str]]  # of each product
    seeds: range
    with_and_without: bool  # paint each product without a reference too, as the demo does
    exemplars: bool  # the references are whole pictures, without masks

    @cached_property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Each product's rgb (3, H, W) and M (1, H, W)."""
        return [load_cutout(item.image, item.mask) for item in self.items]

    @cached_property
    def styles(self) -> list[tuple[Tensor, Tensor | None]]:
        """Each reference's picture (3, H, W), background and all, and its mask (1, H, W); None for an exemplar."""
        if self.exemplars:
            return [(to_tensor(open_image(path).convert("RGB")), None) for path, _ in self.references]
        return [load_masked(*pair, "reference", "--reference-mask") for pair in self.references]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The index of the product, and the seed, for each row of the sheet."""
        return [(i, seed) for i in range(len(self.items)) for seed in self.seeds]

    def jobs(self, texts: dict[str, tuple[str, str, str]]) -> list[Job]:
        """All pictures, in the order of the sheet; texts: the prompts of each category."""
        jobs = []
        for i, seed in self.rows:
            for category in self.categories[i]:
                item, ad = replace(self.items[i], category=category), Ad(*self.products[i], texts[category], seed)
                stem = item.image.stem + (f"_{in_file_name(category)}" if len(self.categories[i]) > 1 else "")
                if self.with_and_without or not self.references:
                    jobs.append(Job(result_name(f"{stem}_{seed}", ".png"), ad, item))
                for (path, mask), style in zip(self.references, self.styles):
                    name = result_name(f"{stem}_like_{path.stem}_{seed}", ".png")
                    item = replace(item, reference=path, reference_mask=mask)
                    jobs.append(Job(name, ad._replace(reference=style), item))
        return jobs

    def small(self, picture: Tensor, mask: Tensor | None = None) -> Image.Image:
        """A picture at the size it has on the sheet."""
        count = len(self.rows) * len(self.categories[0]) * max(1, len(self.references))
        return thumbnail(picture, 256 if count <= 8 else 160, mask)

    def sheet(self, pictures: list[Image.Image], name: str) -> Image.Image:
        """A row for each product and seed, the references above. name: what the network in CG's place is called."""
        columns = len(pictures) // len(self.rows)
        cells = [[self.small(*self.products[i]), *pictures[k * columns : (k + 1) * columns]]
                 for k, (i, _) in enumerate(self.rows)]
        styles = [self.small(rgb) for rgb, _ in self.styles]
        if self.with_and_without:
            cells = [[product, alone, styles[0], both] for product, alone, both in cells]
            return sheet(cells, ["product", f"{name} alone", "reference", f"{name} + PG"])
        return sheet(([[None, *styles * len(self.categories[0])]] if styles else []) + cells)

    @staticmethod
    def remove_sheet(out: Path) -> None:
        """Removes an earlier command's sheet, which would seem to be this one's, and says so."""
        if (out / SHEET).exists():
            (out / SHEET).unlink()
            print(f"{out / SHEET}: removed, since it showed an earlier command's pictures", file=sys.stderr)


def in_file_name(category: str) -> str:
    """A category as a part of a file's name."""
    return re.sub(r"\W+", "_", category)


def check_result_names(products: list[Path], references: list[Path], categories: list[str]) -> None:
    """Raises BadInput if two results would have the same name."""
    names = [in_file_name(category) for category in dict.fromkeys(categories)]
    if len(products) == 1 and len({*names}) < len(names):
        raise BadInput(f"--category: two of {', '.join(categories)} would give results of the same name; leave one out")
    for option, paths in (("product", products), ("reference", references)):
        stems = [path.stem for path in paths]
        if twice := {stem for stem in stems if stems.count(stem) > 1}:
            raise BadInput(f"--{option}: two files are named {min(twice)}, as the results would be; rename one")
