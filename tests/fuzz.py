"""Tests: broken and hostile files for tests/faults.py. Each kind writes one and says which command reads it.

A kind is a function of the case's folder, the tiny models and ads, and a random generator, which decides everything.
It returns the program, its arguments, and in a few words what was done to the file.
"""

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

import data
import generate
import weights
from clip import TextEncoder
from model import UNet
from support.datasets import read_items
from support.images import load_cutout
from vae import VAE
from weights import TEXT_FILE, UNET_FILE, VAE_FILE, load_control, load_module

Case = tuple[Callable, list, str]
COUNTS = {"safetensors": 2000, "pictures": 2000, "config.json": 500, "metadata.jsonl": 125, "bg60k_info.txt": 125,
          "manifest.jsonl": 125, "categories.json": 125, "pickles": 500}
HUGE = (2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)

# ---------------------------------------------------------------- bytes


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damages bytes in one of the ways in which files get broken, by accident or on purpose."""
    kind = rng.choice(("cut", "flip", "flip", "insert", "delete", "number", "number", "repeat", "zeros"))
    content = bytearray(content)
    at = int(len(content) * rng.random() ** 2)  # more often near the start, where the structure is
    n = rng.choice((1, 4, 100, 5000))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        for _ in range(n if n < 1000 else 20):
            content[int(len(content) * rng.random() ** 2)] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        content[at:at] = rng.randbytes(n)
    elif kind == "delete":
        del content[at : at + n]
    elif kind == "number":  # a length or a size, perhaps
        width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
        value = rng.choice((0, 1, 255, 65535, *HUGE)) % 256**width
        content[at : at + width] = value.to_bytes(width, order)
    elif kind == "repeat":
        content[at:at] = content[at : at + n] * rng.choice((1, 50))
    elif kind == "zeros":
        content[at : at + n] = bytes(n)
    return bytes(content), f"{kind} at {at}, {n}"


# ---------------------------------------------------------------- safetensors


def split_file(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(header: str | bytes, body: bytes, length: int | None = None) -> bytes:
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def hostile_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a false header."""
    header, body = split_file(content)
    name, other = rng.sample([name for name in header if name != "__metadata__"], 2)
    entry, odd = header[name], rng.choice((-1, 0, 1, 2**20, *HUGE, 2**70, 1.5, "8", None, [1], True))
    kind = rng.choice(("length", "offsets", "overlap", "swap", "shape", "dtype", "twice", "name", "metadata", "deep",
                       "missing", "extra", "type", "gap"))
    if kind == "length":
        return join_file(json.dumps(header), body, rng.choice((0, 1, 7, len(content), 100_000_001, *HUGE))), kind
    if kind == "offsets":
        entry["data_offsets"] = rng.choice(([odd, odd], [0, odd], [odd, entry["data_offsets"][1]], [], [1, 2, 3], odd))
    elif kind == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == "swap":
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif kind == "shape":
        entry["shape"] = rng.choice(([odd], [odd] * 2, entry["shape"] + [1], [1] * 5000 + entry["shape"],
                                     [2**32, 2**32], [math.prod(entry["shape"])], odd))
    elif kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F128", "", odd))
    elif kind == "twice":
        text = json.dumps(header)
        return join_file(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}", body), kind
    elif kind == "name":
        new = rng.choice(("", "a\nb", "\ud800", "x" * 10**5, "../../x", "\x1b[2J", "state_dict." + other))
        header[new] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice((odd, {"a": odd}, {"a": "b" * 10**6}, {"format": "tf"}))
    elif kind == "deep":
        return join_file('{"a":' * 10**5 + "1" + "}" * 10**5, body), kind
    elif kind == "missing":
        del header[name]
    elif kind == "extra":
        header |= {f"{name}.{i}": entry for i in range(rng.choice((1, 1000)))}
    elif kind == "type":
        header[name] = odd
    else:
        body += bytes(rng.choice((1, 8, 10**6)))
    return join_file(json.dumps(header), body), f"{kind} {odd!r} in {name}"


def link_models(folder: Path, tiny: Path) -> Path:
    """Links the tiny models into a case's own folder; a damaged file replaces its link."""
    for file in tiny.rglob("*"):
        if file.is_file() and "ads" not in file.relative_to(tiny).parts:
            link = folder / "tiny" / file.relative_to(tiny)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return folder / "tiny"


def replace_file(link: Path, content: bytes) -> None:
    link.unlink()
    link.write_bytes(content)


PAINTING = ["--device", "cpu", "--dtype", "float32", "--steps", 1, "--out", "out"]


