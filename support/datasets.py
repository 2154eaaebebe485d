"""Support: lists of ads: BG60k as released, imagefolders, folders of categories; not needed to understand the paper."""

import argparse
import json
import os
import shutil
import signal
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cutouts import SOLID, covers_border
from support.files import BadInput, check_folder, is_hidden, is_unicode, nfc, one_line, read_json, write_text
from support.images import FORMATS, load_mask, save_image, sheet
from support.machine import cores
from support.options import Parser, whole_number

MASK_OF_ITEM = "'mask' in metadata.jsonl, or in the folders of masks"  # where messages say that a mask belongs
BROKEN = 0.01  # so large a part may be missing or unreadable, and is skipped; more is an error
SPLITS = {"bg60k": "bg60k", "bg1k": "bg1k", "bgpair": "bg1k"}  # split: the prefix of its image and mask folders


@dataclass(frozen=True)
class Item:
    """One line of a data set. Without `mask` the image's alpha channel is the mask; likewise for the reference."""

    image: Path
    mask: Path | None
    category: str
    reference: Path | None = None
    reference_mask: Path | None = None
    product: str | None = None  # product and scene in words, for captions and tests
    scene: str | None = None
    inverted: bool = False  # mask files are 1 on the background
    line: int = field(default=0, compare=False)  # in the list that names it, counted from 1


def read_items(root: Path | str, split: str = "bg60k") -> tuple[list[Item], list[str]]:
    """The items of a folder, and notes for people: how many, the long tail, what was assumed, what was skipped.

    A folder with metadata.jsonl is read by the imagefolder convention and has no splits; any other is read as BG60k
    was released. Raises BadInput if the folder is neither, if a line can't be read, or if over 1% is missing.
    """
    root = Path(root)
    if split not in SPLITS:
        raise BadInput(f"--split {split}: must be one of {', '.join(SPLITS)}")
    file = list_of(root, split)
    own_format = file.suffix == ".jsonl"
    if not file.is_file():
        raise BadInput(f"{root}: no such data set; expected a folder with metadata.jsonl or with {split}_info.txt and "
                       f"{SPLITS[split]}_imgs_0, {SPLITS[split]}_masks_0, ...")
    items, missing = read_imagefolder(file) if own_format else read_bg60k(file, split)
    refuse_many_broken(missing, len(items) + len(missing), root)
    if not items:
        raise BadInput(f"{root}: the data set is empty; add lines to its list")
    for item in items:
        if not is_unicode(f"{item.category}{item.product}{item.scene}"):
            raise BadInput(f"{file}:{item.line}: not UTF-8 text; convert the list, or rename {item.image.parent}")

    counts = Counter(item.category for item in items)
    masks, covered = "masks taken as 1 on the product", masks_inverted(items)
    if covered and own_format:  # our own format defines white = product; BG60k's release does not say
        masks += ", though most cover the border: are they white on the background?"
    elif covered:
        masks = "masks taken as 1 on the background: inverted, since most cover the border"
        items = [replace(item, inverted=True) for item in items]
    return items, [
        f"{len(items):,} images in {len(counts):,} categories; {len(missing):,} skipped",
        f"long tail: {sum(n < 10 for n in counts.values()):,} categories with fewer than 10 images, "
        f"{sum(n > 100 for n in counts.values()):,} with more than 100",
        masks,
        *(f"skipped: {line}" for line in missing),
    ]


def list_of(root: Path, split: str) -> Path:
    """The file that lists a data set's ads."""
    own = root / "metadata.jsonl"
    return own if own.is_file() else root / f"{split}_info.txt"


def refuse_many_broken(broken: list[str], total: int, where: Path | str) -> None:
    """Raises BadInput, naming the first, if more than 1% is broken."""
    if len(broken) > BROKEN * total:
        raise BadInput(f"{where}: {len(broken):,} of {total:,} images can't be used, more than {BROKEN:.0%}; fix them "
                       f"or take them out of the list; the first: {broken[0]}")


