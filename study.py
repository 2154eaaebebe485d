"""Beside the method: Table 3, a user study. People rank pictures by likeness to the reference and by quality as ads.

    python study.py make          # paints what is missing; writes the raters' folder `study`, and key.json
    python study.py score rankings-*.json         # Table 3 from the files that the raters send back
    python study.py make --pairs 10 --methods stable-diffusion cg cg+pg       # in class: nothing has to be trained
    python study.py make --data BG60K --weights SD15 --cg CG --pg PG --controlnet FILE ...

Give the raters the whole folder `study`, on a web server, on a shared disk or as an archive. Never give them key.json:
it says which method painted which picture. Each rater opens index.html (index.html?rater=7 names the rater), ranks all
pictures of each pair twice, and sends back the file that the page saves at the end.
"""

import argparse
import json
import random
import secrets
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rivals.lab import METHODS, ORIGINALS, Lab, add_lab_options, choose, cutout_of, lab_of
from rivals.metrics import (
    RESAMPLES,
    half_width,
    kendalls_w,
    markdown_table,
    plus_minus,
    rank_scores,
    resampled_means,
    wins,
)
from support.datasets import Item
from support.files import (
    BadInput,
    check_folder,
    locked,
    one_line,
    one_line_errors,
    read_json,
    write_atomic,
    write_json,
    write_text,
)
from support.images import open_image, thumbnail
from support.machine import processes
from support.options import Parser, whole_number
from toy.world import draw_on_first_use


class Row(NamedTuple):
    label: str
    similarity: float  # mean rank scores, 5 for the best
    quality: float


PAPER = {  # Table 3
    "controlnet": Row("ControlNet", 2.39, 2.61),
    "blended-diffusion": Row("Blended Diffusion", 2.53, 2.77),
    "paint-by-example": Row("Paint by Example", 2.03, 2.35),
    "cg": Row("CG", 3.18, 3.42),
    "cg+pg": Row("CG + PG", 4.88, 3.84),
}
QUESTIONS = ("similarity", "quality")
PAIRS = 100  # from BG-pair, as in the paper, which has 20 raters
PAGE = Path(__file__).with_name("support") / "study_page.html"
SIDE = 1024  # pixels; larger pictures are reduced

# ---------------------------------------------------------------- make: what raters get


class Pair(NamedTuple):
    """What a rater sees at once: an item's product and reference, and one picture by each method."""

    item: Item
    candidates: dict[str, Path]  # by method; all pairs have the same methods


class Handout(NamedTuple):
    """A study under random names, which reveal nothing."""

    study: str
    shown: list[dict]  # for the page: names by pair, the candidates in balanced orders
    key: list[dict]  # for `score`: names by pair and method
    pictures: dict[str, Item | Path]  # by name; an item stands for its product


def token() -> str:
    """A random name, which reveals nothing. It needs the system's randomness: a seeded name could be derived."""
    return secrets.token_hex(6)


def balanced_orders(count: int, methods: int) -> list[list[int]]:
    """An order of the methods for each of `count` pairs, such that each method stands equally often in each place.

    Each run of `methods` pairs is a Latin square with shuffled rows, columns and methods; the last may be cut short.
    """
    draw, orders = random.SystemRandom(), []
    while len(orders) < count:
        names, rows, columns = (draw.sample(range(methods), methods) for _ in range(3))
        orders += [[names[(row + column) % methods] for column in columns] for row in rows]
    return orders[:count]


def plan(pairs: list[Pair]) -> Handout:
    """Gives everything a random name, and orders the candidates. The key is to be written first, then the handout."""
    study = Handout(token(), [], [], {})
    for pair, order in zip(pairs, balanced_orders(len(pairs), len(pairs[0].candidates))):
        name, product, reference = token(), token(), token()
        names = {method: token() for method in pair.candidates}
        study.pictures.update({product: pair.item, reference: pair.item.reference})
        study.pictures.update({names[method]: path for method, path in pair.candidates.items()})
        in_order = [[*names.values()][i] for i in order]
        study.shown.append({"pair": name, "product": product, "reference": reference, "candidates": in_order})
        study.key.append({"pair": name, "candidates": names, "product": str(pair.item.image),
                          "reference": str(pair.item.reference)})
    return study


