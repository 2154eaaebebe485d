"""Programs: latents and prompts of a data set, encoded once; not needed to understand the paper."""


import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import Ads, load_ad
from model import Prompts
from support.datasets import Item, read_items
from support.files import BadInput
from support.machine import processes
from support.tensors import compute_parts, file_fingerprint, not_finite, weights_fingerprint
from weights import StableDiffusion


def autocast(device: torch.device | str, dtype: torch.dtype | None, cache: bool = True) -> torch.autocast:
    """A context in which matrix products and convolutions are computed in `dtype`; None changes nothing.

    With `cache` it keeps half-precision copies of the weights until it ends.
    """
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None, cache_enabled=cache)


class Latents:
    """The frozen VAE's encodings of a data set's pictures, cut to squares of `size` pixels; in files of PART items.

    latents[i] -> mean and standard deviation, both (4, h, w) float32, scaled as the UNet's z; and what an inpainting
    UNet reads beside z_t, (5, h, w), or None for other UNets. Processes share the work, and existing files are reused.
    Raises BadInput if a file is broken.
    """

    PART = 1024

    def __init__(self, sd: StableDiffusion, items: list[Item], size: int, folder: Path, batch: int = 8,
                 amp: torch.dtype | None = None, workers: int = 0):
        rank, world = processes()
        self.scale, self.T, self.folder, ads = sd.vae.scaling_factor, sd.schedule.T, folder, Ads(items, size)
        network = [weights_fingerprint(sd.vae), size, str(amp), sd.unet.config["in_channels"]]
        files = [[file_fingerprint(item.image), file_fingerprint(item.mask), item.inverted] for item in items]
        self.keys = [network + files[start : start + self.PART] for start in range(0, len(items), self.PART)]
        bar = tqdm(total=len(items), desc="encoding", unit="image", disable=rank > 0 or not sys.stderr.isatty())

        def encode(k: int) -> dict[str, Tensor]:
            part = Subset(ads, range(k * self.PART, min((k + 1) * self.PART, len(items))))
            return encode_ads(sd, DataLoader(part, batch, num_workers=workers), amp, lambda n: bar.update(n * world))

        self.parts = compute_parts(folder, self.keys, encode)
        bar.close()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        part, row = self.parts[index // self.PART], index % self.PART
        mean, std = part["mean"][row].float(), (part["logvar"][row].float() / 2).exp()
        if not (mean + std).isfinite().all():
            raise BadInput(f"--cache {self.folder}: a file of latents is broken; remove the folder; it is made again")
        return mean * self.scale, std * self.scale, part["inpainting"][row].float() if "inpainting" in part else None


@torch.no_grad()
def encode_ads(sd: StableDiffusion, batches: Iterable[dict], amp: torch.dtype | None,
               on_batch: Callable[[int], None]) -> dict[str, Tensor]:
    """What `Latents` keeps for batches of Ads, (n, ...) float16 each. Calls on_batch(B) after a batch of B pictures.

    Raises BadInput if a latent is not finite.
    """
    weight, rows = sd.vae.quant_conv.weight, {}
    for batch in batches:
        image, mask = batch["image"].to(weight.device), batch["mask"].to(weight.device)
        with autocast(weight.device, amp):
            mean, logvar = sd.vae.encode(2 * image.to(weight) - 1)
            encoded = {"mean": mean, "logvar": logvar, "inpainting": sd.inpainting(image.to(mean), mask)}
        encoded = {name: x.to("cpu", torch.float16) for name, x in encoded.items() if x is not None}
        if not_finite(encoded):
            raise BadInput("the VAE's latents are not finite; its weights are broken" + (
                ", or overflow in float16: leave out --amp" if amp == torch.float16 else "; get them again"))
        for name, x in encoded.items():
            rows.setdefault(name, []).append(x)
        on_batch(len(image))
    return {name: torch.cat(x) for name, x in rows.items()}


def prompt_table(sd: StableDiffusion, texts: list[tuple[str, str, str]], folder: Path,
                 amp: torch.dtype | None = None) -> Tensor:
    """The encodings of C triples of texts, for P, P_fg and P_bg: (C, 3, L, D), memory-mapped."""
    device = sd.text_encoder.text_model.final_layer_norm.weight.device

    @torch.no_grad()
    def encode(_: int) -> dict[str, Tensor]:
        with autocast(device, amp):
            return {"prompts": torch.stack([sd.prompts(list(triple)).cpu() for triple in texts])}

    key = [weights_fingerprint(sd.text_encoder), sd.tokenizer.bpe.to_str(), texts, str(amp)]
    return compute_parts(folder, [key], encode)[0]["prompts"]


class CategoryPrompts:
    """A batch's prompts by category (section 3.2), from the rows of a prompt table, whose last row encodes ''.

    row_of_item (n,): the row of each item of the data set.
    """

    def __init__(self, table: Tensor, row_of_item: list[int], device: str):
        self.table, self.row_of_item, self.device = table, torch.tensor(row_of_item), device

    def __call__(self, index: Tensor, dropped: Tensor) -> Prompts:
        """index (B,): positions in the data set; dropped (B,) bool: where '' replaces the prompt."""
        rows = torch.where(dropped.cpu(), len(self.table) - 1, self.row_of_item[index.cpu()])
        return Prompts(*self.table[rows].to(self.device).unbind(1))


class CaptionPrompts:
    """A batch's prompts by caption, for a branch that reads only P. They are encoded when needed, since there are as
    many captions as pictures.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], captions: list[str]):
        self.encode, self.captions = encode, captions

    @torch.no_grad()
    def __call__(self, index: Tensor, dropped: Tensor) -> Prompts:
        P = self.encode(["" if d else self.captions[i] for i, d in zip(index.tolist(), dropped.tolist())])
        return Prompts(P, P, P)


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
