"""Programs: what generate.py's options ask for: which pictures, painted how; not needed to understand the paper."""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image
from torch import Tensor

from data import Ad
from programs.batch import Job, save_pictures
from programs.models import TOY, Models, add_model_options
from sampler import Painting, Schedule
from support.datasets import Item
from support.files import BadInput, result_name
from support.images import load_cutout, load_masked, sheet, thumbnail
from support.options import Parser, check_together, one_for_each, real_number, unicode_text, whole_number

SAMPLE = "perfume"  # from toy/samples, painted if no product is given
SHEET = "sheet.png"
LARGEST = 4096  # pixels: the longest side that is painted
# The toy's second pass. Only the base was trained at 256 px, on little noise and without prompts. From 201 it sharpens
# as much as from 301, where arches and rims begin to lose their shape
TOY_REFINE = {"refine": 2, "refine_from": 201, "refine_alone": True}

# ---------------------------------------------------------------- from options to pictures


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The pictures that --prompt or --product ask for, in the order of the sheet.

    Every product is painted in the style of every reference, where there are any, for every seed; a single product in
    the scene of each category. Without a product: a sample, by CG alone and in the style of a reference.
    Raises BadInput if two pictures would have the same name.
    """
    seeds = range(args.seed, args.seed + args.num)
    if args.prompt is not None:
        return [Job(args.out / f"prompt_{seed}.png", Item(None, None, None), seed) for seed in seeds]
    products, categories, references = args.product, args.category, args.reference or []
    if products is None:
        sample = TOY / "samples" / f"{SAMPLE}.png"
        products, categories, references = [sample], [SAMPLE], [sample.with_stem(f"{SAMPLE}_reference")]
    masks = one_for_each(args.mask, products, "--mask", "--product")
    scenes = [dict.fromkeys(categories)] if len(products) == 1 else [
        [category] for category in one_for_each(categories, products, "--category", "--product")]
    styles = [*zip(references, one_for_each(args.reference_mask, references, "--reference-mask", "--reference"))]
    if args.product is None or not references:
        styles.insert(0, (None, None))
    jobs = {}
    for product, mask, names in zip(products, masks, scenes):
        for seed, category, style in itertools.product(seeds, names, styles):
            item = Item(product, mask, category, *style)
            stem = product.stem
            if len(names) > 1:
                stem += "_" + re.sub(r"\W+", "_", category)
            if item.reference:
                stem += f"_like_{item.reference.stem}"
            path = args.out / result_name(f"{stem}_{seed}", ".png")
            if path in jobs:
                raise BadInput(f"two pictures would be named {path.name}; rename a file of --product or --reference, "
                               "or leave out a --category")
            jobs[path] = Job(path, item, seed)
    return [*jobs.values()]


def load_ads(jobs: list[Job], texts: dict[str, tuple[str, str, str]]) -> list[Ad]:
    """What products' pictures are painted from; each file is read once. texts: the prompts of each category."""
    cutout, masked = cache(load_cutout), cache(load_masked)
    return [Ad(*cutout(item.image, item.mask), texts[item.category], seed, item.reference and masked(
        item.reference, item.reference_mask, "reference", "--reference-mask")) for _, item, seed in jobs]


def small(jobs: list[Job], picture: Tensor, mask: Tensor | None = None) -> Image.Image:
    """A picture at the size that it has on the jobs' sheet."""
    return thumbnail(picture, 256 if len(jobs) <= 8 else 160, mask)


def paint_jobs(jobs: list[Job], ads: list[Ad], paint_all: Callable, record: dict, batch: int) -> list[Image.Image]:
    """Paints the jobs, `batch` at once, saves the pictures and prints their paths. Returns them at the sheet's size."""
    if (old := jobs[0].path.with_name(SHEET)).exists():
        old.unlink()
        print(f"{old}: removed, since it showed an earlier command's pictures", file=sys.stderr)
    painted = []
    for k in range(0, len(jobs), batch):
        for job, pictures in zip(jobs[k:], paint_all(ads[k : k + batch])):
            print(*save_pictures(pictures, job, record), sep="\n")
            painted.append(small(jobs, pictures[0]))
    return painted


