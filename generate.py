"""From a product photo to an ad image: CG alone, or CG and PG after a reference (Fig. 2, inference; section 5.1).

    python generate.py                                                        # a sample product and reference
    python generate.py --product mug.png --category mug                       # CG: the common style of the category
    python generate.py --product mug.png --category mug --reference ad.png    # CG + PG: the style of a reference ad
    python generate.py --data BG60K --split bgpair --out results              # every item of a data set
    python generate.py --prompt "a photo of a mug"                            # the base alone

A product comes with its mask: an image with an alpha channel, or --mask FILE, white on the product. The result has the
product's frame, and the product's own pixels where the mask is 1.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Ad, background_hint, dilate, product_hint
from model import ControlNet, Prompts
from sampler import GUIDANCE, STEPS, sample, seeded
from support.batch import paint_items, save_data_sheet
from support.datasets import BROKEN, read_items
from support.files import (
    BadInput,
    Parser,
    check_folder,
    one_line_errors,
    pick_device,
    pick_dtype,
    read_json,
    real,
    whole,
)
from support.images import (
    SOLID,
    canvas_size,
    extend,
    fit,
    load_cutout,
    load_masked,
    resize,
    save_image,
    sheet,
    thumbnail,
)
from support.tensors import fingerprint
from weights import StableDiffusion, load_control, load_stable_diffusion

TOY = Path(__file__).resolve().parent / "toy"
SAMPLE = "perfume"  # of toy/samples, painted where no product is given
IDENTIFIER = "sks {}"  # [D], section 5.1: 'sks' and the category's id, its position in the sorted list

# ---------------------------------------------------------------- a batch on its canvas


def prompt_texts(category: str, identifier: str | None) -> tuple[str, str, str]:
    """The texts of P, P_fg and P_bg (section 3.2). Without an identifier, the plain prompt on all sides."""
    product = f"A photo of {category}"
    if identifier is None:
        return product, product, product
    background = f"in the background of {identifier}"
    return f"{product}, {background}", product, background


def encode_prompts(sd: StableDiffusion, texts: list[tuple[str, str, str]]) -> Prompts:
    """Texts of P, P_fg and P_bg, a triple a picture -> their encodings. Each different text is encoded once."""
    unique = list(dict.fromkeys(text for triple in texts for text in triple))
    encoded = sd.prompts(unique)  # (U, L, D)
    row = {text: i for i, text in enumerate(unique)}
    return Prompts(*(encoded[[row[triple[k]] for triple in texts]] for k in range(3)))


@torch.inference_mode()
def paint(sd: StableDiffusion, rgb: Tensor, mask: Tensor, texts: list[tuple[str, str, str]],
          generators: list[torch.Generator], cg: ControlNet | None = None, pg: ControlNet | None = None,
          reference: Tensor | None = None, reference_mask: Tensor | None = None, from_reference: bool = True,
          steps: int = STEPS, guidance: float = GUIDANCE, on_step=None, hint_background: float = 0.0) -> Tensor:
    """Paints a batch of backgrounds -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    rgb (B, 3, H, W) and mask (B, 1, H, W): the products on their canvas; reference and reference_mask of the same
    shapes. With them z_T is the reference's latent noised, unless not from_reference (section 3.3), and PG, where given,
    reads its background. In place of CG a plain ControlNet; hint_background is what its hint holds outside of the
    product.
    """
    weight = sd.unet.conv_in.weight
    rgb, mask = rgb.to(weight), mask.to(weight)
    branches = [(cg, product_hint(rgb, mask) + hint_background * (1 - mask))] if cg else []
    if pg:
        branches.append((pg, background_hint(reference.to(weight), reference_mask.to(weight))))
    z_ref = sd.encode(reference) if from_reference and reference is not None else None
    z = sample(sd.unet, sd.schedule, encode_prompts(sd, texts), encode_prompts(sd, [("", "", "")] * len(texts)),
               generators, sd.latent_shape(*rgb.shape[2:]), branches, mask, z_ref, steps, guidance,
               inpainting=sd.inpainting(rgb, mask), on_step=on_step)
    return sd.decode(z)


# ---------------------------------------------------------------- any pictures, in their own frames


def paste_back(painted: Tensor, painted_mask: Tensor, box: tuple[int, int, int, int], rgb: Tensor,
               mask: Tensor) -> Tensor:
    """The product over the painted canvas (3, h, w), in the product's own frame (3, H, W); box as `fit` returned it.

    Where M = 1 the result is the product's pixels, exactly: the product must stay unchanged (section 1). The networks
    paint the product too, blurred over its edge by a pixel of the canvas, where painted_mask (1, h, w) is M: there the
    scene is continued from further out, so that no glow of the painted product surrounds the real one.
    """
    painted = extend(painted, dilate(painted_mask, 3) <= 1 - SOLID)
    top, left, h, w = box
    painted = resize(painted[:, top : top + h, left : left + w], *rgb.shape[1:])
    mask = mask.masked_fill(mask >= SOLID, 1)
    return rgb * mask + painted * (1 - mask)


def steps_bar(args, text: str) -> tqdm:
    """A bar over the denoising steps on stderr, where that is a terminal."""
    return tqdm(total=args.steps, desc=text, unit="step", leave=False, disable=not sys.stderr.isatty())


def paint_ads(ads: list[Ad], painter: Callable, multiple: int, args) -> list[Tensor]:
    """Finished ads, each (3, H, W) in its product's frame. Those of one canvas, with or without reference, make a batch.

    painter(rgb, mask, texts, generators, reference, reference_mask, on_step) -> (B, 3, h, w), as `paint`; multiple: of
    which the canvas's sides are (StableDiffusion.multiple).
    """
    batches = defaultdict(list)
    for i, ad in enumerate(ads):
        batches[canvas_size(*ad.mask.shape[1:], args.size, multiple), ad.reference is not None].append(i)
    results = [None] * len(ads)
    for ((h, w), with_reference), batch in batches.items():
        chosen, references = [ads[i] for i in batch], (None, None)
        rgb, boxes = zip(*(fit(ad.rgb, h, w, "contain") for ad in chosen))
        rgb, mask = torch.stack(rgb), torch.stack([fit(ad.mask, h, w, "contain")[0] for ad in chosen])
        if with_reference:
            references = [torch.stack([fit(ad.reference[k], h, w, "cover")[0] for ad in chosen]) for k in (0, 1)]
        with steps_bar(args, f"{len(batch)} at once{', after references' if with_reference else ''}") as bar:
            painted = painter(rgb, mask, [ad.texts for ad in chosen], [seeded(ad.seed)[0] for ad in chosen],
                              *references, on_step=lambda *_: bar.update()).cpu()
        check_finite(painted, args)
        for i, ad, picture, painted_mask, box in zip(batch, chosen, painted, mask, boxes):
            results[i] = paste_back(picture, painted_mask, box, ad.rgb, ad.mask)
    return results


def check_finite(painted: Tensor, args) -> None:
    if not painted.isfinite().all():
        raise BadInput("the pictures are not numbers: the weights are broken, or their training failed"
                       if args.dtype == torch.float32 else
                       f"--dtype: the networks overflow in {str(args.dtype)[6:]}; add --dtype float32")


def painter_of(sd: StableDiffusion, cg: ControlNet, pg: ControlNet | None, args) -> Callable:
    """The paper's method as `paint_ads` calls it: CG, and PG for those that have a reference."""

    def painter(rgb, mask, texts, generators, reference, reference_mask, on_step=None):
        return paint(sd, rgb, mask, texts, generators, cg, pg if reference is not None else None, reference,
                     reference_mask, args.start == "reference", args.steps, args.guidance, on_step,
                     hint_background=-1.0 if args.hint == "inpaint" else 0.0)

    return painter


