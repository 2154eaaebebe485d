"""From a product photo to an ad image: CG alone, or CG and PG after a reference (Fig. 2, inference)."""

import torch
from torch import Tensor

from data import background_hint, product_hint
from model import ControlNet, Prompts
from sampler import GUIDANCE, STEPS, sample
from weights import StableDiffusion

IDENTIFIER = "sks {}"  # [D], section 5.1: 'sks' and the category's id


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
          steps: int = STEPS, guidance: float = GUIDANCE, on_step=None) -> Tensor:
    """Paints a batch of backgrounds -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    rgb (B, 3, H, W) and mask (B, 1, H, W): the products on their canvas; reference and reference_mask of the same
    shapes, for PG. from_reference: z_T is the reference's latent noised, not pure noise (section 3.3).
    """
    weight = sd.unet.conv_in.weight
    rgb, mask = rgb.to(weight), mask.to(weight)
    branches = [(cg, product_hint(rgb, mask))] if cg else []
    z_ref = None
    if pg:
        reference, reference_mask = reference.to(weight), reference_mask.to(weight)
        branches.append((pg, background_hint(reference, reference_mask)))
        z_ref = sd.encode(reference) if from_reference else None
    z = sample(sd.unet, sd.schedule, encode_prompts(sd, texts), encode_prompts(sd, [("", "", "")] * len(texts)),
               generators, sd.latent_shape(*rgb.shape[2:]), branches, mask, z_ref, steps, guidance, on_step=on_step)
    return sd.decode(z)
