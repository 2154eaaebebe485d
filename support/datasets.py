"""Support: lists of ads: BG60k as released, imagefolders, folders of categories; not needed to understand the paper."""


import argparse
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cutouts import SOLID, covers_border
from support.files import BadInput, is_hidden, is_unicode, nfc, one_line, read_json, write_text
from support.images import FORMATS, AnyPath, load_mask
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

    @property
    def caption(self) -> tuple[str, str] | None:
        """Its own words in the two halves of the paper's prompt (section 3.2); None if it has none."""
        words = self.product and self.scene
        return (f"A photo of {self.product}", f"in the background of {self.scene}") if words else None


def read_items(root: AnyPath, split: str = "bg60k") -> tuple[list[Item], list[str]]:
    """The items of a folder, and notes for people: how many, the long tail, what was assumed, what was skipped.

    A folder with metadata.jsonl is read by the imagefolder convention and has no splits; any other is read as BG60k
    was released. Raises BadInput if the folder is neither, if a line can't be read, or if over 1% is missing.
    """
    root = Path(root)
    own_format = (root / "metadata.jsonl").is_file()
    if split not in SPLITS:
        raise BadInput(f"--split {split}: must be one of {', '.join(SPLITS)}")
    if own_format:
        items, missing, listed = _read_imagefolder(root)
    elif (root / f"{split}_info.txt").is_file():
        items, missing, listed = _read_bg60k(root, split)
    else:
        raise BadInput(f"{root}: no such data set; expected a folder with metadata.jsonl or with {split}_info.txt and "
                       f"{SPLITS[split]}_imgs_0, {SPLITS[split]}_masks_0, ...")
    refuse_many_broken(missing, len(items) + len(missing), root)
    if not items:
        raise BadInput(f"{root}: the data set is empty; add lines to its list")
    counts = Counter(item.category for item in items)
    category, largest = counts.most_common(1)[0]
    masks, covered = "masks taken as 1 on the product", masks_inverted(items)
    if covered and own_format:  # our own format defines white = product; BG60k's release does not say
        masks += ", though most cover the border: are they white on the background?"
    elif covered:
        masks = "masks taken as 1 on the background: inverted, since most cover the border"
        items = [replace(item, inverted=True) for item in items]
    notes = [
        f"{len(items):,} images in {len(counts):,} categories, {listed}",
        f"long tail: {sum(n < 10 for n in counts.values()):,} categories with fewer than 10 images, "
        f"{sum(n > 100 for n in counts.values()):,} with more than 100; the largest, {category}, with {largest:,}",
        masks,
        *(f"skipped: {line}" for line in missing),
    ]
    if missing:
        notes.append(f"skipped in all: {len(missing):,}")
    return items, notes


def refuse_many_broken(broken: list[str], total: int, where: AnyPath) -> None:
    """Raises BadInput, naming the first, if more than 1% is broken."""
    if len(broken) > BROKEN * total:
        raise BadInput(f"{where}: {len(broken):,} of {total:,} images can't be used, more than {BROKEN:.0%}; fix them "
                       f"or take them out of the list; the first: {broken[0]}")


# ---------------------------------------------------------------- the two formats


def _read_imagefolder(root: Path) -> tuple[list[Item], list[str], str]:
    """Items, missing files and a note, from metadata.jsonl: one JSON object a line, its paths relative to root."""
    file, folders = root / "metadata.jsonl", {}
    items, missing = [], []
    for number, line in _lines(_read_list(file)):
        try:
            entry = json.loads(line)
            texts = {key: nfc(entry[key]).strip() for key in ("category", "product", "scene") if entry.get(key)}
            names = {key: entry[key] for key in ("file_name", "mask", "reference", "reference_mask") if entry.get(key)}
            faults = [f"{key} {name} {fault}" for key, name in names.items() if (fault := fault_of_name(name))]
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise BadInput(f"{file}:{number}: not a JSON object of strings ({error}); fix the line") from None
        if "file_name" not in names or not texts.get("category"):
            raise BadInput(f"{file}:{number}: needs a file_name and a category; add them")
        if faults:
            raise BadInput(f"{file}:{number}: {faults[0]}")
        if not all(map(is_unicode, texts.values())):
            raise BadInput(f"{file}:{number}: not UTF-8 text; convert it")
        paths = {key: find_file(root.absolute(), name, folders) for key, name in names.items()}
        if absent := [names[key] for key, path in paths.items() if path is None]:
            missing.append(f"{file}:{number}: no file {absent[0]}")
        else:
            image, mask = paths.pop("file_name"), paths.pop("mask", None)
            items.append(Item(image, mask, **paths, **texts, line=number))
    return items, missing, "listed in metadata.jsonl"


