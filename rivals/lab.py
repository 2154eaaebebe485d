"""Rivals: the lab, in which all methods are trained, paint and are measured; not needed to understand the paper.

    python rivals/lab.py paint --lama FILE --product mug.png [--mask m.png]
    python rivals/lab.py paint --paint-by-example PATH --product mug.png --reference ad.png
    python rivals/lab.py train lama             # or paint-by-example: the toy's own; the options are train.py's

Reading order: METHODS, where a new entry makes a new method; the lab of evaluate.py and study.py, which paints by the
methods and embeds what they painted; this program. networks.py says where the networks come from.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python rivals/lab.py`: the repository's root

import train
from clip import CLIP
from data import AdInputs, prompts_by_category
from generate import paint_ads
from programs.batch import jobs_of_items, paint_items
from programs.gallery import add_walk_options, jobs_of, paint_jobs, sampler_settings
from programs.models import (
    ModelChoice,
    Models,
    add_model_options,
    categories_file,
    check_identifiers,
    identifiers_of,
    load_models,
)
from rivals.baselines import STRENGTH, blended_diffusion, stable_diffusion
from rivals.lama import load_lama
from rivals.metrics import embed_pictures
from rivals.networks import Networks
from rivals.paint_by_example import GUIDANCE, load_paint_by_example
from rivals.stages import RIVAL_STAGES
from sampler import SamplerSettings
from support.datasets import Item, read_items
from support.files import BadInput, locked, one_line_errors, read_json
from support.images import canvas_size, load_cutout, load_masked, open_image, resize, save_image, to_tensor
from support.machine import barrier, pick_device, pick_dtype
from support.options import Parser, check_together, whole_number
from support.tensors import file_fingerprint, fingerprint, model_fingerprint
from toy.world import TOY_DATA

Texts = dict[str, tuple[str, str, str]]  # the texts for P, P_fg and P_bg, by category

# ---------------------------------------------------------------- methods


class Method(NamedTuple):
    """What paints: generate.paint with these networks, or a rival in its place."""

    cg: str | None = None
    pg: str | None = None
    controlnet: str | None = None  # in CG's place
    plain_prompt: bool = False  # 'A photo of [category]', without the identifier
    settings: dict = {}  # fields of SamplerSettings that it has its own values for
    painter: Callable | None = None  # a rival made of the base's parts, see baselines.py
    clip: str | None = None  # the CLIP that guides it
    own: str | None = None  # a rival's own network, in the base's place

    def networks(self) -> list[str]:
        """The names of the networks that it paints with."""
        return [name for name in (self.own or "weights", self.controlnet, self.cg, self.pg, self.clip) if name]


ORIGINALS = ("shuffled", "others", "references")  # ads in the place of pictures: these paint nothing
METHODS = {
    "lama": Method(plain_prompt=True, own="lama", settings={"refine": 1}),  # only the base has a second pass
    "paint-by-example": Method(plain_prompt=True, own="paint-by-example", settings={"refine": 1, "guidance": GUIDANCE}),
    "stable-diffusion": Method(plain_prompt=True, painter=stable_diffusion),
    "blended-diffusion": Method(plain_prompt=True, painter=blended_diffusion, clip="guide-clip"),
    "controlnet": Method(controlnet="controlnet", plain_prompt=True),
    "cg": Method("cg"),
    "cg-plain": Method("cg-plain"),
    "cg+pg": Method("cg", "pg"),
    "cg+pg-noise": Method("cg", "pg", settings={"from_reference": False}),
    "controlnet+pg": Method(controlnet="controlnet", pg="pg"),
    "controlnet+its-pg": Method(controlnet="controlnet", pg="pg-controlnet"),
    "cg-plain+pg": Method("cg-plain", "pg"),
    "fig7-none": Method("cg", "pg-none"),
    "fig7-dilation": Method("cg", "pg-dilation"),
    "fig7-mixup": Method("cg", "pg-mixup"),
} | {name: Method(plain_prompt=True) for name in ORIGINALS}


def load(method: Method, networks: Networks, choice: ModelChoice, size: int | None, settings: SamplerSettings,
         categories: set[str]) -> tuple[Models, Callable[[list[AdInputs]], list[Tensor]]]:
    """A method's models, and what paints ads with them. choice: the base, and where it runs; size: the canvas's longer
    side in pixels [the base's]. Raises BadInput for wrong weights, dtype or size.
    """
    if method.own:
        return load_rival(method.own, networks.path(method.own), choice, size, settings)
    branches = {role: name for role in ("cg", "pg", "controlnet") if (name := getattr(method, role))}
    choice = replace(choice, **{role: networks.path(name) for role, name in branches.items()})
    models = load_models(choice, size, categories if branches else set(), with_pg="pg" in branches)
    guide = {"clip": networks.load_clip(method.clip)} if method.clip else {}
    painter = method.painter and partial(method.painter, models.sd, settings=settings, **guide)
    return models, partial(paint_ads, models=models, settings=settings, painter=painter)


def load_rival(name: str, path: Path, choice: ModelChoice, size: int | None,
               settings: SamplerSettings) -> tuple[Models, Callable]:
    """As `load`, for a rival with networks of its own. Its exemplars are whole references, squashed to a square."""
    device, dtype = pick_device(choice.device), torch.float32
    if name == "lama":  # its Fourier transforms need float32
        rival = load_lama(path, device)
    else:
        dtype = pick_dtype(choice.dtype, device)
        rival = load_paint_by_example(path, device, dtype)
    size = size or rival.size
    canvas_size(1, 1, size, rival.multiple)  # refuses a size that does not fit
    models = Models(None, None, None, {}, size, rival.multiple, str(dtype).removeprefix("torch."),
                    [model_fingerprint(path)])

    def paint_all(ads: list[AdInputs]) -> list[Tensor]:
        if side := rival.exemplar:
            ads = [ad._replace(reference=(resize(ad.reference[0], side, side), None)) for ad in ads]
        return paint_ads(ads, models, settings, partial(rival.paint, settings=settings))

    return models, paint_all


# ---------------------------------------------------------------- the lab of evaluate.py and study.py

PROTOCOLS = {"bg1k": "", "ref": "Ref→Self", "self": "Self→Self"}  # what is painted (see Lab.all_items): its label


@dataclass(frozen=True, eq=False)
class Lab:
    """What all tables and figures share: the data, the networks, and the pictures, which are kept in `out`."""

    data: Path
    limit: int | None  # at most so many items are painted
    networks: Networks
    choice: ModelChoice  # the base and where it runs; the branches are the methods'
    settings: SamplerSettings
    size: int | None
    seed: int
    batch: int
    out: Path

    def check(self, methods: list[str], items: list[Item], with_clip: bool = True) -> None:
        """Raises BadInput if networks are missing or do not belong together, or if CG does not know a category: at
        once, not after hours of painting. with_clip: the CLIP that measures is needed, too.
        """
        names = [name for method in methods for name in METHODS[method].networks()] + ["clip"] * with_clip
        paths = {name: path for name in names if (path := self.networks.given(name))}
        for path in paths.values():
            model_fingerprint(path)
        if not all(METHODS[method].plain_prompt for method in methods):
            identifiers_of({item.category for item in items}, self.networks.given("cg"))
        for name in paths.keys() & {"pg", "cg-plain"}:
            check_identifiers(self.networks.given("cg"), paths[name])
        for name in paths.keys() & {"cg", "cg-plain"}:
            check_attention(name, paths[name])

    def items(self, protocol: str) -> list[Item]:
        """The items that are painted and measured: the first --limit."""
        return self.all_items(protocol)[: self.limit]

    @cache  # noqa: B019 (a program makes one lab)
    def all_items(self, protocol: str) -> list[Item]:
        """The items of BG1k or BG-pair (section 4). bg1k: products; ref: products and the references they are paired
        with; self: each its own reference.
        """
        items = read_items(self.data, "bg1k" if protocol == "bg1k" else "bgpair")[0]
        if protocol == "bg1k":
            return [replace(item, reference=None, reference_mask=None) for item in items]
        if protocol == "self":
            return [replace(item, reference=item.image, reference_mask=item.mask) for item in items]
        if items := [item for item in items if item.reference]:
            return items
        raise BadInput(f"{self.data}: no item has a reference, which this command needs; choose another data set")

    @cached_property
    def other_ads(self) -> list[Item]:
        """The ads of the training set that BG1k does not show; none where a list marks no ads as held out."""
        shown = {item.image for item in self.all_items("bg1k")}
        return [ad for ad in read_items(self.data)[0] if ad.image not in shown]

    def pictures(self, name: str, items: list[Item], folder: str, chosen: list[int] | None = None,
                 texts: Texts | None = None) -> list[Path]:
        """The paths of a method's pictures for these items, or for those `chosen` by index; paints missing ones first.
        `texts` [those with CG's identifiers].

        The folder's name ends in a fingerprint of all that the pictures depend on. The first --limit items in a split
        share the folder of the whole split.
        """
        method = METHODS[name]
        used = [*map(self.networks.path, method.networks()), self.choice.vae]
        used = [model_fingerprint(path) for path in used if path]
        settings = replace(self.settings, **method.settings)
        if not method.controlnet:
            settings = replace(settings, hint="product")  # --hint is --controlnet's
        record = vars(settings) | {
            "method": name, "size": self.size, "seed": self.seed, "dtype": self.choice.dtype, "models": used,
            "texts": texts, "strength": STRENGTH if method.clip else None}
        split = self.all_items(folder) if folder in PROTOCOLS else items
        files = [[item.category, *map(file_fingerprint, (item.image, item.mask, item.reference, item.reference_mask))]
                 for item in split]
        out = self.out / "pictures" / folder / f"{name}-{fingerprint([record, files])[:8]}"
        jobs = jobs_of_items(items, out, self.seed)
        if chosen is not None:
            jobs = [jobs[i] for i in chosen]
        paths = [job.path for job in jobs]
        missing = not all(path.exists() for path in paths)
        barrier()  # every process has looked before any paints
        if missing:
            print(f"painting {folder}, {name}", file=sys.stderr)
            categories = {item.category for item in items}
            models, paint_all = load(method, self.networks, self.choice, self.size, settings, categories)
            if texts is None:
                cg = None if method.plain_prompt else self.networks.given("cg")
                texts = prompts_by_category(identifiers_of(categories, cg), models.sd and models.sd.tokenizer)
            record |= {"dtype": models.dtype}
            paint_items(jobs, texts, paint_all, record, self.batch)
        barrier()
        return paths

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP that measures."""
        return self.networks.load_clip("clip")

    def embeddings(self, pictures: list[tuple[Path, Item | None]]) -> Tensor:
        """The pictures' embeddings (n, d), NaN where there is no picture; see embed_pictures."""
        return embed_pictures(self.clip, pictures, self.out / "embeddings")

    def backgrounds(self, pictures: Iterable[tuple[Path, Item]]) -> tuple[Tensor, list[Item]]:
        """Of the pictures that can be read: their backgrounds' embeddings (n, d), of length 1, and their items.

        Raises BadInput if there is none.
        """
        pictures = [*pictures]
        x = F.normalize(self.embeddings(pictures), dim=1)
        readable = x.isfinite().all(dim=1)
        if not readable.any():
            raise BadInput(f"{self.data}: there is no picture to measure; raise --limit")
        return x[readable], [item for (_, item), r in zip(pictures, readable.tolist()) if r]

    @cached_property
    def centres(self) -> tuple[list[str], Tensor]:
        """Categories, and the normalised means (C, d) of their ads' backgrounds over the training set (Fig. 5a)."""
        x, items = self.backgrounds((item.image, item) for item in read_items(self.data)[0])
        categories = sorted({item.category for item in items})
        own = torch.tensor([categories.index(item.category) for item in items])
        return categories, F.normalize(torch.stack([x[own == k].mean(dim=0) for k in range(len(categories))]), dim=1)


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG and prints its path."""
    save_image(picture, path)
    print(path)


def cutout_of(item: Item) -> Tensor:
    """An item's product on white, (3, H, W)."""
    rgb, mask = load_masked(item.image, item.mask, inverted=item.inverted)
    return rgb * mask + 1 - mask


def choose(items: list, count: int, seed: int = 0) -> list:
    """`count` of the items, drawn at random by the seed and kept in order. Evenly spaced ones would not do: lists often
    go round the categories.
    """
    chosen = torch.randperm(len(items), generator=Generator().manual_seed(seed))[:count]
    return [items[i] for i in sorted(chosen.tolist())]


def check_attention(option: str, cg: Path) -> None:
    """Raises BadInput if --cg has plain attention or --cg-plain has not, as config.json records train.py's option."""
    config, wanted = categories_file(cg).with_name("config.json"), "plain" if option == "cg-plain" else "mask-guided"
    found = read_json(config).get("attention", "mask-guided") if config.is_file() else "mask-guided"
    if found != wanted:
        raise BadInput(f"--{option} {cg} is a CG with {found} attention; give one with {wanted}")


def add_rival_options(add: Callable) -> None:
    """Adds those that name rivals. add: a parser's add_argument."""
    add("--lama", type=Path, help="LaMa: big-lama.safetensors or the like")
    add("--paint-by-example", metavar="PATH", type=Path, help="Paint by Example: its public folder or single file")


def add_lab_options(parser: Parser) -> Callable:
    """Adds them. Returns the add_argument of the group for the program's own options."""
    own = parser.add_argument_group("what is painted, and where it goes")
    own.add_argument("--data", type=Path, default=TOY_DATA / "ads",
                     help="BG60k as released, or metadata.jsonl [the toy's ads]")
    add = parser.add_argument_group("how the methods paint").add_argument
    add_walk_options(add)
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, help="item i is painted with SEED + i [0]")
    add = parser.add_argument_group("models [the toy's; those not shipped are trained on first use]").add_argument
    add_model_options(add)
    add_rival_options(add)
    add("--pg-controlnet", metavar="PATH", type=Path, help="PG trained beside --controlnet, for Table 4's (a)")
    add("--cg-plain", type=Path, help="CG with plain attention, from train.py cg --attention plain")
    add("--clip", type=Path, help="CLIP that measures, such as openai/clip-vit-base-patch32")
    add("--guide-clip", type=Path, help="CLIP that guides Blended Diffusion: not the one that measures")
    add("--batch", type=whole_number(1, 1024), default=16, help="pictures painted at once [16]")
    return own.add_argument


def lab_of(args: argparse.Namespace, out: Path, limit: int | None = None) -> Lab:
    """The lab that these options describe; it keeps its pictures in `out`. Raises BadInput for options that clash."""
    device = pick_device(args.device)
    networks = Networks({name.replace("_", "-"): value for name, value in vars(args).items()}, device)
    choice = ModelChoice(args.weights, args.tokenizer, device=device, dtype=args.dtype, vae=args.vae)
    return Lab(args.data.absolute(), limit, networks, choice, sampler_settings(args, refine=1), args.size, args.seed,
               args.batch, out)


# ---------------------------------------------------------------- the program


def options() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=["paint", "train"], help="paint; `train STAGE --help` shows that one's options")
    add, files = parser.add_argument, dict(type=Path, nargs="+")
    add_rival_options(add)
    add("--product", **files, required=True, help="photo, or several; its alpha channel is its mask")
    add("--mask", **files, help="the product's mask, white on the product; one for each product")
    add("--reference", **files, help="exemplar of Paint by Example, or several: whole pictures, without a mask")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, help="seed of the noise [0]")
    add("--size", type=whole_number(8, 4096), help="longer side of the canvas in pixels [the rival's]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="of Paint by Example; LaMa is always in float32. float16 and bfloat16 are less precise [auto]")
    add("--out", type=Path, default=Path("out"), help="where the pictures go [out]")
    parser.set_defaults(category=[""], reference_mask=None, prompt=None, num=1)  # rivals read no words
    return parser


def paint(args: argparse.Namespace) -> None:
    """Paints every product by a rival with networks of its own, for every exemplar, if any."""
    check_together(args, [("lama", "paint_by_example"), ("lama", "reference")], [("paint_by_example", "reference")])
    name, path = ("lama", args.lama) if args.lama else ("paint-by-example", args.paint_by_example)
    if path is None:
        raise BadInput("which rival? Give --lama FILE or --paint-by-example PATH")
    jobs = jobs_of(args)
    exemplars = {path: (to_tensor(open_image(path).convert("RGB")), None) for path in args.reference or ()}
    ads = [AdInputs(*load_cutout(item.image, item.mask), ("", "", ""), seed, exemplars.get(item.reference))
           for _, item, seed in jobs]
    settings = SamplerSettings(guidance=GUIDANCE)
    models, paint_all = load_rival(name, path, ModelChoice(device=args.device, dtype=args.dtype), args.size, settings)
    record = {"method": name, "steps": settings.steps, "guidance": settings.guidance, "size": models.size,
              "dtype": models.dtype, "models": models.fingerprints}
    with locked(args.out):
        paint_jobs(jobs, ads, paint_all, record, batch=4)
    print("next: evaluate.py compares it with the other methods", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        train.main(arguments[1:], RIVAL_STAGES)
    else:
        paint(options().parse_args(arguments))


if __name__ == "__main__":
    with one_line_errors():
        main()
