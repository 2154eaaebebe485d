"""Support: lists of ads: BG60k as released, an imagefolder, a folder of categories; not needed to understand the paper."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import torch

from support.files import BadInput, write_atomic
from support.images import AnyPath, load_mask

MASK_OF_ITEM = "'mask' in metadata.jsonl, or in the folders of masks"  # the remedy for a mask that is no good

BROKEN = 0.01  # the part of a data set that may be missing or unreadable: it is skipped; more is an error

SPLITS = {"bg60k": "bg60k", "bg1k": "bg1k", "bgpair": "bg1k"}  # split: the prefix of its image and mask folders


@dataclass(frozen=True)
class Item:
    """One line of a data set. Without `mask` the image's alpha channel is the mask; likewise for the reference."""

    image: Path
    mask: Path | None
    category: str
    reference: Path | None = None
    reference_mask: Path | None = None
    product: str | None = None  # what is in the picture, in words, and where: kept for captions and tests
    scene: str | None = None
    inverted: bool = False  # mask files are 1 on the background
    line: int = field(default=0, compare=False)  # of the list that names it, counted from 1

    @property
    def caption(self) -> tuple[str, str] | None:
        """Its own words in the two halves of the paper's prompt; None where the data set has none."""
        words = self.product and self.scene
        return (f"A photo of {self.product}", f"in the background of {self.scene}") if words else None


def read_items(root: AnyPath, split: str = "bg60k") -> tuple[list[Item], list[str]]:
    """The items of a folder, and notes for people: how many, the long tail, what was assumed, what was skipped.

    A folder with metadata.jsonl is read by the imagefolder convention (its `split` is all there is), any other as
    BG60k was released. Raises BadInput where the folder is neither, a line can't be read, or over 1% of it is missing.
    """
    root = Path(root)
    if split not in SPLITS:
        raise BadInput(f"--split {split}: must be one of {', '.join(SPLITS)}")
    if (root / "metadata.jsonl").is_file():
        items, missing, notes = _read_imagefolder(root)
    elif (root / f"{split}_info.txt").is_file():
        items, missing, notes = _read_bg60k(root, split)
    else:
        raise BadInput(f"{root}: no such data set; expected a folder with metadata.jsonl or with {split}_info.txt and "
                       f"{SPLITS[split]}_imgs_0, {SPLITS[split]}_masks_0, ...")
    _tolerate(missing, len(items) + len(missing), root)
    if not items:
        raise BadInput(f"{root}: the data set is empty")
    counts = Counter(item.category for item in items)
    category, largest = counts.most_common(1)[0]
    own = (root / "metadata.jsonl").is_file()  # where white is the product; what was released is not said to be so
    if inverted := not own and masks_inverted(items):
        items = [replace(item, inverted=True) for item in items]
    return items, [
        f"{len(items):,} images in {len(counts):,} categories" + notes,
        f"long tail: {sum(n < 10 for n in counts.values()):,} categories with fewer than 10 images, "
        f"{sum(n > 100 for n in counts.values()):,} with more than 100; the largest, {category}, with {largest:,}",
        "masks taken as 1 on the " + ("background: inverted, since most cover the border" if inverted else "product")
        + (", though most cover the border: are they white on the background?" * (own and masks_inverted(items))),
        *(f"skipped: {line}" for line in missing),
        *([f"skipped in all: {len(missing):,}"] if missing else []),
    ]


def _tolerate(broken: list[str], total: int, where: AnyPath) -> None:
    """Raise BadInput, naming the first, if more than 1% is broken."""
    if len(broken) > BROKEN * total:
        raise BadInput(f"{where}: {len(broken):,} of {total:,} images can't be used, more than {BROKEN:.0%}; "
                       f"the first: {broken[0]}")