def fault_of_name(name: str) -> str | None:
    """Why a list may not name a file like this, or None. Links are allowed and followed, wherever they lead."""
    if PureWindowsPath(name).anchor or ".." in PurePosixPath(name).parts:  # C:, C:\\, \\ and / too
        return "leaves the folder; move the file into it and name it relative to the folder"
    if "\\" in name:
        return "holds a backslash; write / between folders"
    return None


def find_file(root: Path, name: str, folders: dict[Path, dict[str, str]]) -> Path | None:
    """The file `name` in root, or the one of the same name in another Unicode spelling; None if there is neither.

    `folders` caches the entries of folders from call to call, by their names in NFC.
    """
    if os.path.isfile(path := root / name):
        return path
    path = root
    for part in PurePosixPath(name).parts:
        if path not in folders:
            folders[path] = {nfc(entry): entry for entry in os.listdir(path)} if os.path.isdir(path) else {}
        path = path / (part if os.path.exists(path / part) else folders[path].get(nfc(part), part))
    return path if os.path.isfile(path) else None


def _read_bg60k(root: Path, split: str) -> tuple[list[Item], list[str], str]:
    """Items, missing files and a note on the delimiter, from the text file and the numbered folders of BG60k."""
    file = root / f"{split}_info.txt"
    columns = 3 if split == "bgpair" else 2  # image, (reference,) category; the category may contain delimiters
    images, masks = (_index(root, f"{SPLITS[split]}_{kind}") for kind in ("imgs", "masks"))
    text = _read_list(file)
    lines = list(_lines(text))

    def fields(line: str, delimiter: str | None) -> list[str]:
        row = [cell.strip() for cell in line.split(delimiter, columns - 1)]
        return row if len(row) == columns and all(row) else []

    def find(name: str) -> tuple[Path | None, Path | None]:
        """The image listed as name, which may hold its folder and lack its suffix; and its mask, matched by stem."""
        path = PurePosixPath(nfc(name))
        image = images.get("/".join(path.parts[-2:])) or images.get(path.name)
        if image is None:
            return None, None
        stem, folder = nfc(image.stem), image.parent.name.replace("_imgs_", "_masks_")
        # The mask from the folder of the same number, or else from any
        return image, masks.get(f"{folder}/{stem}") or masks.get(stem)

    # The release does not state its delimiter: we take the first that splits (nearly) every line.
    names_of_delimiters = {"\t": "tabs", ",": "commas", None: "white space"}
    for delimiter in names_of_delimiters:
        if sum(not fields(line, delimiter) for _, line in lines) <= BROKEN * len(lines):
            break
    else:
        what = (f"expected {columns} columns on each line, separated by tab, comma or white space" if is_unicode(text)
                else "not UTF-8 text; convert it")
        raise BadInput(f"{file}: {what}")

    items, missing = [], []
    for number, line in lines:
        if not (row := fields(line, delimiter)):
            missing.append(f"{file}:{number}: not {columns} columns")
            continue
        *names, category = row
        if not is_unicode(category):
            raise BadInput(f"{file}:{number}: not UTF-8 text; convert it")
        if faults := [f"{name} {fault}" for name in names if (fault := fault_of_name(name))]:
            raise BadInput(f"{file}:{number}: {faults[0]}")
        paths = [path for name in names for path in find(name)]  # image, mask, (reference, its mask)
        if None in paths:
            i = paths.index(None)
            missing.append(f"{file}:{number}: no single {('image', 'mask for')[i % 2]} {names[i // 2]}")
        else:
            items.append(Item(*paths[:2], nfc(category), *paths[2:], line=number))
    return items, missing, f"columns separated by {names_of_delimiters[delimiter]}"


def _read_list(file: Path) -> str:
    """A list as text, from UTF-8 or Windows programs' UTF-16. Bytes in names that are not UTF-8 become surrogates."""
    content = file.read_bytes()
    try:
        text = content.decode(json.detect_encoding(content), "surrogateescape")
    except UnicodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{file}: not UTF-8 text; convert it")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that aren't blank, with their numbers."""
    return ((number, line.strip()) for number, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip())


