"""Section 5, measured: CLIP similarity and Fréchet distance, Tables 1, 2 and 4, and the figures that show why.

    python evaluate.py table1             # without a reference: Stable Diffusion, ControlNet, CG
    python evaluate.py table2             # after a reference: and Blended Diffusion, CG + PG
    python evaluate.py table4             # the ablation
    python evaluate.py tsne               # Fig. 5a: do a category's backgrounds gather around its centre?
    python evaluate.py fig6               # the methods of Table 2 side by side; fig7: PG's perturbations;
                                          # fig9: a product after many references; fig10: many after one
    python evaluate.py table1 --data BG60K --weights SD15 --cg CG --controlnet FILE --hint inpaint --clip VIT-B-32

Read from the top: the two metrics and their intervals, the methods, what is painted and measured, tables, figures.
Without options all is the toy's, and what the comparison needs beside the shipped weights is trained on first use.
Pictures and embeddings stay in --out, so that an interrupted evaluation goes on, and the tables share them.
"""

import argparse
import io
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

import train
from clip import CLIP
from data import background_hint
from generate import TOY, branch_path, check_identifiers, load_base, load_branch, paint, paint_ads, save, texts_of
from model import ControlNet
from rivals.baselines import STRENGTH, blended_diffusion, stable_diffusion
from sampler import GUIDANCE, STEPS
from support.batch import paint_items, result_path
from support.cache import cached, digest, hashed, stamp
from support.datasets import MASK_OF_ITEM, Item, read_items
from support.figures import cutout_of, drawn, picture_of, scatter, tsne
from support.files import (
    BadInput,
    Parser,
    barrier,
    check_folder,
    native_bfloat16,
    one_line_errors,
    pick_device,
    pick_dtype,
    processes,
    real,
    whole,
    write_atomic,
    write_json,
)
from support.images import load_masked, open_image, sheet, to_tensor
from support.metrics import RESAMPLES, frechet, interval, joint_frechet, similarity
from support.tensors import fingerprint
from weights import StableDiffusion, load_clip

SINGLE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}  # not torchrun's

# ---------------------------------------------------------------- the metrics (section 5.2, after Yang et al.)


# ---------------------------------------------------------------- the methods


class Method(NamedTuple):
    """How a row of a table paints."""

    cg: str | None = None  # in CG's place: cg, controlnet (a general one), or tuned (a ControlNet trained on the ads)
    pg: str | None = None
    from_reference: bool = True  # z_T, where there is a reference
    plain: bool = False  # the prompt 'A photo of [category]', without identifier
    baseline: str | None = None  # of baselines.py

    def models(self) -> list[str]:
        """What it needs beside the base."""
        return [name for name in (self.cg, self.pg) if name] + ["guide-clip"] * (self.baseline == "blended_diffusion")