def write_handout(handout: Handout, out: Path) -> None:
    """Writes OUT/index.html and OUT/pictures, where the pictures' own text, which names the method, is left out."""
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("STUDY_DATA", json.dumps({"study": handout.study, "pairs": handout.shown}), 1)

    def write(new: Path) -> None:
        (new / "pictures").mkdir(parents=True)
        (new / "index.html").write_text(page, encoding="utf-8")
        for name in sorted(handout.pictures):  # the names are random, so the order of the files in time is, too
            source = handout.pictures[name]
            picture = cutout_of(source) if isinstance(source, Item) else open_image(source).convert("RGB")
            thumbnail(picture, SIDE).save(new / "pictures" / f"{name}.png", icc_profile=None)

    write_atomic(out, write)


def make(args: argparse.Namespace) -> None:
    """Writes the key first, so that no raters' folder is without one. Raises BadInput if either is there already."""
    for path, option in ((args.out, "--out"), (args.key, "--key")):
        if path.exists():
            raise BadInput(f"{option} {path} is there already, and raters may be at work on that study; name another")
    check_methods(args.methods)
    check_folder(args.out)
    check_folder(args.key.parent, "--key")
    if args.key.resolve().is_relative_to(args.out.resolve()):
        raise BadInput(f"--key {args.key} is in the folder that the raters get; name a file outside {args.out}")
    lab = lab_of(args, args.pictures)
    pairs = painted_pairs(lab, args.methods, args.pairs)
    handout = plan(pairs)
    write_json({"study": handout.study, "methods": args.methods, "how": vars(lab.settings), "pairs": handout.key},
               args.key)
    write_handout(handout, args.out)
    print(f"{args.out}: for the raters, who open index.html; pairs: {len(pairs)}", f"{args.key}: keep it from them",
          f"next: python study.py score --key {args.key} rankings-*.json, with the files that they send back", sep="\n")


def painted_pairs(lab: Lab, methods: list[str], count: int) -> list[Pair]:
    """Draws `count` of the data set's pairs of a product and a reference by the seed, and has the methods paint them.

    Pairs that can't be painted or read are left out. Raises BadInput if none is left.
    """
    if processes()[1] > 1:
        raise BadInput("study.py is for one process; paint the same pictures with torchrun evaluate.py table2 first")
    draw_on_first_use(lab.data)
    items = lab.items("ref")
    lab.check(methods, items, with_clip=False)
    chosen = choose([*range(len(items))], count, lab.seed)
    with locked(lab.out):
        columns = [lab.pictures(method, items, "ref", chosen) for method in methods]
    pairs = [Pair(items[i], dict(zip(methods, candidates))) for i, candidates in zip(chosen, zip(*columns))]
    pairs = [pair for pair in pairs if all(map(is_readable, [pair.item.reference, *pair.candidates.values()]))]
    if not pairs:
        raise BadInput(f"{lab.data}: no pair could be painted, for the reasons above")
    return pairs


def is_readable(path: Path) -> bool:
    try:
        open_image(path)
    except BadInput as error:
        print(f"left out, with its pair: {error}", file=sys.stderr)
        return False
    return True


# ---------------------------------------------------------------- score


def read_key(path: Path) -> dict:
    """Reads what `make` wrote. Raises BadInput if the file is missing or is no key."""
    key = read_json(path) if path.exists() else None
    if key is None or not {"study", "methods", "pairs"} <= key.keys():
        raise BadInput(f"--key {path}: no such key; give the key.json that study.py make wrote with the raters' folder")
    return key


