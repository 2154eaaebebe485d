"""Programs: what generate.py's options ask for: which pictures, painted how; not needed to understand the paper."""

import itertools
import json
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from data import AdInputs, prompts_by_category
from programs.batch import (
    Job,
    check_last_seed,
    count_steps,
    jobs_of_items,
    load_ads,
    paint_items,
    save_data_sheet,
    save_picture,
)
from programs.models import TOY, ModelChoice, Models, add_model_options, load_models
from sampler import SAMPLERS, SamplerSettings
from support.datasets import BROKEN, Item, read_items
from support.files import BadInput, locked, nfc, result_name
from support.images import save_image, sheet, thumbnail
from support.machine import processes, sum_over_processes
from support.options import Parser, check_together, one_for_each, ratio, real_number, unicode_text, whole_number
from support.plots import picture_of

SAMPLE = "sneaker"  # from toy/samples, painted if no product is given
SHEET = "sheet.png"
LARGEST = 4096  # pixels: the longest side that is painted
# The toy's second pass. Only the base was trained at 256 px, on little noise and without prompts. From 201 it sharpens
# as much as from 301, where arches and rims begin to lose their shape
TOY_REFINE = {"refine": 2, "refine_from": 201, "refine_alone": True}

# ---------------------------------------------------------------- from options to pictures


def jobs_of(args: Namespace) -> list[Job]:
    """The pictures that --prompt or --product ask for, in the order of the sheet.

    Every product is painted in the style of every reference, where there are any, for every seed; a single product in
    the scene of each category. Without a product: a sample, by CG alone and in the style of a reference.
    Raises BadInput if two pictures would have the same name, as some file systems compare them: case does not count.
    """
    seeds = range(args.seed, args.seed + (args.num or 1))
    check_last_seed(seeds[-1])
    if args.prompt is not None:
        return [Job(args.out / f"prompt_{seed}.png", Item(None, None, None), seed) for seed in seeds]
    products, categories, references = args.product, args.category, args.reference or []
    styles = [] if references else [(None, None)]  # each a reference and its mask
    if products is None:
        sample = TOY / "samples" / f"{SAMPLE}.png"
        products, categories, references = [sample], [SAMPLE], [sample.with_stem(f"{SAMPLE}_reference")]
    masks = one_for_each(args.mask, products, "--mask", "--product")
    scenes = [categories]
    if len(products) > 1:
        scenes = [[category] for category in one_for_each(categories, products, "--category", "--product")]
    styles += zip(references, one_for_each(args.reference_mask, references, "--reference-mask", "--reference"))
    jobs = {}
    for product, mask, names in zip(products, masks, scenes):
        for seed, category, style in itertools.product(seeds, names, styles):
            item = Item(product, mask, category, *style)
            scene = "_" + re.sub(r"\W+", "_", category) if len(names) > 1 else ""
            like = f"_like_{item.reference.stem}" if item.reference else ""
            path = args.out / result_name(f"{product.stem}{scene}{like}_{seed}", ".png")
            if (key := nfc(path.name).casefold()) in jobs:
                raise BadInput(f"two pictures would be named {path.name}; rename a file of --product or --reference, "
                               "or leave out a --category")
            jobs[key] = Job(path, item, seed)
    return [*jobs.values()]


def paint_jobs(jobs: list[Job], ads: list[AdInputs], paint_all: Callable, record: dict, batch: int) -> None:
    """Paints the jobs, `batch` at once, saves the pictures and prints their paths."""
    jobs[0].path.with_name(SHEET).unlink(missing_ok=True)  # it shows an earlier command's pictures
    for k in range(0, len(jobs), batch):
        for job, picture in zip(jobs[k:], paint_all(ads[k : k + batch])):
            save_picture(picture, job, record)
            print(job.path)


