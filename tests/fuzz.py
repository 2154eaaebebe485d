"""Tests: broken files for tests/faults.py. A case damages one file in its folder and names a command that reads it.

Everything is decided by the case's random generator. Paths are relative to the case's folder, which holds tiny/: the
models and ads that faults.py makes, and what write_originals adds to them.
"""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

import data
import generate
import weights
from sampler import Schedule
from support.images import load_cutout
from weights import load_control, load_stable_diffusion

# ---------------------------------------------------------------- commands


def read_models(_) -> None:
    """Instead of a command: reads all weights."""
    sd = load_stable_diffusion("tiny/base")
    branches = load_control("tiny/cg", "category"), load_control("tiny/pg", "personality")
    for network in (sd.unet, sd.vae, sd.text_encoder, *branches):
        for tensor in network.state_dict().values():
            tensor.sum()


def read_product(files: list[str]) -> None:
    """Instead of a command: reads a product as all commands do."""
    load_cutout(*files)


MODELS = ["--weights", "tiny/base", "--cg", "tiny/cg", "--pg", "tiny/pg", "--device", "cpu", "--dtype", "float32"]
PAINT = [*MODELS, "--steps", 1]
PRODUCT, MASK = "tiny/ads/bg1k_imgs_0/000000.png", "tiny/ads/bg1k_masks_0/000000.png"
REFERENCE, REFERENCE_MASK = "tiny/ads/bg1k_imgs_0/ref_000000.png", "tiny/ads/bg1k_masks_0/ref_000000.png"
PAINT_PRODUCT = generate.main, [*PAINT, "--category", "watch", "--product", PRODUCT]
PAINT_AD = generate.main, [*PAINT_PRODUCT[1], "--mask", MASK,
                           "--reference", REFERENCE, "--reference-mask", REFERENCE_MASK]
PAIRS = ["--data", "tiny/ads", "--split", "bgpair"]
PAINT_PAIRS = generate.main, [*PAINT, *PAIRS, "--limit", 2]
GO_ON = generate.main, [*PAINT_PAIRS[1], "--out", "tiny/out"]
CHECK_PAIRS = data.main, ["tiny/ads", "--size", 32, "--split", "bgpair"]
PAINT_LIST = generate.main, [*PAINT, "--data", "tiny/list", "--limit", 2]
CHECK_LIST = data.main, ["tiny/list", "--size", 32]
READ_MODELS = read_models, []
READ_PRODUCT, READ_CUTOUT = (read_product, [PRODUCT, MASK]), (read_product, [PRODUCT])
CONVERT = weights.main, ["convert", "in.ckpt", "out.safetensors"]

# ---------------------------------------------------------------- the originals

FORMATS = {"JPEG": "RGB CMYK L", "MPO": "RGB", "PNG": "RGB RGBA P LA I;16 1", "WEBP": "RGB RGBA", "BMP": "RGB P",
           "GIF": "P", "TIFF": "RGB RGBA CMYK F", "AVIF": "RGB RGBA"}  # of pictures, with their modes