def masks_inverted(items: list[Item], sample: int = 32) -> bool:
    """Whether mask files are 1 on the background: most in a sample cover the border, which few products touch."""
    items, votes = [item for item in items if item.mask], []
    for item in items[:: len(items) // sample + 1]:  # evenly spaced over the list
        with suppress(BadInput):  # reported when it is loaded as part of the data set
            votes.append(covers_border(load_mask(item.mask)))
    return sum(votes) > len(votes) / 2


def categories_of(items: list[Item]) -> list[str]:
    """The names of all categories, sorted: a category's id is its position."""
    return sorted({item.category for item in items})


def read_identifiers(file: Path) -> dict[str, str]:
    """The identifier [D] of each category, from the categories.json that is saved with CG and PG."""
    return {nfc(name): identifier for name, identifier in read_json(file).items()}


# ---------------------------------------------------------------- the two formats


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines that aren't blank, with their numbers. Bytes in names that are not UTF-8 become surrogates."""
    lines = file.read_text("utf-8-sig", "surrogateescape").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def check_name(name: str, where: str) -> None:
    """Raises BadInput for a path that leaves the data set's folder. Links are followed, wherever they lead."""
    if PureWindowsPath(name).anchor or ".." in PurePosixPath(name).parts or "\\" in name:
        raise BadInput(f"{where}: {name} leaves the folder or has a backslash; move the file into the folder, and name "
                       "it relative to that, with / between folders")


def read_imagefolder(file: Path) -> tuple[list[Item], list[str]]:
    """Items and missing files, from metadata.jsonl: one JSON object a line, its paths relative to the folder."""
    items, missing = [], []
    for number, line in read_lines(file):
        where = f"{file}:{number}"
        try:
            entry = json.loads(line)
            category, *words = (nfc(entry.get(key) or "").strip() or None for key in ("category", "product", "scene"))
            names = [entry.get(key) or None for key in ("file_name", "mask", "reference", "reference_mask")]
            paths = [name and find_file(file.parent, name, where) for name in names]
        except BadInput:
            raise
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise BadInput(f"{where}: not a JSON object of strings ({error}); fix the line") from None
        if not names[0] or not category:
            raise BadInput(f"{where}: needs a file_name and a category; add them")
        if absent := [name for name, path in zip(names, paths) if name and not path]:
            missing.append(f"{where}: no file {absent[0]}")
        else:
            items.append(Item(*paths[:2], category, *paths[2:], *words, line=number))
    return items, missing


def find_file(root: Path, name: str, where: str) -> Path | None:
    """The file `name` in root, or the one of the same name in Unicode's other spelling; None if there is neither."""
    check_name(name, where)
    spellings = name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((path for spelling in spellings if os.path.isfile(path := root.absolute() / spelling)), None)


def read_bg60k(file: Path, split: str) -> tuple[list[Item], list[str]]:
    """Items and missing files, from the text file and the numbered folders of BG60k."""
    columns = 3 if split == "bgpair" else 2  # image, (reference,) category; the category may contain delimiters
    images, masks = (index_folders(file.parent, f"{SPLITS[split]}_{kind}") for kind in ("imgs", "masks"))

    # The release does not state its delimiter: we take the first that splits (nearly) every line
    lines = read_lines(file)
    for delimiter in ("\t", ",", None):
        rows = [(number, [cell.strip() for cell in line.split(delimiter, columns - 1)]) for number, line in lines]
        if sum(len(row) < columns or not all(row) for _, row in rows) <= BROKEN * len(rows):
            break
    else:
        raise BadInput(f"{file}: expected {columns} columns on each line of UTF-8 text, separated by tab, comma or "
                       "white space")

    items, missing = [], []
    for number, row in rows:
        *names, category = row
        where, paths = f"{file}:{number}", []  # image, mask, (reference, its mask)
        for name in names:
            check_name(name, where)
            image = find_one(images, name)
            # Its mask has the same stem, and lies in the masks' folder of the same number, or else in any
            folder = image and image.parent.name.replace("_imgs_", "_masks_")
            paths += [image, image and find_one(masks, f"{folder}/{image.stem}")]
        if len(row) < columns or not all(row) or None in paths:
            missing.append(f"{where}: not {columns} columns, or no single image and mask of that name: {' '.join(row)}")
        else:
            items.append(Item(*paths[:2], nfc(category), *paths[2:], line=number))
    return items, missing


def is_picture(path: Path) -> bool:
    """Whether a file is one of the pictures that we read, by its suffix."""
    return Image.registered_extensions().get(path.suffix.lower()) in (*FORMATS, "MPO")  # MPO: many phones' JPEG


def index_folders(root: Path, prefix: str) -> dict[str, list[Path]]:
    """The pictures in the folders prefix_0, prefix_1, ..., by name and by stem, both in NFC."""
    index = defaultdict(list)
    for path in root.glob(f"{prefix}_[0-9]*/*"):
        if is_picture(path) and not is_hidden(path.name):
            for key in (path.name, path.stem):
                index[nfc(key)].append(path)
    if not index:
        raise BadInput(f"{root}: no pictures in folders {prefix}_0, {prefix}_1, ...; name the folder that holds these")
    return index


def find_one(index: dict[str, list[Path]], name: str) -> Path | None:
    """The file listed as name, which may hold its folder and lack its suffix. None if two files share a name without a
    folder: a wrong image would be worse than none.
    """
    name = PurePosixPath(nfc(name))
    files = index.get(name.name, [])
    files = [path for path in files if path.parent.name == name.parent.name] or files
    return files[0] if len(files) == 1 else None


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
    texts = [json.dumps(line, ensure_ascii=False, default=Path.as_posix) + "\n" for line in lines]
    write_text("".join(texts), file)
    return f"{file}: {note}"


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
    broken, blank = [], []
    workers, memory = min(8, cores()), Path("/dev/shm")  # through it workers send ads; where it is full, they hang
    if memory.is_dir():  # in a container it may be small; a worker has two ads ready, and two are in use
        workers = min(workers, shutil.disk_usage(memory).free // (4 * 16 * ads.size**2))
    loader = DataLoader(ads, batch_size=None, num_workers=workers)
    for i, sample in enumerate(tqdm(loader, desc="loading", disable=None)):
        if sample["index"] != i:  # another was taken in its place
            broken.append(str(ads.items[i].image))
        elif i < count and is_blank(sample["image"], sample["mask"]):
            blank.append(ads.items[i])
    refuse_many_broken(broken, len(ads), where)
    print(f"{len(ads) - len(broken):,} images load, {len(broken):,} are broken; {len(blank):,} have a blank background")
    for item in blank[:10]:
        print(f"  {one_line(str(item.image))}")
    return blank


def drop_lines(file: Path, items: list[Item]) -> Path:
    """Takes items out of a data set's list. Returns FILE.all, which keeps every line that the list ever had."""
    kept, lines = file.with_name(file.name + ".all"), read_lines(file)
    ever = dict.fromkeys(line for _, line in (read_lines(kept) if kept.exists() else []) + lines)
    dropped = {item.line for item in items}
    for path, texts in (kept, ever), (file, [line for number, line in lines if number not in dropped]):
        write_text("".join(f"{text}\n" for text in texts), path, "surrogateescape")
    return kept


def check_data_set(arguments: list[str] | None, dataset: type[Dataset], product_hint: Callable,
                   perturb: Callable) -> None:
    """The command line of data.py, with its AdDataset and, for the sheet, its hints. Raises BadInput."""
    args = parse(arguments)
    if args.sheet:
        check_folder(args.sheet.parent, "--sheet")  # before loading, which may take an hour
    listed = [list_folder(args.dir)] if args.list else []
    file = list_of(args.dir, args.split)
    try:
        if args.list:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt
        items, notes = read_items(args.dir, args.split)
        print("\n".join(listed + notes))
        references = [replace(item, image=item.reference, mask=item.reference_mask) for item in items if item.reference]
        ads = dataset(items + references, args.size)
        blank = check_ads(ads, len(items), file)
        if args.sheet:
            save_sheet(ads, len(items), product_hint, perturb, args.sheet)
        if args.drop_blank and blank:
            print(f"dropped them from {file}; the whole list is {drop_lines(file, blank)}")
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
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
    return parser.parse_args(arguments)
