"""From a product photo to an ad: CG alone, or CG and PG in the style of a reference ad (Fig. 2; section 5.1).

    python generate.py                                                        # a sample product and reference
    python generate.py --product mug.png --category mug                       # CG: the common style of the category
    python generate.py --product mug.png --category mug --reference ad.png    # CG + PG: the style of that ad
    python generate.py --data BG60K --split bgpair --out results              # every item of a data set
    python generate.py --prompt "a photo of a mug"                            # the base alone

A product comes with its mask: an image with an alpha channel, or --mask FILE, white on the product. The result keeps
the product's frame, and the product's own pixels where the mask is 1.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clip import Tokenizer
from data import Ad, background_hint, dilate, inpaint_hint, product_hint
from model import ControlNet, Prompts
from sampler import Conditions, Painting, sample, seeded
from support.batch import check_finite, line_of, paint_items, save_data_sheet, steps_bar
from support.cutouts import SOLID, extend
from support.datasets import BROKEN, Item, read_items
from support.files import BadInput, one_line_errors
from support.gallery import SHEET, Gallery, check_result_names
from support.images import canvas_size, fit, resized_strips, save_image, to_bytes
from support.lock import locked
from support.models import TOY, ModelChoice, Models, add_model_options, add_walk_options, load_models
from support.options import Parser, check_together, one_for_each, real_number, unicode_text, whole_number
from support.record import command_of, record_of
from weights import StableDiffusion

SAMPLE = "perfume"  # of toy/samples, painted where no product is given
IDENTIFIER = "sks {}"  # [D], section 5.1: 'sks' and the category's id

# ---------------------------------------------------------------- a batch on its canvas


def prompt_texts(category: str, identifier: str | None, tokenizer: Tokenizer | None = None) -> tuple[str, str, str]:
    """The texts of P, P_fg and P_bg (section 3.2). Without an identifier, all three are the plain prompt.

    Given the tokenizer, a category that is too long for the text encoder is cut, never the identifier after it.
    """
    if identifier is None:
        return (f"A photo of {category}",) * 3
    background = f"in the background of {identifier}"
    if tokenizer:
        category = tokenizer.shorten(category, "A photo of ", f", {background}")
    return f"A photo of {category}, {background}", f"A photo of {category}", background


def prompts_by_category(identifiers: dict[str, str | None], tokenizer: Tokenizer) -> dict[str, tuple[str, str, str]]:
    """The texts of each category, from its identifier."""
    return {name: prompt_texts(name, identifier, tokenizer) for name, identifier in identifiers.items()}


def encode_prompts(sd: StableDiffusion, texts: list[tuple[str, str, str]]) -> Prompts:
    """The texts of P, P_fg and P_bg of B pictures -> encodings, (B, L, D) each. Each different text is encoded once."""
    unique = list(dict.fromkeys(text for triple in texts for text in triple))
    encoded = sd.prompts(unique)  # (U, L, D)
    row = {text: i for i, text in enumerate(unique)}
    return Prompts(*(encoded[[row[triple[k]] for triple in texts]] for k in range(3)))


class Canvas(NamedTuple):
    """A batch of B products at the size they are painted at, and their references at the same size."""

    rgb: Tensor  # (B, 3, H, W)
    mask: Tensor  # (B, 1, H, W), M
    texts: list[tuple[str, str, str]]  # for P, P_fg, P_bg
    generators: list[torch.Generator]  # one per picture, for its noise
    reference: Tensor | None = None  # (B, 3, H, W), I_ref
    reference_mask: Tensor | None = None  # (B, 1, H, W), M_ref


@torch.inference_mode()
def paint(sd: StableDiffusion, canvas: Canvas, how: Painting, cg: ControlNet | None = None,
          pg: ControlNet | None = None, on_step: Callable | None = None) -> Tensor:
    """Paints backgrounds (Fig. 2) -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    cg: CG or a plain ControlNet in its place; without it the base paints alone. pg sees the references, if any.
    """
    weight, branches, z_ref = sd.unet.conv_in.weight, [], None
    rgb, mask = canvas.rgb.to(weight), canvas.mask.to(weight)
    if cg:
        hint = inpaint_hint(rgb, mask) if how.hint == "inpaint" else product_hint(rgb, mask)
        branches.append((cg, cg.hint_features(hint)))
    if canvas.reference is not None:
        if pg:
            hint = background_hint(canvas.reference.to(weight), canvas.reference_mask.to(weight))
            branches.append((pg, pg.hint_features(hint)))
        if how.from_reference:
            z_ref = sd.encode(canvas.reference)
    given = Conditions(encode_prompts(sd, canvas.texts), encode_prompts(sd, [("", "", "")] * len(rgb)), branches, mask,
                       sd.inpainting(rgb, mask))
    z = sample(sd.unet, sd.schedule, given, canvas.generators, sd.latent_shape(*rgb.shape[2:]), how, z_ref, on_step)
    return sd.decode(z)


# ---------------------------------------------------------------- any pictures, in their own frames


def paste_back(painted: Tensor, painted_mask: Tensor, box: tuple[int, int, int, int], rgb: Tensor,
               mask: Tensor) -> Tensor:
    """The product over the painted canvas (3, h, w), in its own frame -> (3, H, W) uint8; box as `fit` returned it.

    Where M = 1 the result is the product's pixels, exactly: the product must stay unchanged (section 1). The networks
    paint the product too, and it spreads over its edge (painted_mask (1, h, w) is M on the canvas) by about a pixel.
    There the scene is continued from further out, so that no glow surrounds the real product.
    """
    painted = extend(painted, dilate(painted_mask, 3) <= 1 - SOLID)
    top, left, h, w = box
    result = torch.empty(rgb.shape, dtype=torch.uint8)
    for rows, scene in resized_strips(painted[:, top : top + h, left : left + w], *rgb.shape[1:]):
        M = mask[:, rows].masked_fill(mask[:, rows] >= SOLID, 1)
        result[:, rows] = to_bytes(rgb[:, rows] * M + scene * (1 - M))
    return result


def paint_ads(ads: list[Ad], painter: Callable, size: int, multiple: int, steps: int) -> list[Tensor]:
    """Finished ads, each (3, H, W) uint8 in its product's frame.

    A batch has one canvas size, and references for all of its ads or for none. painter(canvas, on_step=...) ->
    (B, 3, h, w), as `paint`; size: the canvas's longer side; multiple: its sides are multiples of it.
    """
    batches = defaultdict(list)
    for i, ad in enumerate(ads):
        batches[canvas_size(*ad.mask.shape[1:], size, multiple), ad.reference is not None].append(i)
    results = [None] * len(ads)
    for ((h, w), with_reference), batch in batches.items():
        chosen = [ads[i] for i in batch]
        rgb, boxes = zip(*(fit(ad.rgb, h, w, "contain") for ad in chosen))
        masks = [fit(ad.mask, h, w, "contain")[0] for ad in chosen]
        canvas = Canvas(torch.stack(rgb), torch.stack(masks), [ad.texts for ad in chosen],
                        [seeded(ad.seed)[0] for ad in chosen])
        if with_reference:
            references = (torch.stack([fit(ad.reference[k], h, w, "cover")[0] for ad in chosen]) for k in (0, 1))
            canvas = Canvas(*canvas[:4], *references)
        with steps_bar(steps, f"{len(batch)} at once{', with references' if with_reference else ''}") as bar:
            painted = painter(canvas, on_step=lambda *_: bar.update()).cpu()
        check_finite(painted)
        for i, ad, picture, mask, box in zip(batch, chosen, painted, masks, boxes):
            results[i] = paste_back(picture, mask, box, ad.rgb, ad.mask)
    return results


# ---------------------------------------------------------------- the three commands


def load(args, categories: set[str] = frozenset(), with_pg: bool = False) -> tuple[Models, Painting, dict]:
    """The models, how to paint with them, and the record of both."""
    choice = ModelChoice(args.weights, args.tokenizer, args.cg, args.pg, args.controlnet, args.device, args.dtype)
    models = load_models(choice, args.size, categories, with_pg, args.plain_prompt)
    how = Painting(args.steps, args.guidance, args.eta, args.start == "reference", args.hint)
    return models, how, record_of(args, size=models.size, models=models.fingerprints)


def painter_of_ads(models: Models, how: Painting) -> Callable[[list[Ad]], list[Tensor]]:
    """`paint_ads` by the paper's method."""
    painter = partial(paint, models.sd, how=how, cg=models.cg, pg=models.pg)
    return partial(paint_ads, painter=painter, size=models.size, multiple=models.sd.multiple, steps=how.steps)


