"""Rivals: the methods that section 5 compares, and the pictures that they paint for a data set.

To add a method, add an entry to METHODS. For a rival that is made of Stable Diffusion's parts, also write a function
like those in rivals/baselines.py; for one with networks of its own, a class like LaMa and PaintByExample, which
support.models.load_rival loads.
"""

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
from rivals.baselines import blended_diffusion, stable_diffusion
from rivals.paint_by_example import GUIDANCE
from rivals.stages import RIVAL_SETTINGS
from sampler import Painting
from support.batch import paint_items, result_path
from support.cache import file_fingerprint, fingerprint
from support.datasets import Item, read_items
from support.files import BadInput
from support.machine import barrier
from support.metrics import embed_pictures
from support.models import ModelChoice, Models, identifiers_of, load_models
from support.networks import Networks
from support.tensors import model_fingerprint
from toy.world import TOY_DATA
from weights import load_clip


class Method(NamedTuple):
    """A row of a table: it paints by generate.paint with these networks, or by a function from rivals/."""

    cg: str | None = None  # what stands in CG's place: cg, cg-plain (CG with plain attention) or controlnet
    pg: str | None = None
    from_reference: bool = True  # z_T starts from the reference, if there is one
    plain_prompt: bool = False  # 'A photo of [category]', without the identifier
    rival: Callable | None = None
    clip: str | None = None  # the CLIP that guides the rival
    guidance: float | None = None  # the rival's own, whatever --guidance says
    own: str | None = None  # the rival's own network, in the base's place: see support.models.load_rival

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
