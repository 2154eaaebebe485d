"""Support: painting a whole data set: manifest, prefetching, shards; not needed to understand the paper."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Ad
from support.datasets import MASK_OF_ITEM, Item
from support.files import BadInput, append_line, read_log
from support.images import load_cutout, load_masked, open_image, save_image, sheet, thumbnail
from support.machine import processes
from support.names import result_name


def result_path(out: Path, index: int, item: Item) -> Path:
    """Where the picture painted for item `index` of a data set lies."""
    return out / result_name(f"{index:06}_{item.image.stem}", ".png")


def paint_items(items: list[Item], texts: dict[str, tuple[str, str, str]], paint_ads: Callable[[list[Ad]], list[Tensor]],
                args) -> tuple[int, int, int]:
    """Paints all items of a data set that are not in args.out yet, item i with seed + i; texts by category; painter and
    multiple as in paint_ads. Returns how many were painted, were there, and are broken: these are named and skipped.

    A line of manifest.jsonl for each picture. Under torchrun each process paints its share. Raises BadInput where
    args.out holds pictures of the same names that were painted of other items or in another way.
    """
    manifest = args.out / "manifest.jsonl"
    paths = [result_path(args.out, i, item) for i, item in enumerate(items)]
    listed = {line["file"]: line for line in read_log(manifest)}
    settings = ("weights", "tokenizer", "cg", "pg", "controlnet", "hint", "start", "plain_prompt", "size", "steps", "guidance",
                "models")
    how = {name: str(getattr(args, name, None)) for name in settings}

    def entry(i: int) -> dict:
        item = items[i]
        return {"item": i, "image": str(item.image), "category": item.category,
                "reference": str(item.reference) if item.reference else None, "seed": args.seed + i,
                "file": paths[i].name, "how": how}

    def is_of(line: dict) -> list:
        """What a picture is painted of and how; files by name, as data sets are moved."""
        files = [Path(line[key]).name if line[key] else None for key in ("image", "reference")]
        return [*files, line["category"], line["seed"], line.get("how")]

    for i, path in enumerate(paths):
        if path.name in listed and is_of(listed[path.name]) != is_of(entry(i)):
            raise BadInput(f"--out {args.out} holds {path.name}, which was painted of another item, or with other options "
                           "or weights; name another folder")
    rank, world = processes()
    share = range(rank, len(items), world)
    todo = [i for i in share if paths[i].name not in listed or not paths[i].exists()]

    def read(i: int) -> Ad | BadInput:
        item, reference = items[i], None
        try:
            cutout = load_cutout(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
            if item.reference:
                reference = load_masked(item.reference, item.reference_mask, "reference",
                                        MASK_OF_ITEM, item.inverted)
        except BadInput as error:
            return error
        return Ad(*cutout, texts[item.category], args.seed + i, reference)

    def write(ads: dict[int, Ad], pictures: list[Tensor], seconds: float) -> None:
        for i, picture in zip(ads, pictures):
            save_image(picture, paths[i])
            append_line(entry(i) | {"seconds": round(seconds, 3)}, manifest)

    broken, chunks = 0, [todo[k : k + args.batch] for k in range(0, len(todo), args.batch)]
    # While a batch is painted, threads read the next one and write the last. Each computes alone: teams of threads that
    # wait for one another would take the painting's cores
    alone = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ThreadPoolExecutor(4, **alone) as readers, ThreadPoolExecutor(1, **alone) as writer:
        following = [readers.submit(read, i) for chunk in chunks[:1] for i in chunk]
        written = None
        for k, chunk in enumerate(tqdm(chunks, unit="batch", disable=not sys.stderr.isatty())):
            results = {i: future.result() for i, future in zip(chunk, following)}
            following = [readers.submit(read, i) for after in chunks[k + 1 : k + 2] for i in after]
            ads = {i: result for i, result in results.items() if isinstance(result, Ad)}
            for error in (result for result in results.values() if isinstance(result, BadInput)):
                broken += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            clock = time.perf_counter()
            pictures = paint_ads(list(ads.values()))
            seconds = (time.perf_counter() - clock) / max(1, len(ads))
            if written:
                written.result()  # raises what the writer raised
            written = writer.submit(write, ads, pictures, seconds)
        if written:
            written.result()
    return len(todo) - broken, len(share) - len(todo), broken


def save_data_sheet(items: list[Item], out: Path, columns: int = 8, cells: int = 32) -> None:
    """OUT/sheet.png: the first items' pictures, beneath each its reference if it has one."""
    def cell(path: Path | None):
        try:
            return path and thumbnail(open_image(path).convert("RGB"))
        except BadInput:
            return None  # of a broken item

    rows = []
    for start in range(0, min(len(items), cells), columns):
        row = list(enumerate(items))[start : start + columns]
        rows.append([cell(result_path(out, i, item)) for i, item in row])
        if any(item.reference for _, item in row):
            rows.append([cell(item.reference) for _, item in row])
    if any(picture for row in rows for picture in row):
        save_image(sheet(rows), out / "sheet.png")
