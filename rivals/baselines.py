"""What the paper compares its generators with (section 5.3), on the same sampler: the baselines of Tables 1 and 2 that
are made of Stable Diffusion's own parts. Each paints as generate.paint does, products and references on one canvas in,
pictures out:

- Stable Diffusion, inpainting: the base alone, the product kept where it is;
- ControlNet: generate.paint itself, with a plain ControlNet in CG's place and no PG;
- Blended Diffusion: inpainting, pulled towards the reference by the gradient of a CLIP distance.

Not here: LaMa and Paint by Example, which are networks of their own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clip import CLIP
from data import background_hint
from generate import encode_prompts
from sampler import GUIDANCE, STEPS, draw_noise, sample
from weights import StableDiffusion

# Of Blended Diffusion's guidance, ours: of pairs of training ads 0 left the reference's scene to chance, 50 and 150
# found it in most, 400 was garish.
STRENGTH = 50.0


@torch.no_grad()
def stable_diffusion(sd: StableDiffusion, rgb: Tensor, mask: Tensor, texts: list[tuple[str, str, str]],
                     generators: list[Generator], reference: Tensor | None = None, reference_mask: Tensor | None = None,
                     steps: int = STEPS, guidance: float = GUIDANCE, on_step: Callable | None = None,
                     guide: Callable | None = None) -> Tensor:
    """Inpainting around the products -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    rgb (B, 3, H, W), mask (B, 1, H, W); reference of the same shape: z_T is then the noised latent of the product
    pasted on it (Table 2); reference_mask is not used. An inpainting UNet is told the product. With an ordinary one, the
    product's own latent, noised to the step's timestep, is put back after every step (Avrahami et al. 2023, 'Blended
    Latent Diffusion'). guide as in `sample`.
    """
    weight = sd.unet.conv_in.weight
    rgb, mask = rgb.to(weight), mask.to(weight)
    scene = torch.full_like(rgb, 0.5) if reference is None else reference.to(weight)
    z_known = sd.encode(rgb * mask + scene * (1 - mask)).float()
    shape, inpainting, edit = z_known.shape[1:], sd.inpainting(rgb, mask), None
    if inpainting is None:
        M = F.interpolate((mask > 0.5).float(), size=shape[1:])  # (B, 1, h, w), 0 or 1
        eps = torch.cat([draw_noise(shape, g) for g in generators]).to(z_known)

        def edit(z: Tensor, t: int) -> Tensor:
            known = sd.schedule.add_noise(z_known, eps, torch.full((len(z),), t)) if t >= 0 else z_known
            return M * known + (1 - M) * z

    z = sample(sd.unet, sd.schedule, encode_prompts(sd, texts), encode_prompts(sd, [("", "", "")] * len(texts)),
               generators, shape, z_ref=None if reference is None else z_known, steps=steps, guidance=guidance,
               inpainting=inpainting, on_step=on_step, guide=guide, edit=edit)
    return sd.decode(z)


def blended_diffusion(sd: StableDiffusion, rgb: Tensor, mask: Tensor, texts: list[tuple[str, str, str]],
                      generators: list[Generator], reference: Tensor, reference_mask: Tensor, clip: CLIP,
                      strength: float = STRENGTH, **how) -> Tensor:
    """stable_diffusion, guided by D, the cosine distance of the CLIP embeddings of two backgrounds: the reference's,
    I_ref ⊗ (1 − M_ref), and that of the picture which a step expects at the end, Î_0 ⊗ (1 − M). -> (B, 3, H, W)

    z_T is the noised reference, as there; the paper does not say. As classifier guidance (Dhariwal and Nichol 2021): ε
    := ε + strength √(1 − ᾱ_t) ∇_z D. After Avrahami et al. 2022, 'Blended Diffusion', with latents in place of their
    pixels, and without their augmentations.
    """
    M = mask.to(sd.unet.conv_in.weight.device)

    def embed(picture: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(clip.encode_image(clip.preprocess(background_hint(picture, mask))), dim=-1)  # (B, n)

    with torch.no_grad():
        wanted = embed(reference.to(M), reference_mask.to(M))

    def guide(eps_model: Callable, z: Tensor, t: int) -> Tensor:
        alpha_bar = sd.schedule.alpha_bar[t].item()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            eps = eps_model(z, t)
            z_0 = (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
            D = 1 - (embed(sd.decode(z_0), M) * wanted).sum(dim=-1)  # (B,)
            gradient = torch.autograd.grad(D.sum(), z)[0]
        return eps.detach() + strength * (1 - alpha_bar) ** 0.5 * gradient

    return stable_diffusion(sd, rgb, mask, texts, generators, reference, guide=guide, **how)