def _index(root: Path, prefix: str) -> dict[str, Path | None]:
    """Every file in the folders prefix_0, prefix_1, ..., by its name in NFC, with and without its folder; pictures also
    by their stem. A key that two files share maps to None: a wrong image would be worse than none.
    """
    index: dict[str, Path | None] = {}
    for folder in os.scandir(root):
        if folder.is_dir() and re.fullmatch(prefix + r"_\d+", folder.name):
            for file in _visible(folder.path):
                if not file.is_file():
                    continue
                path, name = Path(file.path), nfc(file.name)
                names = {name, PurePosixPath(name).stem} if is_picture(name) else {name}
                for key in names | {f"{folder.name}/{name}" for name in names}:
                    index[key] = None if key in index else path
    if not index:
        raise BadInput(f"{root}: no files in folders {prefix}_0, {prefix}_1, ...; name the folder that holds these")
    return index


def masks_inverted(items: list[Item], sample: int = 32) -> bool:
    """Whether mask files are 1 on the background: most in a sample cover the border, which few products touch."""
    items = [item for item in items if item.mask]
    votes = []
    for item in items[:: -(-len(items) // sample) or 1]:  # evenly spaced over the list
        try:
            votes.append(covers_border(load_mask(item.mask)))
        except BadInput:
            continue  # reported when it is loaded as part of the data set
    return bool(sum(votes) > len(votes) / 2)


def categories_of(items: list[Item]) -> list[str]:
    """The names of all categories, sorted: a category's id is its position."""
    return sorted({item.category for item in items})


def read_identifiers(file: Path) -> dict[str, str]:
    """The identifier [D] of each category, from the categories.json that is saved with CG and PG."""
    return {nfc(name): identifier for name, identifier in read_json(file).items()}


# ---------------------------------------------------------------- a folder of categories


@cache
def _suffixes() -> set[str]:
    """The suffixes of all picture files that we read."""
    formats = (*FORMATS, "MPO")  # the JPEG of many phones
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def is_picture(name: str) -> bool:
    """Whether a file is one of the pictures that we read, by its suffix."""
    return PurePosixPath(name).suffix.lower() in _suffixes()


def _visible(folder: AnyPath) -> list[os.DirEntry]:
    """A folder's entries, sorted by name, without hidden files and those of operating systems."""
    return sorted((entry for entry in os.scandir(folder) if not is_hidden(entry.name)), key=lambda entry: entry.name)


def list_folder(root: Path) -> list[str]:
    """Writes metadata.jsonl for pictures in files CATEGORY/NAME.*, each with its mask in CATEGORY/NAME_mask.* or in its
    alpha channel. Returns notes for people: how many, and what was left out. Raises BadInput if there are no pictures,
    or if there is a list already.
    """
    file, expected = root / "metadata.jsonl", f"expected {root / 'mug' / 'any_name.png'} and others"
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; {expected}")
    if file.exists():
        raise BadInput(f"{file} is there already; remove it to list the folder again")
    lines: list[dict] = []
    left_out: dict[str, list[str]] = defaultdict(list)  # files by reason
    for folder in _visible(root):
        if folder.is_dir():
            lines += _list_category(folder, left_out)
        else:
            left_out["not in the folder of a category"].append(folder.name)
    notes = []
    if any(left_out.values()):
        reasons = (f"{len(names):,} {reason}, such as {names[0]}" for reason, names in left_out.items() if names)
        notes.append(one_line(f"left out: {sum(map(len, left_out.values())):,} files: {'; '.join(reasons)}"))
    if not lines:
        raise BadInput("; ".join([f"{root}: no pictures in folders of categories", expected, *notes]))
    write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), file)
    return [f"{len(lines):,} pictures listed in {file}", *notes]


def _list_category(folder: os.DirEntry, left_out: dict[str, list[str]]) -> list[dict]:
    """The lines of metadata.jsonl for a category's folder; adds the files that it does not list to left_out."""
    stems = {}  # picture: its name without the suffix
    for entry in _visible(folder):
        name = f"{folder.name}/{entry.name}"
        if entry.is_dir():
            left_out["in deeper folders"] += [f"{name}/{file}" for file in _files_below(entry)]
        elif not entry.is_file():
            left_out["that are links to nothing"].append(name)
        elif not is_picture(name):
            left_out[f"of other formats than {', '.join(FORMATS)}"].append(name)
        elif fault_of_name(name) or not is_unicode(folder.name):
            left_out["to be renamed: they have a backslash, or a folder whose name is no UTF-8"].append(name)
        else:
            stems[name] = nfc(PurePosixPath(entry.name).stem)
    # NAME_mask.* is a mask if NAME.* lies beside it, else a product of that name
    beside = {*stems.values()}
    masks = {stem: name for name, stem in stems.items()
             if stem.endswith("_mask") and stem.removesuffix("_mask") in beside}
    lines = []
    for name, stem in stems.items():
        if stem not in masks:
            mask = {"mask": masks[f"{stem}_mask"]} if f"{stem}_mask" in masks else {}
            lines.append({"file_name": name} | mask | {"category": nfc(folder.name)})
    listed = {line.get(key) for line in lines for key in ("file_name", "mask")}
    left_out["that are a second mask"] += [name for name in stems if name not in listed]
    return lines