def draw_sheet(jobs: list[Job], ads: list[AdInputs], name: str) -> Image.Image:
    """A row for each product and seed, the references above. name: what the network in CG's place is called."""
    by_row = {}
    for job, ad in zip(jobs, ads):
        row = [thumbnail(ad.rgb, mask=ad.mask)]
        by_row.setdefault((job.item.image, job.seed), row).append(picture_of(job.path))
    rows = [*by_row.values()]
    styles = [ad.reference[0] for ad in ads[: len(rows[0]) - 1] if ad.reference]
    if styles and ads[0].reference is None:  # the sample, also painted without its reference
        for row in rows:
            row.insert(2, styles[0])
        return sheet(rows, ["product", f"{name} alone", "reference", f"{name} + PG"])
    return sheet([[None, *styles], *rows] if styles else rows)


# ---------------------------------------------------------------- how they are painted


def sampler_settings(args: Namespace, **others) -> SamplerSettings:
    """The settings by the options that all programs share. others: further settings, or defaults of these options.

    Raises BadInput for options that do not go together.
    """
    given = {name: value for name, value in vars(args).items()
             if name in SamplerSettings.__dataclass_fields__ and value is not None}
    settings = SamplerSettings(**({} if args.weights else TOY_REFINE) | others | given)
    if settings.eta and settings.sampler != "ddim":
        raise BadInput(f"--eta goes with --sampler ddim; leave it out, or --sampler {settings.sampler}")
    if settings.negative and settings.guidance == 1:
        raise BadInput("--negative goes with guidance; leave it out, or give a --guidance above 1")
    if settings.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    if settings.refine == 1 and args.refine_from:
        raise BadInput("--refine-from goes with a second pass; add --refine 2")
    return settings


# Options left out of the record: what is painted is recorded for each picture, and the machine changes none
HARMLESS = {"product", "mask", "category", "reference", "reference_mask", "data", "split", "limit", "num", "seed",
            "batch", "device", "out", "how"}


def record_of(args: Namespace, settings: SamplerSettings, models: Models) -> dict:
    """How pictures are painted, as JSON can hold it: all options but the harmless ones, so a new one can't be
    forgotten, with the values that defaults gave them.
    """
    record = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    record |= {"refine": settings.refine, "size": models.size, "dtype": models.dtype, "models": models.fingerprints}
    if settings.refine > 1:
        record |= {"refine_from": settings.refine_from, "refine_alone": settings.refine_alone}
    return record


