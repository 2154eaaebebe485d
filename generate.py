"""The method: from a product photo to an ad, by CG alone or CG + PG in the style of a reference (Fig. 2, section 5.1).

    python generate.py                                                        # a sample product and reference
    python generate.py --product mug.png --category mug                       # CG: the common style of the category
    python generate.py --product mug.png --category mug --reference ad.png    # CG + PG: the style of that ad
    python generate.py --data BG60K --split bgpair --out results              # every item of a data set
    python generate.py --prompt "a photo of a mug"                            # the base alone

A product needs a mask: its image's alpha channel, or --mask FILE, white on the product. The result keeps the photo's
size and framing, and the product's own pixels where the mask is 1.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clip import Tokenizer
from data import Ad, background_hint, dilate, inpaint_hint, product_hint
from model import ControlNet, Prompts
from programs.batch import jobs_of_items, load_ads, paint_items, save_data_sheet
from programs.gallery import (
    LARGEST,
    SHEET,
    check,
    command_of,
    draw_sheet,
    jobs_of,
    options,
    paint_jobs,
    painting_of,
    record_of,
)
from programs.models import ModelChoice, Models, load_models
from sampler import Conditions, Painting, Schedule, sample, seeded
from support.cutouts import SOLID, extend
from support.datasets import BROKEN, Item, read_items
from support.files import BadInput, locked, one_line_errors
from support.images import canvas_size, fit, resize, save_image, to_bytes
from weights import StableDiffusion

IDENTIFIER = "sks {}"  # [D], section 5.1: 'sks' and the category's id

# ---------------------------------------------------------------- a batch on its canvas


def prompt_texts(category: str, identifier: str | None, tokenizer: Tokenizer | None = None) -> tuple[str, str, str]:
    """The texts for P, P_fg and P_bg (section 3.2). Without an identifier, all three are the plain prompt.

    With a tokenizer, a category that is too long for the text encoder is cut, but never the identifier after it.
    """
    if identifier is None:
        return (f"A photo of {category}",) * 3
    background = f"in the background of {identifier}"
    if tokenizer:
        category = tokenizer.shorten(category, "A photo of ", f", {background}")
    return f"A photo of {category}, {background}", f"A photo of {category}", background


def prompts_by_category(identifiers: dict[str, str | None], tokenizer: Tokenizer) -> dict[str, tuple[str, str, str]]:
    """Each category's texts for P, P_fg and P_bg."""
    return {name: prompt_texts(name, identifier, tokenizer) for name, identifier in identifiers.items()}


def encode_prompts(sd: StableDiffusion, texts: list[tuple[str, str, str]]) -> Prompts:
    """B pictures' texts for P, P_fg and P_bg -> encodings, (B, L, D) each. Each distinct text is encoded once."""
    unique = list(dict.fromkeys(text for triple in texts for text in triple))
    encoded = sd.prompts(unique)  # (U, L, D)
    row = {text: i for i, text in enumerate(unique)}
    return Prompts(*(encoded[[row[triple[k]] for triple in texts]] for k in range(3)))


class Canvas(NamedTuple):
    """A batch of B products and their references, at the size at which the products are painted."""

    rgb: Tensor  # (B, 3, H, W)
    mask: Tensor  # (B, 1, H, W), M
    texts: list[tuple[str, str, str]]  # for P, P_fg, P_bg
    generators: list[torch.Generator]  # one per picture, for its noise
    reference: Tensor | None = None  # (B, 3, H, W), I_ref
    reference_mask: Tensor | None = None  # (B, 1, H, W), M_ref


