"""Support: images to tensors, cut-outs, fitting to a canvas, contact sheets; not needed to understand the paper."""


import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from support.cutouts import (
    PREMULTIPLIED,
    SOLID,
    STORED,
    black_and_white,
    covers_border,
    divide,
    edge_holds,
    extend,
    strips,
    unmix_edges,
)
from support.files import BadInput, write_atomic

AnyPath = Path | str

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # if Pillow opens them; JPEG: phones' MPO too

Image.MAX_IMAGE_PIXELS = 120_000_000  # admits a phone's 108 megapixels, at 27 bytes a pixel until saved
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses them

SRGB = ImageCms.createProfile("sRGB")
SRGB_XY = np.array([[0.3127, 0.3290], [0.64, 0.33], [0.30, 0.60], [0.15, 0.06]])  # xy of its white, red, green, blue
D50 = np.array([0.9642, 1, 0.8249])  # XYZ
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # XYZ to cones


@cache
def note(text: str) -> None:
    """Prints one line on stderr, once per process."""
    tqdm.write(f"note: {text}", file=sys.stderr)


# ---------------------------------------------------------------- opening

STARTS = {  # how files start that people mistake for pictures
    b"<svg": "an SVG drawing", b"<?xml": "an SVG drawing or another XML file", b"<": "a web page", b"{": "a JSON file",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the picture)", b"%pdf": "a PDF document",
    b"%!ps": "a PostScript file", b"8bps": "a Photoshop document", b"gimp xcf": "a GIMP document",
    b"pk\3\4": "a ZIP archive", b"\xff\x0a": "a JPEG XL picture", b"\0\0\0\x0cjxl": "a JPEG XL picture",
    b"\0\0\0\x0cjp": "a JPEG 2000 picture",
    b"\xff\x4f\xff\x51": "a JPEG 2000 picture", b"fujifilm": "a camera's raw file", b"\0\0\1\0": "an icon",
    b"#?radiance": "a Radiance HDR picture", b"v/1\1": "an OpenEXR picture"}
BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC",
          b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}  # of ISO media files
RAW = ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".pef", ".srw"  # many are TIFFs that hold a small preview


def unreadable(path: AnyPath) -> str:
    """What a file is that Pillow can't read, judged by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        return "an empty file"
    if Path(path).suffix.lower() in RAW:
        return "a camera's raw file"
    if head[4:8] == b"ftyp":
        brand = BRANDS.get(head[8:12])
        return f"a picture in {brand} format" if brand else "a video"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, kind in STARTS.items():
        if text.startswith(start) or head.lower().startswith(start):
            return kind
    if head[:2] in (b"II", b"MM") and b"*" in head[2:4]:
        return "a damaged TIFF, or one with numbers that are not read here (32-bit or floating point)"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")):
        return "damaged or cut short"
    return "a text file" if text and all(byte >= 32 or byte in b"\t\r\n" for byte in head) else "of an unknown format"


def decode(path: AnyPath) -> Image.Image:
    """The image in a file as it is stored, wholly decoded and upright; 16-bit grey becomes 8-bit. See open_image."""
    Image.init()  # the list of what this Pillow opens
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if Path(path).suffix.lower() in RAW:
                raise Image.UnidentifiedImageError
            sixteen = image.format == "PNG" and ";16" in str(image.tile[0][3])
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: not a readable image: it is a folder; give a picture") from None
    except PermissionError:
        raise BadInput(f"{path}: can't be read; change its permissions") from None
    except Image.DecompressionBombError:
        raise BadInput(f"{path}: over {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
        raise BadInput(f"{path}: not a readable image: it is {unreadable(path)}; "
                       "save the picture as PNG or JPEG") from error
    clear = image.info.get("transparency")
    if image.mode == "F":
        raise BadInput(f"{path}: holds 32-bit floating-point numbers, whose white is unknown; save it as PNG or JPEG")
    if image.mode.startswith("I"):
        image = eight_bits(np.asarray(image), clear, image.info, path)
    elif sixteen and isinstance(clear, tuple):  # Pillow halves the pixels' bits, not those of the clear colour
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image


def eight_bits(grey: np.ndarray, clear: int | None, info: dict, path: AnyPath) -> Image.Image:
    """16-bit grey -> an L or LA image. `clear` is its transparent level. Masks and label maps that some program widened
    from 8 bits keep their numbers.
    """
    if grey.min() < 0 or grey.max() > 65535:
        raise BadInput(f"{path}: holds 32-bit numbers, whose white is unknown; save it as PNG or JPEG")
    image = Image.fromarray((grey if grey.max() <= 255 else (grey / 257).round()).astype(np.uint8))
    if clear is not None:
        image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    image.info = {key: value for key, value in info.items() if key != "transparency"}
    return image


def take_alpha(image: Image.Image) -> Image.Image | None:
    """An image's transparency as a channel, or None if it is opaque. Its transparent colour, if any, is removed."""
    if not image.has_transparency_data:
        return None
    alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
    image.info.pop("transparency", None)
    return alpha if alpha.getextrema()[0] < SOLID * 255 else None


