"""Advertising images and their product masks: BG60k (section 4), a folder of your own, and the generators' hints.

Read from the top: files to tensors, cut-outs, fitting to a canvas, data sets, the training sample, and the background
perturbation that keeps PG from copying and pasting (section 3.3, Eq. 5 and 6). Checking a data set:

    python data.py DIR --sheet sheet.png            # BG60k as released, or a folder with metadata.jsonl
    python data.py DIR --list --sheet sheet.png     # DIR/CATEGORY/NAME.png: writes metadata.jsonl first

Everywhere: a picture is (3, H, W) float32 in [0, 1], its mask M (1, H, W) with 1 on the product, 0 on the background
and values between at soft edges.
"""

import argparse
import io
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from weights import BadInput, check_folder, write_atomic

# Background perturbation, section 5.1
THETA = 50  # kernel of the dilation in pixels of a 512 x 512 image; scaled along with other sizes
SIGMA = (0.75, 0.95)  # σ of the mixup is uniform in this range
# The paper names random masks and mask translation without figures. Ours, in parts of the image's side:
EXTRA_MASKS = 3  # at most so many, each a rectangle or an ellipse
EXTRA_RADII = (0.03, 0.15)  # half their height and half their width
TRANSLATION = 0.15  # the mask's copy moves at most so far, up or down and left or right

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses such pictures

AnyPath = Path | str
SOLID = 0.99  # from this M on a pixel is all product: its colour is never touched
BLANK = 0.04, 0.98  # a background is blank where so large a part of it is so near to its median colour
MASK_OF_ITEM = "'mask' in metadata.jsonl, or in the folders of masks"  # the remedy for a mask that is no good
BROKEN = 0.01  # the part of a data set that may be missing or unreadable: it is skipped; more is an error
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO")  # MPO: the JPEG of many phones
SPLITS = {"bg60k": "bg60k", "bg1k": "bg1k", "bgpair": "bg1k"}  # split: the prefix of its image and mask folders


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a program's main: BadInput, a full GPU and a file system that refuses become one line on stderr and exit
    status 2, no traceback.
    """
    try:
        yield
    except BadInput as error:
        # A DataLoader's worker puts its traceback and the error's name before the message
        print("error:", str(error).strip().splitlines()[-1].split("BadInput: ")[-1], file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; lower --batch (in training --micro-batch) or --size", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:  # no room or no permission, or a name that is too long
        where = f"{name}: " if (name := getattr(error, "filename", None)) else ""
        print(f"error: {where}{getattr(error, 'strerror', None) or error}; make room, or choose another place",
              file=sys.stderr)
        raise SystemExit(2) from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, without the usage."""

    def error(self, message: str) -> None:
        raise BadInput(message)


# ---------------------------------------------------------------- files and tensors


def open_image(path: AnyPath) -> Image.Image:
    """The image of a file, wholly decoded and turned upright by its EXIF tag: RGBA where it is transparent, else RGB.

    Raises BadInput where the file is missing, empty, cut short, no image of FORMATS, or above Pillow's pixel limit.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(file)  # decodes
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise BadInput(f"{path}: over {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # what Pillow's decoders raise on damaged files is not a closed list
        raise BadInput(f"{path}: not a readable image ({type(error).__name__}); save it as PNG or JPEG") from error
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            return image
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit image of C channels -> (C, H, W) float32 in [0, 1]."""
    x = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C)
    return x.view(*x.shape[:2], -1).permute(2, 0, 1).contiguous().float() / 255


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) or (1, H, W) in [0, 1] -> an RGB or grey image; the inverse of to_tensor."""
    x = (x.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy())


def save_image(image: Tensor | Image.Image, path: AnyPath) -> None:
    """Write a tensor (as in to_image) or an image as PNG, whatever the name's suffix."""
    image = to_image(image) if isinstance(image, Tensor) else image
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))


# ---------------------------------------------------------------- cut-outs


def load_mask(path: AnyPath) -> Tensor:
    """The mask in a file, (1, H, W) in [0, 1]: its alpha channel where it has one, else its luminance."""
    image = open_image(path)
    return to_tensor(image.getchannel("A") if image.mode == "RGBA" else image.convert("L"))


