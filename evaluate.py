"""Beside the method: the evaluation (section 5) by CLIP similarity and Fréchet distance, its tables and its figures.

    python evaluate.py table1             # without a reference: Stable Diffusion, ControlNet, CG
    python evaluate.py table2             # in the style of a reference: also Blended Diffusion and CG + PG
    python evaluate.py table4             # the ablation
    python evaluate.py tsne               # Fig. 5a: do a category's backgrounds gather around its centre?
    python evaluate.py fig6               # the methods of Table 2 side by side; fig7: PG's perturbations;
                                          # fig9: a product in many styles; fig10: many products in one
    python evaluate.py swapped            # ours: does Eq. 3 matter where it should? By another category's identifier
    python evaluate.py table1 --data BG60K --weights SD15 --cg CG --controlnet FILE --hint inpaint --clip VIT-B-32

Reading order: the tables as data; the measurements; the figures. rivals/lab.py holds the methods, and the lab that
paints and embeds. By default everything is the toy's, and networks that are not shipped are trained on first use.
Pictures and embeddings stay in --out: the tables share them, and an interrupted evaluation continues where it stopped.
"""

import io
from collections import Counter, defaultdict
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor

from rivals.eq3 import swapped
from rivals.lab import METHODS, PROTOCOLS, Lab, add_lab_options, choose, cutout_of, lab_of, save
from rivals.metrics import RESAMPLES, frechet, interval, joint_frechet, markdown_table, plus_minus, similarity
from rivals.tsne import scatter, tsne
from support.datasets import Item
from support.files import BadInput, locked, one_line_errors, write_json, write_text
from support.images import load_masked, sheet
from support.machine import processes
from support.options import Parser, whole_number
from support.plots import picture_of
from toy.world import draw_on_first_use

# ---------------------------------------------------------------- the tables as data


class Row(NamedTuple):
    label: str
    method: str  # a key of METHODS
    paper: tuple[float, ...] = ()  # the paper's similarity and Fréchet distance, for each protocol


class Table(NamedTuple):
    protocols: list[str]  # keys of PROTOCOLS
    metrics: list[str]  # keys of METRICS
    ours: str  # the method that is compared with every other
    rows: list[Row]


TABLES = {
    "table1": Table(["bg1k"], ["similarity", "frechet", "joint"], "cg", [
        Row("LaMa", "lama", (88.33, 8.24)),
        Row("Stable Diffusion", "stable-diffusion", (76.47, 7.54)),
        Row("ControlNet", "controlnet", (84.80, 5.79)),
        Row("CG", "cg", (89.58, 3.94)),
        Row("CG with plain attention", "cg-plain"),
        Row("originals of other products, the same set: Fréchet 0 by construction", "shuffled"),
        Row("other ads of the same categories: the floor", "others"),
    ]),
    "table2": Table(["ref", "self"], ["similarity", "frechet"], "cg+pg", [
        Row("Blended Diffusion", "blended-diffusion", (63.51, 3.62, 89.02, 2.73)),
        Row("Paint by Example", "paint-by-example", (62.82, 5.96, 81.00, 5.99)),
        Row("Stable Diffusion", "stable-diffusion", (57.10, 7.92, 76.10, 7.29)),
        Row("ControlNet", "controlnet", (62.78, 3.92, 87.21, 3.27)),
        Row("CG + PG", "cg+pg", (68.26, 2.39, 93.63, 1.39)),
        Row("the references themselves", "references"),
    ]),
    "table4": Table(["ref"], ["similarity", "frechet"], "cg+pg", [
        Row("(a) ControlNet in CG's place, PG trained beside CG", "controlnet+pg", (66.17, 4.01)),
        Row("(a) ControlNet in CG's place, PG trained beside it", "controlnet+its-pg"),
        Row("(b) no PG, z_T from the reference", "cg", (67.50, 2.76)),
        Row("(c) CG + PG, z_T pure noise", "cg+pg-noise", (66.51, 2.73)),
        Row("(d) CG + PG, z_T from the reference", "cg+pg", (68.26, 2.39)),
        Row("CG with plain attention in CG's place, PG trained beside CG", "cg-plain+pg"),
    ]),
}  # fmt: skip
METRICS = {"similarity": "similarity ↑", "frechet": "Fréchet ↓", "joint": "joint Fréchet ↓"}

# ---------------------------------------------------------------- tables


