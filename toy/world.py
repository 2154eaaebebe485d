"""Toy: its ad world, drawn by code and simple enough for a tiny Stable Diffusion to learn on two CPU cores.

products.py has the products; each category has its common scene, from scenes.py. There is any number of brands. A brand
is a palette, a layout and a set of elements that all of its ads share. The Personality-Wise Generator must carry these
over from a reference.

    python toy/world.py --sheet sheet.png      # look at it: a row per category, a column per brand
    python toy/world.py --out toy/data         # write the base set, BG60k, BG1k and BG-pair
    python toy/world.py --samples toy/samples  # write the products and references to try
"""

import argparse
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python toy/world.py`: the repository's root

from support.files import BadInput, one_line_errors, write_atomic
from support.images import save_image
from support.machine import barrier, processes
from support.options import Parser, whole_number
from toy.canvas import COLOURS, SHADOW, Canvas
from toy.products import ALL_PRODUCTS, OTHERS, PRODUCTS, product_caption, product_colour
from toy.scenes import Brand, paint_scene, scene_caption

TOY_DATA = Path(__file__).resolve().parent / "data"  # where the toy's data is drawn on first use
SUPERSAMPLE = 2  # Pillow draws hard edges, so pictures are drawn this many times larger, and products twice that
FOLDER_SIZE = 2000  # images in each numbered folder of BG60k
# Training brands have the seeds from 0 on; this many belong to each category's ads
BRANDS_PER_CATEGORY = 400
HELD_OUT_BRANDS = 1_000_000  # the first brand seed of BG1k and BG-pair
OTHERS_SHARE = 1 / 2  # the fraction of training ads that show one of OTHERS
# The fraction of the base set before a plain wall, which is no category's scene: if all that the base paints looked
# like ads, CG would have nothing left to add
PLAIN_SHARE = 1 / 2


# ---------------------------------------------------------------- one picture


def draw_layers(product: str, scene: str, brand: int, seed: int, size: int) -> tuple[Image.Image, Image.Image]:
    """A brand's scene with the product's shadow (RGB), and the product alone in its place (RGBA); both supersampled.

    product is a key of ALL_PRODUCTS, scene a key of SCENES, brand a Brand's seed. `seed` decides the product's looks,
    its place and a slight camera pan; the brand alone decides everything else.
    """
    rng = random.Random(f"picture {product} {scene} {seed}")
    side = size * SUPERSAMPLE
    canvas = Canvas(side, side, pan=(rng.uniform(-0.012, 0.012), rng.uniform(-0.012, 0.012)))
    floor = paint_scene(canvas, scene, Brand(brand))

    entry = ALL_PRODUCTS[product]
    foot = rng.uniform(floor.back, floor.front)
    height = min(rng.uniform(*entry.heights), foot - 0.04)
    width = height * entry.aspect
    x = min(max(0.5 + rng.uniform(-floor.sway, floor.sway), width / 2 + 0.02), 0.98 - width / 2)
    fine = Canvas(round(width * side) * 2, round(height * side) * 2)
    entry.paint(fine, COLOURS[product_colour(product, seed)], rng)

    canvas.pan = (0.0, 0.0)
    left, right = x - width / 2, x + width / 2
    canvas.ellipse(left - 0.01, foot - 0.045, right + 0.03, foot + 0.035, SHADOW, alpha=0.5, blur=0.02)
    canvas.ellipse(left + 0.02, foot - 0.02, right - 0.01, foot + 0.014, SHADOW, alpha=0.65, blur=0.007)
    cutout = fine.image
    cutout.putalpha(fine.cover)
    cutout = cutout.reduce(2)
    placed = Image.new("RGBA", (side, side))
    placed.paste(cutout, (round(left * side), round(foot * side) - cutout.height))
    return canvas.image, placed


def draw_picture(product: str, scene: str, brand: int, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A product in a brand's scene -> RGB (size, size, 3) and product mask (size, size), both 0..255.

    The arguments are those of draw_layers. Where the mask is 255, the picture has exactly the product's pixels.
    """
    image, placed = draw_layers(product, scene, brand, seed, size)
    image.paste(placed, (0, 0), placed)
    return np.asarray(image.reduce(SUPERSAMPLE)), np.asarray(placed.getchannel("A").reduce(SUPERSAMPLE))


# ---------------------------------------------------------------- data sets


class Job(NamedTuple):
    """A picture to draw, by draw_picture's arguments, and where its image and mask are written."""

    product: str
    scene: str
    brand: int
    seed: int
    size: int
    image: Path
    mask: Path


def render(job: Job) -> None:
    *arguments, image, mask = job
    for pixels, path in zip(draw_picture(*arguments), (image, mask)):
        Image.fromarray(pixels).save(path, compress_level=1)


def base_jobs(root: Path, count: int, size: int, rng: random.Random) -> list[Job]:
    """The base set: any category in any scene or before a plain wall, in training brands.

    Writes metadata.jsonl, with captions in halves, and returns the pictures to draw.
    """
    jobs, lines = [], []
    for i in range(count):
        category, other = (rng.choice([*PRODUCTS]) for _ in range(2))
        scene = "plain wall" if rng.random() < PLAIN_SHARE else PRODUCTS[other].scene
        brand, seed = rng.randrange(BRANDS_PER_CATEGORY * len(PRODUCTS)), rng.randrange(2**31)
        image, mask = f"images/{i:06}.png", f"masks/{i:06}.png"
        jobs.append(Job(category, scene, brand, seed, size, root / image, root / mask))
        item = {"file_name": image, "mask": mask, "category": category, "product": product_caption(category, seed),
                "scene": scene_caption(scene, Brand(brand))}
        lines.append(json.dumps(item) + "\n")
    root.mkdir(parents=True)
    (root / "metadata.jsonl").write_text("".join(lines))
    return jobs


def ads_jobs(root: Path, ads: int, bg1k: int, pairs: int, size: int, rng: random.Random) -> list[Job]:
    """The ads, in BG60k's format as released: tab-separated info files, and numbered folders of images and of masks.

    Every category has its own scene; half of the training ads show another product in it (OTHERS). Each image in BG1k
    has a held-out brand to itself. Pair k consists of image k of BG1k (starting over at the end) and another ad of that
    brand, whose product has another colour and another place. That ad is an extra image in BG1k's folders, and is not
    in bg1k_info.txt. Writes the info files and returns the pictures to draw.
    """

    def job(split: str, name: str, index: int, product: str, category: str, brand: int, seed: int) -> Job:
        image, mask = (root / f"{split}_{kind}_{index // FOLDER_SIZE}" / name for kind in ("imgs", "masks"))
        return Job(product, PRODUCTS[category].scene, brand, seed, size, image, mask)

    categories, others = list(PRODUCTS), random.Random("other products")
    jobs, rows = [], {"bg60k": [], "bg1k": [], "bgpair": []}
    for i in range(ads):
        name, which = f"{i:06}.png", i % len(categories)
        category, brand = categories[which], which * BRANDS_PER_CATEGORY + rng.randrange(BRANDS_PER_CATEGORY)
        product = others.choice(list(OTHERS)) if others.random() < OTHERS_SHARE else category
        jobs.append(job("bg60k", name, i, product, category, brand, rng.randrange(2**31)))
        rows["bg60k"].append((name, category))
    for i in range(bg1k):
        name, category = f"{i:06}.png", categories[i % len(categories)]
        jobs.append(job("bg1k", name, i, category, category, HELD_OUT_BRANDS + i, rng.randrange(2**31)))
        rows["bg1k"].append((name, category))
    for k in range(pairs):
        name, own = f"ref_{k:06}.png", jobs[ads + k % bg1k]
        seed = rng.randrange(2**31)
        while product_colour(own.product, seed) == product_colour(own.product, own.seed):
            seed = rng.randrange(2**31)
        jobs.append(job("bg1k", name, bg1k + k, own.product, own.product, own.brand, seed))
        rows["bgpair"].append((own.image.name, name, own.product))
    root.mkdir(parents=True)
    for split, lines in rows.items():
        (root / f"{split}_info.txt").write_text("".join("\t".join(line) + "\n" for line in lines))
    return jobs


def write_world(
    root: str | Path,
    size: int = 256,
    base: int = 24000,
    ads: int = 6000,
    bg1k: int = 256,
    pairs: int = 256,
    seed: int = 0,
    workers: int = 2,
    parts: tuple[str, ...] = ("base", "ads"),
) -> None:
    """Write root/base (to train the tiny Stable Diffusion) and root/ads (BG60k, BG1k and BG-pair), or one of the two.

    A part that exists is left as it is, with a note. An interrupted part leaves nothing behind. Raises BadInput for
    pairs without images in BG1k, from which they are made.
    """
    if pairs and not bg1k:
        raise BadInput("--pairs are made from BG1k's images: give --bg1k too, or --pairs 0")

    def draw_part(folder: Path) -> None:
        rng = random.Random(f"{part} {seed}")
        jobs = base_jobs(folder, base, size, rng) if part == "base" else ads_jobs(folder, ads, bg1k, pairs, size, rng)
        for parent in {path.parent for job in jobs for path in (job.image, job.mask)}:
            parent.mkdir()
        with ProcessPoolExecutor(workers) as pool:
            done = pool.map(render, jobs, chunksize=32)
            for _ in tqdm(done, desc=part, total=len(jobs), unit="picture", disable=not sys.stderr.isatty()):
                pass

    for part in parts:
        folder = Path(root) / part
        if folder.exists():
            print(f"{folder} is there already; remove it to have it drawn again", file=sys.stderr)
        else:
            write_atomic(folder, draw_part)


def draw_on_first_use(wanted: Path) -> None:
    """If `wanted` is toy/data/base or toy/data/ads and does not exist yet, draws it; this can take minutes."""
    if wanted in (TOY_DATA / "base", TOY_DATA / "ads") and not wanted.exists() and processes()[0] == 0:
        print(f"drawing the toy's pictures to {wanted}, once", file=sys.stderr)
        write_world(TOY_DATA, parts=(wanted.name,))
    barrier()


# ---------------------------------------------------------------- pictures to look at and to try


# The products that the repository ships as pictures, by file name: a product, its seed, and the brand of the ad that
# serves as its reference, which is in no data set; 0 if there is none.
SAMPLES = {
    "laptop": ("laptop", 103, 1_000_507), "rice_cooker": ("rice cooker", 104, 1_000_603),
    "refrigerator": ("refrigerator", 104, 1_000_705), "sneaker": ("sneaker", 105, 1_000_902),
    "watch": ("watch", 103, 1_001_007), "sunscreen": ("sunscreen", 101, 1_001_103),
    "toy_car": ("toy car", 108, 1_001_209), "perfume": ("perfume", 106, 1_000_808),
    "perfume_2": ("perfume", 102, 1_000_801), "perfume_3": ("perfume", 104, 1_000_800),
    "perfume_4": ("perfume", 108, 1_000_804), "mug": ("mug", 0, 0),
}


def write_samples(folder: Path, size: int) -> None:
    """Writes cut-out products, NAME.png, and ads whose alpha channel is their product's mask, NAME_reference.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (product, seed, brand) in SAMPLES.items():
        scene = ALL_PRODUCTS[product].scene
        _, placed = draw_layers(product, scene, brand, seed, size)
        placed.reduce(SUPERSAMPLE).save(folder / f"{name}.png", optimize=True)
        if brand:
            image, mask = draw_picture(product, scene, brand, 100 + brand % 100, size)
            Image.fromarray(np.dstack([image, mask])).save(folder / f"{name}_reference.png", optimize=True)


def write_sheet(path: Path, size: int) -> None:
    """Writes ads side by side: a row per category, a column per brand."""
    rows = [np.hstack([draw_picture(category, product.scene, 100 * row + i, i, size)[0] for i in range(10)])
            for row, (category, product) in enumerate(PRODUCTS.items())]
    save_image(Image.fromarray(np.vstack(rows)), path)


# ---------------------------------------------------------------- the command line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", metavar="DIR", type=Path, help="write the data sets to this folder")
    goal.add_argument("--sheet", metavar="FILE", type=Path,
                      help="write a page of ads: a row per category, a column per brand")
    goal.add_argument("--samples", metavar="DIR", type=Path, help="write the sample products and references")
    for name, default, kind, text in (
        ("--size", 256, whole_number(64, 4096), "height and width of a picture, in pixels"),
        ("--base", 24000, whole_number(0, 999_999), "pictures of any category in any scene"),
        ("--ads", 6000, whole_number(0, 999_999), "ads of the training set, BG60k"),
        ("--bg1k", 256, whole_number(0, 999_999), "ads of the test set, with held-out brands"),
        ("--pairs", 256, whole_number(0, 999_999), "test pairs of a product and a reference ad"),
        ("--seed", 0, whole_number(0, 2**32 - 1), "decides which pictures are drawn"),
        ("--workers", 2, whole_number(1, 256), "processes that draw"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{text} [{default}]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.sheet:
        write_sheet(args.sheet, args.size)
        print(f"{args.sheet}: a row per category ({', '.join(PRODUCTS)}), a column per brand")
    elif args.samples:
        write_samples(args.samples, args.size)
        print(f"{args.samples}: {len(SAMPLES)} products and their references; paint around one with\n"
              f"python generate.py --product {args.samples / 'mug.png'} --category perfume")
    else:
        write_world(args.out, args.size, args.base, args.ads, args.bg1k, args.pairs, args.seed, args.workers)
        print(f"{args.out / 'base'}: captioned pictures, for train.py clip and unet\n"
              f"{args.out / 'ads'}: BG60k, BG1k and BG-pair, for train.py vae, cg and pg; look at them with\n"
              f"python data.py {args.out / 'ads'} --sheet check.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
