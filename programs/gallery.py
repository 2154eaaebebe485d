"""Programs: several products and references: what to paint, file names, a sheet; not needed to understand the paper."""


import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from data import Ad
from programs.models import Models, add_model_options
from rivals.paint_by_example import GUIDANCE
from sampler import Painting
from support.datasets import Item
from support.files import BadInput, result_name
from support.images import load_cutout, load_masked, open_image, sheet, thumbnail, to_tensor
from support.options import Parser, check_together, real_number, unicode_text, whole_number

SHEET = "sheet.png"


class Job(NamedTuple):
    """One picture to paint."""

    name: str  # of its file
    ad: Ad
    item: Item  # the files it is painted from


@dataclass(frozen=True)
class Gallery:
    """Every product in the style of every reference, where there are any, for every seed."""

    items: list[Item]  # the products' files; categories are added by `jobs`
    references: list[tuple[Path, Path | None]]  # ads and their masks
    categories: list[list[str]]  # of each product
    seeds: range
    with_and_without: bool  # paint each product without a reference too, as the demo does
    exemplars: bool  # the references are whole pictures, without masks

    @cached_property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Each product's rgb (3, H, W) and M (1, H, W)."""
        return [load_cutout(item.image, item.mask) for item in self.items]

    @cached_property
    def styles(self) -> list[tuple[Tensor, Tensor | None]]:
        """Each reference's picture (3, H, W), background and all, and its mask (1, H, W); None for an exemplar."""
        if self.exemplars:
            return [(to_tensor(open_image(path).convert("RGB")), None) for path, _ in self.references]
        return [load_masked(*pair, "reference", "--reference-mask") for pair in self.references]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The index of the product, and the seed, for each row of the sheet."""
        return [(i, seed) for i in range(len(self.items)) for seed in self.seeds]

    def jobs(self, texts: dict[str, tuple[str, str, str]]) -> list[Job]:
        """All pictures, in the order of the sheet; texts: the prompts of each category."""
        jobs = []
        for i, seed in self.rows:
            for category in self.categories[i]:
                item, ad = replace(self.items[i], category=category), Ad(*self.products[i], texts[category], seed)
                stem = item.image.stem + (f"_{in_file_name(category)}" if len(self.categories[i]) > 1 else "")
                if self.with_and_without or not self.references:
                    jobs.append(Job(result_name(f"{stem}_{seed}", ".png"), ad, item))
                for (path, mask), style in zip(self.references, self.styles):
                    name = result_name(f"{stem}_like_{path.stem}_{seed}", ".png")
                    item = replace(item, reference=path, reference_mask=mask)
                    jobs.append(Job(name, ad._replace(reference=style), item))
        return jobs

    def small(self, picture: Tensor, mask: Tensor | None = None) -> Image.Image:
        """A picture at the size it has on the sheet."""
        count = len(self.rows) * len(self.categories[0]) * max(1, len(self.references))
        return thumbnail(picture, 256 if count <= 8 else 160, mask)

    def sheet(self, pictures: list[Image.Image], name: str) -> Image.Image:
        """A row for each product and seed, the references above. name: what the network in CG's place is called."""
        columns = len(pictures) // len(self.rows)
        cells = [[self.small(*self.products[i]), *pictures[k * columns : (k + 1) * columns]]
                 for k, (i, _) in enumerate(self.rows)]
        styles = [self.small(rgb) for rgb, _ in self.styles]
        if self.with_and_without:
            cells = [[product, alone, styles[0], both] for product, alone, both in cells]
            return sheet(cells, ["product", f"{name} alone", "reference", f"{name} + PG"])
        return sheet(([[None, *styles * len(self.categories[0])]] if styles else []) + cells)

    @staticmethod
    def remove_sheet(out: Path) -> None:
        """Removes an earlier command's sheet, which would seem to be this one's, and says so."""
        if (out / SHEET).exists():
            (out / SHEET).unlink()
            print(f"{out / SHEET}: removed, since it showed an earlier command's pictures", file=sys.stderr)