def open_image(path: AnyPath) -> Image.Image:
    """The image in a file, in sRGB, wholly decoded, turned upright by its EXIF tag: RGBA if it is transparent, else
    RGB. An animation gives its first picture.

    Raises BadInput if the file is missing, empty, cut short, not an image in FORMATS, or above MAX_IMAGE_PIXELS.
    """
    image = decode(path)
    alpha = take_alpha(image)
    image = in_srgb(image, path)
    if alpha:
        image.putalpha(alpha)
    return image


# ---------------------------------------------------------------- colours


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode, converted if it has another."""
    return image if image.mode == mode else image.convert(mode)


def in_srgb(image: Image.Image, path: AnyPath) -> Image.Image:
    """An image of any mode -> RGB in sRGB, converted by its embedded profile.

    sRGB's own profiles change nothing. A broken profile, or one for another kind of picture, is ignored with a note.
    """
    if image.mode not in ("RGB", "CMYK", "LAB", "L"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    try:
        if profile := image.info.get("icc_profile") or chunks_profile(image.info):
            mode, transform = transform_of(profile)
            if mode != image.mode and (image.mode, mode) != ("L", "RGB"):
                raise ImageCms.PyCMSError
            image = as_mode(image, mode)
            return ImageCms.applyTransform(image, transform) if transform else as_mode(image, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, ArithmeticError, struct.error):
        note(f"{path}: its colour profile is broken, or for another kind of picture; the colours are taken as sRGB")
    if image.mode == "CMYK":
        note(f"{path}: CMYK without a profile, so its colours are a guess; for the right ones save it as sRGB")
    return as_mode(image, "RGB")


@lru_cache(maxsize=16)
def transform_of(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of the pictures that a profile is for, and the transform to sRGB; None if that changes nothing.

    Raises ImageCms's errors for broken profiles.
    """
    opened = ImageCms.ImageCmsProfile(BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[opened.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(opened, SRGB, mode, "RGB")
    if mode in ("RGB", "L"):
        ramp = Image.linear_gradient("L")
        probe = Image.merge("RGB", (ramp, ramp.rotate(90), Image.radial_gradient("L"))) if mode == "RGB" else ramp
        change = ImageChops.difference(ImageCms.applyTransform(probe, transform), probe.convert("RGB"))
        if max(high for _, high in change.getextrema()) <= 1:
            return mode, None
    return mode, transform


def chunks_profile(info: dict) -> bytes | None:
    """A PNG's gAMA and cHRM as an ICC profile, as browsers read them: only if both are there without an sRGB chunk.

    None otherwise, and for sRGB's own values: many programs write these without the sRGB chunk.
    """
    if "srgb" in info or "gamma" not in info or "chromaticity" not in info:
        return None
    exponent, xy = 1 / info["gamma"], np.array(info["chromaticity"]).reshape(4, 2)  # of white, red, green, blue
    if abs(exponent - 2.2) < 0.02 and np.abs(xy - SRGB_XY).max() < 0.01:
        return None
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in xy.tolist())  # XYZ
    primaries = np.stack(primaries, axis=1)
    primaries = primaries * np.linalg.solve(primaries, white)  # their sum is white
    cones = BRADFORD @ primaries
    primaries = np.linalg.solve(BRADFORD, cones * (BRADFORD @ D50 / (BRADFORD @ white))[:, None])  # ICC's white is D50

    fixed = struct.Struct(">3i")  # fixed-point numbers, in units of 1/65536
    parts = [b"XYZ \0\0\0\0" + fixed.pack(*(round(v * 65536) for v in column)) for column in primaries.T]
    parts.append(b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(exponent * 256)))
    names, start, table = (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"), 128 + 4 + 6 * 12, b""
    for i, name in enumerate(names):
        part = parts[min(i, 3)]  # one curve for all three channels
        table += name + struct.pack(">II", start + 20 * min(i, 3), len(part))
    body = struct.pack(">I", len(names)) + table + b"".join(parts)
    head = struct.pack(">I4sI4s4s4s12x4s", 128 + len(body), b"", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return head.ljust(68, b"\0") + fixed.pack(*(round(v * 65536) for v in D50)) + bytes(48) + body


LARGE = 4_000_000  # pixels; larger PNGs are compressed a little less, in a third of the time


# ---------------------------------------------------------------- tensors and back


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit image of C channels -> (C, H, W) float32 in [0, 1]."""
    w, h = image.size
    x = torch.empty(len(image.getbands()), h, w)
    for rows in strips(h, w):
        strip = np.array(image.crop((0, rows.start, w, rows.stop)))  # (rows, W) or (rows, W, C)
        x[:, rows] = torch.from_numpy(strip).view(*strip.shape[:2], -1).permute(2, 0, 1) / 255
    return x


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8 from 0 to 255."""
    return (x.float().clamp(0, 1) * 255).round().byte()


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) or (1, H, W), float in [0, 1] or uint8, -> an RGB or grey image; the inverse of to_tensor."""
    image = Image.new("L" if len(x) == 1 else "RGB", (x.shape[2], x.shape[1]))
    for rows in strips(*x.shape[1:]):
        strip = x[:, rows].detach().cpu()
        strip = strip if strip.dtype == torch.uint8 else to_bytes(strip)
        image.paste(Image.fromarray(strip.permute(1, 2, 0).squeeze(2).numpy()), (0, rows.start))
    return image


def save_image(image: Tensor | Image.Image, path: AnyPath, text: dict[str, str] | None = None) -> None:
    """Writes a tensor (as in to_image) or an sRGB image as PNG, whatever the name's suffix; `text` is stored in it.

    PNG's sRGB chunk says what the numbers mean, so no viewer has to guess.
    """
    image = to_image(image) if isinstance(image, Tensor) else image
    chunks = PngInfo()
    chunks.add(b"sRGB", b"\0")  # perceptual, as for photos
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value.encode("utf-8", "backslashreplace").decode())  # file names may not be UTF-8
    large = image.width * image.height >= LARGE
    how = dict(compress_level=1, compress_type=zlib.Z_RLE) if large else {}
    write_atomic(path, lambda new: image.save(new, format="PNG", pnginfo=chunks, icc_profile=None, **how))


# ---------------------------------------------------------------- products and their masks


def open_mask(path: AnyPath) -> tuple[Image.Image, str]:
    """The mask in a file as an 8-bit grey image, its values as stored, and its name for messages."""
    image = decode(path)
    alpha = take_alpha(image)
    return (alpha, f"alpha channel of mask {path}") if alpha else (as_mode(image, "L"), f"mask {path}")


def load_mask(path: AnyPath) -> Tensor:
    """The mask in a file, (1, H, W) in [0, 1]: its alpha channel where it has one, else its luminance."""
    return to_tensor(open_mask(path)[0])


def load_masked(
    image_path: AnyPath, mask_path: AnyPath | None = None, what: str = "product", option: str = "--mask", inverted=False
) -> tuple[Tensor, Tensor]:
    """A picture as it is stored, background and all, (3, H, W), and its product's mask, (1, H, W).

    The mask is read from mask_path, 1 on the background if `inverted`; without a path, it is the picture's own alpha
    channel. A raised black and a grey white become 0 and 1, see black_and_white.
    Raises BadInput if there is no mask, or if it is empty, covers everything or has another size than the picture.
    The message calls the picture `what` and names the `option` that gives a mask.
    """
    image = open_image(image_path)
    if mask_path is None and image.mode == "RGB":
        raise BadInput(f"{what} {image_path} has no alpha channel: give its mask (white on the product) by {option}")
    mask, source = open_mask(mask_path) if mask_path else (
        image.getchannel("A"), f"alpha channel of {what} {image_path}")
    if mask.size != image.size:
        (w, h), (mask_w, mask_h) = image.size, mask.size
        raise BadInput(f"{source} is {mask_w} x {mask_h} pixels, but {what} {image_path} is {w} x {h}: "
                       f"give one of the same size by {option}")
    mask = ImageOps.invert(mask) if inverted and mask_path else mask
    check_mask(mask, source, option)
    black, white = black_and_white(mask)
    rgb, mask = to_tensor(as_mode(image, "RGB")), to_tensor(mask)
    if (black, white) != (0, 255):
        mask.sub_(black / 255).div_((white - black) / 255).clamp_(0, 1)
    return rgb, mask


def check_mask(mask: Image.Image, source: str, option: str) -> None:
    """Raises BadInput for a mask that is empty, covers all or is a label map; prints a note if it seems inverted."""
    low, high = mask.getextrema()
    labels = mask.getcolors(maxcolors=64)  # [(pixels, level), ...], or None where there are more
    if 0 < high < 128 and labels:
        some = ", ".join(str(level) for _, level in sorted(labels, key=lambda label: label[1])[:4])
        raise BadInput(f"{source} looks like a label map (levels {some}{', ...' if len(labels) > 4 else ''} of 255): "
                       f"make the product's label 255 and the others 0, or give another by {option}")
    if high < 128:
        raise BadInput(f"{source} is empty: it must be white (opaque) on the product; give another by {option}")
    if low >= 128:
        raise BadInput(f"{source} covers the whole picture: it must be black (transparent) on the background; "
                       f"give another by {option}")
    if covers_border(mask):
        note(f"{source} covers the picture's border on all sides; is it white on the background? It must be white on "
             "the product")


def load_cutout(
    image_path: AnyPath, mask_path: AnyPath | None = None, what: str = "product", option: str = "--mask", inverted=False
) -> tuple[Tensor, Tensor]:
    """The product alone: rgb (3, H, W) and M (1, H, W), such that rgb ⊗ M + scene ⊗ (1 − M) has no old background.

    Arguments and errors are load_masked's. With a mask file, colours at soft edges are mixed with the background (see
    unmix_edges); with an alpha channel they may also be the product's own, or multiplied by alpha (see edge_holds).
    Where M = 0 the product's colours are continued, so resizing mixes in nothing else.
    """
    rgb, mask = load_masked(image_path, mask_path, what, option, inverted)
    holds = STORED if mask_path else edge_holds(rgb, mask)
    if holds == STORED:
        unmix_edges(rgb, mask, out=rgb)
    elif holds == PREMULTIPLIED:
        divide(rgb, mask)
    else:
        extend(rgb, mask > 0, out=rgb)
    return rgb, mask


# ---------------------------------------------------------------- fitting


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) -> (C, height, width), antialiased bicubic, kept within [0, 1]."""
    if x.shape[1:] == (height, width):
        return x
    return F.interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def resized_strips(x: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields resize(x, height, width) in strips of n rows, to save memory: (slice of rows, (C, n, width))."""
    h = x.shape[1]
    wide = F.interpolate(x[None], size=(h, width), mode="bicubic", antialias=True)[0]
    identity = torch.eye(h)[None, None]
    weights = F.interpolate(identity, size=(height, h), mode="bicubic", antialias=True)[0, 0]  # (height, h)
    for rows in strips(height, width):
        used = weights[rows].any(dim=0).nonzero()
        used = slice(int(used[0]), int(used[-1]) + 1)  # rows of x
        yield rows, torch.einsum("yh,chx->cyx", weights[rows, used], wide[:, used]).clamp(0, 1)


def fit(
    x: Tensor, height: int, width: int, mode: str, centre: tuple[float, float] | None = None
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Scales x (C, H, W) to (C, height, width) without stretching it; also returns a box (top, left, h, w).

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
    """(H, W) of the canvas for a picture: its longer side is `size`, the other is rounded up to a multiple.

    So fewer than `multiple` pixels are padding. Raises BadInput unless size is itself a multiple.
    """
    if size < multiple or size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise BadInput(f"--size {size}: must be a multiple of {multiple}, such as {nearest}")
    longer = max(height, width) * multiple
    return -(-height * size // longer) * multiple, -(-width * size // longer) * multiple  # -(-a // b): a / b rounded up


# ---------------------------------------------------------------- small pictures


def thumbnail(picture: Tensor | Image.Image, side: int = 256, mask: Tensor | None = None) -> Image.Image:
    """A picture as an image, reduced if it is larger than `side` pixels; white outside the mask (1, H, W)."""
    if mask is not None:
        scale = min(1, side / max(mask.shape))
        h, w = (max(1, round(scale * length)) for length in mask.shape[1:])
        mask = resize(mask, h, w)
        picture = resize(picture, h, w) * mask + 1 - mask
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