def load_masked(
    image_path: AnyPath, mask_path: AnyPath | None = None, what: str = "product", option: str = "--mask", inverted=False
) -> tuple[Tensor, Tensor]:
    """A picture as it is stored, background and all, (3, H, W), and the mask of its product, (1, H, W).

    The mask is that of mask_path, 1 on the background if `inverted`; without a path, the picture's own alpha channel.
    Raises BadInput, naming the picture as `what` and the `option` that gives a mask, where there is no mask, or one
    of another size, empty, or covering everything.
    """
    image = to_tensor(open_image(image_path))
    if mask_path is None and len(image) == 3:
        raise BadInput(f"{what} {image_path} has no alpha channel: give its mask (white on the product) by {option}")
    rgb, mask = image[:3], load_mask(mask_path) if mask_path else image[3:]
    if mask.shape[1:] != rgb.shape[1:]:
        (h, w), (mask_h, mask_w) = rgb.shape[1:], mask.shape[1:]
        raise BadInput(f"mask {mask_path} is {mask_w} x {mask_h} pixels, but {what} {image_path} is {w} x {h}: "
                       f"give one of the same size by {option}")
    mask = 1 - mask if inverted and mask_path else mask
    source = f"mask {mask_path}" if mask_path else f"alpha channel of {what} {image_path}"
    if mask.max() < 0.5:
        raise BadInput(f"{source} is empty: it must be white (opaque) on the product; give another by {option}")
    if mask.min() > 0.5:
        raise BadInput(f"{source} covers the whole picture: it must be black (transparent) on the background; "
                       f"give another by {option}")
    return rgb, mask


def load_cutout(
    image_path: AnyPath, mask_path: AnyPath | None = None, what: str = "product", option: str = "--mask", inverted=False
) -> tuple[Tensor, Tensor]:
    """The product alone: rgb (3, H, W) and M (1, H, W), such that rgb ⊗ M + scene ⊗ (1 − M) has no old background.

    Arguments and errors are load_masked's. Where a background is stored, beside a mask file or hidden under an alpha of
    0, the colours at soft edges are mixed with it, see unmix_edges; in other cut-outs they are the product's already.
    Colours where M = 0 continue the product's, so that resizing mixes nothing else in.
    """
    rgb, mask = load_masked(image_path, mask_path, what, option, inverted)
    hidden = rgb[:, mask[0] == 0]  # (3, pixels): one colour in most cut-outs
    stored = mask_path or (hidden.numel() and (hidden.amax(1) - hidden.amin(1)).max() > 0.02)
    return (unmix_edges(rgb, mask) if stored else extend(rgb, mask > 0)), mask


def extend(rgb: Tensor, known: Tensor) -> Tensor:
    """Continue the colours of the known pixels over all others: normalised convolution on a pyramid of halved sizes.

    rgb (3, H, W), known (1, H, W) bool -> (3, H, W), equal to rgb where known. Unchanged where nothing is known.
    """
    if known.all() or not known.any():
        return rgb
    h, w = rgb.shape[1:]
    weight = F.avg_pool2d(known.float(), 2, ceil_mode=True)  # (1, h/2, w/2): the known part of each 2 x 2 block
    coarse = F.avg_pool2d(rgb * known, 2, ceil_mode=True) / weight.clamp(min=0.25)  # the mean of what is known
    coarse = extend(coarse, weight > 0)
    return torch.where(known, rgb, F.interpolate(coarse[None], size=(h, w), mode="bilinear")[0])


def unmix_edges(rgb: Tensor, mask: Tensor) -> Tensor:
    """The product's pure colours F at soft edges, where a photo shows C = M F + (1 − M) B, B the old background.

    rgb (3, H, W), mask (1, H, W) -> (3, H, W); the colours of solid pixels are untouched, bit for bit.
    B and a first F are continued from the pixels that are wholly one or the other. M times what they leave unexplained
    of C is added to F, as in Forte's 'Approximate Fast Foreground Colour Estimation' (2021): next to nothing at an
    ordinary edge, and the texture where a product is half clear, such as glass.
    """
    solid = mask >= SOLID * mask.max()
    foreground = extend(rgb, solid)
    background = extend(rgb, mask <= 1 - SOLID)
    unexplained = rgb - mask * foreground - (1 - mask) * background
    return torch.where(solid, rgb, (foreground + mask * unexplained).clamp(0, 1))