def generate_text(args) -> None:
    """--prompt: the base alone."""
    models, how, record = load(args)
    Gallery.remove_sheet(args.out)
    for start in range(0, args.num, args.batch):
        seeds = range(args.seed + start, args.seed + min(start + args.batch, args.num))
        blank = torch.zeros(len(seeds), 3, models.size, models.size)
        canvas = Canvas(blank, blank[:, :1], [(args.prompt,) * 3] * len(seeds), [seeded(seed)[0] for seed in seeds])
        with steps_bar(how.steps, "base") as bar:
            pictures = paint(models.sd, canvas, how, on_step=lambda *_: bar.update())
        check_finite(pictures)
        for seed, picture in zip(seeds, pictures):
            line = line_of(Item(None, None, None), seed, models.dtype, record) | {"prompt": args.prompt}
            save(picture, args.out / f"prompt_{seed}.png", line)
    say_next("--product PHOTO --mask MASK --category NAME paints around a product")


def generate_product(args) -> None:
    """--product: every product, in the style of every reference if any, each --num times, and a sheet of them.

    A single product is painted in each of several categories. Without --product the samples, CG alone beside CG + PG.
    """
    demo, sample_file = args.product is None, TOY / "samples" / f"{SAMPLE}.png"
    files = args.product or [sample_file]
    references = [sample_file.with_stem(f"{SAMPLE}_reference")] if demo else args.reference or []
    gallery = Gallery(
        [Item(*pair, "") for pair in zip(files, one_for_each(args.mask, files, "--mask", "--product"))],
        [*zip(references, one_for_each(args.reference_mask, references, "--reference-mask", "--reference"))],
        [list(dict.fromkeys(args.category or [SAMPLE]))] if len(files) == 1 else
        [[category] for category in one_for_each(args.category, files, "--category", "--product")],
        seeds=range(args.seed, args.seed + args.num), with_and_without=demo)
    models, how, record = load(args, set(chain(*gallery.categories)), bool(references))
    jobs = gallery.jobs(prompts_by_category(models.identifiers, models.sd.tokenizer))
    paint_all, pictures = painter_of_ads(models, how), []
    gallery.remove_sheet(args.out)
    for start in range(0, len(jobs), args.batch):
        chunk = jobs[start : start + args.batch]
        for job, picture in zip(chunk, paint_all([job.ad for job in chunk])):
            save(picture, args.out / job.name, line_of(job.item, job.ad.seed, models.dtype, record))
            pictures.append(gallery.small(picture))
    if len(pictures) > 1:
        save(gallery.sheet(pictures, "ControlNet" if args.controlnet else "CG"), args.out / SHEET)
    say_next("--product PHOTO --mask MASK --category NAME paints around a product of your own" if demo else
             "--num 4 paints more of them; --how FILE prints the command that paints one again" if references else
             "--reference AD --reference-mask MASK paints in the style of an ad")