def read_rankings(path: Path, key: dict) -> dict:
    """Reads what a rater has saved. Raises BadInput unless it ranks every candidate of every pair in this study."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    content = read_json(path)
    if content.get("study") != key["study"]:
        raise BadInput(f"{path} is from another study; give that study's --key")
    rankings = content.get("rankings")
    for number, pair in enumerate(key["pairs"], 1):
        for question in QUESTIONS:
            try:
                ranked = sorted(rankings[pair["pair"]][question])
            except (KeyError, TypeError):
                ranked = None
            if ranked != sorted(pair["candidates"].values()):
                raise BadInput(f"{path} does not rank every picture of pair {number} for {question}; get it completed")
    if not isinstance(content.get("rater"), str) or not isinstance(content.get("saved"), str):
        raise BadInput(f"{path} does not say who ranked, or when; ask for it again")
    return content


def read_all(paths: list[Path], key: dict) -> tuple[dict[str, dict], list[str]]:
    """Rankings by rater, and why files were left out. If a rater sent two files, the one that was saved last counts."""
    rankings, files, left_out = {}, {}, []
    for path in paths:
        try:
            content = read_rankings(path, key)
        except BadInput as error:
            left_out.append(one_line(str(error)))
            continue
        rater = content["rater"]
        newer = rater not in rankings or content["saved"] > rankings[rater]["saved"]
        if rater in rankings:
            kept, other = (path, files[rater]) if newer else (files[rater], path)
            left_out.append(one_line(f"{other} is by rater {rater}, as is {kept}, which was not saved earlier"))
        if newer:
            rankings[rater], files[rater] = content, path
    return rankings, left_out


def scores_of(rankings: dict[str, dict], key: dict, question: str) -> Tensor:
    """Rank scores (R, P, M) of R raters, P pairs and M methods in the key's order."""
    orders = [[content["rankings"][pair["pair"]][question] for pair in key["pairs"]] for content in rankings.values()]
    names = [[pair["candidates"][method] for method in key["methods"]] for pair in key["pairs"]]
    places = [[[*map(order.index, of_pair)] for of_pair, order in zip(names, rater)] for rater in orders]
    return rank_scores(-torch.tensor(places))


def analyse(scores: Tensor) -> dict:
    """Rank scores (R, P, M) -> the methods' means, and the fraction of rankings in which one method stands above
    another, each with half of its 95% interval; and the raters' agreement (Kendall's W).
    """
    def with_interval(values: Tensor) -> list:  # (R, P, ...) -> nested lists of [mean, half width]
        return torch.stack([values.mean(dim=(0, 1)), half_width(resampled_means(values))], dim=-1).tolist()

    return {"mean_rank_scores": with_interval(scores), "win_rates": with_interval(wins(scores)),
            "kendalls_w": kendalls_w(scores).mean().item()}


def score(args: argparse.Namespace) -> None:
    """Prints and writes Table 3, with the paper's numbers beside ours. Raises BadInput if no rankings are left."""
    check_folder(args.out)
    key = read_key(args.key)
    rankings, left_out = read_all(args.rankings, key)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if not rankings:
        raise BadInput("no file of rankings is left to count; ask the raters for them again")
    methods, raters, pairs = key["methods"], len(rankings), len(key["pairs"])
    results = {question: analyse(scores_of(rankings, key, question)) for question in QUESTIONS}
    note = (f"Mean rank scores: {len(methods)} for the best picture, 1 for the worst, from raters: {raters}, pairs: "
            f"{pairs}. ± is half of the 95% interval over raters and pairs ({RESAMPLES} bootstrap samples).")
    if raters == 1:
        note += " With one rater it is over pairs alone."
    if left_out:
        note += f" Files left out: {len(left_out)}."
    if {*methods} != {*PAPER}:
        note += " The paper's raters ranked its five methods: compare only the order."
    lines = [*table3(methods, results), "", note]
    for question in QUESTIONS:
        lines += ["", *win_table(methods, question, results[question]["win_rates"])]
    agreement = ", ".join(f"{question} {results[question]['kendalls_w']:.2f}" for question in QUESTIONS)
    lines += ["", f"The raters' agreement, Kendall's W averaged over the pairs: {agreement}; 1 where all agree, "
              f"{1 / raters:.2f} on average by chance."]
    paper = {method: PAPER[method]._asdict() for method in methods if method in PAPER}
    write_json({"methods": methods, "raters": [*rankings], "left_out": left_out, "pairs": pairs, "paper": paper}
               | results, args.out / "table3.json")
    write_text("\n".join(lines) + "\n", args.out / "table3.md")
    print(*lines, "", args.out / "table3.md", args.out / "table3.json", sep="\n")