def _files_below(folder: AnyPath) -> Iterator[str]:
    """The paths of all files in a folder and below, relative to it. Links to folders are not followed: they may lead
    round in a circle.
    """
    for entry in _visible(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{file}" for file in _files_below(entry))
        else:
            yield entry.name


def drop_lines(file: Path, numbers: set[int]) -> Path:
    """Takes lines (counted from 1) out of a data set's list. Returns FILE.all, which keeps all lines it ever had."""
    kept = file.with_name(file.name + ".all")
    lines, before = [*io.StringIO(_read_list(file), newline="")], ""  # with their line ends
    if kept.exists():
        before = _read_list(kept)
        before += "" if before.endswith("\n") else "\n"
    known = {line.rstrip("\r\n") for line in io.StringIO(before, newline="")}
    ever = before + "".join(line for line in lines if line.rstrip("\r\n") not in known)
    left = "".join(line for number, line in enumerate(lines, 1) if number not in numbers)
    write_text(ever, kept, "surrogateescape")
    write_text(left, file, "surrogateescape")
    return kept


BLANK_DISTANCE, BLANK_PART = 0.04, 0.98  # blank: 98% of the background is within 0.04 of its median colour


def is_blank(image: Tensor, mask: Tensor) -> bool:
    """Whether the background has one colour; section 4.2 drops such ads. image (3, H, W), mask (1, H, W)."""
    background = image[:, mask[0] <= 1 - SOLID]  # (3, pixels)
    if not background.numel():
        return False
    distance = (background - background.median(dim=1, keepdim=True).values).abs().amax(dim=0)
    return bool((distance <= BLANK_DISTANCE).float().mean() >= BLANK_PART)


def check_ads(ads: Dataset, items: list[Item], where: Path) -> tuple[list[Item], list[dict]]:
    """Loads every ad of data.Ads (the items, then their references) and prints a report. Returns the items with a blank
    background, and the samples of eight items for a sheet. Raises BadInput if more than 1% can't be used.
    """
    on_sheet = range(0, len(items), -(-len(items) // 8))  # evenly spaced over the list
    samples, broken, blank = [], [], []
    loader = DataLoader(ads, batch_size=None, num_workers=min(8, cores()))
    for i, sample in enumerate(tqdm(loader, desc="loading", disable=not sys.stderr.isatty())):
        if sample["index"] != i:  # another was taken in its place
            broken.append(str(ads.items[i].image))
            continue
        if i < len(items) and is_blank(sample["image"], sample["mask"]):
            blank.append(items[i])
        if i in on_sheet:
            samples.append(sample)
    refuse_many_broken(broken, len(ads), where)
    print(f"{len(ads) - len(broken):,} images load, {len(broken):,} are broken")
    print(f"{len(blank):,} have a blank background")
    for item in blank[:10]:
        print(f"  {one_line(str(item.image))}")
    if len(blank) > 10:
        print(f"  ... and {len(blank) - 10:,} more")
    return blank, samples


def print_next_commands(root: Path, split: str) -> None:
    """Prints what to do next with a checked data set: the user's own list, or a split of BG60k as released."""
    own = (root / "metadata.jsonl").is_file()
    if own or split == "bg60k":
        print(f"next, train CG on it: python train.py cg --data {root} --weights SD15")
    if own or split != "bg60k":
        of_split = "" if own else f" --split {split}"
        print(f"next, with the CG and PG that you trained: python generate.py --data {root}{of_split} --out results "
              "--weights SD15 --cg CG --pg PG")


# ---------------------------------------------------------------- the command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of data.py."""
    parser = Parser(description="Check a data set: report what is in it and what was assumed, load every picture, find "
                    "blank backgrounds, and draw eight items as the networks see them.")
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