# ---------------------------------------------------------------- models and categories


def load_base(args) -> StableDiffusion:
    """The frozen base; also settles args.size: by default, what the base was trained at. Raises BadInput."""
    sd = load_stable_diffusion(args.weights or TOY / "base", args.device, args.dtype, args.tokenizer)
    args.size = args.size or sd.size
    canvas_size(1, 1, args.size, sd.multiple)  # says so where the size does not fit the base
    return sd


def branch_path(option: str, args) -> Path:
    """Folder or file of "cg" or "pg": by default the toy's. Raises BadInput where the base is another."""
    path = getattr(args, option)
    if path is None and args.weights:
        raise BadInput(f"--{option} is missing: the base {args.weights} needs a {option.upper()} trained on it; "
                       f"train one by train.py {option} --weights {args.weights}")
    return path or TOY / option


def load_branch(kind: str, path: Path, sd: StableDiffusion, args) -> ControlNet:
    """CG ("category"), PG ("personality") or a "controlnet". Raises BadInput where its weights are broken, or made for
    another base.
    """
    branch = load_control(path, kind, args.device, args.dtype)
    ours, base = branch.config, sd.unet.config
    hint_factor = 2 ** (len(ours["conditioning_embedding_out_channels"]) - 1)
    if (any(ours[key] != base[key] for key in ("block_out_channels", "layers_per_block", "cross_attention_dim"))
            or ours["in_channels"] != base["out_channels"] or hint_factor != sd.vae.factor):
        raise BadInput(f"{path} was trained on another base than {args.weights or TOY / 'base'}: "
                       "give weights and branches that belong together")
    return branch


