"""Support: an evaluation's networks, some trained on first use; not needed to understand the paper."""


import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from clip import CLIP
from generate import paint_ads, prompts_by_category
from model import CategoryGenerator
from programs.batch import paint_items, result_path
from programs.gallery import add_walk_options, painting_of, record_of, settled
from programs.models import (
    TOY,
    ModelChoice,
    Models,
    add_model_options,
    branch_path,
    categories_file,
    check_identifiers,
    identifiers_of,
    load_models,
)
from rivals.baselines import STRENGTH, blended_diffusion, stable_diffusion
from rivals.paint_by_example import GUIDANCE
from rivals.stages import RIVAL_SETTINGS
from sampler import Painting
from support.datasets import Item, read_identifiers, read_items
from support.files import BadInput, read_json
from support.machine import barrier, pick_device, processes
from support.metrics import embed_pictures
from support.options import Parser, real_number, whole_number
from support.tensors import file_fingerprint, fingerprint, model_fingerprint
from toy.world import TOY_DATA
from weights import load_clip, load_control, save_control

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
OPTIONS = ("weights", "cg", "pg", "controlnet", "pg-controlnet", "cg-plain", "clip", "guide-clip", "lama",
           "paint-by-example")  # of evaluate.py
SHIPPED = {"weights": TOY / "base", "clip": TOY / "clip"}  # besides CG and PG, see branch_path


class Networks(NamedTuple):
    """The networks, by the names in OPTIONS (`weights` is the base) and in `trained`."""

    options: dict[str, Path | None]  # None if the option was not given
    trained: dict[str, list[str]]  # train.py's arguments for each toy network that is not shipped
    device: str

    def given(self, name: str) -> Path | None:
        """The path of a network's weights, by its option or as shipped; None if it is the toy's and must be trained.

        Raises BadInput if its option is missing with a base other than the toy's, which needs networks of its own.
        """
        path, base = self.options.get(name), self.options["weights"]
        if name in ("cg", "pg"):
            return branch_path(name, path, base)
        if base and not path:
            raise BadInput(f"--{name} is missing: the toy's does not go with --weights {base}" if name in self.options
                           else "this command works with the toy only: leave out --weights")
        return path or SHIPPED.get(name)

    def path(self, name: str) -> Path:
        """As `given`, but trains the network first if it must be."""
        if path := self.given(name):
            return path
        frozen = [] if name in ("guide-clip", "lama", "segmenter") else [self.given("weights")]
        if name == "pg-controlnet":
            frozen.append(as_plain_cg(self.path("controlnet"), self.given("cg")))
        elif name.startswith("pg-"):
            frozen.append(self.given("cg"))
        return train_once(name, self.trained[name], frozen, self.device)

    def check(self, names: list[str], categories: set[str]) -> None:
        """Raises BadInput if networks are missing or do not belong together, or if CG does not know one of the
        categories: at once, not after hours of painting.
        """
        paths = {name: path for name in names if (path := self.given(name))}
        for path in paths.values():
            model_fingerprint(path)
        if categories:
            identifiers_of(categories, self.given("cg"))
        for name in paths.keys() & {"cg-plain", "pg"}:
            check_identifiers(self.given("cg"), paths[name])
        for name, attention in (("cg", "mask-guided"), ("cg-plain", "plain")):
            if name in paths and (found := attention_of(paths[name])) != attention:
                raise BadInput(f"--{name} {paths[name]} is a CG with {found} attention; give one with {attention}")


def attention_of(cg: Path) -> str:
    """A CG's attention, "mask-guided" or "plain", as its config.json records train.py's --attention."""
    config = (cg.parent if cg.is_file() else cg) / "config.json"
    return read_json(config).get("attention", "mask-guided") if config.is_file() else "mask-guided"