# ---------------------------------------------------------------- fitting


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) -> (C, height, width), antialiased bicubic, kept within [0, 1]."""
    if x.shape[1:] == (height, width):
        return x
    return F.interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def fit(
    x: Tensor, height: int, width: int, mode: str, centre: tuple[float, float] | None = None
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Scale x (C, H, W) to (C, height, width) without stretching it; also returns a box (top, left, h, w).

    "contain": all of x, in the middle; pictures are padded with their edge, masks (C = 1) with 0. The box is where
    x lies on the canvas. "cover": as much of x as fills the canvas, around `centre` (y, x in pixels of x; the middle
    if None) as far as x reaches. The box is the part of x that was kept.
    """
    h, w = x.shape[1:]
    if mode == "contain":
        scale = min(height / h, width / w)
        h, w = max(1, round(h * scale)), max(1, round(w * scale))
        top, left = (height - h) // 2, (width - w) // 2
        pad = (left, width - w - left, top, height - h - top)
        x = F.pad(resize(x, h, w), pad, mode="constant" if len(x) == 1 else "replicate")
        return x, (top, left, h, w)
    if mode == "cover":
        scale = max(height / h, width / w)
        kept_h, kept_w = max(1, round(height / scale)), max(1, round(width / scale))
        cy, cx = centre or (h / 2, w / 2)
        top = min(max(round(cy - kept_h / 2), 0), h - kept_h)
        left = min(max(round(cx - kept_w / 2), 0), w - kept_w)
        return resize(x[:, top : top + kept_h, left : left + kept_w], height, width), (top, left, kept_h, kept_w)
    raise ValueError(f"mode must be 'contain' or 'cover', not {mode!r}")