def in_file_name(category: str) -> str:
    """A category as a part of a file's name."""
    return re.sub(r"\W+", "_", category)


def check_result_names(products: list[Path], references: list[Path], categories: list[str]) -> None:
    """Raises BadInput if two results would have the same name."""
    names = [in_file_name(category) for category in dict.fromkeys(categories)]
    if len(products) == 1 and len({*names}) < len(names):
        raise BadInput(f"--category: two of {', '.join(categories)} would give results of the same name; leave one out")
    for option, paths in (("product", products), ("reference", references)):
        stems = [path.stem for path in paths]
        if twice := {stem for stem in stems if stems.count(stem) > 1}:
            raise BadInput(f"--{option}: two files are named {min(twice)}, as the results would be; rename one")


LARGEST = 4096  # pixels: the longest side that is painted
# The toy's second pass. Only the base was trained at 256 px, on little noise and without prompts. From 201 it sharpens
# as much as from 301, where arches and rims begin to lose their shape
TOY_REFINE = {"refine": 2, "refine_from": 201, "refine_alone": True}

# Options that exclude each other: the base alone paints a --prompt, and a rival with networks of its own paints alone
ALONE = [*(("prompt", branch) for branch in ("cg", "pg", "controlnet")),
         *((rival, option) for rival in ("lama", "paint_by_example") for option in (
             "weights", "tokenizer", "cg", "pg", "controlnet", "category", "plain_prompt", "data", "prompt",
             "refine_from", "keep_first")),
         ("lama", "reference"), ("lama", "paint_by_example"), ("paint_by_example", "reference_mask")]
RIVALS_NEED = [("lama", "product"), ("paint_by_example", "reference")]


def painting_of(args: argparse.Namespace, **others) -> Painting:
    """A Painting from the options that all programs share. others: further fields of it, or defaults of these options.

    Raises BadInput for options that do not go together.
    """
    fields = (TOY_REFINE if args.weights is None else {}) | others
    fields |= {name: vars(args)[name] for name in ("guidance", "refine", "refine_from") if vars(args)[name] is not None}
    how = Painting(args.steps, hint=args.hint, sampler=args.sampler, **fields)
    if how.eta and how.sampler != "ddim":
        raise BadInput(f"--eta goes with --sampler ddim; leave it out, or --sampler {how.sampler}")
    for option in ("refine_from", "keep_first"):
        if how.refine == 1 and getattr(args, option, None):
            raise BadInput(f"--{option.replace('_', '-')} goes with a second pass; add --refine 2")
    return how


def own_defaults(args: argparse.Namespace) -> dict:
    """The defaults of a rival with networks of its own: it has no second pass, which only the base can paint."""
    if args.paint_by_example:
        return {"refine": 1, "guidance": GUIDANCE}
    return {"refine": 1} if args.lama else {}


def settled(how: Painting) -> dict:
    """Settings for the record that may come from defaults: the guidance and the second pass."""
    second = {"refine_from": how.refine_from, "refine_alone": how.refine_alone} if how.refine > 1 else {}
    return {"guidance": how.guidance, "refine": how.refine, **second}


