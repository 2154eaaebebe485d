"""Support: files to tensors, cut-outs, fitting to a canvas, contact sheets; not needed to understand the paper."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from support.files import BadInput, write_atomic

AnyPath = Path | str

SOLID = 0.99  # from this M on a pixel is all product: its colour is never touched

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO")  # MPO: the JPEG of many phones


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


def save_image(image: Tensor | Image.Image, path: AnyPath, text: dict[str, str] | None = None) -> None:
    """Write a tensor (as in to_image) or an image as PNG, whatever the name's suffix, with text chunks by keyword."""
    image, chunks = to_image(image) if isinstance(image, Tensor) else image, PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value)
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))


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
