"""Support: what data.py does: lists a folder, checks a data set, holds ads out; not needed to understand the paper."""

import argparse
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cutouts import SOLID
from support.datasets import Item, is_picture, list_of, read_items, read_lines, refuse_many_broken
from support.files import BadInput, check_folder, is_hidden, nfc, one_line, write_text
from support.images import FORMATS, save_image, sheet
from support.machine import cores
from support.options import Parser, real_number, whole_number
from support.tensors import fingerprint

# ---------------------------------------------------------------- a folder of categories


def list_folder(root: Path) -> str:
    """Writes metadata.jsonl for pictures in files CATEGORY/NAME.*, each with its mask in CATEGORY/NAME_mask.* or in its
    alpha channel. Returns what was listed and what was left out. Raises BadInput if there are no pictures, or if there
    is a list already.
    """
    file = root / "metadata.jsonl"
    if file.exists():
        raise BadInput(f"{file} is there already; remove it to list the folder again")
    names = [path.relative_to(root) for path in sorted(root.glob("*/*"))]
    names = [name for name in names if not any(map(is_hidden, name.parts))]
    stems = {name: nfc(str(name.with_suffix(""))) for name in names if is_picture(name) and (root / name).is_file()}
    by_stem = {stem: name for name, stem in stems.items()}
    # NAME_mask.* is a mask if NAME.* lies beside it, else a product of that name
    masks = {name: by_stem.get(f"{stem}_mask") for name, stem in stems.items()}
    used = {*masks.values()}
    lines = [{"file_name": name, "mask": mask, "category": nfc(name.parent.name)} for name, mask in masks.items()
             if name not in used]
    left_out = [one_line(str(name)) for name in names if name not in stems]
    note = "; ".join([
        f"{len(lines):,} pictures in folders of categories",
        f"left out {len(left_out):,} that are links to nothing, deeper folders or not {', '.join(FORMATS)}",
        *left_out[:5]])
    if not lines:
        raise BadInput(f"{root}: {note}; expected {root / 'mug' / 'any_name.png'} and others")
    write_list(lines, file)
    return f"{file}: {note}"


def write_list(lines: list[dict], file: Path) -> None:
    """Writes metadata.jsonl."""
    texts = (json.dumps(line, ensure_ascii=False, default=Path.as_posix) + "\n" for line in lines)
    write_text("".join(texts), file)


# ---------------------------------------------------------------- checking a data set

BLANK_DISTANCE, BLANK_PART = 0.04, 0.98  # blank: 98% of the background is within 0.04 of its median colour


def is_blank(image: Tensor, mask: Tensor) -> bool:
    """Whether the background has one colour; section 4.2 drops such ads. image (3, H, W), mask (1, H, W)."""
    background = image[:, mask[0] <= 1 - SOLID]  # (3, pixels)
    if not background.numel():
        return False
    distance = (background - background.median(dim=1, keepdim=True).values).abs().amax(dim=0)
    return bool((distance <= BLANK_DISTANCE).float().mean() >= BLANK_PART)