@torch.inference_mode()
def paint(sd: StableDiffusion, canvas: Canvas, how: Painting, cg: ControlNet | None = None,
          pg: ControlNet | None = None, on_step: Callable | None = None, first: Tensor | None = None) -> Tensor:
    """Paints backgrounds (Fig. 2) -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    cg: CG, or a plain ControlNet in its place; without it the base paints alone. pg sees the references, if any.
    first (B, 3, h, w): pictures of a first pass on a smaller canvas. The second pass starts from these, noised to T'.
    """
    if first is not None and how.refine_alone:
        canvas, how, cg, pg = canvas._replace(texts=[("", "", "")] * len(first)), replace(how, guidance=1), None, None
    weight, branches, start = sd.unet.conv_in.weight, [], None
    rgb, mask = canvas.rgb.to(weight), canvas.mask.to(weight)
    if cg:
        hint = inpaint_hint(rgb, mask) if how.hint == "inpaint" else product_hint(rgb, mask)
        branches.append((cg, cg.hint_features(hint)))
    if pg and canvas.reference is not None:
        hint = background_hint(canvas.reference.to(weight), canvas.reference_mask.to(weight))
        branches.append((pg, pg.hint_features(hint)))
    begin = canvas.reference if how.from_reference else None  # what z_T is made from
    if first is not None:  # enlarged as pictures: enlarged latents decode blurred; with the real products put in
        begin = canvas.rgb.lerp(torch.stack([resize(picture, *rgb.shape[2:]) for picture in first]), 1 - canvas.mask)
        start = how.refine_from * sd.schedule.T // 1000
    z_ref = None if begin is None else sd.encode(begin)
    given = Conditions(encode_prompts(sd, canvas.texts), encode_prompts(sd, [("", "", "")] * len(rgb)), branches, mask,
                       sd.inpainting(rgb, mask))
    z = sample(sd.unet, sd.schedule, given, canvas.generators, sd.latent_shape(*rgb.shape[2:]), how, z_ref, on_step,
               start)
    return sd.decode(z)


# ---------------------------------------------------------------- any pictures, in their own frames


def paste_back(painted: Tensor, painted_mask: Tensor, box: tuple[int, int, int, int], rgb: Tensor, mask: Tensor,
               spread: int = 1) -> Tensor:
    """Pastes the product over the painted canvas (3, h, w) -> (3, H, W) uint8 in its own frame. box is from `fit`.

    Where M = 1 the result has exactly the product's pixels: the product must stay unchanged (section 1). The networks
    paint the product too, and it spreads about `spread` pixels beyond its edge in painted_mask, which is M (1, h, w) on
    the canvas. There the scene is continued from further out, so that no glow surrounds the product. Under its shadow,
    or a haze in M, the scene stays as painted.
    """
    painted = extend(painted, dilate(painted_mask, 3 + 2 * spread) <= 0.5)  # an antialiased edge adds a pixel
    top, left, h, w = box
    M = mask.masked_fill(mask >= SOLID, 1)
    scene = resize(painted[:, top : top + h, left : left + w], *rgb.shape[1:])
    return torch.cat([to_bytes(F * M + B * (1 - M)) for F, B in zip(rgb.split(1), scene.split(1))])  # saves memory


def canvas_of(ads: list[Ad], h: int, w: int, generators: list[torch.Generator]) -> tuple[Canvas, list[tuple]]:
    """Fits ads to a canvas of h x w pixels; also returns where their frames lie on it. References fill the canvas, but
    those without a mask, all of one size, are taken as they are.
    """
    rgb, boxes = zip(*(fit(ad.rgb, h, w, "contain") for ad in ads))
    mask = torch.stack([fit(ad.mask, h, w, "contain")[0] for ad in ads])
    canvas = Canvas(torch.stack(rgb), mask, [ad.texts for ad in ads], generators)
    if ads[0].reference is None:
        return canvas, boxes
    references, masks = zip(*(ad.reference for ad in ads))
    if masks[0] is None:
        return canvas._replace(reference=torch.stack(references)), boxes
    references, masks = (torch.stack([fit(x, h, w, "cover")[0] for x in xs]) for xs in (references, masks))
    return canvas._replace(reference=references, reference_mask=masks), boxes


def paint_ads(ads: list[Ad], models: Models, how: Painting, painter: Callable | None = None,
              keep_first: bool = False) -> list[list[Tensor]]:
    """Paints ads -> for each a picture (3, H, W) uint8 in its product's frame; with keep_first also the first pass's.

    Ads with the same canvas size, and all with or all without a reference, are painted as one batch.
    painter(canvas, on_step=...) -> (B, 3, h, w) paints the first pass in place of our networks.
    """
    batches, results = defaultdict(list), [[] for _ in ads]
    for i, ad in enumerate(ads):
        size = canvas_size(*ad.mask.shape[1:], models.size, models.multiple)
        batches[size, ad.reference is not None].append(i)
    steps = count_steps(models.sd.schedule, how) if models.sd else how.steps
    for ((h, w), with_reference), batch in batches.items():
        chosen, painted = [ads[i] for i in batch], None
        generators = [seeded(ad.seed)[0] for ad in chosen]
        text = f"{len(batch)} at once{', with references' if with_reference else ''}"
        with tqdm(total=steps, desc=text, unit="step", leave=False, disable=None) as bar:
            for n in dict.fromkeys((1, how.refine)):  # the canvas of the second pass is n times larger
                canvas, boxes = canvas_of(chosen, n * h, n * w, generators)
                paint_pass = painter if painter and n == 1 else partial(
                    paint, models.sd, how=how, cg=models.cg, pg=models.pg, first=painted)
                painted = paint_pass(canvas, on_step=lambda *_: bar.update()).cpu()
                if not painted.isfinite().all():
                    raise BadInput("--dtype: the painted pixels are not finite; add --dtype float32; if they still are "
                                   "not, the weights are broken")
                if n == how.refine or keep_first:
                    for i, ad, picture, mask, box in zip(batch, chosen, painted, canvas.mask, boxes):
                        results[i].insert(0, paste_back(picture, mask, box, ad.rgb, ad.mask, spread=n))
    return results