def paint(tiny: Path, *options) -> list:
    return ["--weights", tiny / "base", "--cg", tiny / "cg", "--pg", tiny / "pg", *PAINTING, *options]


def painted_ad(tiny: Path, ads: Path) -> list:
    """Arguments that paint an ad with CG and PG."""
    ad = read_items(ads, "bgpair")[0][0]
    return paint(tiny, "--product", ad.image, "--mask", ad.mask, "--category", ad.category, "--reference", ad.reference,
                 "--reference-mask", ad.reference_mask)


WHOLE_COMMANDS = 0.25  # the fraction of cases that run a whole command; the others only call its reading function


def load_network(arguments: list[str]) -> None:
    """Instead of a command: loads one network and uses all of its weights."""
    folder = Path(arguments[0])
    if folder.name in ("cg", "pg"):
        network = load_control(folder, {"cg": "category", "pg": "personality"}[folder.name])
    else:
        networks = {"unet": (UNet, UNET_FILE), "vae": (VAE, VAE_FILE), "text_encoder": (TextEncoder, TEXT_FILE)}
        network = load_module(networks[folder.name][0], folder, networks[folder.name][1], "cpu", torch.float32)
    for tensor in network.state_dict().values():
        tensor.sum()


def reading(file: Path, own: Path, ads: Path, rng: random.Random) -> tuple[Callable, list]:
    """The program, and its arguments, that read a network's file."""
    networks = ("cg", "pg", "unet", "vae", "text_encoder")
    if file.parent.name in networks and rng.random() > WHOLE_COMMANDS:
        return load_network, [file.parent]
    return generate.main, painted_ad(own, ads)


def safetensors(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """A file of weights: the base's, CG's or PG's."""
    own = link_models(folder, tiny)
    file = rng.choice(sorted(own.rglob("*.safetensors")))
    content, what = rng.choice((damage, hostile_header))(file.read_bytes(), rng)
    replace_file(file, content)
    return *reading(file, own, tiny / "ads", rng), f"{file.parent.name}: {what}"


# ---------------------------------------------------------------- pictures

FORMATS = [
    ("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "RGB", {"exif": True}),
    ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "I;16", {}), ("PNG", "LA", {}), ("PNG", "1", {}),
    ("PNG", "RGB", {"icc_profile": True}), ("WEBP", "RGBA", {}), ("WEBP", "RGB", {"lossless": True}),
    ("BMP", "RGB", {}), ("BMP", "P", {}), ("GIF", "P", {"save_all": True}), ("TIFF", "RGBA", {}), ("TIFF", "F", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}), ("AVIF", "RGBA", {}), ("MPO", "RGB", {"save_all": True})]


def picture(rng: random.Random) -> tuple[bytes, str]:
    """An undamaged picture in any format and mode."""
    name, mode, given = rng.choice(FORMATS)
    options, file = dict(given), io.BytesIO()
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").resize((64, 48))
    for step in {"I;16": ("L", "I", "I;16"), "F": ("L", "F")}.get(mode, (mode,)):
        image = image.convert(step)
    if "exif" in options:
        options["exif"] = Image.Exif()
        options["exif"][274] = rng.randrange(10)  # orientation
    if "icc_profile" in options:
        profile = ImageCms.createProfile("LAB" if rng.random() < 0.2 else "sRGB")
        options["icc_profile"] = ImageCms.ImageCmsProfile(profile).tobytes()
    if "save_all" in options:
        options["append_images"] = [image.rotate(90)]
    image.save(file, name, **options)
    return file.getvalue(), f"{name} {mode}"


def open_cutout(arguments: list[str]) -> None:
    """Instead of a command: reads a product as a command does."""
    load_cutout(*arguments)