def _read_imagefolder(root: Path) -> tuple[list[Item], list[str], str]:
    """Items, missing files and a note: metadata.jsonl, one JSON object a line, its paths relative to root."""
    file, inside = root / "metadata.jsonl", root.resolve()
    items, missing = [], []
    for number, line in _lines(file):
        try:
            entry = json.loads(line)
            texts = {key: entry.get(key) for key in ("category", "product", "scene")}
            files = {key: entry.get(key) for key in ("file_name", "mask", "reference", "reference_mask")}
            paths = {key: (inside / name).resolve() if name else None for key, name in files.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise BadInput(f"{file}:{number}: not a JSON object of strings ({error})") from error
        if not paths["file_name"] or not isinstance(texts["category"], str) or not texts["category"].strip():
            raise BadInput(f"{file}:{number}: needs a file_name and a category")
        for key, path in paths.items():
            if path and not path.is_relative_to(inside):
                raise BadInput(f"{file}:{number}: {key} {files[key]} leaves the folder; move the file into it")
        if absent := [files[key] for key, path in paths.items() if path and not path.is_file()]:
            missing.append(f"{file}:{number}: no file {absent[0]}")
        else:
            texts["category"] = texts["category"].strip()
            items.append(Item(image=paths.pop("file_name"), **paths, **texts, line=number))
    return items, missing, ", listed in metadata.jsonl"


def _read_bg60k(root: Path, split: str) -> tuple[list[Item], list[str], str]:
    """Items, missing files and a note on the delimiter: the text file and the numbered folders of BG60k."""
    file = root / f"{split}_info.txt"
    columns = 3 if split == "bgpair" else 2  # image, (reference,) category: the last may hold any delimiter itself
    images, masks = (_index(root, f"{SPLITS[split]}_{kind}") for kind in ("imgs", "masks"))
    lines = list(_lines(file))

    def fields(line: str, delimiter: str | None) -> list[str]:
        row = [cell.strip() for cell in line.split(delimiter, columns - 1)]
        return row if len(row) == columns and all(row) else []

    def find(name: str) -> tuple[Path | None, Path | None]:
        """The image listed as name, which may hold its folder and lack its suffix; and its mask, matched by stem."""
        path = PurePosixPath(name)
        image = images.get("/".join(path.parts[-2:])) or images.get(path.name)
        if image is None:
            return None, None
        folder = image.parent.name.replace("_imgs_", "_masks_")  # of the same number, or else any
        return image, masks.get(f"{folder}/{image.stem}") or masks.get(image.stem)

    # The release does not state its delimiter: it is the first that splits (nearly) every line.
    for delimiter, delimiter_name in (("\t", "tabs"), (",", "commas"), (None, "white space")):
        if sum(not fields(line, delimiter) for _, line in lines) <= BROKEN * len(lines):
            break
    else:
        raise BadInput(f"{file}: expected {columns} columns on each line, separated by tab, comma or white space")

    items, missing = [], []
    for number, line in lines:
        if not (row := fields(line, delimiter)):
            missing.append(f"{file}:{number}: not {columns} columns")
            continue
        *names, category = row
        paths = [path for name in names for path in find(name)]  # image, mask, (reference, its mask)
        if None in paths:
            i = paths.index(None)
            missing.append(f"{file}:{number}: no single {('image', 'mask for')[i % 2]} {names[i // 2]}")
        else:
            items.append(Item(*paths[:2], category, *paths[2:], line=number))
    return items, missing, f", columns separated by {delimiter_name}"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that aren't blank, with their numbers."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            yield from ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())
    except UnicodeDecodeError:
        raise BadInput(f"{file}: not UTF-8 text; convert it") from None


def _index(root: Path, prefix: str) -> dict[str, Path | None]:
    """Every file of the folders prefix_0, prefix_1, ..., by name and by stem, each with and without its folder.

    None where two files share the key: a wrong image would be worse than none.
    """
    index: dict[str, Path | None] = {}
    for folder in os.scandir(root):
        if folder.is_dir() and re.fullmatch(prefix + r"_\d+", folder.name):
            for file in os.scandir(folder):
                path = Path(file.path)
                for key in {path.name, path.stem, f"{folder.name}/{path.name}", f"{folder.name}/{path.stem}"}:
                    index[key] = None if key in index else path
    if not index:
        raise BadInput(f"{root}: expected files in folders {prefix}_0, {prefix}_1, ...")
    return index


def masks_inverted(items: list[Item], sample: int = 32) -> bool:
    """Whether mask files are 1 on the background: most of a sample cover their border, which few products touch."""
    items = [item for item in items if item.mask]
    votes = []
    for item in items[:: -(-len(items) // sample) or 1]:  # evenly from the whole list
        try:
            mask = load_mask(item.mask)[0]  # (H, W)
        except BadInput:
            continue  # reported when it is loaded as part of the data set
        votes.append(torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean() > 0.5)
    return bool(sum(votes) > len(votes) / 2)


def categories_of(items: list[Item]) -> list[str]:
    """The names of all categories, sorted: a category's id is its position."""
    return sorted({item.category for item in items})


def list_folder(root: Path) -> int:
    """Writes metadata.jsonl for pictures that lie as CATEGORY/NAME.*, each with its mask as CATEGORY/NAME_mask.* or as
    its alpha channel -> how many. Raises BadInput where there is none, or a list already.
    """
    file, suffixes = root / "metadata.jsonl", (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    if file.exists():
        raise BadInput(f"{file} is there already; remove it to list the folder again")
    pictures = [path for path in sorted(root.glob("*/*")) if path.suffix.lower() in suffixes]
    masks = {path.with_suffix(""): path for path in pictures if path.stem.endswith("_mask")}
    lines = []
    for path in pictures:
        if not path.stem.endswith("_mask"):
            mask = masks.get(path.with_name(f"{path.stem}_mask"))
            names = {"file_name": path, **({"mask": mask} if mask else {})}
            line = {key: name.relative_to(root).as_posix() for key, name in names.items()}
            lines.append(line | {"category": path.parent.name})
    if not lines:
        raise BadInput(f"{root}: no pictures in folders of categories; expected {root / 'mug' / 'any_name.png'} and others")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(file, lambda new: new.write_text(text, encoding="utf-8"))
    return len(lines)


def drop_lines(file: Path, numbers: set[int]) -> Path:
    """Takes lines (counted from 1) out of a data set's list -> where all that it ever held are kept: FILE.all."""
    kept, text = file.with_name(file.name + ".all"), file.read_text(encoding="utf-8")
    before = kept.read_text(encoding="utf-8") if kept.exists() else ""
    before += "\n" * (before[-1:] not in ("", "\n"))
    known = set(before.split("\n"))
    whole = before + "".join(line for line in io.StringIO(text) if line.rstrip("\n") not in known)
    write_atomic(kept, lambda new: new.write_text(whole, encoding="utf-8"))
    left = "".join(line for i, line in enumerate(io.StringIO(text), 1) if i not in numbers)
    write_atomic(file, lambda new: new.write_text(left, encoding="utf-8"))
    return kept