METHODS = {
    "stable-diffusion": Method(plain=True, baseline="stable_diffusion"),
    "blended-diffusion": Method(plain=True, baseline="blended_diffusion"),
    "controlnet": Method("controlnet", plain=True),
    "tuned": Method("tuned"),
    "cg": Method("cg"),
    "cg+pg": Method("cg", "pg"),
    "cg+pg-noise": Method("cg", "pg", from_reference=False),
    "controlnet+pg": Method("controlnet", "pg"),
    "tuned+pg": Method("tuned", "pg"),
    "shuffled": Method(plain=True),  # paints nothing: the originals, dealt out anew
    **{f"fig7-{name}": Method("cg", f"pg-{name}") for name in ("none", "dilation", "mixup")},
}
CG = train.TOY_SETTINGS["cg"]
# What they need beside the shipped weights, trained on first use: stage, steps, options of train.py
TRAINED = {
    "controlnet": ("controlnet", 2600, ["--data", str(train.TOY_DATA / "base")]),
    "tuned": ("controlnet", CG["steps"], ["--data", str(train.TOY_DATA / "ads"),  # as CG
                                          "--prompt-dropout", str(CG["prompt_dropout"])]),
    "guide-clip": ("clip", 800, ["--seed", "1"]),
    "pg-none": ("pg", 600, ["--theta", "0", "--sigma", "1", "1"]),
    "pg-dilation": ("pg", 600, ["--sigma", "1", "1"]),
    "pg-mixup": ("pg", 600, []),
}
# Protocols, metrics, our method, and the rows: label, method and the paper's figures (it has no joint distance)
TABLES = {
    "table1": (["bg1k"], ["similarity", "frechet", "joint"], "cg", [
        ("LaMa", None, [88.33, 8.24]),
        ("Stable Diffusion", "stable-diffusion", [76.47, 7.54]),
        ("ControlNet", "controlnet", [84.80, 5.79]),
        ("CG", "cg", [89.58, 3.94]),
        ("ControlNet trained on the ads", "tuned", []),
        ("originals of other products", "shuffled", []),
    ]),
    "table2": (["ref", "self"], ["similarity", "frechet"], "cg+pg", [
        ("Blended Diffusion", "blended-diffusion", [63.51, 3.62, 89.02, 2.73]),
        ("Paint by Example", None, [62.82, 5.96, 81.00, 5.99]),
        ("Stable Diffusion", "stable-diffusion", [57.10, 7.92, 76.10, 7.29]),
        ("ControlNet", "controlnet", [62.78, 3.92, 87.21, 3.27]),
        ("CG + PG", "cg+pg", [68.26, 2.39, 93.63, 1.39]),
    ]),
    "table4": (["ref"], ["similarity", "frechet"], "cg+pg", [
        ("(a) ControlNet in CG's place", "controlnet+pg", [66.17, 4.01]),
        ("(b) no PG, z_T from the reference", "cg", [67.50, 2.76]),
        ("(c) CG + PG, z_T pure noise", "cg+pg-noise", [66.51, 2.73]),
        ("(d) CG + PG, z_T from the reference", "cg+pg", [68.26, 2.39]),
        ("ControlNet trained on the ads in CG's place", "tuned+pg", []),
    ]),
}  # fmt: skip
PROTOCOLS = {"bg1k": "", "ref": "Ref→Self", "self": "Self→Self"}
METRICS = {"similarity": "similarity ↑", "frechet": "Fréchet ↓", "joint": "joint Fréchet ↓"}


