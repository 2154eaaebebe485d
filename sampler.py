"""The method: from noise to a picture by DDIM with classifier-free guidance, z_T from a reference (sections 3.3, 5.1).

`ddim_step` is one step, a pure function. `ddim` repeats it and yields the intermediate results; `dpm` does the same
with a solver that needs fewer steps. `guided` combines the noise predicted with and without the prompt. `sample` joins
them, from z_T to z_0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention import mask_at
from model import Prompts, UNet, predict_noise
from support.files import BadInput


@dataclass(frozen=True)
class Painting:
    """How pictures are painted. The defaults are the paper's (sections 3.3 and 5.1)."""

    steps: int = 50
    guidance: float = 2.0  # weight of the prompt in classifier-free guidance; 1: no guidance
    eta: float = 0.0  # η of DDIM: 0 deterministic, 1 as much noise at each step as DDPM
    from_reference: bool = True  # z_T is the reference's latent, noised; without a reference it is pure noise
    hint: str = "product"  # CG, or a ControlNet in its place, sees I ⊗ M; with "inpaint", data.inpaint_hint
    # Ours, not the paper's:
    sampler: str = "ddim"  # or "dpm++", DPM-Solver++ (2M), for fewer steps
    refine: int = 1  # a second pass paints the picture again, this many times larger; 1: no second pass
    refine_from: int = 301  # T', where the second pass starts, in thousandths of the schedule
    refine_alone: bool = False  # the base paints the second pass alone: no branches, the prompt '', no guidance