def canvas_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """(H, W) of the canvas for a picture: its longer side is `size`, the other the next multiple that contains it.

    So less than `multiple` pixels are padding. Raises BadInput unless size is itself a multiple.
    """
    if size < multiple or size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise BadInput(f"--size {size}: must be a multiple of {multiple}, such as {nearest}")
    longer = max(height, width) * multiple
    return -(-height * size // longer) * multiple, -(-width * size // longer) * multiple  # -(-a // b): a / b rounded up


# ---------------------------------------------------------------- data sets


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


def is_blank(image: Tensor, mask: Tensor) -> bool:
    """Whether the background is of one colour: the first thing that section 4 sorts out. (3, H, W), (1, H, W)."""
    near, part = BLANK
    background = image[:, mask[0] <= 1 - SOLID]  # (3, pixels)
    if not background.numel():
        return False
    distance = (background - background.median(dim=1, keepdim=True).values).abs().amax(dim=0)
    return bool((distance <= near).float().mean() >= part)


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


# ---------------------------------------------------------------- training sample


def load_ad(item: Item, size: int) -> tuple[Tensor, Tensor]:
    """An ad, background and all, and its mask: (3, size, size) and (1, size, size).

    The square of the picture's short side that is nearest to the product's centroid. Raises load_masked's errors.
    """
    image, mask = load_masked(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
    h, w = mask.shape[1:]
    y, x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    rows, columns = mask[0].sum(1), mask[0].sum(0)
    centre = float(rows @ y / rows.sum()), float(columns @ x / columns.sum())
    return fit(image, size, size, "cover", centre)[0], fit(mask, size, size, "cover", centre)[0]


class Ads(Dataset):
    """Training samples: {"image": (3, S, S), "mask": (1, S, S), "index": position in items}.

    A broken item is named once on stderr, its index kept in `broken`, and the next one taken in its place ("index"
    says which). Raises BadInput once more than 1% are broken. Each worker of a DataLoader has its own `broken`.
    """

    def __init__(self, items: list[Item], size: int):
        self.items, self.size, self.broken = items, size, {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        while index in self.broken:
            index = (index + 1) % len(self)
        try:
            image, mask = load_ad(self.items[index], self.size)
        except BadInput as error:
            self.broken[index] = str(error)
            print(f"skipped: {error}", file=sys.stderr)
            _tolerate(list(self.broken.values()), len(self), "data set")
            return self[index]
        return {"image": image, "mask": mask, "index": index}


def product_hint(image: Tensor, mask: Tensor) -> Tensor:
    """I ⊗ M, what CG sees. (..., 3, H, W) and (..., 1, H, W) -> (..., 3, H, W)."""
    return image * mask


def background_hint(image: Tensor, mask: Tensor) -> Tensor:
    """I ⊗ (1 − M), what PG sees of a reference. (..., 3, H, W) and (..., 1, H, W) -> (..., 3, H, W)."""
    return image * (1 - mask)


# ---------------------------------------------------------------- background perturbation, for PG's training


def dilate(mask: Tensor, theta: int) -> Tensor:
    """Eq. 5: Dilate(M | θ), the maximum over a window of θ x θ pixels around each. (1, H, W) -> (1, H, W)."""
    before, after = theta // 2, (theta - 1) // 2
    mask = F.pad(mask, (before, after, before, after))
    mask = F.max_pool2d(mask, (theta, 1), stride=1)  # a square's maximum is that of its columns' maxima:
    return F.max_pool2d(mask, (1, theta), stride=1)  # 2 θ comparisons a pixel in place of θ²


def perturb(
    image: Tensor, mask: Tensor, other: Tensor, generator: Generator, theta: int = THETA,
    sigma: tuple[float, float] = SIGMA
) -> Tensor:
    """PG's hint in training: a background in which neither the product's outline nor the elements can be just copied.

    image I, other I_rand (3, H, W), mask M (1, H, W) -> (3, H, W). theta in pixels of a 512 x 512 image, sigma the
    range of σ. Fig. 7 compares neither step (theta 0: no change of the mask; sigma 1 to 1: no mixup), the first, and
    both. All randomness is drawn from the CPU `generator`, so a run can be resumed.
    """
    h, w = mask.shape[1:]
    if theta:
        M_aug = dilate(mask, max(1, round(theta * min(h, w) / 512)))  # Eq. 5
        dy, dx = ((torch.rand(2, generator=generator) * 2 - 1) * TRANSLATION * torch.tensor([h, w])).int().tolist()
        moved = F.pad(M_aug, (dx, -dx, dy, -dy))
        # The union, so that the product itself stays hidden whatever is drawn
        M_aug = M_aug.maximum(moved).maximum(random_masks(h, w, generator))
    else:
        M_aug = mask
    low, high = sigma
    s = low + (high - low) * torch.rand((), generator=generator)  # σ
    I_aug = s * image + (1 - s) * other  # Eq. 6
    return I_aug * (1 - M_aug)  # the paper prints I_aug ⊗ M_aug, a slip: PG must see the background


def random_masks(h: int, w: int, generator: Generator) -> Tensor:
    """The union of up to EXTRA_MASKS rectangles and ellipses at random places, (1, h, w) of 0 and 1."""
    y, x = (torch.arange(h)[:, None] + 0.5) / h, (torch.arange(w)[None, :] + 0.5) / w  # (h, 1), (1, w) in [0, 1]
    low, high = EXTRA_RADII
    union = torch.zeros(h, w, dtype=torch.bool)
    for _ in range(torch.randint(EXTRA_MASKS + 1, (), generator=generator)):
        cy, cx, ry, rx, ellipse = torch.rand(5, generator=generator).tolist()
        dy, dx = ((y - cy) / (low + (high - low) * ry)).abs(), ((x - cx) / (low + (high - low) * rx)).abs()
        union |= (dy**2 + dx**2 < 1) if ellipse < 0.5 else (dy < 1) & (dx < 1)
    return union[None].float()


# ---------------------------------------------------------------- contact sheet


def thumbnail(picture: Tensor | Image.Image, side: int = 256) -> Image.Image:
    """A picture as an image, reduced where it is larger than `side` pixels."""
    image = to_image(picture) if isinstance(picture, Tensor) else picture
    return ImageOps.contain(image, (side, side)) if max(image.size) > side else image


def sheet(
    rows: list[list[Tensor | Image.Image | None]], labels: list[str] | None = None, row_labels: list[str] | None = None
) -> Image.Image:
    """Pictures side by side in cells of one size, the largest picture's, with white gaps. None leaves a cell empty.

    labels stand above the columns, row_labels to the left of the rows. Large pictures are reduced, see thumbnail.
    """
    rows = [[cell if cell is None else thumbnail(cell) for cell in row] for row in rows]
    w, h = (max(cell.size[axis] for row in rows for cell in row if cell) for axis in (0, 1))
    gap, text = 4, max(12, h // 16)
    font = ImageFont.load_default(text)
    left = int(max(map(font.getlength, row_labels))) + 2 * gap if row_labels else gap
    top = text + 3 * gap if labels else gap
    page = Image.new("RGB", (left + (w + gap) * max(map(len, rows)), top + (h + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(labels or []):
        draw.text((left + (w + gap) * column + w // 2, top // 2), label, "black", font, anchor="mm")
    for i, row in enumerate(rows):
        if row_labels:
            draw.text((left - gap, top + (h + gap) * i + h // 2), row_labels[i], "black", font, anchor="rm")
        for column, cell in enumerate(row):
            if cell:
                centred = (w - cell.width) // 2, (h - cell.height) // 2
                page.paste(cell, (left + (w + gap) * column + centred[0], top + (h + gap) * i + centred[1]))
    return page


def main(arguments: list[str] | None = None) -> None:
    """Check a data set: say what is in it, load every picture, tell blank backgrounds, draw eight as the generators see
    them."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("dir", type=Path, help="BG60k's root, or a folder with metadata.jsonl")
    parser.add_argument("--split", default="bg60k", help="bg60k (default), bg1k or bgpair")
    parser.add_argument("--sheet", metavar="FILE", help="draw eight items here: image, mask, CG's hint, PG's hint")
    parser.add_argument("--size", type=int, default=512, help="side of the training images in pixels (default 512)")
    parser.add_argument("--list", action="store_true",
                        help="first write metadata.jsonl, from DIR/CATEGORY/NAME.png and NAME_mask.png or alpha")
    parser.add_argument("--drop-blank", action="store_true",
                        help="take images with a blank background out of the list; the whole list stays as FILE.all")
    options = parser.parse_args(arguments)
    if options.size < 1:
        raise BadInput(f"--size {options.size}: must be at least 1")
    if options.sheet:
        check_folder(Path(options.sheet).parent, "--sheet")  # before an hour of loading

    if options.list:
        print(f"{list_folder(options.dir):,} pictures listed in {options.dir / 'metadata.jsonl'}")
    items, notes = read_items(options.dir, options.split)
    print("\n".join(notes))
    references = [replace(item, image=item.reference, mask=item.reference_mask) for item in items if item.reference]
    ads = Ads(items + references, options.size)
    shown, samples, broken, blank = set(range(0, len(items), -(-len(items) // 8))), [], [], []
    loader = DataLoader(ads, batch_size=None, num_workers=min(8, os.cpu_count()))
    for i, sample in enumerate(tqdm(loader, desc="loading", disable=not sys.stderr.isatty())):
        if sample["index"] != i:  # another was taken in its place
            broken.append(str(ads.items[i].image))
            continue
        if i < len(items) and is_blank(sample["image"], sample["mask"]):
            blank.append(items[i])
        if i in shown:
            samples.append(sample)
    _tolerate(broken, len(ads), options.dir)
    print(f"{len(ads) - len(broken):,} images load, {len(broken):,} are broken")
    print(f"{len(blank):,} have a blank background" + "".join(f"\n  {item.image}" for item in blank[:10])
          + f"\n  ... and {len(blank) - 10:,} more" * (len(blank) > 10))
    if options.drop_blank and blank:
        lines = options.dir / "metadata.jsonl"
        lines = lines if lines.is_file() else options.dir / f"{options.split}_info.txt"
        print(f"dropped from {lines}; the whole list is {drop_lines(lines, {item.line for item in blank})}")
    if options.sheet:
        generator, rows = Generator().manual_seed(0), []
        for sample, other in zip(samples, samples[1:] + samples[:1]):
            I, M = sample["image"], sample["mask"]
            rows.append([I, M, product_hint(I, M), perturb(I, M, other["image"], generator)])
        names = [items[sample["index"]].category for sample in samples]
        save_image(sheet(rows, ["image", "mask", "CG's hint", "PG's hint, perturbed"], names), options.sheet)


if __name__ == "__main__":
    with one_line_errors():
        main()