class Lab:
    """The models, each loaded (the toy's: trained) when first asked for, and what they paint, kept in args.out."""

    def __init__(self, args):
        self.args, self.size = args, args.size  # as it was given: load_base settles args.size
        self.branch, self.clip, self.all_items = map(cache, (self.branch, self.clip, self.all_items))

    @cached_property
    def sd(self) -> StableDiffusion:
        return load_base(self.args)

    def given(self, name: str) -> Path | None:
        """Of a model's weights: the option's, or what is shipped. None: the toy's, to be trained on first use. Raises
        BadInput where an option is missing.
        """
        args = self.args
        if name in ("cg", "pg"):
            return branch_path(name, args)
        if path := getattr(args, name.replace("-", "_"), None):
            return path
        if args.weights:
            raise BadInput(f"--{name} is missing: the toy's does not go with --weights {args.weights}"
                           if hasattr(args, name.replace("-", "_")) else "fig7 is the toy's: leave out --weights")
        return TOY / "clip" if name == "clip" else None

    def check(self, methods: list[str], items: list[Item]) -> None:
        """Raises BadInput for what painting by these methods and measuring would miss: at once, not after hours."""
        names = [name for method in methods for name in METHODS[method].models()]
        for path in (self.args.weights or TOY / "base", *map(self.given, [*names, "clip"])):
            if path:
                fingerprint(path)
        if not all(METHODS[method].plain for method in methods):
            texts_of({item.category for item in items}, self.given("cg"), None)
            for path in filter(None, map(self.given, {*names} - {"controlnet", "guide-clip"})):
                check_identifiers(self.given("cg"), path)

    def path(self, name: str) -> Path:
        """Of a model's weights, which are trained first where they are the toy's and not shipped."""
        args = self.args
        if path := self.given(name):
            return path
        stage, steps, options = TRAINED[name]
        frozen = {"clip": [], "controlnet": [TOY / "base"], "pg": [TOY / "base", self.path("cg")]}[stage]
        out = Path("runs", "evaluate", f"{name}-{hashed([steps, options, list(map(fingerprint, frozen))])[:8]}")
        rank, world = processes()
        alone = stage == "clip" and world > 1  # tells a whole batch's pictures apart: the first process trains it
        if alone and rank:
            dist.barrier()
        found = sorted((out / "training" / stage).glob("checkpoint_*"))
        if not found or found[-1].name != f"checkpoint_{steps:08}.safetensors":
            command = [stage, "--steps", str(steps), *options, "--out", str(out), "--cache", "runs/cache"]
            command += ["--device", self.args.device]
            command += ["--amp"] * native_bfloat16()
            if stage == "pg":
                command += ["--cg", str(self.path("cg"))]
            print("training, once: python train.py", *command, file=sys.stderr)
            command += ["--resume"] * bool(found)
            if not alone:
                train.main(command)
            elif subprocess.run([sys.executable, train.__file__, *command], env=SINGLE).returncode:
                raise BadInput("the training failed, as it says above; once that is mended, this command goes on")
        if alone and not rank:
            dist.barrier()
        return out / stage

    def branch(self, name: str) -> ControlNet:
        kind = {"cg": "category", "controlnet": "controlnet", "tuned": "controlnet"}.get(name, "personality")
        return load_branch(kind, self.path(name), self.sd, self.args)

    def clip(self, name: str = "clip") -> CLIP:
        return load_clip(self.path(name), self.args.device, torch.float32)

    def items(self, protocol: str) -> list[Item]:
        """What is painted and measured: the first --limit."""
        return self.all_items(protocol)[: self.args.limit]

    def all_items(self, protocol: str) -> list[Item]:
        """bg1k: products; ref: products and the references they are paired with; self: each its own reference."""
        args = self.args
        items = read_items(args.data, "bg1k" if protocol == "bg1k" else "bgpair")[0]
        if protocol == "bg1k":
            return [replace(item, reference=None, reference_mask=None) for item in items]
        if protocol == "self":
            return [replace(item, reference=item.image, reference_mask=item.mask) for item in items]
        if items := [item for item in items if item.reference]:
            return items
        raise BadInput(f"{args.data}: no item has a reference, which this table needs")

    def painter(self, name: str) -> Callable:
        """A method as generate.paint_items calls it."""
        method, args, sd = METHODS[name], self.args, self.sd
        how = dict(steps=args.steps, guidance=args.guidance)
        if method.baseline:
            function = {"stable_diffusion": stable_diffusion, "blended_diffusion": blended_diffusion}[method.baseline]
            if function is blended_diffusion:
                how |= dict(clip=self.clip("guide-clip"), strength=args.strength)
        else:
            function = paint
            how |= dict(cg=self.branch(method.cg), pg=method.pg and self.branch(method.pg),
                        from_reference=method.from_reference,
                        hint_background=-1.0 if method.cg == "controlnet" and args.hint == "inpaint" else 0.0)
        return lambda *batch, on_step: function(sd, *batch[:4], reference=batch[4], reference_mask=batch[5],
                                                on_step=on_step, **how)

    def pictures(self, name: str, items: list[Item], folder: str) -> list[Path]:
        """Where a method's pictures of these items lie; those that are missing are painted first.

        The folder's name ends in a hash of what the pictures depend on, so that none of other settings is taken.
        """
        method, args = METHODS[name], self.args
        models = [args.weights or TOY / "base", *map(self.path, method.models())]
        key = [method, args.steps, args.guidance, args.seed, self.size, args.hint, str(args.dtype), str(args.tokenizer)]
        if method.baseline == "blended_diffusion":
            key += [args.strength]
        for item in self.all_items(folder) if folder in PROTOCOLS else items:  # whatever --limit is
            key += [item.category, *map(stamp, (item.image, item.mask, item.reference, item.reference_mask))]
        out = args.out / "pictures" / folder / f"{name}-{hashed([key, list(map(fingerprint, models))])[:8]}"
        paths = [result_path(out, i, item) for i, item in enumerate(items)]
        missing = not all(path.exists() for path in paths)
        barrier()  # every process has looked before any paints
        if missing:
            print(f"painting {folder}, {name}", file=sys.stderr)
            texts = texts_of({item.category for item in items}, None if method.plain else self.path("cg"), None)
            painter, multiple = self.painter(name), self.sd.multiple  # loaded: args.size is settled
            # what the models are is in the folder's name; among the settings other methods' options would not match
            settings = vars(args) | {"out": out, "weights": None, "cg": None, "pg": None, "controlnet": None}
            how = argparse.Namespace(**settings)
            paint_items(items, texts, partial(paint_ads, painter=painter, multiple=multiple, args=how), how)
        barrier()
        return paths

    def embeddings(self, paths: list[Path], items: list[Item] | None = None) -> Tensor:
        """CLIP embeddings of pictures, not normalised; with their items those of the backgrounds alone, I ⊗ (1 − M).
        (n, d), computed once; not a number where a picture can't be read, which is named.
        """
        clip = self.clip()
        def embed(path: Path, item: Item | None) -> Tensor:
            try:
                picture = to_tensor(open_image(path).convert("RGB"))
                if item:
                    mask = load_masked(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)[1]
                    picture = background_hint(picture, mask)
            except BadInput as error:
                print(f"skipped: {error}", file=sys.stderr)
                picture = torch.full((3, 8, 8), math.nan)
            return clip.preprocess(picture[None].to(self.args.device))

        @torch.no_grad()
        def compute() -> dict[str, Tensor]:
            pairs, rows = list(zip(paths, items or [None] * len(paths))), []
            for k in tqdm(range(0, len(pairs), 64), "embedding", unit="batch", disable=not sys.stderr.isatty()):
                rows.append(clip.encode_image(torch.cat([embed(*pair) for pair in pairs[k : k + 64]])).cpu())
            return {"embeddings": torch.cat(rows)}

        masks = [[stamp(item.image), stamp(item.mask), item.inverted] for item in items or ()]
        key = [digest(clip), [stamp(path) for path in paths], masks]
        return cached(self.args.out / "embeddings", key, compute)["embeddings"]