def generate_data(args) -> None:
    """--data: every item not yet painted, with PG where the item has a reference."""
    items, notes = read_items(args.data, args.split or "bg1k")
    items = items[: args.limit]
    models, how, record = load(args, {item.category for item in items}, any(item.reference for item in items))
    texts = prompts_by_category(models.identifiers, models.sd.tokenizer)
    print("\n".join(notes), file=sys.stderr)
    painted, there, broken = paint_items(items, texts, painter_of_ads(models, how), args.out, record, models.dtype,
                                         args.seed, args.batch)
    save_data_sheet(items, args.out)  # of several processes the last one has them all
    print(f"{args.out}: {painted:,} painted, {there:,} were there, {broken:,} broken")
    if broken > BROKEN * (painted + there + broken):
        raise BadInput(f"{args.data}: {broken:,} items can't be used, more than {BROKEN:.0%}; they are named above")
    say_next(f"look at {args.out / 'sheet.png'}; {args.out / 'manifest.jsonl'} says what each was painted from")


def save(image, path: Path, line: dict | None = None) -> None:
    """Writes a PNG and says so; line: what it was painted from and how, kept in the PNG."""
    save_image(image, path, {"how": json.dumps(line)} if line else None)
    print(path)


def say_next(text: str) -> None:
    """What to do after this, on stderr: stdout has only the paths."""
    print(f"next: {text}", file=sys.stderr)