class Schedule:
    """The noise schedule, z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε, and the timesteps that a sampler visits.

    config: fields of a public scheduler_config.json. The defaults are Stable Diffusion's.
    """

    def __init__(self, config: dict | None = None):
        self.config = config = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
                                "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "epsilon",
                                "timestep_spacing": "leading", **(config or {})}
        self.T = config["num_train_timesteps"]
        beta = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, self.T) ** 2  # scaled linear
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)  # (T,)
        self.final_alpha_bar = torch.tensor(1.0) if config["set_alpha_to_one"] else self.alpha_bar[0]

    def timesteps(self, steps: int, start: int | None = None) -> list[int]:
        """`steps` evenly spaced timesteps, the noisiest first; for 50 of T = 1000, by the config's timestep_spacing:

        - leading: 981, 961, …, 1. If T is no multiple of `steps`, the noisy end is cut: 400 steps start at 799.
        - trailing: 999, 979, …, 19. Few-step models are trained for it: a single step visits 999.
        - linspace: 999, 979, 958, …, 0.

        Whatever the spacing, a step of DDIM at t ends at t − T // steps, as in diffusers. `start` leaves out all
        timesteps above it. Raises BadInput if there are more steps than timesteps, or if none is left.
        """
        if self.config["timestep_spacing"] == "trailing":
            ts = np.arange(self.T, 0, -self.T / steps)[:steps].round() - 1
        elif self.config["timestep_spacing"] == "linspace":
            ts = np.linspace(0, self.T - 1, steps).round()[::-1]
        else:
            ts = np.arange(steps)[::-1] * (self.T // steps) + self.config["steps_offset"]
        if steps > self.T or ts[0] >= self.T:
            raise BadInput(f"--steps {steps}: too many for this model's schedule of {self.T} timesteps; give fewer")
        ts = [t for t in ts.astype(int).tolist() if start is None or t <= start]
        if not ts:
            raise BadInput(f"--refine-from: none of the {steps} steps is that late; raise it, or give more --steps")
        return ts

    def alpha_bar_at(self, t: int) -> Tensor:
        """ᾱ_t, (); its final value for t < 0, after the last step."""
        return self.alpha_bar[t] if t >= 0 else self.final_alpha_bar

    def add_noise(self, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_0, eps (B, 4, h, w), t (B,) -> z_t (B, 4, h, w)."""
        alpha_bar = self.alpha_bar.to(z_0.device)[t].view(-1, 1, 1, 1)
        return (alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps).to(z_0.dtype)

    def target(self, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the UNet learns to predict, (B, 4, h, w): ε, or in a v-prediction model v = √ᾱ_t ε − √(1 − ᾱ_t) z_0."""
        if self.config["prediction_type"] == "epsilon":
            return eps
        alpha_bar = self.alpha_bar.to(z_0.device)[t].view(-1, 1, 1, 1)
        return (alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0).to(z_0.dtype)

    def eps_from(self, output: Tensor, z_t: Tensor, t: int) -> Tensor:
        """The UNet's output at timestep t, ε or v -> ε. All are (B, 4, h, w)."""
        if self.config["prediction_type"] == "epsilon":
            return output
        return self.alpha_bar[t].sqrt().item() * output + (1 - self.alpha_bar[t]).sqrt().item() * z_t


def timestep_weights(schedule: Schedule, kind: str) -> Tensor:
    """The weight of each timestep's error, (T,): 1 ('uniform', Eq. 1), or a function of its signal-to-noise ratio.

    Most of the error of ε comes from nearly clean z_t, where little of it can be learnt; almost none comes from the
    noisiest, where the scene is decided. 'min-snr' (Hang et al. 2023, γ = 5) weights the former down; 'debias' (Yu et
    al. 2023) also weights the latter up. Neither is the paper's.
    """
    if kind == "uniform":
        return torch.ones(schedule.T)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    weight = snr.clamp(max=5) / snr if kind == "min-snr" else snr.rsqrt()
    return weight if schedule.config["prediction_type"] == "epsilon" else weight * snr / (snr + 1)


def ddim_step(eps: Tensor, z_t: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float = 0.0,
              noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One step of DDIM (Song et al. 2021, Eq. 12), from ᾱ_t to ᾱ_{t−1} -> z_{t−1} and the guess ẑ_0, each (B, 4, h, w).

    η = 0 is deterministic. η = 1 adds as much noise as DDPM. η > 0 needs `noise` (B, 4, h, w) ~ N(0, 1).
    """
    a, a_prev = float(alpha_bar), float(alpha_bar_prev)
    z_0 = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
    z_prev = a_prev**0.5 * z_0 + (1 - a_prev - sigma**2) ** 0.5 * eps
    return (z_prev + sigma * noise if sigma > 0 else z_prev), z_0


Step = tuple[int, Tensor, Tensor]  # (t, z_{t−1}, ẑ_0)


def ddim(eps_model: Callable[[Tensor, int], Tensor], z_T: Tensor, schedule: Schedule, steps: int = Painting.steps,
         eta: float = 0.0, generators: list[torch.Generator] | None = None,
         edit: Callable[[Tensor, int], Tensor] | None = None, start: int | None = None) -> Iterator[Step]:
    """Walks from z_T (B, 4, h, w) to z_0; yields (t, z_{t−1}, ẑ_0) after every step.

    eps_model(z, t) -> eps. For η > 0, generators, one per picture, draw each step's noise. edit(z, t) -> z can put
    known parts of the picture back into each step's result; t is that result's timestep, below 0 at the end.
    With `start`, only timesteps up to it are visited, and z_T belongs to the first of them.
    """
    z, stride = z_T, schedule.T // steps
    for t in schedule.timesteps(steps, start):
        eps = eps_model(z, t)
        noise = torch.cat([draw_noise(z.shape[1:], g) for g in generators]).to(z) if eta > 0 else None
        z, z_0 = ddim_step(eps, z, schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - stride), eta, noise)
        z = edit(z, t - stride) if edit else z
        yield t, z, z_0


def dpm(eps_model: Callable[[Tensor, int], Tensor], z_T: Tensor, schedule: Schedule, steps: int = Painting.steps,
        edit: Callable[[Tensor, int], Tensor] | None = None, start: int | None = None) -> Iterator[Step]:
    """DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2), called as `ddim`. Second order: it uses ẑ_0 of two steps.

    With α = √ᾱ, σ = √(1 − ᾱ), λ = log(α / σ), a step's length h = λ_{t−1} − λ_t, and primes for the step before:

        z_{t−1} = (σ_{t−1} / σ_t) z_t − α_{t−1} (e^{−h} − 1) D,    D = ẑ_0 + h / (2 h') (ẑ_0 − ẑ_0'),

    where D is ẑ_0 extrapolated to the middle of the step. The first step has no step before it, and in the last, to a
    clean picture, h may be infinite. Both use D = ẑ_0, and are steps of DDIM.
    """
    z, timesteps, before = z_T, schedule.timesteps(steps, start), None
    for t, to in zip(timesteps, [*timesteps[1:], -1]):
        a, a_to = float(schedule.alpha_bar_at(t)), float(schedule.alpha_bar_at(to))  # ᾱ
        z_0 = D = (z - (1 - a) ** 0.5 * eps_model(z, t)) / a**0.5
        lambda_t, lambda_to = (0.5 * math.log(x / (1 - x)) if x < 1 else math.inf for x in (a, a_to))
        if before and to >= 0:
            z_0_before, lambda_before = before
            D = z_0 + (lambda_to - lambda_t) / (2 * (lambda_t - lambda_before)) * (z_0 - z_0_before)
        z = ((1 - a_to) / (1 - a)) ** 0.5 * z - a_to**0.5 * math.expm1(lambda_t - lambda_to) * D
        z, before = edit(z, to) if edit else z, (z_0, lambda_t)
        yield t, z, z_0


def walk(eps_model: Callable[[Tensor, int], Tensor], z_T: Tensor, schedule: Schedule, how: Painting,
         generators: list[torch.Generator], edit: Callable[[Tensor, int], Tensor] | None = None,
         start: int | None = None) -> Iterator[Step]:
    """Runs `ddim` or `dpm`, whichever how.sampler names."""
    if how.sampler == "dpm++":
        return dpm(eps_model, z_T, schedule, how.steps, edit, start)
    return ddim(eps_model, z_T, schedule, how.steps, how.eta, generators, edit, start)


def seeded(seed: int, count: int = 1) -> list[torch.Generator]:
    """One CPU generator per picture, seed + index: neither device nor batch size changes a picture."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw_noise(shape, generator: torch.Generator) -> Tensor:
    """(1, *shape) ~ N(0, 1), drawn on the CPU in float32."""
    return torch.randn((1, *shape), generator=generator)


class Conditions(NamedTuple):
    """The networks' inputs beside z_t and t, for a batch of B pictures."""

    prompts: Prompts
    unconditional: Prompts  # the encodings of '', for guidance
    branches: tuple = ()  # as in `predict_noise`: pairs of a branch and its hint's features
    mask: Tensor | None = None  # M (B, 1, H, W) of the products
    inpainting: Tensor | None = None  # (B, 5, h, w), for an inpainting UNet


def guided(unet: UNet, schedule: Schedule, given: Conditions, guidance: float) -> Callable[[Tensor, int], Tensor]:
    """Classifier-free guidance (section 5.1) -> eps_model(z, t) = ε('') + guidance · (ε(P) − ε('')), (B, 4, h, w).

    Both passes run as one batch of 2 B rows. With guidance 1 only the pass with the prompt runs.
    """
    prompts, mask = given.prompts, given.mask
    if guidance != 1:
        prompts = Prompts(*(torch.cat(pair) for pair in zip(given.unconditional, given.prompts)))
        mask = None if mask is None else mask.repeat(2, 1, 1, 1)

    def eps_model(z: Tensor, t: int) -> Tensor:
        z_t, t_all = z.to(unet.conv_in.weight.dtype), torch.full((1,), t, device=z.device)
        output = predict_noise(unet, z_t, t_all, prompts, given.branches, mask, given.inpainting).float()
        if guidance != 1:
            without, with_prompt = output.chunk(2)
            output = without + guidance * (with_prompt - without)
        return schedule.eps_from(output, z, t)

    return eps_model


def first_latent(schedule: Schedule, generators: list[torch.Generator], shape: tuple[int, int, int], steps: int,
                 z_ref: Tensor | None = None, device="cpu", start: int | None = None) -> Tensor:
    """z_T (B, *shape) float32: pure noise, or the reference's latent z_ref noised to the first timestep."""
    noise = torch.cat([draw_noise(shape, g) for g in generators]).to(device)
    if z_ref is None:
        return noise
    return schedule.add_noise(z_ref.to(noise), noise, torch.full((len(noise),), schedule.timesteps(steps, start)[0]))


@torch.no_grad()
def sample(unet: UNet, schedule: Schedule, given: Conditions, generators: list[torch.Generator],
           shape: tuple[int, int, int], how: Painting, z_ref: Tensor | None = None,
           on_step: Callable[[int, Tensor, Tensor], None] | None = None, start: int | None = None) -> Tensor:
    """Denoises B = len(generators) pictures -> z_0 (B, *shape) float32, scaled as the UNet's latents are.

    z_ref (B, *shape): the references' latents, noised to make z_T (section 3.3). on_step(t, z_{t−1}, ẑ_0) is called
    after every step. A second pass gives `start` = T' and, as z_ref, the latents of the first pass's pictures.
    """
    if given.mask is not None:  # average the full-size mask only once: each level's average of it is the same
        given = given._replace(mask=mask_at(given.mask, *shape[1:]))
    z_T = first_latent(schedule, generators, shape, how.steps, z_ref, unet.conv_in.weight.device, start)
    eps_model = guided(unet, schedule, given, how.guidance)
    for t, z, z_0 in walk(eps_model, z_T, schedule, how, generators, start=start):
        if on_step:
            on_step(t, z, z_0)
    return z
