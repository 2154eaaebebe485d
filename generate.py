"""The method: from a product photo to an ad, by CG alone or CG + PG in the style of a reference (Fig. 2, section 5.1).

    python generate.py                                                        # a sample product and reference
    python generate.py --product mug.png --category mug                       # CG: the common style of the category
    python generate.py --product mug.png --category mug --reference ad.png    # CG + PG: the style of that ad
    python generate.py --data BG60K --split bgpair --out results              # every item of a data set
    python generate.py --prompt "a photo of a mug"                            # the base alone

A product needs a mask: its image's alpha channel, or --mask FILE, white on the product. The result keeps the photo's
size and framing, and the product's own pixels where the mask is 1.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from data import AdInputs, Canvas, background_hint, dilate, inpaint_hint, product_hint
from model import ControlNet, Prompts
from programs.batch import count_steps, refuse_not_finite, second_pass
from programs.gallery import run_command
from programs.models import Models
from sampler import Conditions, SamplerSettings, sample, seeded
from support.cutouts import SOLID, extend
from support.files import one_line_errors
from support.images import canvas_size, fit, resize, to_bytes
from weights import StableDiffusion


def encode_prompts(sd: StableDiffusion, texts: list[tuple[str, str, str]]) -> Prompts:
    """B pictures' texts for P, P_fg and P_bg -> encodings, (B, L, D) each. Each distinct text is encoded once."""
    unique = list(dict.fromkeys(text for triple in texts for text in triple))
    encoded = sd.prompts(unique)  # (U, L, D)
    row = {text: i for i, text in enumerate(unique)}
    return Prompts(*(encoded[[row[triple[k]] for triple in texts]] for k in range(3)))


@torch.inference_mode()
def paint(sd: StableDiffusion, canvas: Canvas, settings: SamplerSettings, cg: ControlNet | None = None,
          pg: ControlNet | None = None, on_step: Callable | None = None, initial: Tensor | None = None,
          start: int | None = None) -> Tensor:
    """Paints backgrounds (Fig. 2) -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    cg: CG, or a plain ControlNet in its place; without it the base paints alone. pg sees the references, if any.
    initial (B, 3, H, W), start: pictures that z_T is made from, and its timestep; else the whole references, the first.
    """
    weight, branches = sd.unet.conv_in.weight, []
    rgb, mask = canvas.rgb.to(weight), canvas.mask.to(weight)  # (B, 3, 512, 512), (B, 1, 512, 512)
    if cg:
        hint = inpaint_hint(rgb, mask) if settings.hint == "inpaint" else product_hint(rgb, mask)
        branches.append((cg, cg.hint_features(hint)))
    if pg and canvas.reference is not None:
        hint = background_hint(canvas.reference.to(weight), canvas.reference_mask.to(weight))
        branches.append((pg, pg.hint_features(hint)))
    if initial is None and settings.from_reference:
        initial = canvas.reference
    z_ref = None if initial is None else sd.encode(initial)  # (B, 4, 64, 64)
    prompts, without = (encode_prompts(sd, texts) for texts in (canvas.texts, [(settings.negative,) * 3] * len(rgb)))
    conditions = Conditions(prompts, without, branches, mask, sd.inpainting(rgb, mask))
    z = sample(sd.unet, sd.schedule, conditions, canvas.generators, sd.latent_shape(*rgb.shape[2:]), settings, z_ref,
               on_step, start)
    return sd.decode(z)


def paste_back(painted: Tensor, painted_mask: Tensor, box: tuple[int, int, int, int], rgb: Tensor, mask: Tensor,
               spread: int = 1) -> Tensor:
    """Pastes the product over the painted canvas (3, h, w) -> (3, H, W) uint8 in its own frame. box is from `fit`.

    Where M = 1 the result has exactly the product's pixels: the product must stay unchanged (section 2.2). The networks
    paint the product too, and it spreads about `spread` pixels beyond its edge in painted_mask, which is M (1, h, w) on
    the canvas. There the scene is continued from further out, so that no glow surrounds the product. Under its shadow,
    or a haze in M, the scene stays as painted.
    """
    painted = extend(painted, dilate(painted_mask, 3 + 2 * spread) <= 0.5)  # an antialiased edge adds a pixel
    top, left, h, w = box
    M = mask.masked_fill(mask >= SOLID, 1)
    scene = resize(painted[:, top : top + h, left : left + w], *rgb.shape[1:])
    return torch.cat([to_bytes(fg * M + bg * (1 - M)) for fg, bg in zip(rgb.split(1), scene.split(1))])  # saves memory


def canvas_of(ads: list[AdInputs], h: int, w: int, generators: list[torch.Generator]) -> tuple[Canvas, list[tuple]]:
    """Fits ads to a canvas of h x w pixels; also returns where their frames lie on it. References fill the canvas;
    those without a mask, all of one size, are taken as they are.
    """
    rgb, boxes = zip(*(fit(ad.rgb, h, w, "contain") for ad in ads))
    mask = torch.stack([fit(ad.mask, h, w, "contain")[0] for ad in ads])
    canvas = Canvas(torch.stack(rgb), mask, [ad.texts for ad in ads], generators)
    if ads[0].reference is None:
        return canvas, boxes
    references, masks = zip(*(ad.reference for ad in ads))
    if masks[0] is None:
        return canvas._replace(reference=torch.stack(references)), boxes
    references, masks = (torch.stack([fit(x, h, w, "cover")[0] for x in xs]) for xs in (references, masks))
    return canvas._replace(reference=references, reference_mask=masks), boxes


def paint_ads(ads: list[AdInputs], models: Models, settings: SamplerSettings,
              painter: Callable | None = None) -> list[Tensor]:
    """Paints ads -> for each a picture (3, H, W) uint8 in its product's frame.

    Ads with the same canvas size, and all with or all without a reference, are painted as one batch.
    painter(canvas, on_step=...) -> (B, 3, h, w) paints the first pass in place of our networks.
    """
    painter = painter or partial(paint, models.sd, settings=settings, cg=models.cg, pg=models.pg)
    batches, results = defaultdict(list), {}
    for i, ad in enumerate(ads):
        size = canvas_size(*ad.mask.shape[1:], models.size, models.multiple)
        batches[size, ad.reference is not None].append(i)
    for ((h, w), _), batch in batches.items():
        chosen, painted = [ads[i] for i in batch], None
        generators = [seeded(ad.seed)[0] for ad in chosen]
        with tqdm(total=count_steps(models, settings), desc=f"{len(batch)} at once", leave=False, disable=None) as bar:
            for n in dict.fromkeys((1, settings.refine)):  # the canvas of the second pass is n times larger
                canvas, boxes = canvas_of(chosen, n * h, n * w, generators)
                paint_pass = painter if painted is None else partial(second_pass, paint, models, settings, painted)
                painted = paint_pass(canvas, on_step=lambda *_: bar.update()).cpu()
                refuse_not_finite(painted)
        for i, ad, picture, mask, box in zip(batch, chosen, painted, canvas.mask, boxes):
            results[i] = paste_back(picture, mask, box, ad.rgb, ad.mask, spread=settings.refine)
    return [results[i] for i in range(len(ads))]


def main(arguments: list[str] | None = None) -> None:
    run_command(arguments, __doc__, paint_ads)


if __name__ == "__main__":
    with one_line_errors():
        main()
