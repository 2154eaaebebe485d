"""Programs: what a training run reads of its data, encoded once: latents and prompts; and the ads on its sheets; not
needed to understand the paper.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import AdDataset, Canvas, TrainingSamples, caption_texts, load_ad, product_hint, prompts_by_category
from model import ControlNet, Prompts, UNet
from programs.batch import refuse_not_finite
from programs.settings import Settings, category_identifiers
from sampler import SamplerSettings, seeded
from support.datasets import Item, read_items
from support.files import BadInput
from support.images import canvas_size, note, sheet
from support.machine import processes
from support.tensors import compute_parts, file_fingerprint, not_finite, weights_fingerprint
from weights import StableDiffusion, load_stable_diffusion

PART = 1024  # items in a file of latents
ON_SHEET, CHECKED = 8, 64  # ads on a sheet, and held-out ads whose loss is checked


def load_base_and_ads(settings: Settings) -> tuple[StableDiffusion, list[Item], list[Item], dict[str, str] | None]:
    """The base, the ads, those that are held out, and their categories' identifiers; None in stage controlnet, which
    reads captions instead. Raises BadInput if they can't be read, or do not fit the settings.
    """
    sd = load_stable_diffusion(settings.weights, settings.device, tokenizer=settings.tokenizer, vae=settings.vae)
    canvas_size(1, 1, settings.size, sd.multiple)  # raises BadInput if the size does not fit the base
    items, notes = read_items(settings.data)
    captions = settings.stage == "controlnet"
    if captions and not all(map(caption_texts, items)):
        raise BadInput(f"{settings.data}: stage controlnet trains on captions, which this data set lacks; to train an "
                       "ordinary ControlNet on these ads, give train.py cg --attention plain")
    identifiers = None if captions else category_identifiers(items, settings)
    ads = loadable(held_out_ads(settings, "bg1k", items, identifiers), settings.size)
    held_out = [ad for ad, *_ in islice(ads, CHECKED)]
    if not held_out:
        notes.append("no ads are held out to check the training with; data.py --hold-out marks some in metadata.jsonl")
    if processes()[0] == 0:
        print(*notes, sep="\n", file=sys.stderr)
    return sd, items, held_out, identifiers


def latent_samples(sd: StableDiffusion, items: list[Item], size: int, settings: Settings, perturbed: bool = False,
                   pictures: bool = True) -> TrainingSamples:
    """Training samples with latents, which are encoded first if settings.cache lacks them."""
    latents = encode_items(sd, items, size, settings)
    return TrainingSamples(items, size, latents, sd.vae.scaling_factor, sd.schedule.T, pictures, perturbed,
                           settings.theta, settings.sigma, settings.noise_offset)


def encode_items(sd: StableDiffusion, items: list[Item], size: int, settings: Settings) -> list[dict[str, Tensor]]:
    """The frozen VAE's encodings of a data set's pictures, cut to squares of `size` pixels: a dict for PART items each.

    It holds the posterior's "mean" and "logvar", unscaled, (n, 4, h, w), and "inpainting" (n, 5, h, w), what an
    inpainting UNet reads beside z_t. All are float16, memory-mapped from settings.cache. Processes share the work,
    and existing files are reused. Raises BadInput if a file is broken or a latent is not finite.
    """
    ads, keys, weight = AdDataset(items, size), latent_keys(sd, items, size, settings.amp), sd.vae.quant_conv.weight

    @torch.no_grad()
    def encode(k: int) -> dict[str, Tensor]:
        part, encoded = Subset(ads, range(k * PART, min((k + 1) * PART, len(items)))), []
        loader = DataLoader(part, min(8, settings.micro_batch), num_workers=settings.workers)
        for ad in tqdm(loader, f"encoding {k + 1} of {len(keys)}", unit="batch", disable=None):
            image = ad["image"].to(weight)
            with settings.autocast():
                mean, logvar = sd.vae.encode(2 * image - 1)
                latents = {"mean": mean, "logvar": logvar, "inpainting": sd.inpainting(image.to(mean), ad["mask"])}
            encoded.append({name: x.to("cpu", torch.float16) for name, x in latents.items() if x is not None})
            if not_finite(encoded[-1]):
                raise BadInput("the VAE's latents are not finite; its weights are broken: get them again, or, if they "
                               "overflow with --amp float16, leave it out")
        return {name: torch.cat([latents[name] for latents in encoded]) for name in encoded[0]}

    return compute_parts(settings.cache, keys, encode)


def latent_keys(sd: StableDiffusion, items: list[Item], size: int, amp: torch.dtype | None) -> list:
    """What the latents of each part depend on."""
    # "load_square" stands for the rule of the crop: a change of that rule is to change this word
    network = [weights_fingerprint(sd.vae), size, "load_square", str(amp), sd.unet.config["in_channels"]]
    files = [[file_fingerprint(item.image), file_fingerprint(item.mask), item.inverted] for item in items]
    return [network + files[start : start + PART] for start in range(0, len(items), PART)]


def prompt_table(sd: StableDiffusion, texts: list[tuple[str, str, str]], settings: Settings) -> Tensor:
    """The encodings of C triples of texts, for P, P_fg and P_bg: (C, 3, L, D), memory-mapped from settings.cache."""
    @torch.no_grad()
    def encode(_: int) -> dict[str, Tensor]:
        with settings.autocast():
            return {"prompts": torch.stack([sd.prompts(list(triple)).cpu() for triple in texts])}

    key = [weights_fingerprint(sd.text_encoder), sd.tokenizer.bpe.to_str(), texts, str(settings.amp)]
    return compute_parts(settings.cache, [key], encode)[0]["prompts"]


def category_prompts(table: Tensor, row_of_item: list[int], device: str) -> Callable[[Tensor, Tensor], Prompts]:
    """Eq1.prompts by category (section 3.2), from the rows of a prompt table, whose last row encodes ''.

    row_of_item (n,): the row of each item of the data set.
    """
    rows = torch.tensor(row_of_item)

    def prompts(index: Tensor, dropped: Tensor) -> Prompts:
        chosen = torch.where(dropped.cpu(), len(table) - 1, rows[index.cpu()])
        return Prompts(*table[chosen].to(device).unbind(1))

    return prompts


def caption_prompts(sd: StableDiffusion, captions: list[str]) -> Callable[[Tensor, Tensor], Prompts]:
    """Eq1.prompts by caption, for a branch that reads only P. They are encoded when needed, since there are as many
    captions as pictures.
    """
    @torch.no_grad()
    def prompts(index: Tensor, dropped: Tensor) -> Prompts:
        P = sd.prompts(["" if d else captions[i] for i, d in zip(index.tolist(), dropped.tolist())])
        return Prompts(P, P, P)

    return prompts


def batch_prompts(sd: StableDiffusion, items: list[Item], identifiers: dict[str, str] | None,
                  settings: Settings) -> Callable[[Tensor, Tensor], Prompts]:
    """Eq1.prompts: each category's, with its identifier, encoded here once; without identifiers, the captions."""
    if identifiers is None:
        return caption_prompts(sd, [caption_texts(item)[0] for item in items])
    texts = [*prompts_by_category(identifiers, sd.tokenizer).values(), ("", "", "")]
    rows = {name: row for row, name in enumerate(identifiers)}
    return category_prompts(prompt_table(sd, texts, settings), [rows[item.category] for item in items], settings.device)