def as_plain_cg(controlnet: Path, cg: Path) -> Path:
    """The toy's ControlNet as a CG with plain attention, which computes the same: `train.py pg` trains beside a CG."""
    out = controlnet.parent / "as-cg"
    if processes()[0] == 0 and not out.exists():
        branch = load_control(controlnet, "controlnet")
        plain = CategoryGenerator(branch.config | {"attention": "plain"})
        plain.load_state_dict(branch.state_dict())
        save_control(plain, out, categories=read_identifiers(categories_file(cg)))
    barrier()
    return out


def train_once(name: str, command: list[str], frozen: list[Path], device: str) -> Path:
    """Trains a network by `train.py *command` on the frozen networks, unless it is there already; returns its folder.

    Under torchrun one process trains and the others wait. An interrupted training is resumed. Raises BadInput if it
    fails.
    """
    key = [command, [model_fingerprint(path) for path in frozen]]
    out = Path("runs", "evaluate", f"{name}-{fingerprint(key)[:8]}")
    if processes()[0] == 0 and not out.exists():
        unfinished = out.with_name(f"{out.name}.unfinished")
        command = [*command, "--out", str(unfinished), "--cache", "runs/cache", "--device", device, "--amp"]
        if command[0] == "pg":
            command += ["--cg", str(frozen[1])]
        print("training, once: python train.py", *command, file=sys.stderr)
        if [*unfinished.glob("training/*/checkpoint_*")]:
            command.append("--resume")
        alone = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        if subprocess.run([sys.executable, TRAIN, *command], env=alone, stdout=2).returncode:  # stdout is the table's
            raise BadInput("the training failed, as it says above; once that is fixed, this command goes on")
        unfinished.rename(out)
    barrier()
    return out / command[0]


class Method(NamedTuple):
    """A row of a table: it paints by generate.paint with these networks, or by a function from rivals/."""

    cg: str | None = None  # what stands in CG's place: cg, cg-plain (CG with plain attention) or controlnet
    pg: str | None = None
    from_reference: bool = True  # z_T starts from the reference, if there is one
    plain_prompt: bool = False  # 'A photo of [category]', without the identifier
    rival: Callable | None = None
    clip: str | None = None  # the CLIP that guides the rival
    guidance: float | None = None  # the rival's own, whatever --guidance says
    own: str | None = None  # the rival's own network, in the base's place: see programs.models.load_rival

    def networks(self) -> list[str]:
        """The names of the networks that it paints with."""
        return [name for name in (self.own or "weights", self.cg, self.pg, self.clip) if name]


FEW_ADS, FEW_SEEDS = (10, 30, 100), 3  # for rivals/eq3.py: ads per category, and trainings with each
ATTENTION = {"cg": "mask-guided", "cg-plain": "plain"}
FEW = {f"{cg}-{count}-{seed}": (cg, count, seed)
       for cg in ATTENTION for count in FEW_ADS for seed in range(FEW_SEEDS)}

# the toy's settings for CG, which train.py takes by itself only with the toy's own ads
FEW_SETTINGS = [word for name, value in (train.TOY_SETTINGS["cg"] | {"steps": 600, "micro_batch": 16}).items()
                for word in (f"--{name.replace('_', '-')}", str(value))]


def few_ads_folder(count: int) -> Path:
    """Where so many ads per category are drawn."""
    return Path("runs", "evaluate", f"ads-{count}", "ads")


