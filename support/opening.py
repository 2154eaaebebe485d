"""Support: opens image files as 8-bit sRGB, and says what is wrong with others; not needed to understand the paper."""

import struct
import sys
import warnings
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps
from tqdm import tqdm

from support.cutouts import SOLID
from support.files import BadInput

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