def draw_sheet(jobs: list[Job], ads: list[Ad], painted: list[Image.Image], name: str) -> Image.Image:
    """A row for each product and seed, the references above. name: what the network in CG's place is called."""
    columns = sum(job.item.image == jobs[0].item.image and job.seed == jobs[0].seed for job in jobs)
    cells = [[small(jobs, ads[k].rgb, ads[k].mask), *painted[k : k + columns]] for k in range(0, len(jobs), columns)]
    styles = [small(jobs, ad.reference[0]) for ad in ads[:columns] if ad.reference]
    if 0 < len(styles) < columns:  # the sample, also painted without its reference
        cells = [[product, alone, *styles, both] for product, alone, both in cells]
        return sheet(cells, ["product", f"{name} alone", "reference", f"{name} + PG"])
    return sheet([[None, *styles], *cells] if styles else cells)


# ---------------------------------------------------------------- how they are painted


def painting_of(args: argparse.Namespace, **others) -> Painting:
    """A Painting from the options that all programs share. others: further fields of it, or defaults of these options.

    Raises BadInput for options that do not go together.
    """
    fields = (TOY_REFINE if args.weights is None else {}) | others
    fields |= {name: vars(args)[name] for name in ("guidance", "refine", "refine_from") if vars(args)[name] is not None}
    how = Painting(args.steps, hint=args.hint, sampler=args.sampler, **fields)
    if how.eta and how.sampler != "ddim":
        raise BadInput(f"--eta goes with --sampler ddim; leave it out, or --sampler {how.sampler}")
    if how.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    for option in ("refine_from", "keep_first"):
        if how.refine == 1 and getattr(args, option, None):
            raise BadInput(f"--{option.replace('_', '-')} goes with a second pass; add --refine 2")
    return how


def count_steps(schedule: Schedule, how: Painting) -> int:
    """The steps of both passes. Raises BadInput if the schedule has too few for the first, or none for the second."""
    second = schedule.timesteps(how.steps, how.refine_from * schedule.T // 1000) if how.refine > 1 else []
    return len(schedule.timesteps(how.steps)) + len(second)


# Options left out of the record: what is painted is recorded for each picture, and the machine changes none
HARMLESS = {"product", "mask", "category", "reference", "reference_mask", "data", "split", "limit", "num", "seed",
            "batch", "device", "out", "how", "keep_first"}


def record_of(args: argparse.Namespace, how: Painting, models: Models) -> dict:
    """How pictures are painted, as JSON can hold it: all options but the harmless ones, so a new one can't be
    forgotten, with the values that defaults gave them.
    """
    record = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
              if name not in HARMLESS}
    record |= {"guidance": how.guidance, "refine": how.refine, "size": models.size, "dtype": models.dtype,
               "models": models.fingerprints}
    if how.refine > 1:
        record |= {"refine_from": how.refine_from, "refine_alone": how.refine_alone}
    return record


def command_of(file: Path, parser: argparse.ArgumentParser) -> str:
    """The command line that paints a picture again, from its PNG's text. Raises BadInput if it holds none."""
    try:
        with Image.open(file) as image:
            line = json.loads(image.text["how"])
        values = {**line["how"], **line, "product": line["image"], "how": None}
    except FileNotFoundError:
        raise BadInput(f"--how {file}: no such file") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"--how {file}: does not say how it was painted; give a PNG from generate.py") from None
    if "method" in values:
        raise BadInput(f"--how {file}: painted by another program, which has no such command; its settings: "
                       f"{json.dumps(line['how'])}")
    if values.get("inverted"):
        raise BadInput(f"--how {file}: its mask is white on the background; give --product {line['image']} and --mask "
                       f"the inverse of {line['mask']}")
    words = ["python", "generate.py"]
    for action in parser._actions:  # the only way to an option's name and default
        value = values.get(action.dest)
        if value is True:
            words.append(action.option_strings[0])
        elif value not in (None, False, action.default):
            words += [action.option_strings[0], str(value)]
    return shlex.join(words)


# ---------------------------------------------------------------- the command line