def count_steps(schedule: Schedule, how: Painting) -> int:
    """The steps of both passes. Raises BadInput if the schedule has too few for the first, or none for the second."""
    second = schedule.timesteps(how.steps, how.refine_from * schedule.T // 1000) if how.refine > 1 else []
    return len(schedule.timesteps(how.steps)) + len(second)


# ---------------------------------------------------------------- the three commands


def load(args, items: list[Item]) -> tuple[dict, Callable, dict]:
    """Loads the models that paint items -> the prompts of each category, `paint_ads` with the models and the settings,
    and the record of both.
    """
    how = painting_of(args, from_reference=args.start == "reference")
    choice = ModelChoice(args.weights, args.tokenizer, args.cg, args.pg, args.controlnet, args.device, args.dtype)
    models = load_models(choice, args.size, {item.category for item in items}, any(item.reference for item in items),
                         args.plain_prompt)
    if (side := how.refine * models.size) > LARGEST:
        raise BadInput(f"--refine {how.refine}: paints {side} pixels, more than {LARGEST}; lower it, or --size")
    count_steps(models.sd.schedule, how)  # raises BadInput for impossible ones
    paint_all = partial(paint_ads, models=models, how=how, keep_first=args.keep_first)
    return prompts_by_category(models.identifiers, models.sd.tokenizer), paint_all, record_of(args, how, models)


def generate_text(args) -> None:
    """--prompt: the base paints alone, without a product."""
    jobs = jobs_of(args)
    _, paint_all, record = load(args, [])
    blank = torch.zeros(3, *[record["size"] * record["refine"]] * 2)
    ads = [Ad(blank, blank[:1], (args.prompt,) * 3, job.seed) for job in jobs]
    paint_jobs(jobs, ads, paint_all, record, args.batch)
    say_next("--product CUTOUT --category NAME paints around a product")


def generate_product(args) -> None:
    """--product: paints every product, in the style of every reference if any, --num times each, and a sheet of all.

    A single product is painted in the scene of each category given. Without --product: a sample, by CG and by CG + PG.
    """
    jobs = jobs_of(args)
    texts, paint_all, record = load(args, [job.item for job in jobs])
    ads = load_ads(jobs, texts)
    paint_jobs(jobs, ads, paint_all, record, args.batch)
    if len(jobs) > 1:
        save(draw_sheet(jobs, ads, "ControlNet" if args.controlnet else "CG"), args.out / SHEET)
    say_next("--product CUTOUT --category NAME paints around a product of your own" if args.product is None else
             "--reference AD paints in its style; --how FILE prints the command that paints a picture again")


def generate_data(args) -> None:
    """--data: paints every item that has no picture yet, with PG where the item has a reference."""
    items, notes = read_items(args.data, args.split or "bg1k")
    items = items[: args.limit]
    jobs = jobs_of_items(items, args.out, args.seed)
    texts, paint_all, record = load(args, items)
    print("\n".join(notes), file=sys.stderr)
    painted, there, broken = paint_items(jobs, texts, paint_all, record, args.batch, args.keep_first)
    save_data_sheet(jobs)  # the last of several processes has all pictures
    print(f"{args.out}: {painted:,} painted, {there:,} were there, {broken:,} broken")
    if broken > BROKEN * (painted + there + broken):
        raise BadInput(f"{args.data}: {broken:,} items can't be used, more than {BROKEN:.0%}; they are named above")
    say_next(f"look at {args.out / SHEET}; {args.out / 'manifest.jsonl'} says what each was painted from")


def save(image, path: Path) -> None:
    """Writes a PNG and prints its path."""
    save_image(image, path)
    print(path)


def say_next(text: str) -> None:
    """Prints on stderr what to do next: stdout has only paths."""
    print(f"next: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    if args.how:
        print(command_of(args.how))
        return
    check(args)
    command = generate_text if args.prompt is not None else generate_data if args.data else generate_product
    with locked(args.out):
        command(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