# ---------------------------------------------------------------- the command line


def options() -> Parser:
    parser = Parser(description=__doc__, formatter_class=partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120))
    add = parser.add_argument_group("what to paint [a sample of the toy]").add_argument
    files = dict(metavar="FILE", type=Path, nargs="+")
    add("--product", **files, help="photo, or several (JPEG, PNG, WebP, ...); its alpha channel is its mask")
    add("--mask", **files, help="the product's mask, white on the product; one for each product")
    add("--category", metavar="NAME", type=unicode_text, nargs="+",
        help="the product's category, of CG's; one for all or one for each; "
        "for a single product also several: it is painted in each")
    add("--reference", **files, help="ad whose style the background follows (PG), or several [none: CG alone]")
    add("--reference-mask", **files, help="mask of the product in the reference [its alpha channel]; one for each")
    add("--data", metavar="DIR", type=Path, help="BG60k as released, or metadata.jsonl; goes on where it stopped")
    add("--split", metavar="NAME", help="of the data set as released: bg60k, bg1k or bgpair [bg1k]")
    add("--limit", metavar="N", type=whole_number(1, 10**9), help="only the first N items of the data set [all]")
    add("--prompt", metavar="TEXT", type=unicode_text, help="plain text-to-image with the base alone")
    add("--how", metavar="FILE", type=Path, help="print the command that paints this picture again, and paint nothing")
    add = parser.add_argument_group("how").add_argument
    add("--num", metavar="N", type=whole_number(1, 9999), default=1,
        help="pictures, with seeds SEED, SEED + 1, ... [1]")
    add("--seed", metavar="N", type=whole_number(0, 2**32 - 1), default=0,
        help="of the noise; SEED + i for item i of --data [0]")
    add_walk_options(add)
    add("--eta", metavar="X", type=real_number(0, 1), default=Painting.eta,
        help="DDIM's η: part of DDPM's noise that is added at each step [0: none, the paper's]")
    add("--start", metavar="FROM", choices=["reference", "noise"], default="reference",
        help="z_T: the reference's latent, noised, or pure noise [reference, the paper's; noise without a reference]")
    add("--plain-prompt", action="store_true",
        help="a category that CG was not trained on gets the plain prompt 'A photo of NAME' [an error]")
    add = parser.add_argument_group("models and machine").add_argument
    add_model_options(add)
    add("--batch", metavar="N", type=whole_number(1, 1024), default=4, help="pictures painted at once [4]")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="where the pictures go [out]")
    return parser


def check(args) -> None:
    """Raises BadInput for options that do not go together."""
    check_together(args, [("product", "data", "prompt"), ("controlnet", "cg")],
                   [("mask", "product"), ("product", "category"), ("category", "product"), ("reference", "product"),
                    ("reference_mask", "reference"), ("split", "data"), ("limit", "data")])
    for option in ("cg", "pg", "controlnet"):
        if args.prompt is not None and getattr(args, option):
            raise BadInput(f"--prompt is painted by the base alone, without --{option}; leave one out")
    if args.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    check_result_names(args.product or [], args.reference or [], args.category or [])
    if args.data and args.num != 1:
        raise BadInput("--num: a data set gets one picture an item; leave it out, or run again with another --out")


def main(arguments: list[str] | None = None) -> None:
    parser = options()
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