def add_walk_options(add: Callable, refine: str) -> None:
    """Adds the options for how to paint. add: a parser's add_argument; refine: the default of --refine, in words."""
    add("--steps", metavar="N", type=whole_number(1, 500), default=Painting.steps,
        help=f"steps of denoising [{Painting.steps}, the paper's]")
    add("--sampler", choices=["ddim", "dpm++"], default=Painting.sampler,
        help="dpm++: DPM-Solver++ (2M), for fewer steps, such as 20 [ddim, the paper's]")
    add("--guidance", metavar="X", type=real_number(1, 30),
        help=f"weight of the prompt, 1: without guidance [{Painting.guidance}, the paper's]")
    add("--size", metavar="N", type=whole_number(8, LARGEST),
        help="longer side of the painted canvas in pixels [the base's: toy 128, SD 1.5 and the paper 512]")
    add("--refine", metavar="N", type=whole_number(1, 8),
        help=f"paint a second time on a canvas N times larger, 1: no second pass [{refine}]")
    add("--refine-from", metavar="T", type=whole_number(1, 999),
        help="timestep from which the second pass denoises, in thousandths of the schedule: larger ones "
        f"repaint more [toy {TOY_REFINE['refine_from']}, else {Painting.refine_from}]")


def options(description: str) -> Parser:
    """The options of generate.py."""
    parser = Parser(description=description)
    add = parser.add_argument_group("what to paint [a sample of the toy]").add_argument
    files = dict(metavar="FILE", type=Path, nargs="+")
    add("--product", **files, help="photo, or several (JPEG, PNG, WebP, ...); its alpha channel is its mask")
    add("--mask", **files, help="the product's mask, white on the product; one for each product")
    add("--category", metavar="NAME", type=unicode_text, nargs="+",
        help="the product's category, one that CG knows; one for all or one for each; "
        "a single product may have several and is painted in each")
    add("--reference", **files, help="ad whose style the background follows (PG), or several [none: CG alone]")
    add("--reference-mask", **files, help="mask of the product in the reference [its alpha channel]; one for each")
    add("--data", metavar="DIR", type=Path, help="BG60k as released, or metadata.jsonl; continues where it stopped")
    add("--split", metavar="NAME", help="split of BG60k as released: bg60k, bg1k or bgpair [bg1k]")
    add("--limit", metavar="N", type=whole_number(1, 10**9), help="only the first N items of the data set [all]")
    add("--prompt", metavar="TEXT", type=unicode_text, help="plain text-to-image with the base alone")
    add("--how", metavar="FILE", type=Path, help="print the command that paints this picture again, and paint nothing")
    add = parser.add_argument_group("how").add_argument
    add("--num", metavar="N", type=whole_number(1, 9999), default=1,
        help="number of pictures, with seeds SEED, SEED + 1, ... [1]")
    add("--seed", metavar="N", type=whole_number(0, 2**32 - 1), default=0,
        help="seed of the noise; SEED + i for item i of --data [0]")
    add_walk_options(add, "toy 2, else 1; the paper 1")
    add("--eta", metavar="X", type=real_number(0, 1), default=Painting.eta,
        help="DDIM's η: part of DDPM's noise that is added at each step [0: none, the paper's]")
    add("--keep-first", action="store_true", help="save the picture of the first pass too, as NAME_first.png")
    add("--start", metavar="FROM", choices=["reference", "noise"], default="reference",
        help="z_T: the reference's latent, noised, or pure noise [reference, the paper's; noise without a reference]")
    add("--plain-prompt", action="store_true",
        help="a category that CG was not trained on gets the plain prompt 'A photo of NAME' [an error]")
    add = parser.add_argument_group("models and machine").add_argument
    add_model_options(add)
    add("--batch", metavar="N", type=whole_number(1, 1024), default=4, help="pictures painted at once [4]")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="where the pictures go [out]")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises BadInput for options that do not go together."""
    check_together(args, [("product", "data", "prompt"), ("prompt", "controlnet", "cg"), ("prompt", "pg")],
                   [("product", "category"), ("mask", "product"), ("category", "product"), ("reference", "product"),
                    ("reference_mask", "reference"), ("split", "data"), ("limit", "data")])
    if args.data and args.num != 1:
        raise BadInput("--num: a data set gets one picture an item; leave it out, or run again with another --out")