# ---------------------------------------------------------------- tables


class Measured(NamedTuple):
    """A method's pictures of the items `kept`, as embeddings."""

    kept: list[int]
    similarities: Tensor  # (n,): to the originals (bg1k) or to the references
    painted: Tensor  # (n, d)
    originals: Tensor  # (n, d)
    categories: Tensor  # (n, C), one-hot

    def similarity(self, i: Tensor) -> Tensor:
        return self.similarities[i].mean()

    def frechet(self, i: Tensor) -> Tensor:
        return frechet(self.painted[i], self.originals[i])

    def joint(self, i: Tensor) -> Tensor:
        return joint_frechet(self.painted[i], self.originals[i], self.categories[i])

    def only(self, kept: list[int]) -> "Measured":
        rows = [self.kept.index(item) for item in kept]
        return Measured(kept, *(x[rows] for x in self[1:]))


def measure(lab: Lab, name: str, protocol: str) -> Measured:
    """Paints and embeds. Items that can't be painted or read are left out."""
    items = lab.items(protocol)
    if name == "shuffled":
        order = torch.randperm(len(items), generator=Generator().manual_seed(0))
        paths = [items[i].image for i in order.roll(1)[order.argsort()].tolist()]  # along one round, so none its own
    else:
        paths = lab.pictures(name, items, protocol)
    kept = [i for i, path in enumerate(paths) if path.exists()]
    if len(kept) < 2:
        raise BadInput(f"{lab.args.data}: {len(kept)} pictures are too few to measure; raise --limit")
    painted = lab.embeddings([paths[i] for i in kept])
    originals = lab.embeddings([items[i].image for i in kept])
    wanted = originals if protocol == "bg1k" else lab.embeddings([items[i].reference for i in kept])
    names = sorted({item.category for item in items})
    categories = F.one_hot(torch.tensor([names.index(items[i].category) for i in kept]), len(names))
    read = (painted + originals + wanted).isfinite().all(dim=1).tolist()  # of the rest a file can't be read
    everything = Measured(kept, similarity(painted, wanted), painted, originals, categories)
    return everything.only([i for i, r in zip(kept, read) if r])