METHODS = {
    "lama": Method(plain_prompt=True, own="lama"),
    "paint-by-example": Method(plain_prompt=True, own="paint-by-example", guidance=GUIDANCE),
    "stable-diffusion": Method(plain_prompt=True, rival=stable_diffusion),
    "blended-diffusion": Method(plain_prompt=True, rival=blended_diffusion, clip="guide-clip"),
    "controlnet": Method("controlnet", plain_prompt=True),
    "cg": Method("cg"),
    "cg-plain": Method("cg-plain"),
    "cg+pg": Method("cg", "pg"),
    "cg+pg-noise": Method("cg", "pg", from_reference=False),
    "controlnet+pg": Method("controlnet", "pg"),
    "controlnet+its-pg": Method("controlnet", "pg-controlnet"),
    "cg-plain+pg": Method("cg-plain", "pg"),
    "shuffled": Method(plain_prompt=True),  # paints nothing: the original ads, each beside another product's
    **{f"fig7-{name}": Method("cg", f"pg-{name}") for name in ("none", "dilation", "mixup")},
    **{name: Method(name) for name in FEW},
}
# train.py's arguments for the toy's networks that are not shipped; cg-plain has CG's own settings
TRAINED = {
    "controlnet": ["controlnet", "--steps", "2600", "--data", str(TOY_DATA / "base")],
    **{stage: [stage, "--steps", str(settings["steps"])] for stage, settings in RIVAL_SETTINGS.items()},
    "cg-plain": ["cg", "--attention", "plain", "--steps", str(train.TOY_SETTINGS["cg"]["steps"])],
    "guide-clip": ["clip", "--steps", "800", "--seed", "1"],
    "pg-none": ["pg", "--steps", "600", "--theta", "0", "--sigma", "1", "1"],
    "pg-dilation": ["pg", "--steps", "600", "--sigma", "1", "1"],
    "pg-mixup": ["pg", "--steps", "600"],
    "pg-controlnet": ["pg", "--steps", str(train.TOY_SETTINGS["pg"]["steps"])],
    **{name: ["cg", "--attention", ATTENTION[cg], *FEW_SETTINGS, "--seed", str(seed),
              "--data", str(few_ads_folder(count))] for name, (cg, count, seed) in FEW.items()},
}

PROTOCOLS = {"bg1k": "", "ref": "Ref→Self", "self": "Self→Self"}  # what is painted (see Lab.all_items): its label