def command_of(file: Path) -> str:
    """The command line that paints a picture again, from its PNG's text. Raises BadInput if it holds none."""
    try:
        with Image.open(file) as image:
            line = json.loads(image.text["how"])
        values = line.pop("how") | line | {"product": line["image"]}
        if values["start"] and values["inverted"]:  # another program's picture has no start
            raise ValueError(f"its mask is white on the background; give --mask the inverse of {line['mask']}")
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"--how {file}: no command paints it again ({error}); give a PNG from generate.py") from None
    words = ["python", "generate.py"]
    for name, default in vars(options("").parse_args([])).items():
        value, option = values.get(name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value != default:
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return shlex.join(words)


# ---------------------------------------------------------------- the command line


def add_walk_options(add: Callable) -> None:
    """Adds the options for how to paint. add: a parser's add_argument."""
    add("--steps", type=whole_number(1, 500), default=SamplerSettings.steps,
        help=f"steps of denoising [{SamplerSettings.steps}, the paper's]")
    add("--sampler", choices=[*SAMPLERS], default=SamplerSettings.sampler,
        help="dpm++: DPM-Solver++ (2M), for fewer steps, such as 20 [ddim, the paper's]")
    add("--guidance", type=real_number(1, 30), default=SamplerSettings.guidance,
        help=f"weight of the prompt, 1: without guidance [{SamplerSettings.guidance}, the paper's]")
    add("--size", type=whole_number(8, LARGEST),
        help="longer side of the painted canvas in pixels [the base's: toy 128, SD 1.5 and the paper 512]")
    add("--refine", type=whole_number(1, 8),
        help="paint a second time on a canvas so many times larger, 1: no second pass [1, the paper's; with "
        "the toy, generate.py's is 2]")
    add("--refine-from", type=whole_number(1, 999),
        help="timestep from which the second pass denoises, in thousandths of the schedule: larger ones "
        f"repaint more [toy {TOY_REFINE['refine_from']}, else {SamplerSettings.refine_from}]")


def options(description: str) -> Parser:
    """The options of generate.py."""
    parser = Parser(description=description)
    add = parser.add_argument_group("what to paint [a sample of the toy]").add_argument
    files = dict(type=Path, nargs="+")
    add("--product", **files, help="photo, or several (JPEG, PNG, WebP, ...); its alpha channel is its mask")
    add("--mask", **files, help="the product's mask, white on the product; one for each product")
    add("--category", type=unicode_text, nargs="+",
        help="the product's category, one that CG knows; one for all or one for each; "
        "a single product may have several and is painted in each")
    add("--reference", **files, help="ad whose style the background follows (PG), or several [none: CG alone]")
    add("--reference-mask", **files, help="mask of the product in the reference [its alpha channel]; one for each")
    add("--data", type=Path, help="BG60k as released, or a folder with metadata.jsonl; continues where it stopped")
    add("--split", help="split of BG60k as released: bg60k, bg1k or bgpair [bg1k]")
    add("--limit", type=whole_number(1, 1_000_000), help="only so many items of the data set, its first [all]")
    add("--prompt", type=unicode_text, help="plain text-to-image with the base alone")
    add("--how", metavar="FILE", type=Path, help="print the command that paints this picture again, and paint nothing")
    add = parser.add_argument_group("how").add_argument
    add("--num", type=whole_number(1, 9999), help="number of pictures, with seeds SEED, SEED + 1, ... [1]")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0,
        help="seed of the noise; SEED + i for item i of --data [0]")
    add_walk_options(add)
    add("--eta", type=real_number(0, 1), default=SamplerSettings.eta,
        help="DDIM's η: part of DDPM's noise that is added at each step [0: none, the paper's]")
    add("--negative", type=unicode_text, help="prompt that guidance leads away from, in place of ''")
    add("--cg-scale", type=real_number(0, 4),
        help="factor of CG's or --controlnet's outputs: how strongly product and category count [1]")
    add("--pg-scale", type=real_number(0, 4),
        help="factor of PG's outputs: how strongly the reference counts [1]")
    add("--spacing", choices=["leading", "trailing", "linspace"],
        help="which timesteps are visited; trailing for few steps of dpm++ [the base's, in the toy and SD 1.5 leading]")
    add("--margin", type=real_number(0, 0.45),
        help="widen the frame until so large a part of it is free on each side of the product [0]")
    add("--aspect", type=ratio, help="widen the frame to this ratio of width to height, such as 16:9 [the photo's]")
    add("--start", choices=["reference", "noise"], default="reference",
        help="z_T: the reference's latent, noised, or pure noise [reference, the paper's; noise without a reference]")
    add("--plain-prompt", action="store_true",
        help="a category that CG was not trained on gets the plain prompt 'A photo of CATEGORY' [an error]")
    add = parser.add_argument_group("models and machine").add_argument
    add_model_options(add)
    add("--batch", type=whole_number(1, 1024), default=4, help="pictures painted at once [4]")
    add("--out", type=Path, default=Path("out"), help="where the pictures go [out]")
    add("--no-metadata", action="store_true", default=None,
        help="leave out the PNGs' text: the options and file names, which --how reads")
    return parser


def check(args: Namespace) -> None:
    """Raises BadInput for options that do not go together."""
    check_together(args, [("product", "data", "prompt"), ("prompt", "controlnet", "cg"), ("data", "num"),
                          *(("prompt", name) for name in ("pg", "cg_scale", "pg_scale", "margin", "aspect"))],
                   [("product", "category"), ("mask", "product"), ("category", "product"), ("reference", "product"),
                    ("reference_mask", "reference"), ("split", "data"), ("limit", "data")])


# ---------------------------------------------------------------- generate.py's commands; each gets its paint_ads


