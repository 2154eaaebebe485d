"""The method: from a product photo to an ad, by CG alone or CG + PG in the style of a reference (Fig. 2, section 5.1).

    python generate.py                                                        # a sample product and reference
    python generate.py --product mug.png --category mug                       # CG: the common style of the category
    python generate.py --product mug.png --category mug --reference ad.png    # CG + PG: the style of that ad
    python generate.py --data BG60K --split bgpair --out results              # every item of a data set
    python generate.py --prompt "a photo of a mug"                            # the base alone
    python generate.py --product mug.png --lama FILE                          # a rival; or --paint-by-example

A product needs a mask: its image's alpha channel, or --mask FILE, white on the product. The result keeps the photo's
size and framing, and the product's own pixels where the mask is 1.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clip import Tokenizer
from data import Ad, background_hint, dilate, inpaint_hint, product_hint
from model import ControlNet, Prompts
from programs.batch import check_finite, kept_files, line_of, paint_items, save_data_sheet, steps_bar
from programs.gallery import (
    SHEET,
    Gallery,
    check,
    command_of,
    count_steps,
    options,
    own_defaults,
    painting_of,
    record_of,
    settled,
)
from programs.models import TOY, Models, choice_of, load_models
from sampler import Conditions, Painting, sample, seeded
from support.cutouts import SOLID, extend
from support.datasets import BROKEN, Item, read_items
from support.files import BadInput, locked, one_line_errors
from support.images import canvas_size, fit, resize, save_image, to_bytes
from support.options import one_for_each
from weights import StableDiffusion

SAMPLE = "perfume"  # from toy/samples, painted if no product is given
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
    the canvas. There the scene is continued from further out, so that no glow surrounds the product.
    """
    painted = extend(painted, dilate(painted_mask, 1 + 2 * spread) <= 1 - SOLID)
    top, left, h, w = box
    M = mask.masked_fill(mask >= SOLID, 1)
    return to_bytes(torch.lerp(resize(painted[:, top : top + h, left : left + w], *rgb.shape[1:]), rgb, M))


def canvas_of(ads: list[Ad], h: int, w: int, generators: list[torch.Generator],
              exemplar: int | None = None) -> tuple[Canvas, list[tuple]]:
    """Fits ads to a canvas of h x w pixels; also returns where their frames lie on it. References fill the canvas, but
    with `exemplar`, for a rival, each is squashed whole to a square of that side.
    """
    rgb, boxes = zip(*(fit(ad.rgb, h, w, "contain") for ad in ads))
    mask = torch.stack([fit(ad.mask, h, w, "contain")[0] for ad in ads])
    canvas = Canvas(torch.stack(rgb), mask, [ad.texts for ad in ads], generators)
    if ads[0].reference is None:
        return canvas, boxes
    references = [torch.stack([resize(ad.reference[0], exemplar, exemplar) for ad in ads])] if exemplar else [
        torch.stack([fit(ad.reference[k], h, w, "cover")[0] for ad in ads]) for k in (0, 1)]
    return Canvas(*canvas[:4], *references), boxes


def paint_ads(ads: list[Ad], models: Models, how: Painting, painter: Callable | None = None,
              keep_first: bool = False) -> list[list[Tensor]]:
    """Paints ads -> for each a picture (3, H, W) uint8 in its product's frame; with keep_first also the first pass's.

    Ads with the same canvas size, and all with or all without a reference, are painted as one batch.
    painter(canvas, on_step=...) -> (B, 3, h, w) paints a rival's first pass.
    """
    ours = models.rival.paint if models.rival else partial(paint, models.sd, cg=models.cg, pg=models.pg)
    ours, steps = partial(ours, how=how), count_steps(models, how)
    batches = defaultdict(list)
    for i, ad in enumerate(ads):
        size = canvas_size(*ad.mask.shape[1:], models.size, models.multiple)
        batches[size, ad.reference is not None].append(i)
    results = [[] for _ in ads]
    for ((h, w), with_reference), batch in batches.items():
        chosen, painted = [ads[i] for i in batch], None
        generators = [seeded(ad.seed)[0] for ad in chosen]
        with steps_bar(steps, f"{len(batch)} at once{', with references' if with_reference else ''}") as bar:
            for n in dict.fromkeys((1, how.refine)):  # the canvas of the second pass is n times larger
                canvas, boxes = canvas_of(chosen, n * h, n * w, generators, models.exemplar)
                painter_of_pass = partial(ours, first=painted) if n > 1 else painter or ours
                painted = painter_of_pass(canvas, on_step=lambda *_: bar.update()).cpu()
                check_finite(painted)
                if n == how.refine or keep_first:
                    for i, ad, picture, mask, box in zip(batch, chosen, painted, canvas.mask, boxes):
                        results[i].insert(0, paste_back(picture, mask, box, ad.rgb, ad.mask, spread=n))
    return results


# ---------------------------------------------------------------- the three commands