def categories_file(branch: Path) -> Path:
    """Lies in CG's and PG's folder, or beside a single file: the identifier [D] of each category it was trained on."""
    return (branch.parent if branch.is_file() else branch) / "categories.json"


def check_identifiers(cg: Path, other: Path) -> None:
    """Raises BadInput where CG and the branch beside it were trained with different identifiers."""
    file = categories_file(other)
    if file.is_file() and read_json(file) != read_json(categories_file(cg)):
        raise BadInput(f"{other} was trained on other categories than {cg}, or with other identifiers: "
                       "give branches that belong together")


def texts_of(names: set[str], cg: Path | None, plain_prompt: bool | None) -> dict[str, tuple[str, str, str]]:
    """The prompts of each category in `names`, with the identifiers that are saved with CG.

    Raises BadInput for a name that is not among them, unless the plain prompt is asked for instead (None: can't be).
    Without a CG (None) all get the plain one.
    """
    if cg is None:
        return {name: prompt_texts(name, None) for name in names}
    file = categories_file(cg)
    known = {} if plain_prompt and not file.exists() else read_json(file)
    if (unknown := sorted(names - set(known))) and not plain_prompt:
        some = ", ".join([*known][:20]) + (f", ... ({len(known):,} in all, see {file})" if len(known) > 20 else "")
        raise BadInput(f"CG was not trained on category {unknown[0]!r}; choose one of {some}"
                       + "; or add --plain-prompt" * (plain_prompt is not None))
    return {name: prompt_texts(name, known.get(name)) for name in names}


def load_models(names: set[str], with_pg: bool, args):
    """-> the base, CG (or the plain ControlNet in its place), PG or None, and the prompts of the categories `names`."""
    cg_path = None if args.controlnet else branch_path("cg", args)
    pg_path = branch_path("pg", args) if with_pg else None
    texts = texts_of(names, cg_path, args.plain_prompt)
    if cg_path and pg_path and not args.plain_prompt:
        check_identifiers(cg_path, pg_path)
    sd = load_base(args)
    cg = load_branch("category" if cg_path else "controlnet", cg_path or args.controlnet, sd, args)
    pg = load_branch("personality", pg_path, sd, args) if with_pg else None
    # --data keeps a record of it
    args.models = [fingerprint(path) for path in (args.weights or TOY / "base", cg_path or args.controlnet, pg_path) if path]
    return sd, cg, pg, texts


# ---------------------------------------------------------------- the three commands


def generate_text(args) -> None:
    """--prompt: the base alone."""
    sd = load_base(args)
    for start in range(0, args.num, args.batch):
        count = min(args.batch, args.num - start)
        blank = torch.zeros(count, 3, args.size, args.size)
        with steps_bar(args, "base") as bar:
            pictures = paint(sd, blank, blank[:, :1], [(args.prompt,) * 3] * count, seeded(args.seed + start, count),
                             steps=args.steps, guidance=args.guidance, on_step=lambda *_: bar.update())
        check_finite(pictures, args)
        for i, picture in enumerate(pictures, args.seed + start):
            save(picture, args.out / f"prompt_{i}.png")


