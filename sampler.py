"""The method: from noise to a picture by DDIM with classifier-free guidance, z_T from a reference (sections 3.3, 5.1).

`ddim_step` is one step, a pure function. `ddim` repeats it and yields the intermediate results. `guided` combines the
noise predicted with and without the prompt. `sample` joins them, from z_T to z_0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention import mask_at
from model import Prompts, UNet, predict_noise
from support.files import BadInput
from support.solvers import dpm


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are painted. The defaults are the paper's (sections 3.3 and 5.1)."""

    steps: int = 50
    guidance: float = 2.0  # weight of the prompt in classifier-free guidance; 1: no guidance
    eta: float = 0.0  # η of DDIM: 0 deterministic, 1 as much noise at each step as DDPM
    from_reference: bool = True  # z_T is the reference's latent, noised; without a reference it is pure noise
    negative: str = ""  # the prompt that guidance leads away from
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

        leading 981, 961, …, 1 (400 steps start at 799); trailing 999, 979, …, 19; linspace 999, 979, 958, …, 0.

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


def ddim(eps_model: Callable[[Tensor, int], Tensor], z_T: Tensor, schedule: Schedule,
         steps: int = SamplerSettings.steps, eta: float = 0.0, generators: list[torch.Generator] | None = None,
         edit: Callable[[Tensor, int], Tensor] | None = None,
         start: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walks from z_T (B, 4, h, w) to z_0; yields (t, z_{t−1}, ẑ_0) after every step.

    eps_model(z, t) -> eps. For η > 0, generators, one per picture, draw each step's noise. edit(z, t) -> z can put
    known parts of the picture back into each step's result (rivals/); t is the result's timestep, below 0 at the end.
    With `start`, only timesteps up to it are visited, and z_T belongs to the first of them.
    """
    z = z_T  # (B, 4, 64, 64) for SD 1.5 at 512 px
    stride = schedule.T // steps  # 20 for 50 steps
    for t in schedule.timesteps(steps, start):
        eps = eps_model(z, t)
        noise = torch.cat([draw_noise(z.shape[1:], g) for g in generators]).to(z) if eta > 0 else None
        z, z_0 = ddim_step(eps, z, schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - stride), eta, noise)
        z = edit(z, t - stride) if edit else z
        yield t, z, z_0


SAMPLERS = {"ddim": ddim, "dpm++": dpm}


def seeded(seed: int, count: int = 1) -> list[torch.Generator]:
    """One CPU generator per picture, seed + index: neither device nor batch size changes a picture."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw_noise(shape, generator: torch.Generator) -> Tensor:
    """(1, *shape) ~ N(0, 1), drawn on the CPU in float32."""
    return torch.randn((1, *shape), generator=generator)


class Conditions(NamedTuple):
    """The networks' inputs beside z_t and t, for a batch of B pictures."""

    prompts: Prompts
    unconditional: Prompts  # the encodings of '', or of a negative prompt, for guidance
    branches: tuple = ()  # as in `predict_noise`: pairs of a branch and its hint's features
    mask: Tensor | None = None  # M (B, 1, H, W) of the products, at any size
    inpainting: Tensor | None = None  # (B, 5, h, w), for an inpainting UNet


def guided(unet: UNet, schedule: Schedule, conditions: Conditions, guidance: float) -> Callable[[Tensor, int], Tensor]:
    """Classifier-free guidance (section 5.1) -> eps_model(z, t) = ε('') + guidance · (ε(P) − ε('')), (B, 4, h, w).

    Both passes run as one batch: of prompts and masks 2B rows, of z and hints B, which the networks repeat where they
    first read a prompt (attention.one_row_per_prompt). With guidance 1 only the pass with the prompt runs.
    """
    prompts, mask = conditions.prompts, conditions.mask
    if guidance != 1:
        prompts = Prompts(*(torch.cat(pair) for pair in zip(conditions.unconditional, conditions.prompts)))
        mask = None if mask is None else mask.repeat(2, 1, 1, 1)

    def eps_model(z: Tensor, t: int) -> Tensor:
        z_t, t_all = z.to(unet.conv_in.weight.dtype), torch.full((1,), t, device=z.device)
        output = predict_noise(unet, z_t, t_all, prompts, conditions.branches, mask, conditions.inpainting).float()
        if guidance != 1:
            without, with_prompt = output.chunk(2)  # (2B, 4, 64, 64) -> (B, 4, 64, 64) each
            output = without + guidance * (with_prompt - without)
        return schedule.eps_from(output, z, t)

    return eps_model


def first_latent(schedule: Schedule, generators: list[torch.Generator], shape: tuple[int, int, int], steps: int,
                 z_ref: Tensor | None = None, device="cpu", start: int | None = None) -> Tensor:
    """z_T (B, *shape) float32: pure noise, or the reference's latent z_ref, noised (section 3.3).

    The paper noises it "for T times"; here to the first timestep that is visited, such as 981.
    """
    noise = torch.cat([draw_noise(shape, g) for g in generators]).to(device)
    if z_ref is None:
        return noise
    return schedule.add_noise(z_ref.to(noise), noise, torch.full((len(noise),), schedule.timesteps(steps, start)[0]))


@torch.no_grad()
def sample(unet: UNet, schedule: Schedule, conditions: Conditions, generators: list[torch.Generator],
           shape: tuple[int, int, int], settings: SamplerSettings, z_ref: Tensor | None = None,
           on_step: Callable[[int, Tensor, Tensor], None] | None = None, start: int | None = None) -> Tensor:
    """Denoises B = len(generators) pictures -> z_0 (B, *shape) float32, scaled as the UNet's latents are.

    z_ref (B, *shape): the references' latents, noised to make z_T (section 3.3). on_step(t, z_{t−1}, ẑ_0) is called
    after every step. A second pass gives `start` = T' and, as z_ref, the latents of the first pass's pictures.
    """
    if conditions.mask is not None:  # average the full-size mask only once: each level's average of it is the same
        conditions = conditions._replace(mask=mask_at(conditions.mask, *shape[1:]))
    z_T = first_latent(schedule, generators, shape, settings.steps, z_ref, unet.conv_in.weight.device, start)
    eps_model = guided(unet, schedule, conditions, settings.guidance)
    noise = {"eta": settings.eta, "generators": generators} if settings.eta else {}  # DDIM's alone
    for t, z, z_0 in SAMPLERS[settings.sampler](eps_model, z_T, schedule, settings.steps, start=start, **noise):
        if on_step:
            on_step(t, z, z_0)
    return z