def held_out_ads(settings: Settings, split: str, items: list[Item], identifiers: dict[str, str] | None) -> list[Item]:
    """The ads of a test split whose pictures are not among `items`, the training set, and which a run's branches can
    paint: their category has an identifier or, where these are read, they have captions. A split that can't be read has
    none, and a note says why.
    """
    try:
        test = read_items(settings.data, split)[0]
    except BadInput as error:
        note(f"no held-out ads: {error}")
        return []
    trained, captions = {item.image for item in items}, settings.stage == "controlnet"
    return [item for item in test if item.image not in trained and (
        item.category in identifiers if identifiers else caption_texts(item) or not captions)]


def loadable(items: list[Item], size: int) -> Iterator[tuple]:
    """Yields the ads that load: each with its image, its mask, its reference's and the reference's mask. An ad without
    a reference is its own reference.
    """
    for item in items:
        reference = replace(item, image=item.reference, mask=item.reference_mask) if item.reference else item
        with suppress(BadInput):  # data.py reports it
            yield item, *load_ad(item, size), *load_ad(reference, size)


def sheet_ads(settings: Settings, split: str, items: list[Item],
              identifiers: dict[str, str] | None = None) -> tuple[str, tuple[Item, ...], list[Tensor]]:
    """The ads on a run's sheets: the first of a test split that load, or else the last ones of the training set.

    Returns what they are called, the ads, and their images, masks, references and references' masks, all (n, 3 or 1,
    size, size); see loadable.
    """
    held_out = [*islice(loadable(held_out_ads(settings, split, items, identifiers), settings.size), ON_SHEET)]
    ads, *pictures = zip(*(held_out or islice(loadable(items[::-1], settings.size), ON_SHEET)))
    return "held-out ads" if held_out else "training ads", ads, [torch.stack(parts) for parts in pictures]


def sheet_of(rows: dict[str, Tensor]) -> Image.Image:
    """A sheet with a labelled row for each batch of pictures (n, 3, H, W)."""
    return sheet([list(pictures) for pictures in rows.values()], row_labels=list(rows))


def sheet_painter(paint: Callable, sd: StableDiffusion, cg: ControlNet, pg: ControlNet | None, items: list[Item],
                  identifiers: dict[str, str] | None, settings: Settings) -> Callable[[], Image.Image]:
    """Task.draw for the paper's branches: ads with their categories' prompts or, without identifiers, their captions.

    paint: generate.paint.
    """
    label, ads, (rgb, mask, *references) = sheet_ads(settings, "bgpair" if pg else "bg1k", items, identifiers)
    texts = prompts_by_category(identifiers, sd.tokenizer) if identifiers else None
    texts = [texts[ad.category] if texts else caption_texts(ad)[:1] * 3 for ad in ads]
    canvas = Canvas(rgb, mask, texts, [], *(references if pg else ()))  # draw_branches adds generators
    return partial(draw_branches, paint, sd.unet, cg, pg, canvas, label, settings)


def draw_branches(paint: Callable, unet: UNet, cg: ControlNet, pg: ControlNet | None, canvas: Canvas,
                  label: str, settings: Settings) -> Image.Image:
    """A sheet with a column per ad: the product, for PG also the reference, the painted picture, the original ad."""
    # training dropped its VAE
    base = load_stable_diffusion(settings.weights, "cpu", tokenizer=settings.tokenizer, vae=settings.vae)
    vae, text_encoder = base.vae.to(settings.device), base.text_encoder.to(settings.device)
    sd = replace(base, unet=unet, vae=vae, text_encoder=text_encoder)
    canvas = canvas._replace(generators=seeded(settings.seed, len(canvas.texts)))
    painted = paint(sd, canvas, SamplerSettings(steps=25), cg, pg)
    refuse_not_finite(painted)
    rows = {"product": product_hint(canvas.rgb, canvas.mask)} | ({"reference": canvas.reference} if pg else {})
    return sheet_of(rows | {"painted": painted, label: canvas.rgb})