def generate_product(args) -> None:
    """--product: every product, after every reference if any, each --num times; several pictures come with a sheet.

    A single product is painted in each of several categories. Without --product the samples, CG alone beside CG + PG.
    """
    demo = args.product is None
    if demo:
        args.product, args.category = [TOY / "samples" / f"{SAMPLE}.png"], [SAMPLE]
        args.reference = [TOY / "samples" / f"{SAMPLE}_reference.png"]
    if len(args.product) == 1:
        categories = [dict.fromkeys(args.category)]
    else:
        categories = [[category] for category in each("category", "product", args)]
    products = [load_cutout(*pair) for pair in zip(args.product, each("mask", "product", args))]
    references = [load_masked(*pair, "reference", "--reference-mask")
                  for pair in zip(args.reference or (), each("reference_mask", "reference", args))]
    sd, cg, pg, texts = load_models(set(chain(*categories)), bool(references), args)
    painter = painter_of(sd, cg, pg, args)

    ads: dict[str, Ad] = {}  # by file name, in the order of the sheet
    rows = [(i, seed) for i in range(len(products)) for seed in range(args.seed, args.seed + args.num)]
    for i, seed in rows:
        for category in categories[i]:
            stem, ad = args.product[i].stem, Ad(*products[i], texts[category], seed)
            if len(categories[i]) > 1:
                stem += "_" + re.sub(r"\W+", "_", category)
            if demo or not references:
                ads[f"{stem}_{seed}.png"] = ad
            for path, reference in zip(args.reference or (), references):
                ads[f"{stem}_like_{path.stem}_{seed}.png"] = ad._replace(reference=reference)
    names, pictures = list(ads), []
    small = partial(thumbnail, side=256 if len(ads) <= 8 else 160)  # for the sheet
    for start in range(0, len(names), args.batch):
        chunk = names[start : start + args.batch]
        for name, picture in zip(chunk, paint_ads([ads[name] for name in chunk], painter, sd.multiple, args)):
            save(picture, args.out / name)
            pictures.append(small(picture))

    columns = len(pictures) // len(rows)
    cells = [[small(rgb * mask + 1 - mask), *pictures[k * columns : (k + 1) * columns]]
             for k, (rgb, mask) in enumerate(products[i] for i, _ in rows)]
    if demo:
        cells = [[product, alone, references[0][0], after] for product, alone, after in cells]
        first = "ControlNet" if args.controlnet else "CG"
        save(sheet(cells, ["product", f"{first} alone", "reference", f"{first} + PG"]), args.out / "sheet.png")
    elif len(pictures) > 1:
        heads = [[None, *[small(rgb) for rgb, _ in references] * len(categories[0])]] if references else []
        save(sheet(heads + cells), args.out / "sheet.png")


def each(option: str, of: str, args) -> list:
    """One value of an option for each of another's. Raises BadInput unless as many were given, or one, or none."""
    values, count = getattr(args, option) or [None], len(getattr(args, of) or ())
    if len(values) not in (1, count) or (option.endswith("mask") and values[0] and len(values) != count):
        raise BadInput(f"--{option.replace('_', '-')}: {len(values)} given for {count} of --{of}; give one for each")
    return values * count if len(values) == 1 else values


def save(image, path: Path) -> None:
    save_image(image, path)
    print(path)


def generate_data(args) -> None:
    """--data: every item not yet painted, with PG where the item has a reference."""
    items, notes = read_items(args.data, args.split or "bg1k")
    items = items[: args.limit]
    with_pg = any(item.reference for item in items)
    sd, cg, pg, texts = load_models({item.category for item in items}, with_pg, args)
    print("\n".join(notes), file=sys.stderr)
    painted, there, broken = paint_items(items, texts, partial(paint_ads, painter=painter_of(sd, cg, pg, args), multiple=sd.multiple, args=args), args)
    save_data_sheet(items, args.out)  # of several processes the last one has them all
    print(f"{args.out}: {painted:,} painted, {there:,} were there, {broken:,} broken")
    if broken > BROKEN * (painted + there + broken):
        raise BadInput(f"{args.data}: {broken:,} items can't be used, more than {BROKEN:.0%}; they are named above")


