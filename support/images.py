"""Support: images to tensors, cut-outs, fitting to a canvas, contact sheets; not needed to understand the paper."""

import math
import sys
import warnings
from fractions import Fraction
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo, PngStream
from torch import Tensor
from tqdm import tqdm

from support.cutouts import SOLID, STORED, black_and_white, covers_border, edge_holds, pure_colours
from support.files import BadInput, write_atomic

AnyPath = Path | str

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # if Pillow opens them; JPEG: phones' MPO too
HEIC = b"heic", b"heix", b"hevc", b"mif1", b"msf1"  # bytes 8 to 11 of its files

Image.MAX_IMAGE_PIXELS = 120_000_000  # admits a phone's 108 megapixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # decode refuses them

SRGB = ImageCms.createProfile("sRGB")
THUMBNAIL, GAP = 256, 4  # pixels: the largest cells of a sheet, and what lies between them
# Display P3's red, green and blue as a profile holds them: X, Y, Z under D50, each as a 32-bit integer times 2⁻¹⁶
DISPLAY_P3 = {b"rXYZ": "000083df 00003dbf ffffffbb", b"gXYZ": "00004abf 0000b137 00000ab9",
              b"bXYZ": "00002838 0000110b 0000c8b9"}  # fmt: skip
LARGE = 4_000_000  # pixels; larger PNGs are compressed a little less, in a third of the time


@cache
def note(text: str) -> None:
    """Prints one line on stderr, once per process."""
    tqdm.write(f"note: {text}", file=sys.stderr)


# ---------------------------------------------------------------- opening


def decode(path: AnyPath) -> Image.Image:
    """The image in a file as it is stored, wholly decoded and upright; 16-bit grey becomes 8-bit. See open_image."""
    Image.init()  # the list of what this Pillow opens
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            take_cicp(image, path)
            ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise BadInput(f"{path}: not a readable image ({error.strerror}); give a picture that can be read") from None
    except Image.DecompressionBombError:
        raise BadInput(f"{path}: over {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
        with open(path, "rb") as file:
            fault = "HEIC, as phones write it" if file.read(12)[8:] in HEIC else error
        raise BadInput(f"{path}: not a readable image ({fault}); save it as PNG or JPEG") from error
    return eight_bits(image, path) if image.mode.startswith(("I", "F")) else image


def keep_cicp(stream: PngStream, position: int, length: int) -> bytes:
    """Keeps a PNG's cICP chunk, which Pillow would skip, in the image's info."""
    stream.im_info["cicp"] = chunk = stream.fp.read(length)
    return chunk


PngStream.chunk_cICP = keep_cicp


def take_cicp(image: Image.Image, path: AnyPath) -> None:
    """Turns the colours that a cICP chunk names, which go before a profile, into the image's profile. Only sRGB and
    Display P3 are known; others, such as HDR's PQ and HLG, are named in a note.
    """
    code = image.info.pop("cicp", b"")[:2]  # primaries, transfer
    if code == b"\1\r":
        image.info.pop("icc_profile", None)
    elif code == b"\f\r":
        profile = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())  # it has the same curve
        for tag, xyz in DISPLAY_P3.items():
            start = profile.index(tag) + 4  # of the offset to its data, whose first 8 bytes are a heading
            start = int.from_bytes(profile[start : start + 4], "big") + 8
            profile[start : start + 12] = bytes.fromhex(xyz)
        image.info["icc_profile"] = bytes(profile)
    elif code:
        note(f"{path}: its cICP chunk names the colours {[*code]} (PQ is 16, HLG 18), which are not converted; for the "
             "right ones save it as sRGB")


def eight_bits(image: Image.Image, path: AnyPath) -> Image.Image:
    """16-bit grey -> an L or LA image. Masks and label maps that a program widened from 8 bits keep their numbers."""
    grey, info = np.asarray(image), image.info
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise BadInput(f"{path}: holds 32-bit numbers, whose white is unknown; save it as PNG or JPEG")
    image = Image.fromarray((grey if grey.max() <= 255 else (grey / 257).round()).astype(np.uint8))
    if (clear := info.pop("transparency", None)) is not None:  # the level that is transparent
        image.putalpha(Image.fromarray(grey != clear).convert("L"))
    image.info = info
    return image