def count_steps(models: Models, how: Painting) -> int:
    """The steps of both passes. Raises BadInput if the second is too large, or if no step is left for it."""
    if models.rival:
        return models.rival.steps(how)
    schedule, size = models.sd.schedule, how.refine * models.size
    if size > LARGEST:
        raise BadInput(f"--refine {how.refine}: paints {size} pixels, more than {LARGEST}; lower it, or --size")
    second = schedule.timesteps(how.steps, how.refine_from * schedule.T // 1000) if how.refine > 1 else []
    return len(schedule.timesteps(how.steps)) + len(second)


# ---------------------------------------------------------------- the command line


def add_walk_options(add: Callable, refine: str) -> None:
    """Adds the options for how to paint. add: a parser's add_argument; refine: the default of --refine, in words."""
    add("--steps", metavar="N", type=whole_number(1, 500), default=Painting.steps,
        help=f"steps of denoising [{Painting.steps}, the paper's]")
    add("--sampler", choices=["ddim", "dpm++"], default=Painting.sampler,
        help="dpm++: DPM-Solver++ (2M), for fewer steps, such as 20 [ddim, the paper's]")
    add("--guidance", metavar="X", type=real_number(1, 30),
        help=f"weight of the prompt, 1: without guidance [{Painting.guidance}, the paper's; Paint by Example's own "
        f"{GUIDANCE}]")
    add("--size", metavar="N", type=whole_number(8, LARGEST),
        help="longer side of the painted canvas in pixels [the base's: toy 128, SD 1.5 and the paper 512]")
    add("--refine", metavar="N", type=whole_number(1, 8),
        help=f"paint a second time on a canvas N times larger, 1: no second pass [{refine}]")
    add("--refine-from", metavar="T", type=whole_number(1, 999),
        help="timestep from which the second pass denoises, in thousandths of the schedule: larger ones "
        f"repaint more [toy {TOY_REFINE['refine_from']}, else {Painting.refine_from}]")


def options(description: str) -> Parser:
    """The options of generate.py."""
    parser = Parser(description=description, formatter_class=partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120))
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


def check(args) -> None:
    """Raises BadInput for options that do not go together."""
    check_together(args, [("product", "data", "prompt"), ("controlnet", "cg"), *ALONE],
                   [("mask", "product"), ("category", "product"), ("reference", "product"),
                    ("reference_mask", "reference"), ("split", "data"), ("limit", "data"), *RIVALS_NEED])
    if args.product and not (args.category or args.lama or args.paint_by_example):
        raise BadInput("--product goes with --category; add the product's category")
    if (args.lama or args.paint_by_example) and (args.refine or 1) > 1:
        raise BadInput("--refine is a second pass of the base, and this rival has none; leave it out")
    if args.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    check_result_names(args.product or [], args.reference or [], args.category or [])
    if args.data and args.num != 1:
        raise BadInput("--num: a data set gets one picture an item; leave it out, or run again with another --out")


# Options left out of the record: what is painted is recorded for each picture, and the machine changes none
HARMLESS = {"product", "mask", "category", "reference", "reference_mask", "data", "split", "limit", "prompt", "num",
            "seed", "batch", "device", "out", "how", "what", "centres", "keep_first", "methods", "pairs", "pictures",
            "key", "noise", "studies"}


def record_of(args: argparse.Namespace, **settled) -> dict:
    """How pictures are painted, as JSON can hold it: all options but the harmless ones, so a new one can't be
    forgotten, and the settings that were `settled` later.
    """
    options = {name: value for name, value in vars(args).items() if name not in HARMLESS} | settled
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def command_of(file: Path, parser: argparse.ArgumentParser) -> str:
    """The command line that paints a picture again, from its PNG's text. Raises BadInput if it holds none."""
    try:
        with Image.open(file) as image:
            line = json.loads(image.text["how"])
    except FileNotFoundError:
        raise BadInput(f"--how {file}: no such file") from None
    except (OSError, AttributeError, KeyError, ValueError):
        raise BadInput(f"--how {file}: does not say how it was painted; give a PNG from generate.py") from None
    if "method" in line["how"]:
        raise BadInput(f"--how {file}: painted by evaluate.py, which has no command for one picture; its settings: "
                       f"{json.dumps(line['how'])}")
    if line["inverted"]:
        raise BadInput(f"--how {file}: its mask is white on the background; give --product {line['image']} and --mask "
                       f"the inverse of {line['mask']}")
    values = {"product": line["image"], "mask": line["mask"], "reference": line["reference"],
              "reference_mask": line["reference_mask"], "category": line["category"], "prompt": line.get("prompt"),
              "seed": line["seed"], **line["how"], "dtype": line["dtype"]}
    words = []
    for action in parser._actions:  # the only way to an option's name and default
        value = values.get(action.dest)
        if value is True:
            words.append(action.option_strings[0])
        elif value not in (None, False) and value != action.default:
            words += [action.option_strings[0], str(value)]
    return shlex.join(["python", "generate.py", *words])