class Measured(NamedTuple):
    """A method's pictures of n items, as embeddings. A metric takes the rows (m,) to use -> ()."""

    readable: Tensor  # (n,): whether there is all to measure an item by; else its rows hold NaN
    painted: Tensor  # (n, d)
    originals: Tensor  # (n, d)
    targets: Tensor  # (n, d): the originals (Table 1) or the references
    categories: Tensor  # (n, C), one-hot

    def similarity(self, rows: Tensor) -> Tensor:
        return similarity(self.painted[rows], self.targets[rows]).mean()

    def frechet(self, rows: Tensor) -> Tensor:
        return frechet(self.painted[rows], self.originals[rows])

    def joint(self, rows: Tensor) -> Tensor:
        return joint_frechet(self.painted[rows], self.originals[rows], self.categories[rows])


def compare(theirs: Measured, ours: Measured, metrics: list[str]) -> dict:
    """A method's metrics with their intervals, and how far ours is ahead.

    That is the paired difference between the two methods. It varies less than either, because both are measured on the
    same items.
    """
    rows, both = theirs.readable.argwhere()[:, 0], (theirs.readable & ours.readable).argwhere()[:, 0]
    figures, ahead = {"n": len(rows)}, {}
    for metric in metrics:
        a, b = getattr(ours, metric), getattr(theirs, metric)
        figures[metric] = interval(lambda i, b=b: b(rows[i]), len(rows))
        if metric != "similarity":  # a smaller distance is better
            a, b = b, a
        ahead[metric] = interval(lambda i, a=a, b=b: a(both[i]) - b(both[i]), len(both))
    return figures | {"ours_ahead": ahead}


def measure(lab: Lab, name: str, protocol: str) -> Measured:
    """Paints a protocol's items by the method `name` and embeds them, or takes ads in the pictures' place.

    Items that can't be painted or read are left out. Raises BadInput if fewer than two are left.
    """
    def embedded(paths: list[Path]) -> Tensor:
        return lab.embeddings([(path, None) for path in paths])

    items = lab.items(protocol)
    if name == "shuffled":
        order = torch.randperm(len(items), generator=Generator().manual_seed(0))
        paths = [items[i].image for i in order.roll(1)[order.argsort()].tolist()]  # a cycle: no item keeps its own
    elif name == "others":
        paths = other_ads(lab, items)
    elif name == "references":
        paths = [item.reference for item in items]
    else:
        paths = lab.pictures(name, items, protocol)
    painted, originals = embedded(paths), embedded([item.image for item in items])
    targets = originals if protocol == "bg1k" else embedded([item.reference for item in items])
    names = sorted({item.category for item in items})
    categories = F.one_hot(torch.tensor([names.index(item.category) for item in items]))
    readable = (painted + originals + targets).isfinite().all(dim=1)
    if (n := readable.sum()) < 2:
        raise BadInput(f"{lab.data}: {n} pictures are too few to measure; raise --limit")
    return Measured(readable, painted, originals, targets, categories)


def other_ads(lab: Lab, items: list[Item]) -> list[Path]:
    """For each item another ad of its category, from the training set; a path to nothing where there are too few."""
    left = defaultdict(list)
    for ad in lab.other_ads:
        left[ad.category].append(ad.image)
    return [left[item.category].pop() if left[item.category] else lab.out / "no other ad" for item in items]


def table(lab: Lab, name: str) -> None:
    """Prints a table as Markdown, with the paper's numbers beside ours, and writes it to NAME.md and NAME.json."""
    protocols, metrics, ours, rows = TABLES[name]
    rows = [row for row in rows if row.paper or available(lab, row.method)]  # the paper's stay, as "not given"
    methods = [row.method for row in rows if available(lab, row.method)]
    lab.check(methods, [item for protocol in protocols for item in lab.items(protocol)])
    measured = {(method, protocol): measure(lab, method, protocol) for method in methods for protocol in protocols}
    results = []
    for label, method, paper in rows:
        for k, protocol in enumerate(protocols):
            figures = None
            if method in methods:
                figures = compare(measured[method, protocol], measured[ours, protocol], metrics)
            results.append({"method": label, "protocol": protocol, "measured": figures, "paper": paper[2 * k :][:2]})
    our_label = next(row.label for row in rows if row.method == ours)
    counts = " or ".join(map(str, sorted({int(m.readable.sum()) for m in measured.values()})))
    lines = [*markdown(results, protocols, metrics), *lines_ahead(results, our_label, protocols, metrics), "",
             f"Each number is from {counts} pictures; ± is 1.96 standard deviations over {RESAMPLES} bootstrap "
             "samples, half of a 95% interval. Fréchet distances are biased upwards, so compare their differences."]
    if lab.networks.options["weights"] is None:
        lines[-1] += " The paper's are from BG60k and another CLIP: compare only the order."
    settings = vars(lab.settings) | {"data": str(lab.data), "seed": lab.seed}
    write_json(settings | {"rows": results}, lab.out / f"{name}.json")
    write_text("\n".join(lines) + "\n", lab.out / f"{name}.md")
    print(*lines, "", lab.out / f"{name}.md", lab.out / f"{name}.json", sep="\n")