def pictures(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """A file of pixels: a product, its mask or a reference."""
    content, kind = picture(rng)
    what = "whole"
    for _ in range(rng.choice((1, 1, 1, 3))):
        content, what = damage(content, rng)
    file, ad = folder / "file", read_items(tiny / "ads", "bgpair")[0][0]
    file.write_bytes(content)
    arguments = painted_ad(tiny, tiny / "ads")
    place = rng.choice(("image", "mask", "reference", "alone"))
    if rng.random() > WHOLE_COMMANDS:
        files = {"image": [file, ad.mask], "mask": [ad.image, file]}.get(place, [file])
        return open_cutout, files, f"{kind} as {place}: {what}"
    if place == "alone":  # with its alpha channel
        arguments = paint(tiny, "--product", file, "--category", ad.category)
    else:
        arguments[arguments.index(getattr(ad, place))] = file
    return generate.main, arguments, f"{kind} as {place}: {what}"


# ---------------------------------------------------------------- JSON and lists

ODD = (-1, 0, 1, 3, 7, 1000, 2**20, 2**31, 2**40, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, float("nan"),
       float("inf"), "", "x" * 10**4, "\ud800", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\nb", "\0", "..", None,
       True, False, [], {}, [-1], [0] * 4, [2**40] * 4, [[[]]], [None] * 4, {"a": {}}, ["CrossAttnDownBlock2D"] * 1000)


def odd_json(content: object, rng: random.Random) -> tuple[bytes, str]:
    """A JSON object in which one or two fields are odd, missing, doubled or unknown; or damaged bytes."""
    if rng.random() < 0.25:
        content, what = damage(json.dumps(content).encode(), rng)
        return content, what
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        values, name = content, rng.choice([*content, "unknown"])
        if isinstance(values.get(name), dict) and values[name] and rng.random() < 0.7:
            values, name = values[name], rng.choice([*values[name]])
        kind = rng.choice(("odd", "odd", "odd", "near", "missing", "in a list"))
        if kind == "missing":
            values.pop(name, None)
        elif kind == "near" and isinstance(values.get(name), (int, float)):
            values[name] = rng.choice((-1, 2, 10**6)) * values[name]
        elif kind == "in a list" and isinstance(values.get(name), list) and values[name]:
            values[name][rng.randrange(len(values[name]))] = rng.choice(ODD)
        else:
            values[name] = rng.choice(ODD)
        done.append(f"{kind} {name} {str(values.get(name))[:40]!r}")
    text = json.dumps(content) if rng.random() < 0.9 else "[" * 10**5
    return text.encode("utf-8", "surrogatepass"), ", ".join(done)


def config(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """A network's configuration, the schedule's, or the tokenizer's files."""
    own = link_models(folder, tiny)
    files = [file for file in sorted(own.rglob("*")) if file.name.endswith("config.json") or file.name == "vocab.json"]
    scheduler = own / "base" / "scheduler" / "scheduler_config.json"
    files += [scheduler] if scheduler not in files else []
    file = rng.choice(files)
    if file == scheduler:
        source = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "steps_offset": 1,
                  "set_alpha_to_one": False, "prediction_type": "epsilon", "timestep_spacing": "leading",
                  "beta_schedule": "scaled_linear", "trained_betas": None, "_class_name": "DDIMScheduler"}
        file.parent.mkdir(exist_ok=True)
        file.touch()
    else:
        source = json.loads(file.read_text())
    content, what = odd_json(source, rng)
    replace_file(file, content)
    return *reading(file, own, tiny / "ads", rng), f"{file.parent.name}/{file.name}: {what}"


def categories(folder: Path, tiny: Path, rng: random.Random) -> Case:
    own = link_models(folder, tiny)
    file = own / rng.choice(("cg", "pg")) / "categories.json"
    content, what = odd_json(json.loads(file.read_text()), rng)
    replace_file(file, content)
    return generate.main, painted_ad(own, tiny / "ads"), what


def odd_lines(lines: list[dict], rng: random.Random) -> tuple[bytes, str]:
    """JSON lines, one or two of them odd."""
    texts, what = [json.dumps(line).encode() for line in lines], ""
    for i in rng.sample(range(len(lines)), rng.choice((1, 1, 2))):
        texts[i], what = odd_json(json.loads(texts[i]), rng)
    content = b"\n".join(texts) + b"\n"
    return damage(content, rng) if rng.random() < 0.2 else (content, what)


def metadata(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """The list of an imagefolder that is checked or painted."""
    (folder / "ads").mkdir()
    names = ("image", "mask", "reference", "reference_mask")
    lines = []
    for item in read_items(tiny / "ads", "bgpair")[0][:2]:
        files = {name: f"{getattr(item, name).parent.name}_{getattr(item, name).name}" for name in names}
        for name in names:
            shutil.copy(getattr(item, name), folder / "ads" / files[name])
        lines.append({"file_name": files.pop("image"), **files, "category": item.category, "scene": "b"})
    content, what = odd_lines(lines, rng)
    (folder / "ads" / "metadata.jsonl").write_bytes(content)
    if rng.random() < 0.5:
        return data.main, [folder / "ads", "--size", 32], what
    return generate.main, paint(tiny, "--data", folder / "ads"), what


def bg60k(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """A list in BG60k's format, likewise."""
    (folder / "ads").mkdir()
    for file in (tiny / "ads").iterdir():
        (folder / "ads" / file.name).symlink_to(file)
    split = rng.choice(("bg60k", "bg1k", "bgpair"))
    file = folder / "ads" / f"{split}_info.txt"
    content, what = damage(file.read_bytes(), rng)
    if rng.random() < 0.5:
        cells = [line.split("\t") for line in file.read_text().splitlines()]
        row = rng.choice(cells)
        row[rng.randrange(len(row))] = what = str(rng.choice(ODD))
        delimiter = rng.choice("\t\t, ;")
        content = "\n".join(delimiter.join(row) for row in cells).encode("utf-8", "surrogatepass")
    replace_file(file, content)
    if rng.random() < 0.5:
        return data.main, [folder / "ads", "--size", 32, "--split", split], what
    return generate.main, paint(tiny, "--data", folder / "ads", "--split", split, "--limit", 2), what


def manifest(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """The manifest that generate.py --data reads from an earlier run."""
    lines = []
    for i, item in enumerate(read_items(tiny / "ads", "bgpair")[0][:2]):
        names = ("image", "mask", "reference", "reference_mask")
        lines.append({"item": i, "file": f"{i:06}_{item.image.stem}.png", **{n: str(getattr(item, n)) for n in names},
                      "inverted": item.inverted, "category": item.category, "seed": i, "dtype": "float32",
                      "how": {"steps": 1, "models": []}, "seconds": 1.0})
    (folder / "out").mkdir()
    content, what = odd_lines(lines, rng)
    (folder / "out" / "manifest.jsonl").write_bytes(content)
    return generate.main, paint(tiny, "--data", tiny / "ads", "--split", "bgpair", "--limit", 2), what


# ---------------------------------------------------------------- pickles


class Hostile:
    """An object whose unpickling would call a function."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickle(rng: random.Random) -> tuple[bytes, str]:
    """A pickle that would run code, fill the memory, or never end."""
    code = rng.choice((Hostile(os.system, "touch canary"), Hostile(exec, "open('canary', 'w')"),
                       Hostile(open, "canary", "w"), Hostile(bytearray, 2**40), Hostile(eval, "9**9**9")))
    weight, file = torch.ones(2), io.BytesIO()
    root = rng.choice((code, [code], {"state_dict": {"w": weight, "x": code}}, {"w": weight, code.call[1]: code}))
    if rng.random() < 0.3:
        return pickle.dumps(root, rng.randrange(6)), "a bare pickle that calls"
    torch.save(root, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return file.getvalue(), "calls"


def tampered_zip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A checkpoint whose pickle inside the zip is damaged, or whose members are odd."""
    source, file = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    kind = rng.choice(("pickle", "names", "compressed", "twice"))
    how = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", how) as out:  # it warns of names twice
        for member in source.namelist():
            inner = source.read(member)
            if member.endswith("data.pkl") and kind == "pickle":
                inner, _ = damage(inner, rng)
            name = f"../../{member}" if kind == "names" and rng.random() < 0.3 else member
            out.writestr(name, inner)
            if kind == "twice" and rng.random() < 0.5:
                out.writestr(name, b"\0" * 100)
    return file.getvalue(), f"zip: {kind}"


def pickles(folder: Path, tiny: Path, rng: random.Random) -> Case:
    """A checkpoint for `weights.py convert`, of either layout."""
    shape, file = [rng.randrange(1, 9) for _ in range(rng.randrange(4))], io.BytesIO()
    tensors = {f"layer.{i}.weight": torch.zeros(shape, dtype=rng.choice((torch.float32, torch.float16, torch.int64)))
               for i in range(rng.randrange(1, 8))}
    legacy = rng.random() < 0.4
    torch.save({"state_dict": tensors, "epoch": 3}, file, _use_new_zipfile_serialization=not legacy)
    kind = rng.choice(("damage", "hostile", "damage" if legacy else "zip"))
    content, what = (hostile_pickle(rng) if kind == "hostile" else tampered_zip(file.getvalue(), rng) if kind == "zip"
                     else damage(file.getvalue(), rng))
    (folder / "file.ckpt").write_bytes(content)
    return weights.main, ["convert", "file.ckpt", "out.safetensors"], f"{'legacy ' * legacy}{what}"


KINDS = {"safetensors": safetensors, "pictures": pictures, "config.json": config, "metadata.jsonl": metadata,
         "bg60k_info.txt": bg60k, "manifest.jsonl": manifest, "categories.json": categories, "pickles": pickles}