def label_of(method: str) -> str:
    return PAPER[method].label if method in PAPER else method


def table3(methods: list[str], results: dict) -> list[str]:
    rows = [["method", *(cell for question in QUESTIONS for cell in (f"{question} ↑", "paper"))]]
    for i, method in enumerate(methods):
        rows.append([label_of(method)])
        for question in QUESTIONS:
            paper = f"{getattr(PAPER[method], question):.2f}" if method in PAPER else ""
            rows[-1] += [plus_minus(results[question]["mean_rank_scores"][i]), paper]
    return markdown_table(rows)


def win_table(methods: list[str], question: str, rates: list[list[list[float]]]) -> list[str]:
    """rates: for each method, against each method, how often it wins, and half of that number's interval."""
    rows = [[f"{question}: % above", *map(label_of, methods)]]
    for i, method in enumerate(methods):
        cells = [f"{100 * rate:.0f} ± {100 * half:.0f}" for rate, half in rates[i]]
        rows.append([label_of(method), *cells[:i], "", *cells[i + 1 :]])
    return markdown_table(rows)


# ---------------------------------------------------------------- the command line


def check_methods(names: list[str]) -> None:
    """Raises BadInput for methods that paint nothing, and for more than can be ranked by digit keys."""
    painting = [name for name in METHODS if name not in ORIGINALS and not name.startswith("fig7")]
    if unknown := [name for name in names if name not in painting]:
        raise BadInput(f"--methods: there is no method {unknown[0]}; choose from {', '.join(painting)}")
    if not len({*names}) == len(names) in range(2, 10):
        raise BadInput("--methods: give two to nine different ones")


def options() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="what", metavar="make or score", required=True)

    def command(name: str, text: str) -> Parser:
        return commands.add_parser(name, description=text, help=text)

    add = add_lab_options(command("make", "writes the raters' folder, and the key outside of it"))
    add("--methods", metavar="NAME", nargs="+", default=[*PAPER], help="two to nine methods [the paper's five]")
    add("--pairs", metavar="N", type=whole_number(1, 10**4), default=PAIRS,
        help=f"pairs of a product and a reference, drawn by --seed [{PAIRS}, as the paper]")
    add("--pictures", metavar="DIR", type=Path, default=Path("results"),
        help="where pictures are painted, and found if painted already: evaluate.py's --out [results]")
    add("--out", metavar="DIR", type=Path, default=Path("study"), help="the raters' folder [study]")
    add("--key", metavar="FILE", type=Path, default=Path("key.json"),
        help="which method painted which picture, for `score` [key.json]")
    add = command("score", "makes Table 3 from the files that the raters send back").add_argument
    add("rankings", metavar="FILE", nargs="+", type=Path, help="rankings-NAME.json")
    add("--key", metavar="FILE", type=Path, default=Path("key.json"), help="from make [key.json]")
    add("--out", metavar="DIR", type=Path, default=Path("results"), help="for table3.md and table3.json [results]")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = options().parse_args(arguments)
    (make if args.what == "make" else score)(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