# ---------------------------------------------------------------- the command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120))
    add = parser.add_argument_group("what to paint [a sample of the toy]").add_argument
    files = dict(metavar="FILE", type=Path, nargs="+")
    add("--product", **files, help="photo, or several (JPEG, PNG, WebP, ...); its alpha channel is its mask")
    add("--mask", **files, help="the product's mask, white on the product; one for each product")
    add("--category", metavar="NAME", nargs="+", help="the product's category, of CG's; one for all or one for each; "
        "for a single product also several: it is painted in each")
    add("--reference", **files, help="ad whose style the background follows (PG), or several [none: CG alone]")
    add("--reference-mask", **files, help="mask of the product in the reference [its alpha channel]; one for each")
    add("--data", metavar="DIR", type=Path, help="BG60k as released, or metadata.jsonl; goes on where it stopped")
    add("--split", metavar="NAME", help="of the data set as released: bg60k, bg1k or bgpair [bg1k]")
    add("--limit", metavar="N", type=whole(1, 10**9), help="only the first N items of the data set [all]")
    add("--prompt", metavar="TEXT", help="plain text-to-image with the base alone")
    add = parser.add_argument_group("how").add_argument
    add("--num", metavar="N", type=whole(1, 9999), default=1, help="pictures, with seeds SEED, SEED + 1, ... [1]")
    add("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0,
        help="of the noise; SEED + i for item i of --data [0]")
    add("--steps", metavar="N", type=whole(1, 500), default=STEPS, help=f"steps of DDIM [{STEPS}, the paper's]")
    add("--guidance", metavar="X", type=real(1, 30), default=GUIDANCE,
        help=f"weight of the prompt, 1: without guidance [{GUIDANCE}, the paper's]")
    add("--size", metavar="N", type=whole(8, 4096),
        help="longer side of the painted canvas in pixels [the base's: toy 128, SD 1.5 and the paper 512]")
    add("--start", metavar="FROM", choices=["reference", "noise"], default="reference",
        help="z_T: the reference's latent, noised, or pure noise [reference, the paper's; noise without a reference]")
    add("--plain-prompt", action="store_true",
        help="a category that CG was not trained on gets the plain prompt 'A photo of NAME' [an error]")
    add = parser.add_argument_group("models and machine").add_argument
    add("--weights", metavar="PATH", type=Path,
        help="Stable Diffusion, a folder or a single file [toy/base; the paper's: SD 1.5]")
    add("--tokenizer", metavar="DIR", type=Path,
        help="folder with vocab.json and merges.txt [tokenizer/ in --weights; beside a single file]")
    add("--cg", metavar="PATH", type=Path, help="Category-Wise Generator, trained on the base [toy/cg]")
    add("--pg", metavar="PATH", type=Path,
        help="Personality-Wise Generator, trained on the base; paints where there is a reference [toy/pg]")
    add("--controlnet", metavar="PATH", type=Path,
        help="a plain ControlNet in place of CG, with the plain prompt 'A photo of NAME': the paper's baseline")
    add("--hint", choices=["product", "inpaint"], default="product",
        help="what --controlnet sees around the product: black, or -1 as ControlNet 1.1 inpaint was trained [product]")
    add("--batch", metavar="N", type=whole(1, 1024), default=4, help="pictures painted at once [4]")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--dtype", metavar="NAME", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="float32, float16, bfloat16 [auto: float16 on CUDA, bfloat16 on CPUs that have it, else float32]")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="where the pictures go [out]")
    return parser.parse_args(arguments)


def check(args) -> None:
    """Raises BadInput for options that do not go together and for an --out that can't be written."""
    goals = [o for o in ("product", "data", "prompt") if getattr(args, o) is not None]
    if len(goals) > 1:
        raise BadInput(f"--{goals[0]} and --{goals[1]} exclude each other; leave one out")
    for option, needed in (("mask", "product"), ("category", "product"), ("reference", "product"),
                           ("reference_mask", "reference"), ("split", "data"), ("limit", "data")):
        if getattr(args, option) is not None and getattr(args, needed) is None:
            raise BadInput(f"--{option.replace('_', '-')} goes with --{needed}; add that one")
    for option in ("cg", "pg", "controlnet"):
        if args.prompt is not None and getattr(args, option):
            raise BadInput(f"--prompt is painted by the base alone, without --{option}; leave one out")
    if args.controlnet and args.cg:
        raise BadInput("--controlnet and --cg exclude each other; leave one out")
    if args.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    if args.product and not args.category:
        raise BadInput("--product goes with --category; add the product's category")
    names = [re.sub(r"\W+", "_", category) for category in dict.fromkeys(args.category or ())]
    if len(args.product or ()) == 1 and len({*names}) < len(names):
        raise BadInput(f"--category: two of {', '.join(args.category)} would give results of one name; leave one out")
    for option in ("product", "reference"):
        stems = [path.stem for path in getattr(args, option) or ()]
        if twice := {stem for stem in stems if stems.count(stem) > 1}:
            raise BadInput(f"--{option}: two files are named {min(twice)}, as the results would be; rename one")
    if args.data and args.num != 1:
        raise BadInput("--num: a data set gets one picture an item; leave it out, or run again with another --out")
    check_folder(args.out)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    (generate_text if args.prompt is not None else generate_data if args.data else generate_product)(args)
    if args.dtype == torch.bfloat16:
        print("computed in bfloat16; for more precision: --dtype float32", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