def available(lab: Lab, method: str) -> bool:
    """Whether there is what a row needs. With --weights, networks that not every table needs must be given."""
    if method == "others":
        return bool(lab.other_ads)
    optional = {"lama", "paint-by-example", "cg-plain", "pg-controlnet"} & {*METHODS[method].networks()}
    return lab.networks.options["weights"] is None or all(lab.networks.options[name] for name in optional)


def markdown(results: list[dict], protocols: list[str], metrics: list[str]) -> list[str]:
    """The lines of a Markdown table. `results` has every protocol of the first row, then of the next, and so on."""
    lines = [["method"]]
    for protocol in protocols:
        for metric in metrics:
            lines[0] += [f"{PROTOCOLS[protocol]} {METRICS[metric]}".strip()] + ["paper"] * (metric != "joint")
    for k, result in enumerate(results):
        if k % len(protocols) == 0:
            lines.append([result["method"]])
        for i, metric in enumerate(metrics):
            lines[-1].append(plus_minus(result["measured"][metric]) if result["measured"] else "not given")
            if metric != "joint":  # the paper does not have this one
                lines[-1].append(f"{result['paper'][i]:.2f}" if result["paper"] else "")
    return markdown_table(lines)


def lines_ahead(results: list[dict], ours: str, protocols: list[str], metrics: list[str]) -> list[str]:
    """How far our method is ahead of each of the others: a paragraph for each protocol."""
    names, lines = ", ".join(METRICS[metric][:-2] for metric in metrics), []
    for protocol in protocols:
        others = [f"of {result['method']} by {', '.join(map(plus_minus, result['measured']['ours_ahead'].values()))}"
                  for result in results
                  if result["protocol"] == protocol and result["measured"] and result["method"] != ours]
        head = f"{PROTOCOLS[protocol]}: {ours}".removeprefix(": ")
        lines += ["", f"{head} is ahead on the same items ({names}): {'; '.join(others)}."]
    return lines


# ---------------------------------------------------------------- figures


def figure_tsne(lab: Lab) -> None:
    """Fig. 5a: the background features of CG's and ControlNet's pictures around their categories' centres, the means
    over the training set. The figure shows the 20 commonest categories.

    For all categories, and also for the original backgrounds, it prints the mean distance between a normalised feature
    and its category's centre, and for how many features that centre is the nearest. Raises BadInput without pictures.
    """
    items = lab.items("bg1k")
    lab.check(["cg", "controlnet"], items)
    categories, centres = lab.centres
    points, kinds = [centres], [("centre", category) for category in categories]
    for label, method in (("original", None), ("CG", "cg"), ("ControlNet", "controlnet")):
        paths = lab.pictures(method, items, "bg1k") if method else [item.image for item in items]
        x, kept = lab.backgrounds(pair for pair in zip(paths, items) if pair[1].category in categories)
        own = torch.tensor([categories.index(item.category) for item in kept])
        distance = torch.cdist(x, centres)  # (n, C)
        print("{}: distance to the category's centre {:.3f} ± {:.3f}, the nearest centre for {} of {} pictures".format(
            label, *interval(lambda i, d=distance, own=own: d[i, own[i]].mean(), len(x)),
            int((distance.argmin(1) == own).sum()), len(x)))
        if method:
            points.append(x)
            kinds += [(label, item.category) for item in kept]
    counts = Counter(item.category for item in items if item.category in categories)
    largest = sorted(category for category, _ in counts.most_common(20))  # as many as the legend has room for
    rows = [i for i, (_, category) in enumerate(kinds) if category in largest]
    save(scatter(tsne(torch.cat(points)[rows]), [kinds[i] for i in rows], largest), lab.out / "tsne.png")


def figure_methods(lab: Lab, rows: int = 8) -> None:
    """Fig. 6, of some pairs: product, reference, and the pictures by Table 2's methods."""
    columns = {row.label: row.method for row in TABLES["table2"].rows}
    draw_methods(lab, "fig6", columns, choose(lab.items("ref"), rows))