def take_alpha(image: Image.Image) -> Image.Image | None:
    """An image's transparency as a channel, or None if it is opaque. Its transparent colour, if any, is removed."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    image.info.pop("transparency", None)
    return alpha if alpha.getextrema()[0] < SOLID * 255 else None


def in_srgb(image: Image.Image, path: AnyPath) -> Image.Image:
    """An image of any mode -> RGB in sRGB, converted by its embedded profile.

    A profile that moves no colour by more than a level, as sRGB's own, changes nothing. A broken profile, or one for
    another kind of picture, is ignored with a note.
    """
    if image.mode not in ("RGB", "CMYK", "LAB", "L"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    plain, profile = image.convert("RGB"), image.info.get("icc_profile")
    if profile:
        try:
            source = plain if image.mode == "L" and profile[16:20] == b"RGB " else image  # grey may have RGB's profile
            managed = ImageCms.profileToProfile(source, BytesIO(profile), SRGB, outputMode="RGB")
            change = max(high for _, high in ImageChops.difference(plain, managed).getextrema())
            return managed if change > 1 else plain
        except ImageCms.PyCMSError:
            note(f"{path}: its colour profile is broken, or for another kind of picture; the colours are taken as sRGB")
    if image.mode == "CMYK":
        note(f"{path}: CMYK without a profile, so its colours are a guess; for the right ones save it as sRGB")
    return plain


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


# ---------------------------------------------------------------- tensors and back


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit image of C channels -> (C, H, W) float32 in [0, 1]."""
    x = torch.tensor(np.atleast_3d(image))  # (H, W, C)
    return x.permute(2, 0, 1).contiguous().float().div_(255)


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8 from 0 to 255."""
    return x.float().clamp(0, 1).mul_(255).round_().byte()


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) or (1, H, W), float in [0, 1] or uint8, -> an RGB or grey image; the inverse of to_tensor."""
    x = x.detach().cpu()
    x = x if x.dtype == torch.uint8 else to_bytes(x)
    return Image.fromarray(x.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def save_image(image: Tensor | Image.Image, path: AnyPath, text: dict[str, str] | None = None) -> None:
    """Writes a tensor (as in to_image) or an sRGB image as PNG, whatever the name's suffix; `text` is stored in it.

    PNG's sRGB chunk says what the numbers mean, so no viewer has to guess.
    """
    image = to_image(image) if isinstance(image, Tensor) else image
    chunks = PngInfo()
    chunks.add(b"sRGB", b"\0")  # perceptual, as for photos
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value.encode("utf-8", "backslashreplace").decode())  # file names may not be UTF-8
    level = 1 if image.width * image.height >= LARGE else 6  # of compression
    write_atomic(path, lambda new: image.save(new, "PNG", pnginfo=chunks, icc_profile=None, compress_level=level))


# ---------------------------------------------------------------- products and their masks


def open_mask(path: AnyPath) -> Image.Image:
    """The mask in a file as an 8-bit grey image, its values as stored: its alpha channel if any, else its luminance."""
    image = decode(path)
    return take_alpha(image) or image.convert("L")


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
    if mask_path:
        mask, source = open_mask(mask_path), f"mask {mask_path}"
        mask = ImageOps.invert(mask) if inverted else mask
    elif image.mode == "RGBA":
        mask, source = image.getchannel("A"), f"alpha channel of {what} {image_path}"
    else:
        raise BadInput(f"{what} {image_path} has no alpha channel: give its mask (white on the product) by {option}")
    if mask.size != image.size:
        raise BadInput(f"{source} is {mask.width} x {mask.height} pixels, but {what} {image_path} is {image.width} x "
                       f"{image.height}: give one of the same size by {option}")
    histogram = np.array(mask.histogram())  # pixels of each level
    if fault := mask_fault(histogram):
        raise BadInput(f"{source} {fault}; or give another by {option}")
    black, white = black_and_white(histogram)
    rgb, mask = to_tensor(image.convert("RGB")), to_tensor(mask)
    if covers_border(mask):
        doubt = ("is it white on the background? It must be white on the product" if mask_path else
                 "there is no room for a background; generate.py --margin makes some")
        note(f"{source} covers the picture's border on all sides; {doubt}")
    return rgb, mask.sub_(black / 255).div_((white - black) / 255).clamp_(0, 1)


def mask_fault(histogram: np.ndarray) -> str | None:
    """What is wrong with a mask, and the remedy; None if nothing is."""
    levels = histogram.nonzero()[0].tolist()
    if levels[0] < 128 <= levels[-1]:
        return None
    if 0 < levels[-1] < 128 and len(levels) <= 64:
        return f"looks like a label map (levels {str(levels)[1:-1]} of 255): make the product's label 255, the others 0"
    fault = "covers the whole picture" if levels[0] >= 128 else "is empty"
    return f"{fault}: it must be white (opaque) on the product alone"