def check_ads(ads: Dataset, count: int, where: Path) -> list[Item]:
    """Loads every ad and prints a report. Returns those of the first `count`, the items without their references, whose
    background is blank. Raises BadInput if more than 1% can't be used.
    """
    broken, blank, cut = [], [], []
    workers, memory = min(8, cores()), Path("/dev/shm")  # through it workers send ads; where it is full, they hang
    if memory.is_dir():  # in a container it may be small; a worker has two ads ready, and two are in use
        workers = min(workers, shutil.disk_usage(memory).free // (4 * 16 * ads.size**2))
    loader = DataLoader(ads, batch_size=None, num_workers=workers)
    for i, sample in enumerate(tqdm(loader, desc="loading", disable=None)):
        if sample["index"] != i:  # another was taken in its place
            broken.append(str(ads.items[i].image))
            continue
        if sample["kept"] < 0.99:
            cut.append(float(sample["kept"]))
        if i < count and is_blank(sample["image"], sample["mask"]):
            blank.append(ads.items[i])
    refuse_many_broken(broken, len(ads), where)
    print(f"{len(ads) - len(broken):,} images load, {len(broken):,} are broken; {len(blank):,} have a blank background")
    if cut:
        print(f"a crop to a square cuts {len(cut):,} products, and leaves {min(cut):.0%} to {max(cut):.0%} of them")
    for item in blank[:10]:
        print(f"  {one_line(str(item.image))}")
    return blank


def drop_lines(file: Path, items: list[Item]) -> Path:
    """Takes items out of a data set's list. Returns FILE.all, which keeps every line that the list ever had, with the
    split that it had last.
    """
    kept, lines = file.with_name(file.name + ".all"), read_lines(file)
    ever = {json.dumps(json.loads(line) | {"split": None}) if file.suffix == ".jsonl" else line: line
            for _, line in (read_lines(kept) if kept.exists() else []) + lines}
    dropped = {item.line for item in items}
    for path, texts in (kept, ever.values()), (file, [line for number, line in lines if number not in dropped]):
        write_text("".join(f"{text}\n" for text in texts), path, "surrogateescape")
    return kept


def hold_out(file: Path, part: float) -> str:
    """Marks the ads of a list whose name's hash falls in the lowest `part` as "split": "test", a category's last one as
    "train"; ads that are marked already stay so, also when others are added. Returns what was done.
    """
    entries = [json.loads(line) for _, line in read_lines(file)]
    left = Counter(entry["category"] for entry in entries if entry.get("split") != "test")
    for entry in entries:
        place = int(fingerprint(entry["file_name"])[:8], 16) / 2**32
        if place < part and "split" not in entry:
            entry["split"] = "test" if left[entry["category"]] > 1 else "train"
            left[entry["category"]] -= entry["split"] == "test"
    write_list(entries, file)
    held_out = len(entries) - left.total()
    return f"{file}: {held_out:,} of {len(entries):,} ads are held out" + ("" if held_out else "; raise --hold-out")


def check_data_set(arguments: list[str] | None, dataset: type[Dataset], product_hint: Callable,
                   perturb: Callable) -> None:
    """The command line of data.py, with its AdDataset and, for the sheet, its hints. Raises BadInput."""
    args = parse(arguments)
    if args.sheet:
        check_folder(args.sheet.parent, "--sheet")  # before loading, which may take an hour
    listed = [list_folder(args.dir)] if args.list else []
    file = list_of(args.dir, args.split)
    if args.hold_out and file.suffix == ".txt":
        raise BadInput(f"--hold-out: {args.dir} has no metadata.jsonl, and BG60k's BG1k is held out; leave it out")
    try:
        if args.list:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt
        items, notes = read_items(args.dir, args.split)
        print("\n".join(listed + notes))
        test = read_items(args.dir, "bg1k")[0] if file.suffix == ".jsonl" else []  # held-out ads must load, too
        items = [*dict.fromkeys(items + test)]
        references = [replace(item, image=item.reference, mask=item.reference_mask) for item in items if item.reference]
        ads = dataset(items + references, args.size)
        blank = check_ads(ads, len(items), file)
        if args.sheet:
            save_sheet(ads, len(items), product_hint, perturb, args.sheet)
        if args.drop_blank and len(blank) == len(items):
            raise BadInput(f"--drop-blank: all {len(items)} backgrounds of {args.dir} are blank; leave it out")
        if args.drop_blank and blank:
            print(f"dropped them from {file}; the whole list is {drop_lines(file, blank)}")
        if args.hold_out:
            print(hold_out(file, args.hold_out))
    except BaseException:  # also an interrupt
        if args.list:
            file.unlink()  # so that the same command can run again
        raise
    if args.split == "bg60k":
        print(f"next, train CG on it: python train.py cg --data {args.dir} --weights SD15")
    else:
        print(f"next, with the CG and PG that you trained: python generate.py --data {args.dir} --split {args.split} "
              "--out results --weights SD15 --cg CG --pg PG")


def save_sheet(ads: Dataset, count: int, product_hint: Callable, perturb: Callable, path: Path) -> None:
    """Writes a sheet of eight of the first `count` ads, evenly spaced over them: what the networks see of each."""
    samples = [ads[index] for index in range(0, count, -(-count // 8))]
    generator, rows = torch.Generator().manual_seed(0), []
    for sample, other in zip(samples, samples[1:] + samples[:1]):
        I, M = sample["image"], sample["mask"]
        rows.append([I, M, product_hint(I, M), perturb(I, M, other["image"], generator)])
    names = [ads.items[sample["index"]].category for sample in samples]
    save_image(sheet(rows, ["image", "mask", "CG's hint", "PG's hint, perturbed"], names), path)
    print(f"wrote {path}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of data.py."""
    parser = Parser(description="Check a data set: report what is in it and what was assumed, load every picture, find "
                    "blank\nbackgrounds, and draw eight items as the networks see them.")
    add = parser.add_argument
    add("dir", type=Path, help="BG60k's root, or a folder with metadata.jsonl")
    add("--split", default="bg60k", help="bg60k (default), bg1k or bgpair")
    add("--sheet", metavar="FILE", type=Path, help="draw eight items here: image, mask, CG's hint, PG's hint")
    add("--size", metavar="N", type=whole_number(1, 4096), default=512, help="side of the training images [512 px]")
    add("--list", action="store_true",
        help="first write metadata.jsonl, from DIR/CATEGORY/NAME.png and NAME_mask.png or alpha")
    add("--drop-blank", action="store_true",
        help="take images with a blank background out of the list; the whole list stays as FILE.all")
    add("--hold-out", metavar="PART", type=real_number(1e-4, 0.5),
        help='mark so large a part of metadata.jsonl as "split": "test": training leaves it out, and is checked on it')
    return parser.parse_args(arguments)