def load(args: Namespace, items: list[Item], paint_ads: Callable) -> tuple[dict, Callable, dict]:
    """Loads the models that paint items -> the prompts of each category, `paint_ads` with the models and the settings,
    and the record of both.
    """
    settings = sampler_settings(args, from_reference=args.start == "reference")
    choice = ModelChoice(**{name: vars(args)[name] for name in ModelChoice.__dataclass_fields__})
    models = load_models(choice, args.size, {item.category for item in items}, any(item.reference for item in items),
                         args.plain_prompt)
    if args.spacing:
        models.sd.schedule.config["timestep_spacing"] = args.spacing
    if (side := settings.refine * models.size) > LARGEST:
        raise BadInput(f"--refine {settings.refine}: paints {side} pixels, more than {LARGEST}; lower it, or --size")
    count_steps(models, settings)  # raises BadInput for impossible ones
    if args.pg_scale is not None and not models.pg:
        raise BadInput("--pg-scale goes with a reference; add --reference, or leave it out")
    for branch, scale in (models.cg, args.cg_scale), (models.pg, args.pg_scale):
        if scale is not None:
            branch.scale = scale
    paint_all = partial(paint_ads, models=models, settings=settings)
    return prompts_by_category(models.identifiers, models.sd.tokenizer), paint_all, record_of(args, settings, models)


def generate_text(args: Namespace, paint_ads: Callable) -> None:
    """--prompt: the base paints alone, without a product."""
    jobs = jobs_of(args)
    _, paint_all, record = load(args, [], paint_ads)
    blank = torch.zeros(3, *[record["size"] * record["refine"]] * 2)
    ads = [AdInputs(blank, blank[:1], (args.prompt,) * 3, job.seed) for job in jobs]
    paint_jobs(jobs, ads, paint_all, record, args.batch)
    say_next("--product CUTOUT --category NAME paints around a product")


def generate_product(args: Namespace, paint_ads: Callable) -> None:
    """--product: paints every product, in the style of every reference if any, --num times each, and a sheet of all.

    A single product is painted in the scene of each category given. Without --product: a sample, by CG and by CG + PG.
    """
    jobs = jobs_of(args)
    texts, paint_all, record = load(args, [job.item for job in jobs], paint_ads)
    ads = load_ads(jobs, texts, record)
    paint_jobs(jobs, ads, paint_all, record, args.batch)
    if len(jobs) > 1:
        save_image(draw_sheet(jobs, ads, "ControlNet" if args.controlnet else "CG"), args.out / SHEET)
        print(args.out / SHEET)
    say_next("--product CUTOUT --category NAME paints around a product of your own" if args.product is None else
             "--reference AD paints in its style; --how FILE prints the command that paints a picture again")


def generate_data(args: Namespace, paint_ads: Callable) -> None:
    """--data: paints every item that has no picture yet, with PG where the item has a reference."""
    items, notes = read_items(args.data, args.split or "bg1k")
    items = items[: args.limit]
    jobs = jobs_of_items(items, args.out, args.seed)
    texts, paint_all, record = load(args, items, paint_ads)
    print("\n".join(notes), file=sys.stderr)
    painted, there, broken = paint_items(jobs, texts, paint_all, record, args.batch)
    print(f"{args.out}: {painted:,} painted, {there:,} were there, {broken:,} broken")
    broken = sum_over_processes(broken)  # when all have painted
    if processes()[0] == 0:
        save_data_sheet(jobs)
    if broken > BROKEN * len(jobs):
        raise BadInput(f"{args.data}: {broken:,} items can't be used, more than {BROKEN:.0%}; they are named above")
    say_next(f"look at {args.out / SHEET}; {args.out / 'manifest.jsonl'} says what each was painted from")


def say_next(text: str) -> None:
    """Prints on stderr what to do next: stdout has only paths."""
    print(f"next: {text}", file=sys.stderr)


def run_command(arguments: list[str] | None, description: str, paint_ads: Callable) -> None:
    """The command line of generate.py."""
    args = options(description).parse_args(arguments)
    if args.how:
        print(command_of(args.how))
        return
    check(args)
    command = generate_text if args.prompt is not None else generate_data if args.data else generate_product
    with locked(args.out):
        command(args, paint_ads)