def figure_perturbations(lab: Lab, each: int = 2) -> None:
    """Fig. 7, of pairs where PG, if it copies, copies what is wrong: references whose product is large, or far from
    the middle, or of another category than the product.
    """
    items = lab.items("ref")
    masks = [load_masked(item.reference, item.reference_mask)[1] for item in items]
    area = [float(M.mean()) for M in masks]
    away = [abs(float((M.sum(dim=(0, 1)) * torch.linspace(-1, 1, M.shape[2])).sum() / M.sum())) for M in masks]
    chosen = [(what, items[i]) for what, of in (("large", area), ("off centre", away))
              for i in sorted(range(len(items)), key=of.__getitem__)[-each:]]
    for item in items[:each]:
        other = next((x for x in items if x.category != item.category), None)
        if other:
            strange = replace(item, reference=other.reference, reference_mask=other.reference_mask)
            chosen.append(("other category", strange))
    labels, pairs = zip(*chosen)
    columns = {"no perturbation": "fig7-none", "dilation": "fig7-dilation", "dilation + mixup": "fig7-mixup"}
    draw_methods(lab, "fig7", columns, [*pairs], [*labels])


def draw_methods(lab: Lab, name: str, columns: dict[str, str], items: list[Item],
                 labels: list[str] | None = None) -> None:
    """Draws each item's product, its reference, and each method's picture. columns: methods by label; labels: rows'."""
    columns = {label: method for label, method in columns.items() if available(lab, method)}
    lab.check([*columns.values()], items)
    painted = [lab.pictures(method, items, name) for method in columns.values()]
    cells = [[cutout_of(item), picture_of(item.reference), *(picture_of(paths[i]) for paths in painted)]
             for i, item in enumerate(items)]
    save(sheet(cells, ["product", "reference", *columns], labels), lab.out / f"{name}.png")


def figure_grid(lab: Lab, name: str, count: int = 8, groups: int = 4) -> None:
    """fig9: each product in the styles of many references; fig10: many products in each reference's style.

    Both show up to `groups` categories with up to `count` pairs each. Raises BadInput if no category has two pairs.
    """
    items, many_styles = lab.items("ref"), name == "fig9"
    by_category = {c: [i for i in items if i.category == c][:count] for c in sorted({i.category for i in items})}
    chosen = [group for group in by_category.values() if len(group) > 1][:groups]
    if not chosen:
        raise BadInput(f"{lab.data}: no category has two pairs of a product and a reference; raise --limit")
    pairs = []
    for group in chosen:
        for item in group:
            product, ad = (group[0], item) if many_styles else (item, group[0])
            pairs.append(replace(product, reference=ad.reference, reference_mask=ad.reference_mask))
    lab.check(["cg+pg"], pairs)
    paths, cells = iter(lab.pictures("cg+pg", pairs, name)), []
    for group in chosen:
        products, ads = [cutout_of(item) for item in group], [picture_of(item.reference) for item in group]
        one, heads = (products[0], ads) if many_styles else (ads[0], products)
        cells += [[None, *heads], [one, *(picture_of(next(paths)) for _ in group)]]
    save(sheet(cells), lab.out / f"{name}.png")


COMMANDS = {  # each with what to look at next
    "table1": (partial(table, name="table1"), "tsne draws the same pictures' backgrounds; table2 adds references"),
    "table2": (partial(table, name="table2"), "fig6 shows its methods side by side; table4 is the ablation"),
    "table4": (partial(table, name="table4"), "fig6 shows the methods of Table 2 side by side"),
    "tsne": (figure_tsne, "table1 measures the same pictures"),
    "fig6": (figure_methods, "table2 measures these methods"),
    "fig7": (figure_perturbations,
             "train.py pg --theta N --sigma LOW HIGH trains with other perturbations"),
    "swapped": (swapped, "its sheet shows Eq. 3 beside Eq. 2"),
    "fig9": (partial(figure_grid, name="fig9"), "fig10 shows many products in one style"),
    "fig10": (partial(figure_grid, name="fig10"), "fig9 shows one product in many styles"),
}

# ---------------------------------------------------------------- the command line


def options() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=COMMANDS)
    add = add_lab_options(parser)
    add("--limit", type=whole_number(2, 10**9), help="only the first N items of the split [all]")
    add("--out", type=Path, default=Path("results"), help="folder for all results [results]")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Carries out one command. Under torchrun all processes paint, and only the first one prints."""
    args = options().parse_args(arguments)
    rank, world = processes()
    with locked(args.out), redirect_stdout(io.StringIO()) if rank else nullcontext():
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # processes wait for one another while all paint
        lab, (command, following) = lab_of(args, args.out, args.limit), COMMANDS[args.what]
        draw_on_first_use(lab.data)
        command(lab)
        print(f"next: {following}; the pictures are in {args.out / 'pictures'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