@dataclass(frozen=True)
class Lab:
    """What all tables and figures share: the data, the networks, and the pictures, which are kept in `out`."""

    data: Path
    limit: int | None  # at most so many items are painted
    centres: int | None  # at most so many training ads make the centres of Fig. 5a
    networks: Networks
    choice: ModelChoice  # the base and where it runs; the branches are the methods'
    how: Painting
    size: int | None
    strength: float  # of the guidance by CLIP
    seed: int
    batch: int
    record: dict  # how pictures are painted, whatever the method: see support/record.py
    out: Path

    def check(self, methods: list[str], items: list[Item], with_clip: bool = True) -> None:
        """Raises BadInput if these methods lack a network, or CG a category, before anything is painted. with_clip: the
        CLIP that measures is needed, too.
        """
        names = [name for method in methods for name in METHODS[method].networks()] + ["clip"] * with_clip
        with_identifiers = not all(METHODS[method].plain_prompt for method in methods)
        self.networks.check(names, {item.category for item in items if with_identifiers})

    def walking(self, sampler: str, steps: int) -> "Lab":
        """The same lab with another sampler and number of steps."""
        walk = {"sampler": sampler, "steps": steps}
        return replace(self, how=replace(self.how, **walk), record=self.record | walk)

    def items(self, protocol: str) -> list[Item]:
        """The items that are painted and measured: the first --limit."""
        return self.all_items(protocol)[: self.limit]

    def all_items(self, protocol: str) -> list[Item]:
        """bg1k: products; ref: products and the references they are paired with; self: each its own reference."""
        if protocol == "bg1k":
            return [replace(item, reference=None, reference_mask=None) for item in self.products]
        if protocol == "self":
            return [replace(item, reference=item.image, reference_mask=item.mask) for item in self.pairs]
        if items := [item for item in self.pairs if item.reference]:
            return items
        raise BadInput(f"{self.data}: no item has a reference, which this command needs; choose another data set")

    @cached_property
    def products(self) -> list[Item]:
        """BG1k (section 4)."""
        return read_items(self.data, "bg1k")[0]

    @cached_property
    def pairs(self) -> list[Item]:
        """BG-pair (section 4)."""
        return read_items(self.data, "bgpair")[0]

    def pictures(self, name: str, items: list[Item], folder: str, chosen: list[int] | None = None,
                 texts: dict[str, tuple[str, str, str]] | None = None) -> list[Path]:
        """The paths of a method's pictures for these items, or for those `chosen` by index; paints missing ones first.
        `texts` are the categories' texts for P, P_fg and P_bg [those with CG's identifiers].

        The folder's name ends in a fingerprint of all that the pictures depend on. The first --limit items in a split
        share the folder of the whole split.
        """
        method = METHODS[name]
        used = [model_fingerprint(self.networks.path(network)) for network in method.networks()]
        hint = self.how.hint if method.cg == "controlnet" else "product"  # --hint is --controlnet's
        record = self.record | {"method": name, "strength": self.strength if method.clip else None, "hint": hint,
                                "guidance": method.guidance or self.how.guidance, "models": used}
        record |= {"texts": texts} if texts else {}
        split = self.all_items(folder) if folder in PROTOCOLS else items
        files = [[item.category, *map(file_fingerprint, (item.image, item.mask, item.reference, item.reference_mask))]
                 for item in split]
        out = self.out / "pictures" / folder / f"{name}-{fingerprint([record, files])[:8]}"
        chosen = [*range(len(items))] if chosen is None else chosen
        paths = [result_path(out, i, items[i]) for i in chosen]
        missing = not all(path.exists() for path in paths)
        barrier()  # every process has looked before any paints
        if missing:
            print(f"painting {folder}, {name}", file=sys.stderr)
            self.paint(method, items, chosen, out, record, texts)
        barrier()
        return paths

    def paint(self, method: Method, items: list[Item], chosen: list[int], out: Path, record: dict,
              texts: dict[str, tuple[str, str, str]] | None) -> None:
        """Paints the chosen items by a method, with support/batch.py."""
        categories = {item.category for item in items}
        cg = None if method.plain_prompt else self.networks.path("cg")
        models = self.load(method, categories)
        texts = texts or prompts_by_category(identifiers_of(categories, cg), models.tokenizer)
        hint = self.how.hint if method.cg == "controlnet" else "product"  # --hint is --controlnet's
        how = replace(self.how, from_reference=method.from_reference, hint=hint)
        if method.own:  # only the base has a second pass
            how = replace(how, guidance=method.guidance or how.guidance, refine=1)
        painter = partial(paint_ads, models=models, how=how, painter=self.rival(method, models))
        paint_items(items, texts, painter, out, record, models.dtype, self.seed, self.batch, chosen=chosen)

    def load(self, method: Method, categories: set[str]) -> Models:
        """The base and a method's branches, or its own network; LaMa paints in float32, whatever --dtype says."""
        if method.own:
            dtype = "float32" if method.own == "lama" else self.choice.dtype
            path = {method.own.replace("-", "_"): self.networks.path(method.own)}
            return load_models(replace(self.choice, **path, dtype=dtype), self.size, categories)
        if method.cg is None:
            return load_models(self.choice, self.size)
        place = "controlnet" if method.cg == "controlnet" else "cg"
        pg = method.pg and self.networks.path(method.pg)
        choice = replace(self.choice, pg=pg, **{place: self.networks.path(method.cg)})
        return load_models(choice, self.size, categories, with_pg=pg is not None)

    def rival(self, method: Method, models: Models) -> Callable | None:
        """painter(canvas, on_step) -> pictures, as generate.paint; None for our own networks and a rival's own."""
        guide = {"clip": self.load_clip(method.clip), "strength": self.strength} if method.clip else {}
        return method.rival and partial(method.rival, models.sd, how=self.how, **guide)

    def load_clip(self, name: str) -> CLIP:
        """The CLIP that measures ("clip") or guides ("guide-clip")."""
        return load_clip(self.networks.path(name), self.choice.device, torch.float32)

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP that measures."""
        return self.load_clip("clip")

    def embeddings(self, paths: list[Path], items: list[Item] | None = None) -> Tensor:
        """The pictures' embeddings (n, d), see embed_pictures."""
        return embed_pictures(self.clip, paths, items, self.out / "embeddings")

    def background_features(self, paths: list[Path], items: list[Item]) -> tuple[Tensor, list[str]]:
        """Of the pictures that can be read: their backgrounds' embeddings (n, d), of length 1, and their categories."""
        x = F.normalize(self.embeddings(paths, items), dim=1)
        readable = x.isfinite().all(dim=1)
        return x[readable], [item.category for item, r in zip(items, readable.tolist()) if r]

    @cached_property
    def category_centres(self) -> tuple[list[str], Tensor]:
        """Categories, and the normalised means (C, d) of their ads' background features over the training set."""
        training = read_items(self.data)[0][: self.centres]
        x, category_of = self.background_features([item.image for item in training], training)
        categories = sorted(set(category_of))
        means = torch.stack([x[[category == c for category in category_of]].mean(0) for c in categories])
        return categories, F.normalize(means, dim=1)

    def nearest_category(self, paths: list[Path], items: list[Item]) -> list[str | None]:
        """The category whose centre is nearest to each picture's background features; None if there is no picture, or
        if it can't be read.
        """
        categories, centres = self.category_centres
        there = [(path, item) for path, item in zip(paths, items) if path.exists()]
        if not there:
            return [None] * len(paths)
        x = F.normalize(self.embeddings(*map(list, zip(*there))), dim=1)
        closest = torch.cdist(x, centres).argmin(dim=1).tolist()
        nearest = {path: categories[k] for (path, _), k, row in zip(there, closest, x) if row.isfinite().all()}
        return [nearest.get(path) for path in paths]


