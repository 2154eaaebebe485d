"""Support: loads a whole data set and reports what is wrong with it; not needed to understand the paper."""

import argparse
import sys
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cutouts import SOLID
from support.datasets import Item, refuse_many_broken
from support.machine import cores
from support.names import one_line
from support.options import Parser, whole_number

BLANK_DISTANCE, BLANK_PART = 0.04, 0.98  # blank: 98% of the background is within 0.04 of its median colour


def is_blank(image: Tensor, mask: Tensor) -> bool:
    """Whether the background has one colour; section 4.2 drops such ads. image (3, H, W), mask (1, H, W)."""
    background = image[:, mask[0] <= 1 - SOLID]  # (3, pixels)
    if not background.numel():
        return False
    distance = (background - background.median(dim=1, keepdim=True).values).abs().amax(dim=0)
    return bool((distance <= BLANK_DISTANCE).float().mean() >= BLANK_PART)


def check_ads(ads: Dataset, items: list[Item], where: Path) -> tuple[list[Item], list[dict]]:
    """Loads every ad of data.Ads (the items, then their references) and prints a report. Returns the items with a blank
    background, and the samples of eight items for a sheet. Raises BadInput if more than 1% can't be used.
    """
    on_sheet = range(0, len(items), -(-len(items) // 8))  # evenly spaced over the list
    samples, broken, blank = [], [], []
    loader = DataLoader(ads, batch_size=None, num_workers=min(8, cores()))
    for i, sample in enumerate(tqdm(loader, desc="loading", disable=not sys.stderr.isatty())):
        if sample["index"] != i:  # another was taken in its place
            broken.append(str(ads.items[i].image))
            continue
        if i < len(items) and is_blank(sample["image"], sample["mask"]):
            blank.append(items[i])
        if i in on_sheet:
            samples.append(sample)
    refuse_many_broken(broken, len(ads), where)
    print(f"{len(ads) - len(broken):,} images load, {len(broken):,} are broken")
    print(f"{len(blank):,} have a blank background")
    for item in blank[:10]:
        print(f"  {one_line(str(item.image))}")
    if len(blank) > 10:
        print(f"  ... and {len(blank) - 10:,} more")
    return blank, samples


def print_next_commands(root: Path, split: str) -> None:
    """Prints what to do next with a checked data set: the user's own list, or a split of BG60k as released."""
    own = (root / "metadata.jsonl").is_file()
    if own or split == "bg60k":
        print(f"next, train CG on it: python train.py cg --data {root} --weights SD15")
    if own or split != "bg60k":
        of_split = "" if own else f" --split {split}"
        print(f"next, with the CG and PG that you trained: python generate.py --data {root}{of_split} --out results "
              "--weights SD15 --cg CG --pg PG")


# ---------------------------------------------------------------- the command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of data.py."""
    parser = Parser(description="Check a data set: report what is in it and what was assumed, load every picture, find "
                    "blank backgrounds, and draw eight items as the networks see them.")
    add = parser.add_argument
    add("dir", type=Path, help="BG60k's root, or a folder with metadata.jsonl")
    add("--split", default="bg60k", help="bg60k (default), bg1k or bgpair")
    add("--sheet", metavar="FILE", type=Path, help="draw eight items here: image, mask, CG's hint, PG's hint")
    add("--size", metavar="N", type=whole_number(1, 4096), default=512, help="side of the training images [512 px]")
    add("--list", action="store_true",
        help="first write metadata.jsonl, from DIR/CATEGORY/NAME.png and NAME_mask.png or alpha")
    add("--drop-blank", action="store_true",
        help="take images with a blank background out of the list; the whole list stays as FILE.all")
    return parser.parse_args(arguments)
