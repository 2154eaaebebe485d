"""Programs: paints a whole data set, with a manifest and prefetching; not needed to understand the paper."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Ad
from support.datasets import MASK_OF_ITEM, Item
from support.files import BadInput, append_line, read_log, result_name
from support.images import load_cutout, load_masked, save_image, sheet
from support.machine import processes
from support.plots import picture_of

# ---------------------------------------------------------------- a picture, and the line that says how it was painted


def result_path(out: Path, index: int, item: Item) -> Path:
    """The path of the picture that is painted for item `index` of a data set."""
    return out / result_name(f"{index:06}_{item.image.stem}", ".png")


def first_path(path: Path) -> Path:
    """Where --keep-first saves the first pass's picture, beside the finished one. No other name ends in _first."""
    return path.with_name(result_name(f"{path.stem}_first", ".png"))


def line_of(item: Item, seed: int, record: dict) -> dict:
    """A picture's line in the manifest: what it was painted from, and how. Its PNG holds the same line as text."""
    files = {name: getattr(item, name) for name in ("image", "mask", "reference", "reference_mask")}
    return {**{name: file and str(file) for name, file in files.items()}, "inverted": item.inverted,
            "category": item.category, "seed": seed, "dtype": record["dtype"], "how": record}


def save_pictures(pictures: list[Tensor], path: Path, line: dict) -> list[Path]:
    """Saves an ad's picture and, if it was kept, the first pass's, whose line is that of a picture painted without a
    second pass. Returns their paths.
    """
    alone = {"refine": 1, "refine_from": None, "refine_alone": False}
    lines = {path: line, first_path(path): line | {"how": line["how"] | alone}}
    saved = dict(zip(lines, pictures))
    for file, picture in saved.items():
        save_image(picture, file, {"how": json.dumps(lines[file])})
    return [*saved]


# ---------------------------------------------------------------- the manifest: the lines of a folder's pictures


def settings_of(line: dict) -> dict:
    """What must be equal in the lines of equal pictures, under the names that messages use.

    Of files only the names count, since data sets get moved.
    """
    files = {name: line[name] and Path(line[name]).name for name in ("image", "reference")}
    options = {f"--{name.replace('_', '-')}": value for name, value in line["how"].items()}
    return files | {"category": line["category"], "seed": line["seed"]} | options | {"--dtype": line["dtype"]}


def read_manifest(file: Path) -> dict[str, dict]:
    """The settings of each picture in a manifest, by its file's name. Raises BadInput for a line that lacks some."""
    settings = {}
    for number, line in enumerate(read_log(file), 1):
        try:
            settings[line["file"]] = settings_of(line)
        except (AttributeError, KeyError, TypeError):
            raise BadInput(f"{file}:{number} does not say how a picture was painted; remove that line") from None
    return settings


def check_same(path: Path, there: dict, wanted: dict) -> None:
    """Raises BadInput, which names the first difference, if the picture at `path` was painted with other settings."""
    for name in there | wanted:
        value = there.get(name)
        if value != wanted.get(name):
            how = f"without {name}" if value is None or value is False else f"with {name} {value}"
            raise BadInput(f"--out {path.parent} holds {path.name}, which was painted "
                           f"{'with other weights' if name == '--models' else how}; name another folder, or give the "
                           "options it was painted with")


# ---------------------------------------------------------------- painting


def read_ad(item: Item, texts: tuple[str, str, str], seed: int) -> Ad:
    """Loads what an item is painted from. Raises BadInput if one of its files can't be used."""
    rgb, mask = load_cutout(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
    return Ad(rgb, mask, texts, seed, item.reference and load_masked(
        item.reference, item.reference_mask, "reference", MASK_OF_ITEM, item.inverted))


def one_ahead(threads: ThreadPoolExecutor, read: Callable, chunks: list[list]) -> Iterator[dict]:
    """Yields {i: read(i)} for each chunk of indices, while threads already read the next chunk."""
    ahead = threads.map(read, chunks[0] if chunks else [])
    for chunk, following in zip(chunks, [*chunks[1:], []]):
        ready, ahead = ahead, threads.map(read, following)
        yield dict(zip(chunk, ready))


def paint_items(items: list[Item], texts: dict[str, tuple[str, str, str]],
                paint_all: Callable[[list[Ad]], list[list[Tensor]]], out: Path, record: dict, seed: int, batch: int,
                keep_first: bool = False, chosen: list[int] | None = None) -> tuple[int, int, int]:
    """Paints the items of a data set, or those `chosen` by index, that are not in `out` yet. Returns how many were
    painted, how many were there, and how many are broken; broken ones are reported and skipped.

    texts: the prompts by category. Item i is painted with seed + i. record: how pictures are painted, see
    gallery.record_of; keep_first: save the first pass's pictures too. Under torchrun each process paints its share. If
    one picture of a batch is missing, the whole batch is painted again: rounding may depend on the batch, and an
    interruption must not change a byte. Raises BadInput if `out` holds pictures of these names that were painted from
    other items or with other settings.
    """
    manifest, paths = out / "manifest.jsonl", [result_path(out, i, item) for i, item in enumerate(items)]
    lines, there = [line_of(item, seed + i, record) for i, item in enumerate(items)], read_manifest(manifest)
    for path, line in zip(paths, lines):
        if path.name in there:
            check_same(path, there[path.name], settings_of(line))
    rank, world = processes()
    share = (range(len(items)) if chosen is None else chosen)[rank::world]
    todo = {i for i in share if paths[i].name not in there or not paths[i].exists()
            or keep_first and not first_path(paths[i]).exists()}
    chunks = [share[k : k + batch] for k in range(0, len(share), batch) if todo.intersection(share[k : k + batch])]
    broken, written = 0, None

    def read(i: int) -> Ad | BadInput:
        try:
            return read_ad(items[i], texts[items[i].category], seed + i)
        except BadInput as error:
            return error

    def write(pictures: dict[int, list[Tensor]]) -> None:
        for i, of_item in pictures.items():
            if i in todo:
                save_pictures(of_item, paths[i], lines[i])
                append_line({"item": i, "file": paths[i].name, **lines[i]}, manifest)

    # Each thread computes on one core: torch's teams of threads would take the cores away from the painting
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        bar = tqdm(one_ahead(threads, read, chunks), total=len(chunks), unit="batch", disable=not sys.stderr.isatty())
        for results in bar:
            ads = {i: result for i, result in results.items() if isinstance(result, Ad)}
            for i in todo.intersection(results) - ads.keys():
                broken += 1
                tqdm.write(f"skipped: {results[i]}", file=sys.stderr)
            if todo.intersection(ads):
                pictures = dict(zip(ads, paint_all([*ads.values()])))
                if written:
                    written.result()  # raises the writing's error
                written = threads.submit(write, pictures)
        if written:
            written.result()
    return len(todo) - broken, len(share) - len(todo), broken


def save_data_sheet(items: list[Item], out: Path, columns: int = 8, count: int = 32) -> None:
    """Writes OUT/sheet.png: the pictures of the first items, each above its reference if it has one."""

    def cell(path: Path | None):
        try:
            return picture_of(path)
        except BadInput:
            return None  # the item is broken

    painted = [cell(result_path(out, i, item)) for i, item in enumerate(items[:count])]
    references = [cell(item.reference) for item in items[:count]]
    rows = [x[k : k + columns] for k in range(0, count, columns) for x in (painted, references)]
    if any(painted):
        save_image(sheet([row for row in rows if any(row)]), out / "sheet.png")
