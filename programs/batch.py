"""Programs: paints a whole data set, with a manifest and prefetching; not needed to understand the paper."""


import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor
from tqdm import tqdm

from data import Ad
from support.datasets import MASK_OF_ITEM, Item
from support.files import BadInput, append_line, read_log, result_name
from support.images import load_cutout, load_masked, open_image, save_image, sheet, thumbnail
from support.machine import processes


def result_path(out: Path, index: int, item: Item) -> Path:
    """The path of the picture that is painted for item `index` of a data set."""
    return out / result_name(f"{index:06}_{item.image.stem}", ".png")


def read_ad(item: Item, texts: tuple[str, str, str], seed: int) -> Ad:
    """Loads what an item is painted from. Raises BadInput if one of its files can't be used."""
    rgb, mask = load_cutout(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
    if item.reference is None:
        return Ad(rgb, mask, texts, seed)
    reference = load_masked(item.reference, item.reference_mask, "reference", MASK_OF_ITEM, item.inverted)
    return Ad(rgb, mask, texts, seed, reference)


def line_of(item: Item, seed: int, dtype: str, record: dict) -> dict:
    """A picture's line in the manifest: what it was painted from, and how. Its PNG holds the same line as text."""
    files = {name: getattr(item, name) for name in ("image", "mask", "reference", "reference_mask")}
    return {**{name: str(file) if file else None for name, file in files.items()}, "inverted": item.inverted,
            "category": item.category, "seed": seed, "dtype": dtype, "how": record}


def first_path(path: Path) -> Path:
    """Where --keep-first saves the first pass's picture, beside the finished one. No other name ends in _first."""
    return path.with_name(result_name(f"{path.stem}_first", ".png"))


def kept_files(pictures: list[Tensor], path: Path, line: dict) -> list[tuple[Tensor, Path, dict]]:
    """What is saved for an ad, as (picture, path, line): its picture and, if it was kept, the first pass's, whose line
    is that of a picture painted without a second pass.
    """
    first = line | {"how": {n: v for n, v in line["how"].items() if not n.startswith("refine")} | {"refine": 1}}
    return [*zip(pictures, (path, first_path(path)), (line, first))]


class Manifest:
    """manifest.jsonl, one line per picture in a folder. Files are compared by name only, since data sets get moved."""

    FIELDS = {"file": str, "image": str, "reference": (str, NoneType), "category": str, "seed": int, "how": dict}

    def __init__(self, out: Path):
        self.file = out / "manifest.jsonl"
        self.lines = {}
        for number, line in enumerate(read_log(self.file), 1):
            if not all(isinstance(line.get(name), kind) for name, kind in self.FIELDS.items()):
                raise BadInput(f"{self.file}:{number} does not say how a picture was painted; remove that line")
            self.lines[line["file"]] = line

    def check(self, file: str, line: dict) -> None:
        """Raises BadInput if the folder holds a picture of this name that was painted from other files or settings."""
        if file not in self.lines:
            return
        there = self.lines[file]
        for name in ("image", "reference"):
            if (there[name] and Path(there[name]).name) != (line[name] and Path(line[name]).name):
                self.refuse(file, f"from another {name}: {there[name]}")
        for name in ("category", "seed"):
            if there[name] != line[name]:
                self.refuse(file, f"with {name} {there[name]}")
        old, new = there["how"], line["how"]
        for name in old | new:
            if old.get(name) != new.get(name):
                option, value = f"--{name.replace('_', '-')}", old.get(name)
                given = f"without {option}" if value is None or value is False else f"with {option} {value}"
                self.refuse(file, "with other weights" if name == "models" else given)

    def refuse(self, file: str, how: str) -> None:
        """Raises the BadInput of `check`."""
        raise BadInput(f"--out {self.file.parent} holds {file}, which was painted {how}; name another folder, or give "
                       "the options it was painted with")

    def append(self, line: dict) -> None:
        """Adds a picture's line to the file."""
        append_line(line, self.file)


def one_ahead(read: Callable, chunks: list[list]) -> Iterator[dict]:
    """Yields {i: read(i)} for each chunk of indices, while threads already read the next chunk.

    Each reader computes on one core; torch's teams of threads would take the cores away from the painting.
    """
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        following = None
        for chunk in [*chunks, []]:
            current, following = following, [(i, readers.submit(read, i)) for i in chunk]
            if current is not None:
                yield {i: future.result() for i, future in current}


def paint_items(items: list[Item], texts: dict[str, tuple[str, str, str]],
                paint_ads: Callable[[list[Ad]], list[list[Tensor]]], out: Path, record: dict, dtype: str, seed: int,
                batch: int, keep_first: bool = False, chosen: list[int] | None = None) -> tuple[int, int, int]:
    """Paints the items of a data set, or those `chosen` by index, that are not in `out` yet. Returns how many were
    painted, how many were there, and how many are broken; broken ones are reported and skipped.

    texts: the prompts by category. Item i is painted with seed + i. record: how pictures are painted, see record.py;
    keep_first: save the first pass's pictures too. Under torchrun each process paints its share. If one picture of a
    batch is missing, the whole batch is painted again: rounding may depend on the batch, and an interruption must not
    change a byte. Raises BadInput if `out` holds pictures of these names that were painted from other items or with
    other settings.
    """
    manifest, paths = Manifest(out), [result_path(out, i, item) for i, item in enumerate(items)]
    lines = [line_of(item, seed + i, dtype, record) for i, item in enumerate(items)]
    for path, line in zip(paths, lines):
        manifest.check(path.name, line)
    rank, world = processes()
    share = (range(len(items)) if chosen is None else chosen)[rank::world]
    wanted = [[path, first_path(path)] if keep_first else [path] for path in paths]
    todo = {i for i in share if paths[i].name not in manifest.lines or not all(map(Path.exists, wanted[i]))}
    chunks = [share[k : k + batch] for k in range(0, len(share), batch) if todo.intersection(share[k : k + batch])]

    def read(i: int) -> Ad | BadInput:
        try:
            return read_ad(items[i], texts[items[i].category], seed + i)
        except BadInput as error:
            return error

    def write(indices: Iterable[int], pictures: list[list[Tensor]], seconds: float) -> None:
        for i, of_ad in zip(indices, pictures):
            if i not in todo:
                continue
            for picture, path, line in kept_files(of_ad, paths[i], lines[i]):
                save_image(picture, path, text={"how": json.dumps(line)})
            manifest.append({"item": i, "file": paths[i].name} | lines[i] | {"seconds": round(seconds, 3)})

    broken, written = 0, None
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as writer:
        bar = tqdm(one_ahead(read, chunks), total=len(chunks), unit="batch", disable=not sys.stderr.isatty())
        for results in bar:
            ads = {i: result for i, result in results.items() if isinstance(result, Ad)}
            for i in todo.intersection(results) - ads.keys():
                broken += 1
                tqdm.write(f"skipped: {results[i]}", file=sys.stderr)
            if not todo.intersection(ads):
                continue
            clock = time.perf_counter()
            pictures = paint_ads(list(ads.values()))
            seconds = (time.perf_counter() - clock) / max(1, len(ads))
            if written:
                written.result()  # raises the writer's error
            written = writer.submit(write, list(ads), pictures, seconds)
        if written:
            written.result()
    return len(todo) - broken, len(share) - len(todo), broken


def steps_bar(steps: int, text: str) -> tqdm:
    """A bar over the denoising steps on stderr, where that is a terminal."""
    return tqdm(total=steps, desc=text, unit="step", leave=False, disable=not sys.stderr.isatty())


def check_finite(painted: Tensor) -> None:
    """Raises BadInput if the model produced NaN or infinite pixels."""
    if not painted.isfinite().all():
        raise BadInput("--dtype: the painted pixels are not finite; add --dtype float32; if they still are not, the "
                       "weights are broken")


def save_data_sheet(items: list[Item], out: Path, columns: int = 8, cells: int = 32) -> None:
    """Writes OUT/sheet.png: the pictures of the first items, each above its reference if it has one."""

    def cell(path: Path | None):
        try:
            return path and thumbnail(open_image(path).convert("RGB"))
        except BadInput:
            return None  # the item is broken

    rows = []
    for start in range(0, min(len(items), cells), columns):
        row = list(enumerate(items))[start : start + columns]
        rows.append([cell(result_path(out, i, item)) for i, item in row])
        if any(item.reference for _, item in row):
            rows.append([cell(item.reference) for _, item in row])
    if any(picture for row in rows for picture in row):
        save_image(sheet(rows), out / "sheet.png")
