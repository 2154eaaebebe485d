"""Support: the ads that a training run's sheets are painted from; not needed to understand the paper."""

from dataclasses import replace

import torch

from data import load_ad
from support.datasets import Item, read_items
from support.files import BadInput
from support.settings import Settings


def held_out_ads(items: list[Item], texts: dict[str, tuple[str, str, str]] | None, settings: Settings,
                 with_references: bool, count: int = 8) -> tuple:
    """The first ads of the test split, where the data set has one, then the last ones of the training set, with the prompts
    of their categories (texts None: their captions).

    -> images (n, 3, S, S), masks (n, 1, S, S), prompts, generators (none yet), and with_references the references and
    their masks; an ad without one is its own.
    """
    split, test = "bgpair" if with_references else "bg1k", []
    if (settings.data / f"{split}_info.txt").is_file():
        try:
            test = read_items(settings.data, split)[0]
        except BadInput:
            pass  # its folders may not be there
    prompts, pictures = [], []
    for item in (*test, *items[::-1]):
        prompt = item.caption and (", ".join(item.caption),) * 3 if texts is None else texts.get(item.category)
        reference = replace(item, image=item.reference, mask=item.reference_mask) if item.reference else item
        if prompt and len(prompts) < count:
            try:
                pictures.append((*load_ad(item, settings.size), *load_ad(reference, settings.size)))
                prompts.append(prompt)
            except BadInput:
                continue  # named when it is read as part of the data set
    rgb, mask, *references = (torch.stack(parts) for parts in zip(*pictures))
    return rgb, mask, prompts, [], *(references if with_references else ())
