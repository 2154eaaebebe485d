"""Support: the files for a study's raters, which must not reveal any method; not needed to understand the paper."""

import json
import os
import random
import secrets
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from support.datasets import Item
from support.figures import cutout_of
from support.files import write_atomic
from support.images import thumbnail
from support.opening import open_image

PAGE = Path(__file__).with_name("study_page.html")
SIDE = 1024  # pixels; larger pictures are reduced
LONG_AGO = 946_684_800  # 1 January 2000, the time of every file, so none reveals when it was painted


class Pair(NamedTuple):
    """What a rater sees at once: an item's product and reference, and one picture by each method."""

    item: Item
    candidates: dict[str, Path]  # by method; all pairs have the same methods


class Handout(NamedTuple):
    """A study under random names, which reveal nothing."""

    study: str
    shown: list[dict]  # for the page: names by pair, the candidates in balanced orders
    key: list[dict]  # for `score`: names by pair and method
    pictures: dict[str, Item | Path]  # by name; an item stands for its product


def token() -> str:
    """A random name, which reveals nothing. It needs the system's randomness: a seeded name could be derived."""
    return secrets.token_hex(6)


def balanced_orders(count: int, methods: int) -> list[list[int]]:
    """An order of the methods for each of `count` pairs, such that each method stands equally often in each place.

    Each run of `methods` pairs is a Latin square with shuffled rows, columns and methods; the last may be cut short.
    """
    draw, orders = random.SystemRandom(), []
    while len(orders) < count:
        names, rows, columns = (draw.sample(range(methods), methods) for _ in range(3))
        orders += [[names[(row + column) % methods] for column in columns] for row in rows]
    return orders[:count]


def plan(pairs: list[Pair]) -> Handout:
    """Gives everything a random name, and orders the candidates. The key is to be written first, then the handout."""
    study = Handout(token(), [], [], {})
    for pair, order in zip(pairs, balanced_orders(len(pairs), len(pairs[0].candidates))):
        name, product, reference = token(), token(), token()
        names = {method: token() for method in pair.candidates}
        study.pictures.update({product: pair.item, reference: pair.item.reference})
        study.pictures.update({names[method]: path for method, path in pair.candidates.items()})
        in_order = [[*names.values()][i] for i in order]
        study.shown.append({"pair": name, "product": product, "reference": reference, "candidates": in_order})
        study.key.append({"pair": name, "candidates": names, "product": str(pair.item.image),
                          "reference": str(pair.item.reference)})
    return study


def write_handout(handout: Handout, out: Path) -> None:
    """Writes OUT/index.html and OUT/pictures.

    All candidates' files have the same size, because how well a picture compresses depends on the method. They are
    written in the order of their names, and all files get the same time.
    """
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("STUDY_DATA", json.dumps({"study": handout.study, "pairs": handout.shown}), 1)
    candidates = sorted(name for pair in handout.shown for name in pair["candidates"])

    def write(new: Path) -> None:
        (new / "pictures").mkdir(parents=True)
        (new / "index.html").write_text(page, encoding="utf-8")
        for name, source in sorted(handout.pictures.items(), key=lambda entry: entry[0]):
            picture = cutout_of(source) if isinstance(source, Item) else open_image(source).convert("RGB")
            thumbnail(picture, SIDE).save(new / "pictures" / f"{name}.png", icc_profile=None)
        pad([new / "pictures" / f"{name}.png" for name in candidates])
        for path in (*new.rglob("*"), new):
            os.utime(path, (LONG_AGO, LONG_AGO))

    write_atomic(out, write)


def pad(files: list[Path]) -> None:
    """Pads all PNGs to the size of the largest, by a private chunk that viewers skip, just before the end chunk.

    It holds random bytes: zeros would vanish when the folder is compressed.
    """
    end = chunk(b"IEND")
    size = max(file.stat().st_size for file in files) + len(end)
    for file in files:
        png = file.read_bytes().removesuffix(end)
        filling = os.urandom(size - len(png) - 2 * len(end))
        file.write_bytes(png + chunk(b"paDd", filling) + end)


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """A chunk of a PNG: length, kind, content, checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