def write_originals(tiny: Path) -> None:
    """Adds pictures in all formats, checkpoints, a schedule, a folder with metadata.jsonl, and one with a manifest."""
    for folder in ("pictures", "checkpoints", "base/scheduler"):
        (tiny / folder).mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    clear = Image.fromarray(noise, "RGBA").resize((64, 48))
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif[0x0112] = 6  # orientation
    for name, modes in FORMATS.items():
        for mode in modes.split():
            image = (clear if "A" in mode else clear.convert("RGB")).convert(mode)
            options = {"exif": exif, "icc_profile": profile} if mode == "RGB" else {}
            image.save(tiny / "pictures" / f"{name} {mode}", name, **options)

    for zipped in (True, False):
        torch.save({"state_dict": {"a": torch.ones(3, 2).half(), "b": torch.zeros(4)}, "epoch": 3},
                   tiny / "checkpoints" / f"{zipped}", _use_new_zipfile_serialization=zipped)
    schedule = Schedule().config | {"beta_schedule": "scaled_linear", "trained_betas": None}
    (tiny / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    shutil.copytree(tiny / "ads", tiny / "list")
    files = {"file_name": PRODUCT, "mask": MASK, "reference": REFERENCE, "reference_mask": REFERENCE_MASK}
    line = json.dumps({name: file.removeprefix("tiny/ads/") for name, file in files.items()} | {"category": "watch"})
    (tiny / "list" / "metadata.jsonl").write_text(f"{line}\n" + line.replace("000000", "000001"))
    program, arguments = GO_ON
    program([str(argument) for argument in arguments])


# ---------------------------------------------------------------- damage

SIZES = (255, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
ODD = (*SIZES, -1, 0, 1, 7, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 10**4, "\ud800", "/etc/passwd",
       "../x", "C:\\x", "a\nb", "\0", "\x1b[2J", "F8_E4M3", None, True, [], {}, [2**40] * 4, [[[]]], {"a": {}},
       ["CrossAttnDownBlock2D"] * 1000)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, lost, added, repeated or overwritten, most often at the start, where the structure is."""
    at, n = int(len(content) * rng.random() ** 2), rng.choice((1, 4, 100, 5000))
    hit, size = content[at : at + n], rng.choice(SIZES).to_bytes(8, rng.choice(("little", "big")))
    new = rng.choice((b"", rng.randbytes(n), bytes(n), hit * 50, size, size[:4], size[4:],
                      bytes(byte ^ rng.choice((0, 0, 1, 128)) for byte in hit)))
    return content[:at] + new + rng.choice((content[at + n :], content[at + len(new) :], b""))


def odd_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON object in which one value is odd or another's, or one name; or damaged bytes."""
    if rng.random() < 0.25:
        return rng.choice((damage(content, rng), b"[" * 10**5))
    node = root = json.loads(content)
    while rng.random() < 0.8:
        values = node.values() if isinstance(node, dict) else node
        node = rng.choice([value for value in values if value and isinstance(value, (dict, list))] or [node])
    keys = [*node] if isinstance(node, dict) else range(len(node))
    key = rng.choice(keys)
    if isinstance(node, dict) and rng.random() < 0.3:
        node[rng.choice(("", "unknown", "\ud800"))] = node.pop(key)
    else:
        node[key] = rng.choice((rng.choice(ODD), node[rng.choice(keys)]))
    return json.dumps(root).encode("utf-8", "surrogatepass")


def odd_line(content: bytes, rng: random.Random) -> bytes:
    """JSON lines, one of them odd."""
    lines = content.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = odd_json(lines[i], rng)
    return b"\n".join(lines) + b"\n"


def odd_cell(content: bytes, rng: random.Random) -> bytes:
    """A table with an odd cell or delimiter; or damaged bytes."""
    cells = re.split(rb"(\s)", content)
    cells[rng.randrange(len(cells))] = str(rng.choice(ODD)).encode("utf-8", "surrogatepass")
    return rng.choice((damage(content, rng), b"".join(cells)))


def split_file(content: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and its tensors' bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def odd_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with an odd header, perhaps of a false length; or damaged bytes."""
    header, body = split_file(content)
    text = odd_json(json.dumps(header).encode(), rng)
    length = rng.choice([len(text)] * 20 + [*SIZES])
    return rng.choice((damage(content, rng), struct.pack("<Q", length) + text + body))


KINDS = {  # count, the files in tiny/, how they are damaged, where they go [in place], commands that read them
    "safetensors": (2000, "*/**/*.safetensors", odd_header, [], [*[READ_MODELS] * 3, PAINT_AD]),
    "pictures": (1500, "pictures/*", damage, [PRODUCT, MASK, REFERENCE],
                 [*[READ_PRODUCT, READ_CUTOUT] * 2, PAINT_PRODUCT, PAINT_AD]),
    "config.json": (500, "*/**/*[gb].json", odd_json, [], [READ_MODELS, PAINT_AD]),
    "metadata.jsonl": (125, "list/metadata.jsonl", odd_line, [], [CHECK_LIST, PAINT_LIST]),
    "bg60k_info.txt": (125, "ads/bgpair_info.txt", odd_cell, [], [CHECK_PAIRS, PAINT_PAIRS]),
    "manifest.jsonl": (125, "out/manifest.jsonl", odd_line, [], [GO_ON]),
    "categories.json": (125, "[cp]g/categories.json", odd_json, [], [PAINT_AD]),
    "pickles": (500, "checkpoints/*", damage, ["in.ckpt"], [CONVERT]),
}


def broken(folder: Path, kind: str, rng: random.Random) -> tuple[Callable, list]:
    """Damages a file of this kind in folder/tiny, whose files are links -> a program that reads it, its arguments."""
    _, files, how, places, commands = KINDS[kind]
    original = rng.choice(sorted((folder / "tiny").glob(files)))
    content = how(original.read_bytes(), rng)
    place = folder / rng.choice(places) if places else original
    place.unlink(missing_ok=True)
    place.write_bytes(content)
    return rng.choice(commands)
