"""Programs: paints a whole data set, with a manifest and prefetching; not needed to understand the paper."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


class Job(NamedTuple):
    """One picture to paint."""

    path: Path
    item: Item  # the files it is painted from; a prompt alone has none
    seed: int


def result_path(out: Path, index: int, item: Item) -> Path:
    """The path of the picture that is painted for item `index` of a data set."""
    return out / result_name(f"{index:06}_{item.image.stem}", ".png")


def first_path(path: Path) -> Path:
    """Where --keep-first saves the first pass's picture, beside the finished one. No other name ends in _first."""
    return path.with_name(result_name(f"{path.stem}_first", ".png"))


def line_of(job: Job, record: dict) -> dict:
    """A picture's line in the manifest: what it was painted from, and how. Its PNG holds the same line as text."""
    item, names = job.item, ("image", "mask", "reference", "reference_mask")
    files = {name: str(file) if (file := getattr(item, name)) else None for name in names}
    return files | {"inverted": item.inverted, "category": item.category, "seed": job.seed, "dtype": record["dtype"],
                    "how": record}


def save_pictures(pictures: list[Tensor], job: Job, record: dict) -> list[Path]:
    """Saves a job's picture and, if it was kept, the first pass's, whose line is that of a picture painted without a
    second pass. Returns their paths.
    """
    alone = record | {"refine": 1, "refine_from": None, "refine_alone": False}
    records = {job.path: record, first_path(job.path): alone}
    saved = dict(zip(records, pictures))
    for path, picture in saved.items():
        save_image(picture, path, {"how": json.dumps(line_of(job, records[path]))})
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


def read_ad(job: Job, texts: dict[str, tuple[str, str, str]]) -> Ad:
    """Loads what an item is painted from. Raises BadInput if one of its files can't be used."""
    item = job.item
    cutout = load_cutout(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
    return Ad(*cutout, texts[item.category], job.seed, item.reference and load_masked(
        item.reference, item.reference_mask, "reference", MASK_OF_ITEM, item.inverted))


def one_ahead(threads: ThreadPoolExecutor, read: Callable, chunks: list[list[Job]]) -> Iterator[dict]:
    """Yields {job: read(job)} for each chunk, while threads already read the next chunk."""
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
    manifest, there = out / "manifest.jsonl", read_manifest(out / "manifest.jsonl")
    record = json.loads(json.dumps(record))  # as it comes back from the manifest
    jobs = [Job(result_path(out, i, item), item, seed + i) for i, item in enumerate(items)]
    for job in jobs:
        if job.path.name in there:
            check_same(job.path, there[job.path.name], settings_of(line_of(job, record)))
    rank, world = processes()
    share = (jobs if chosen is None else [jobs[i] for i in chosen])[rank::world]
    todo = {job for job in share if job.path.name not in there or not job.path.exists()
            or keep_first and not first_path(job.path).exists()}
    chunks = [share[k : k + batch] for k in range(0, len(share), batch) if todo.intersection(share[k : k + batch])]
    broken, written = 0, None

    def read(job: Job) -> Ad | BadInput:
        try:
            return read_ad(job, texts)
        except BadInput as error:
            return error

    def write(painted: dict[Job, list[Tensor]]) -> None:
        for job in [job for job in painted if job in todo]:
            save_pictures(painted[job], job, record)
            append_line({"item": job.seed - seed, "file": job.path.name, **line_of(job, record)}, manifest)

    # Each thread computes on one core: torch's teams of threads would take the cores away from the painting
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        bar = tqdm(one_ahead(threads, read, chunks), total=len(chunks), unit="batch", disable=not sys.stderr.isatty())
        for results in bar:
            ads = {job: result for job, result in results.items() if isinstance(result, Ad)}
            for job in results:
                if job in todo and job not in ads:
                    broken += 1
                    tqdm.write(f"skipped: {results[job]}", file=sys.stderr)
            if todo.intersection(ads):
                painted = dict(zip(ads, paint_all([*ads.values()])))
                if written:
                    written.result()  # raises the writing's error
                written = threads.submit(write, painted)
        if written:
            written.result()
    return len(todo) - broken, len(share) - len(todo), broken


def save_data_sheet(items: list[Item], out: Path, columns: int = 8, count: int = 32) -> None:
    """Writes OUT/sheet.png: the pictures of the first items, each above its reference if it has one."""
    pictures = [picture_of(result_path(out, i, item)) for i, item in enumerate(items[:count])]
    references = [picture and picture_of(item.reference) for picture, item in zip(pictures, items)]
    rows = [x[k : k + columns] for k in range(0, count, columns) for x in (pictures, references)]
    if any(pictures):
        save_image(sheet([row for row in rows if any(row)]), out / "sheet.png")
