"""Support: lists of ads: BG60k as released, imagefolders, folders of categories; not needed to understand the paper."""

import json
import os
import unicodedata
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from support.cutouts import covers_border
from support.files import BadInput, is_hidden, is_unicode, nfc, read_json
from support.images import FORMATS, fit, load_masked, open_mask, to_tensor

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

    A folder with metadata.jsonl is read by the imagefolder convention, any other as BG60k was released. A list's lines
    are for training, but for those with "split": "test", which are both BG1k and, with a reference, BG-pair; a list
    without such lines is all of them. Raises BadInput if the folder is neither, if a line can't be read, or if over 1%
    is missing.
    """
    root = Path(root)
    if split not in SPLITS:
        raise BadInput(f"--split {split}: must be one of {', '.join(SPLITS)}")
    file = list_of(root, split)
    own_format = file.suffix == ".jsonl"
    if not file.is_file():
        raise BadInput(f"{root}: no such data set; expected a folder with metadata.jsonl or with {split}_info.txt and "
                       f"{SPLITS[split]}_imgs_0, {SPLITS[split]}_masks_0, ...")
    items, missing = read_imagefolder(file, split) if own_format else read_bg60k(file, split)
    refuse_many_broken(missing, len(items) + len(missing), root)
    if not items:
        raise BadInput(f"{root}: the data set, or this split of it, is empty; add lines to its list")
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


def masks_inverted(items: list[Item]) -> bool:
    """Whether mask files are 1 on the background: most in a sample cover the border, which few products touch."""
    items, votes = [item for item in items if item.mask], []
    for item in items[:: len(items) // 32 + 1]:  # evenly spaced over the list
        with suppress(BadInput):  # reported when it is loaded as part of the data set
            votes.append(covers_border(to_tensor(open_mask(item.mask))))
    return sum(votes) > len(votes) / 2


def categories_of(items: list[Item]) -> list[str]:
    """The names of all categories, sorted: a category's id is its position."""
    return sorted({item.category for item in items})


def read_identifiers(file: Path) -> dict[str, str]:
    """The identifier [D] of each category, from the categories.json that is saved with CG and PG."""
    return {nfc(name): identifier for name, identifier in read_json(file).items()}


def load_square(item: Item, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """An ad and its mask, (3, size, size) and (1, size, size), cropped to a square of the shorter side; ours. It holds
    as much of the product as it can, its centroid as near to the middle as that allows. Also returns the part of the
    product that it holds, (). Raises BadInput.
    """
    image, mask = load_masked(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
    (rows, cols), side = (mask[0].sum(1), mask[0].sum(0)), min(mask.shape[1:])
    (y, kept_y), (x, kept_x) = best_window(rows, side), best_window(cols, side)
    square = [fit(picture, size, size, "cover", (y, x))[0] for picture in (image, mask)]
    return *square, kept_y * kept_x


def best_window(line: Tensor, length: int) -> tuple[float, Tensor]:
    """The middle of the window of a line of weights (n,) that holds the most, and the part that it holds. Of equal ones
    the nearest to the centroid.
    """
    position, total = torch.arange(len(line)) + 0.5, float(line.sum())
    held = F.pad(line.cumsum(0), (1, 0))
    held = (held[length:] - held[:-length]) / total  # by each window's start
    middles = torch.arange(len(held)) + length / 2
    distance = (middles - line @ position / total).abs()
    best = int(distance.where(held > held.max() - 1e-4, torch.inf).argmin())
    return float(middles[best]), held[best]


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


def read_imagefolder(file: Path, split: str) -> tuple[list[Item], list[str]]:
    """Items and missing files, from metadata.jsonl: one JSON object a line, its paths relative to the folder."""
    train, test = ([], []), ([], [])  # items, missing files
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
        if (part := entry.get("split", "train")) not in ("train", "test"):
            raise BadInput(f"{where}: split {part} is neither train nor test; make it one of them")
        items, missing = test if part == "test" else train
        if absent := [name for name, path in zip(names, paths) if name and not path]:
            missing.append(f"{where}: no file {absent[0]}")
        else:
            items.append(Item(*paths[:2], category, *paths[2:], *words, line=number))
    items, missing = test if split != "bg60k" and any(test) else train
    pairs = [item for item in items if item.reference] if split == "bgpair" else []
    return pairs or items, missing


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
