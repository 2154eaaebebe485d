"""Support: the ads that a training run's sheets are painted from; not needed to understand the paper."""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data import load_ad
from support.datasets import Item, read_items
from support.files import BadInput


def held_out_ads(data: Path, split: str, items: list[Item], categories: Container[str] | None, size: int,
                 count: int = 8) -> tuple[list[Item], list[Tensor]]:
    """The first ads of a test split, if the data set has it, then the last ones of the training set; only those in the
    given categories, if any are given.

    Returns the ads; and their images, masks, references and references' masks, all (n, 3 or 1, size, size). An ad
    without a reference is its own reference.
    """
    test = []
    if (data / f"{split}_info.txt").is_file():
        try:
            test = read_items(data, split)[0]
        except BadInput:
            pass  # its folders may not be there
    ads, pictures = [], []
    for item in (*test, *items[::-1]):
        if len(ads) == count:
            break
        if categories is not None and item.category not in categories:
            continue
        reference = replace(item, image=item.reference, mask=item.reference_mask) if item.reference else item
        try:
            pictures.append((*load_ad(item, size), *load_ad(reference, size)))
        except BadInput:
            continue  # reported when it is read as part of the data set
        ads.append(item)
    return ads, [torch.stack(parts) for parts in zip(*pictures)]