def load(args, categories: set[str] = frozenset(), with_pg: bool = False) -> tuple[Models, Callable, dict]:
    """Loads the models -> the models, `paint_ads` with them and the options filled in, and the record of both."""
    how = painting_of(args, eta=args.eta, from_reference=args.start == "reference", **own_defaults(args))
    models = load_models(choice_of(args), args.size, categories, with_pg, args.plain_prompt)
    count_steps(models, how)  # raises BadInput if the second pass can't be painted
    paint_all = partial(paint_ads, models=models, how=how, keep_first=args.keep_first)
    return models, paint_all, record_of(args, size=models.size, models=models.fingerprints, **settled(how))


def generate_text(args) -> None:
    """--prompt: the base paints alone, without a product."""
    models, paint_all, record = load(args)
    Gallery.remove_sheet(args.out)
    blank = torch.zeros(3, *[models.size * record["refine"]] * 2)
    ads = [Ad(blank, blank[:1], (args.prompt,) * 3, seed) for seed in range(args.seed, args.seed + args.num)]
    for start in range(0, len(ads), args.batch):
        chunk = ads[start : start + args.batch]
        for ad, pictures in zip(chunk, paint_all(chunk)):
            line = line_of(Item(None, None, None), ad.seed, models.dtype, record) | {"prompt": args.prompt}
            for kept in kept_files(pictures, args.out / f"prompt_{ad.seed}.png", line):
                save(*kept)
    say_next("--product CUTOUT --category NAME paints around a product")


def generate_product(args) -> None:
    """--product: paints every product, in the style of every reference if any, --num times each, and a sheet of all.

    A single product is painted in the scene of each category given. Without --product: a sample, by CG and by CG + PG.
    """
    demo, sample_file = args.product is None, TOY / "samples" / f"{SAMPLE}.png"
    files = args.product or [sample_file]
    references = [sample_file.with_stem(f"{SAMPLE}_reference")] if demo else args.reference or []
    gallery = Gallery(
        [Item(*pair, "") for pair in zip(files, one_for_each(args.mask, files, "--mask", "--product"))],
        [*zip(references, one_for_each(args.reference_mask, references, "--reference-mask", "--reference"))],
        [list(dict.fromkeys(args.category or [SAMPLE if demo else None]))] if len(files) == 1 else
        [[category] for category in one_for_each(args.category, files, "--category", "--product")],
        seeds=range(args.seed, args.seed + args.num), with_and_without=demo, exemplars=bool(args.paint_by_example))
    models, paint_all, record = load(args, set(chain(*gallery.categories)), bool(references))
    jobs, small = gallery.jobs(prompts_by_category(models.identifiers, models.tokenizer)), []
    gallery.remove_sheet(args.out)
    for start in range(0, len(jobs), args.batch):
        chunk = jobs[start : start + args.batch]
        for job, pictures in zip(chunk, paint_all([job.ad for job in chunk])):
            line = line_of(job.item, job.ad.seed, models.dtype, record)
            for kept in kept_files(pictures, args.out / job.name, line):
                save(*kept)
            small.append(gallery.small(pictures[0]))
    if len(small) > 1:
        save(gallery.sheet(small, "ControlNet" if args.controlnet else "CG"), args.out / SHEET)
    say_next("--product CUTOUT --category NAME paints around a product of your own" if demo else
             "--num 4 paints more of them; --how FILE prints the command that paints one again" if references else
             "evaluate.py measures it" if args.lama else "--reference AD paints in its style")


def generate_data(args) -> None:
    """--data: paints every item that has no picture yet, with PG where the item has a reference."""
    items, notes = read_items(args.data, args.split or "bg1k")
    items = items[: args.limit]
    models, paint_all, record = load(args, {item.category for item in items}, any(item.reference for item in items))
    texts = prompts_by_category(models.identifiers, models.sd.tokenizer)
    print("\n".join(notes), file=sys.stderr)
    painted, there, broken = paint_items(items, texts, paint_all, args.out, record, models.dtype, args.seed, args.batch,
                                         args.keep_first)
    save_data_sheet(items, args.out)  # the last of several processes has all pictures
    print(f"{args.out}: {painted:,} painted, {there:,} were there, {broken:,} broken")
    if broken > BROKEN * (painted + there + broken):
        raise BadInput(f"{args.data}: {broken:,} items can't be used, more than {BROKEN:.0%}; they are named above")
    say_next(f"look at {args.out / 'sheet.png'}; {args.out / 'manifest.jsonl'} says what each was painted from")


def save(image, path: Path, line: dict | None = None) -> None:
    """Writes a PNG and prints its path. line: what it was painted from and how, stored in the PNG."""
    save_image(image, path, {"how": json.dumps(line)} if line else None)
    print(path)


def say_next(text: str) -> None:
    """Prints on stderr what to do next: stdout has only paths."""
    print(f"next: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    args = parser.parse_args(arguments)
    if args.how:
        print(command_of(args.how, parser))
        return
    check(args)
    with locked(args.out):
        (generate_text if args.prompt is not None else generate_data if args.data else generate_product)(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