def add_lab_options(parser: Parser) -> Callable:
    """Adds them. Returns the add_argument of the group for the program's own options."""
    own = parser.add_argument_group("what is painted, and where it goes")
    own.add_argument("--data", metavar="DIR", type=Path, default=TOY_DATA / "ads",
                     help="BG60k as released, or metadata.jsonl [the toy's ads]")
    add = parser.add_argument_group("how the methods paint").add_argument
    add_walk_options(add, "1, the paper's")
    add("--seed", metavar="N", type=whole_number(0, 2**32 - 1), default=0, help="item i is painted with SEED + i [0]")
    add("--strength", metavar="X", type=real_number(0, 1e6), default=STRENGTH,
        help=f"strength of Blended Diffusion's CLIP guidance [{STRENGTH:g}, chosen on the toy]")
    add = parser.add_argument_group("models [the toy's; those not shipped are trained on first use]").add_argument
    add_model_options(add)
    add("--pg-controlnet", metavar="PATH", type=Path, help="PG trained beside --controlnet, for Table 4's (a)")
    add("--cg-plain", metavar="PATH", type=Path, help="CG with plain attention, from train.py cg --attention plain")
    add("--clip", metavar="DIR", type=Path, help="CLIP that measures, such as openai/clip-vit-base-patch32")
    add("--guide-clip", metavar="DIR", type=Path, help="CLIP that guides Blended Diffusion: not the one that measures")
    add("--batch", metavar="N", type=whole_number(1, 1024), default=16, help="pictures painted at once [16]")
    return own.add_argument


def lab_of(args: argparse.Namespace, out: Path, limit: int | None = None, centres: int | None = None) -> Lab:
    """The lab that these options describe; it keeps its pictures in `out`. Raises BadInput for options that clash."""
    if args.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    device = pick_device(args.device)
    networks = Networks({name: vars(args)[name.replace("-", "_")] for name in OPTIONS}, TRAINED, device)
    how = painting_of(args, refine=1)
    # without the options that name networks: Lab.pictures records the fingerprints of those that a method uses
    record = record_of(args, seed=args.seed, **settled(how))
    record = {name: value for name, value in record.items() if name.replace("_", "-") not in OPTIONS}
    return Lab(data=args.data.absolute(), limit=limit, centres=centres, networks=networks,
               choice=ModelChoice(args.weights, args.tokenizer, device=device, dtype=args.dtype),
               how=how, size=args.size, strength=args.strength, seed=args.seed, batch=args.batch, record=record,
               out=out)
