"""Rivals: those that are made of Stable Diffusion's own parts (section 5.3), on the same sampler as ours.

Each paints as generate.paint does, from a batch on its canvas:

- Stable Diffusion, inpainting: the base alone, with the product kept where it is;
- Blended Diffusion: the same, guided towards the reference by the gradient of a CLIP distance.

The third, ControlNet, is generate.paint itself, with a plain ControlNet in CG's place.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clip import CLIP
from data import Canvas, background_hint
from generate import encode_prompts
from sampler import SAMPLERS, Conditions, SamplerSettings, draw_noise, first_latent, guided
from weights import StableDiffusion

# Strength of Blended Diffusion's guidance; our choice. On pairs of training ads, 0 left the scene to chance, 50 and 150
# gave the reference's scene in most, and 400 gave garish pictures.
STRENGTH = 50.0


@torch.no_grad()
def stable_diffusion(sd: StableDiffusion, canvas: Canvas, settings: SamplerSettings, on_step: Callable | None = None,
                     guide: Callable[[Callable, Tensor, int], Tensor] | None = None) -> Tensor:
    """Inpainting around the products -> (B, 3, H, W) float32 in [0, 1], the products not yet pasted back.

    With a reference (Table 2), z_T is the noised latent of the product pasted onto it; its mask is not used. An
    inpainting UNet reads the product beside z_t. With an ordinary UNet, the product's own latent, noised to the step's
    timestep, is put back after every step (Avrahami et al. 2023, 'Blended Latent Diffusion').
    on_step as in `sampler.sample`; guide(eps_model, z, t) -> ε replaces eps_model(z, t).
    """
    weight = sd.unet.conv_in.weight
    rgb, mask = canvas.rgb.to(weight), canvas.mask.to(weight)
    scene = torch.full_like(rgb, 0.5) if canvas.reference is None else canvas.reference.to(weight)
    z_known = sd.encode(rgb * mask + scene * (1 - mask)).float()
    shape, inpainting, put_back = z_known.shape[1:], sd.inpainting(rgb, mask), None
    if inpainting is None:
        M = F.interpolate((mask > 0.5).float(), size=shape[1:])  # (B, 1, h, w), 0 or 1
        eps = torch.cat([draw_noise(shape, g) for g in canvas.generators]).to(z_known)

        def put_back(z: Tensor, t: int) -> Tensor:
            known = sd.schedule.add_noise(z_known, eps, torch.full((len(z),), t)) if t >= 0 else z_known
            return M * known + (1 - M) * z

    with_prompt, without = (encode_prompts(sd, texts) for texts in (canvas.texts, [("", "", "")] * len(rgb)))
    eps_model = guided(sd.unet, sd.schedule, Conditions(with_prompt, without, inpainting=inpainting), settings.guidance)
    if guide:
        eps_model = partial(guide, eps_model)
    z_T = first_latent(sd.schedule, canvas.generators, shape, settings.steps,
                       None if canvas.reference is None else z_known, z_known.device)
    for t, z, z_0 in SAMPLERS[settings.sampler](eps_model, z_T, sd.schedule, settings.steps, edit=put_back):
        if on_step:
            on_step(t, z, z_0)
    return sd.decode(z)


def blended_diffusion(sd: StableDiffusion, canvas: Canvas, settings: SamplerSettings, clip: CLIP,
                      strength: float = STRENGTH, on_step: Callable | None = None) -> Tensor:
    """stable_diffusion, guided by a distance D between two backgrounds -> (B, 3, H, W) float32 in [0, 1].

    D is the cosine distance between the CLIP embeddings of the reference's background, I_ref ⊗ (1 − M_ref), and of the
    current guess's, Î_0 ⊗ (1 − M), where Î_0 is the decoded ẑ_0. As in classifier guidance (Dhariwal and Nichol 2021),
    ε := ε + strength √(1 − ᾱ_t) ∇_z D. The paper does not say what z_T is; here it is the noised reference, as in
    stable_diffusion. The method is that of Avrahami et al. 2022, 'Blended Diffusion', on latents instead of pixels and
    without their augmentations.
    """
    M = canvas.mask.to(sd.unet.conv_in.weight.device)

    def embed(picture: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(clip.encode_image(clip.preprocess(background_hint(picture, mask))), dim=-1)  # (B, n)

    with torch.no_grad():
        wanted = embed(canvas.reference.to(M), canvas.reference_mask.to(M))

    def guide(eps_model: Callable, z: Tensor, t: int) -> Tensor:
        alpha_bar = sd.schedule.alpha_bar[t].item()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            eps = eps_model(z, t)
            z_0 = (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
            D = 1 - (embed(sd.decode(z_0), M) * wanted).sum(dim=-1)  # (B,)
            gradient = torch.autograd.grad(D.sum(), z)[0]
        return eps.detach() + strength * (1 - alpha_bar) ** 0.5 * gradient

    return stable_diffusion(sd, canvas, settings, on_step, guide)