def figures_of(measured: Measured, ours: Measured, metrics: list[str]) -> dict:
    """The figures with their intervals, and how far ours is ahead, of the same items: much of what makes a figure vary,
    the items, is the same for both.
    """
    both = sorted({*measured.kept} & {*ours.kept})
    a, b, n = ours.only(both), measured.only(both), len(measured.kept)
    ahead = {"similarity": lambda i: a.similarity(i) - b.similarity(i),
             "frechet": lambda i: b.frechet(i) - a.frechet(i), "joint": lambda i: b.joint(i) - a.joint(i)}
    return {"n": n, **{metric: interval(getattr(measured, metric), n) for metric in metrics},
            "ours_ahead": {metric: interval(ahead[metric], len(both)) for metric in metrics}}


def table(lab: Lab, name: str) -> None:
    """Prints a table as Markdown, the paper's figures beside ours, and writes it to NAME.md and NAME.json."""
    protocols, metrics, our_method, rows = TABLES[name]
    if lab.args.weights and not lab.args.tuned:
        rows = [row for row in rows if not (row[1] or "").startswith("tuned")]  # the paper does not have it
    lab.check([method for _, method, _ in rows if method], [item for p in protocols for item in lab.items(p)])
    measured = {(method, p): measure(lab, method, p) for _, method, _ in rows if method for p in protocols}
    columns = [(p, metric) for p in protocols for metric in metrics]
    heads = ["method"]
    for p, metric in columns:
        heads += [f"{PROTOCOLS[p]} {METRICS[metric]}".strip()] + ["paper"] * (metric != "joint")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    results, ahead = [], {p: [] for p in protocols}
    for label, method, paper in rows:
        figures = {p: method and figures_of(measured[method, p], measured[our_method, p], metrics) for p in protocols}
        cells, of_paper = [label], iter(paper)
        for p, metric in columns:
            cells.append("{:.2f} ± {:.2f}".format(*figures[p][metric]) if method else "not yet")
            if metric != "joint":
                cells.append("{:.2f}".format(next(of_paper)) if paper else "")
        lines.append("| " + " | ".join(cells) + " |")
        for k, p in enumerate(protocols):
            results.append({"method": label, "protocol": p, "measured": figures[p], "paper": paper[2 * k :][:2]})
            if method not in (None, our_method):
                by = ("{:.2f} ± {:.2f}".format(*one) for one in figures[p]["ours_ahead"].values())
                ahead[p].append(f"{label}: " + ", ".join(by))
    ours = next(label for label, method, _ in rows if method == our_method)
    for p in protocols:
        named = ", ".join(METRICS[metric][:-2] for metric in metrics)
        head = f"{PROTOCOLS[p]} {ours} ahead, on the same items, by {named}: ".lstrip()
        lines += ["", head + "; ".join(ahead[p]) + "."]
    n = sorted({len(m.kept) for m in measured.values()})
    args = lab.args
    lines += ["", f"{' or '.join(map(str, n))} pictures a figure; ± is half of the 95% interval ({RESAMPLES} bootstrap "
              "samples)." + " The paper's figures are of BG60k and another CLIP: compare orders only." * (not args.weights)]
    settings = {"data": str(args.data), "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    write_json(settings | {"rows": results}, args.out / f"{name}.json")
    write_atomic(args.out / f"{name}.md", lambda new: new.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    print("\n".join(lines))


# ---------------------------------------------------------------- figures


def figure_tsne(lab: Lab) -> None:
    """Fig. 5a: background features of CG's pictures and of ControlNet's around their categories' centres, which are the
    means of the training set's. Also prints, of normalised features, the mean distance to the centre of the own
    category, and for how many that centre is the nearest; of the original backgrounds too. The figure shows the
    20 commonest categories, the numbers are of all.
    """
    def features(paths: list[Path], items: list[Item]) -> tuple[Tensor, list[str]]:
        """Of the pictures that can be read, and their categories."""
        x = F.normalize(lab.embeddings(paths, items), dim=1)
        read = x.isfinite().all(dim=1)
        return x[read], [item.category for item, r in zip(items, read.tolist()) if r]

    items = lab.items("bg1k")
    lab.check(["cg", "controlnet"], items)
    training = read_items(lab.args.data)[0][: lab.args.centres]
    x, of = features([item.image for item in training], training)
    categories = sorted(set(of))
    means = torch.stack([x[[category == c for category in of]].mean(0) for c in categories])
    centres = F.normalize(means, dim=1)  # among the features, which have length 1
    points, kinds = [centres], [("centre", c) for c in categories]
    for label, method in (("original", None), ("CG", "cg"), ("ControlNet", "controlnet")):
        paths = lab.pictures(method, items, "bg1k") if method else [item.image for item in items]
        kept = [(path, item) for path, item in zip(paths, items) if path.exists() and item.category in categories]
        if not kept:
            raise BadInput(f"{lab.args.data}: no picture of a category that has a centre; raise --centres or --limit")
        x, of = features(*map(list, zip(*kept)))
        own = torch.tensor([categories.index(category) for category in of])
        away = torch.cdist(x, centres)  # (n, C)
        print("{}: distance to the own category's centre {:.3f} ± {:.3f}, nearest to it {} of {}".format(
            label, *interval(lambda i: away[i, own[i]].mean(), len(x)), int((away.argmin(1) == own).sum()), len(x)))
        if method:
            points.append(x)
            kinds += [(label, category) for category in of]
    # the commonest categories, as many as the legend has room for
    counts = Counter(item.category for item in items if item.category in categories)
    largest = sorted(category for category, _ in counts.most_common(20))
    rows = [i for i, (_, category) in enumerate(kinds) if category in largest]
    save(scatter(tsne(torch.cat(points)[rows]), [kinds[i] for i in rows], largest), lab.args.out / "tsne.png")


def figure_methods(lab: Lab, name: str, columns: dict[str, str], rows: int = 8) -> None:
    """A row for each of some pairs: product, reference, and what each method, by column label, makes of them."""
    items = drawn(lab.items("ref"), rows)
    lab.check([*columns.values()], items)
    painted = [lab.pictures(method, items, name) for method in columns.values()]
    cells = [[cutout_of(item), picture_of(item.reference), *(picture_of(paths[i]) for paths in painted)]
             for i, item in enumerate(items)]
    save(sheet(cells, ["product", "reference", *columns]), lab.args.out / f"{name}.png")


def figure_grid(lab: Lab, name: str, count: int = 8, groups: int = 4) -> None:
    """fig9: products, each after many references of its category; fig10: references, each for many products."""
    items, cells = lab.items("ref"), []
    by_category = {c: [i for i in items if i.category == c][:count] for c in sorted({i.category for i in items})}
    chosen = [some for some in by_category.values() if len(some) > 1][:groups]
    if not chosen:
        raise BadInput(f"{lab.args.data}: no category has two pairs of a product and a reference; raise --limit")
    wanted = [replace(some[0], reference=item.reference, reference_mask=item.reference_mask) if name == "fig9" else
              replace(item, reference=some[0].reference, reference_mask=some[0].reference_mask)
              for some in chosen for item in some]
    lab.check(["cg+pg"], wanted)
    paths = iter(lab.pictures("cg+pg", wanted, name))
    for some in chosen:
        given = [picture_of(item.reference) if name == "fig9" else cutout_of(item) for item in some]
        one = cutout_of(some[0]) if name == "fig9" else picture_of(some[0].reference)
        cells += [[None, *given], [one, *(picture_of(next(paths)) for _ in some)]]
    save(sheet(cells), lab.args.out / f"{name}.png")


TABLE2_COLUMNS = {"Blended Diffusion": "blended-diffusion", "Stable Diffusion": "stable-diffusion",
                  "ControlNet": "controlnet", "CG + PG": "cg+pg"}
FIG7_COLUMNS = {"no perturbation": "fig7-none", "dilation": "fig7-dilation", "dilation + mixup": "fig7-mixup"}
COMMANDS = {**{name: partial(table, name=name) for name in TABLES}, "tsne": figure_tsne,
            "fig6": partial(figure_methods, name="fig6", columns=TABLE2_COLUMNS),
            "fig7": partial(figure_methods, name="fig7", columns=FIG7_COLUMNS),
            "fig9": partial(figure_grid, name="fig9"), "fig10": partial(figure_grid, name="fig10")}

# ---------------------------------------------------------------- the command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120))
    parser.add_argument("what", help=", ".join(COMMANDS))
    add = parser.add_argument_group("on what").add_argument
    add("--data", metavar="DIR", type=Path, default=train.TOY_DATA / "ads",
        help="BG60k as released, or metadata.jsonl [the toy's ads]")
    add("--limit", metavar="N", type=whole(2, 10**9), help="only the first N items of the split [all]")
    add("--centres", metavar="N", type=whole(1, 10**9), default=10**9,
        help="tsne: centres from the first N training ads [all]")
    add = parser.add_argument_group("how the methods paint").add_argument
    add("--steps", metavar="N", type=whole(1, 500), default=STEPS, help=f"steps of DDIM [{STEPS}, the paper's]")
    add("--guidance", metavar="X", type=real(1, 30), default=GUIDANCE,
        help=f"weight of the prompt [{GUIDANCE}, the paper's]")
    add("--size", metavar="N", type=whole(8, 4096), help="longer side of the painted canvas [the base's]")
    add("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="item i is painted with SEED + i [0]")
    add("--strength", metavar="X", type=real(0, 1e6), default=STRENGTH,
        help=f"of Blended Diffusion's CLIP guidance [{STRENGTH:g}, chosen on the toy]")
    add = parser.add_argument_group("models [the toy's; what else they need is trained on first use]").add_argument
    add("--weights", metavar="PATH", type=Path, help="Stable Diffusion, a folder or a single file")
    add("--tokenizer", metavar="DIR", type=Path, help="its vocab.json and merges.txt [in --weights; beside a file]")
    add("--cg", metavar="PATH", type=Path, help="CG")
    add("--pg", metavar="PATH", type=Path, help="PG")
    add("--controlnet", metavar="PATH", type=Path, help="a general ControlNet, such as ControlNet 1.1 inpaint")
    add("--hint", choices=["product", "inpaint"], default="product",
        help="what --controlnet sees around the product: black, or -1 as ControlNet 1.1 inpaint was trained [product]")
    add("--tuned", metavar="PATH", type=Path, help="a ControlNet trained on the same ads, by train.py controlnet")
    add("--clip", metavar="DIR", type=Path, help="CLIP that measures, such as openai/clip-vit-base-patch32")
    add("--guide-clip", metavar="DIR", type=Path, help="CLIP that guides Blended Diffusion: another one")
    add = parser.add_argument_group("machine and records").add_argument
    add("--batch", metavar="N", type=whole(1, 1024), default=16, help="pictures painted at once [16]")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--dtype", metavar="NAME", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="of painting: float32, float16, bfloat16 [auto: as generate.py]")
    add("--out", metavar="DIR", type=Path, default=Path("results"), help="where all of it goes [results]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.what not in COMMANDS:
        raise BadInput(f"{args.what}: must be one of {', '.join(COMMANDS)}")
    check_folder(args.out)
    args.data = args.data.absolute()
    if args.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    rank, world = processes()
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # processes wait for one another while all paint
    train.toy_data(args.data)
    with redirect_stdout(io.StringIO()) if rank else nullcontext():  # the first process speaks for all
        COMMANDS[args.what](Lab(args))


if __name__ == "__main__":
    with one_line_errors():
        main()