def load_cutout(
    image_path: AnyPath, mask_path: AnyPath | None = None, what: str = "product", option: str = "--mask", inverted=False
) -> tuple[Tensor, Tensor]:
    """The product alone: rgb (3, H, W) and M (1, H, W), such that rgb ⊗ M + scene ⊗ (1 − M) has no old background.

    Arguments and errors are load_masked's. With a mask file, colours at soft edges are mixed with the background (see
    unmix_edges); with an alpha channel they may also be the product's own, or multiplied by alpha (see edge_holds).
    Where M = 0 the product's colours are continued, so resizing mixes in nothing else.
    """
    rgb, mask = load_masked(image_path, mask_path, what, option, inverted)
    return pure_colours(rgb, mask, STORED if mask_path else edge_holds(rgb, mask)), mask


# ---------------------------------------------------------------- fitting


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) -> (C, height, width), antialiased bicubic, kept within [0, 1]."""
    if x.shape[1:] == (height, width):
        return x
    return F.interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp_(0, 1)


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
    scale = max(height / h, width / w)
    kept_h, kept_w = max(1, round(height / scale)), max(1, round(width / scale))
    cy, cx = centre or (h / 2, w / 2)
    top = min(max(round(cy - kept_h / 2), 0), h - kept_h)
    left = min(max(round(cx - kept_w / 2), 0), w - kept_w)
    return resize(x[:, top : top + kept_h, left : left + kept_w], height, width), (top, left, kept_h, kept_w)


def canvas_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """(H, W) of the canvas for a picture: its longer side is `size`, the other is rounded up to a multiple.

    So fewer than `multiple` pixels are padding. Raises BadInput unless size is itself a multiple.
    """
    if size < multiple or size % multiple:
        raise BadInput(f"--size {size}: must be a multiple of {multiple}, such as "
                       f"{max(1, round(size / multiple)) * multiple}")
    longer = max(height, width) * multiple
    return -(-height * size // longer) * multiple, -(-width * size // longer) * multiple  # -(-a // b): a / b rounded up


def grow_frame(rgb: Tensor, mask: Tensor, margin: float, aspect: Fraction | None,
               name: AnyPath) -> tuple[Tensor, Tensor]:
    """Adds pixels around a picture (3, H, W) and its mask (1, H, W) until on each side of the product's box at least
    `margin` of the frame is free, and the width is `aspect` times the height. Nothing is cut off or resampled.

    Raises BadInput, with the file's name, if the frame would be larger than pictures may be.
    """
    left, right = missing_room(mask[0].amax(0), margin)
    top, bottom = missing_room(mask[0].amax(1), margin)
    h, w = mask.shape[1] + top + bottom, mask.shape[2] + left + right
    if aspect:
        wider, higher = max(0, round(h * aspect) - w), max(0, round(w / aspect) - h)
        left, right = left + wider // 2, right + (wider + 1) // 2
        top, bottom = top + higher // 2, bottom + (higher + 1) // 2
        h, w = h + higher, w + wider
    if h * w > Image.MAX_IMAGE_PIXELS:
        raise BadInput(f"{name}: --margin and --aspect would make over {Image.MAX_IMAGE_PIXELS:,} pixels of it; give a "
                       "smaller picture")
    pad = (left, right, top, bottom)
    return F.pad(rgb, pad, mode="replicate"), F.pad(mask, pad)


def missing_room(line: Tensor, margin: float) -> tuple[int, int]:
    """How many pixels to add before and after a line of mask values (n,), so that both sides of the product in it are
    at least `margin` of the whole.
    """
    n, inside = len(line), (line > line.max() / 10).nonzero().flatten().tolist()
    before, after = inside[0], n - 1 - inside[-1]
    # the longest that is needed if no side grows, the one, the other, or both
    whole = max(n, (n - before) / (1 - margin), (n - after) / (1 - margin), (n - before - after) / (1 - 2 * margin))
    free = math.ceil(margin * whole)
    return max(0, free - before), max(0, free - after)


# ---------------------------------------------------------------- small pictures


def thumbnail(picture: Tensor | Image.Image, side: int = THUMBNAIL, mask: Tensor | None = None) -> Image.Image:
    """A picture as an image, reduced if it is larger than `side` pixels; white outside the mask (1, H, W)."""
    if mask is not None:
        picture = picture * mask + 1 - mask
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
    gap, text = GAP, max(12, h // 16)
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
            if cell:  # in the middle
                x, y = left + (w + gap) * column + (w - cell.width) // 2, top + (h + gap) * i + (h - cell.height) // 2
                page.paste(cell, (x, y))
    return page
