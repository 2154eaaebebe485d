"""From noise to a picture: the noise schedule, DDIM, classifier-free guidance, z_T from a reference (section 5.1, 3.3).

The step itself is `ddim_step`, a pure function; `ddim` walks it and yields what a reader wants to see on the way;
`sample` is the whole system's loop.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attention import Reused
from model import Prompts, UNet, predict_noise
from support.files import BadInput

STEPS, GUIDANCE = 50, 2.0  # section 5.1


class Schedule:
    """How much of a picture is left at each timestep: z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε; and which timesteps a walk visits.

    Built from the fields of a public scheduler_config.json; the defaults are Stable Diffusion's.
    """

    def __init__(self, config: dict | None = None):
        self.config = config = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
                                "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "epsilon",
                                "timestep_spacing": "leading", **(config or {})}
        self.T = config["num_train_timesteps"]
        # scaled linear: √β grows linearly
        beta = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, self.T) ** 2
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)  # (T,)
        self.final_alpha_bar = torch.tensor(1.0) if config["set_alpha_to_one"] else self.alpha_bar[0]

    def timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps, evenly spaced, the noisiest first; for 50 of T = 1000, by the field timestep_spacing:

        - leading: 981, 961, …, 1. Where T is no multiple of `steps` the noisy end is cut: 400 start at 799.
        - trailing: 999, 979, …, 19. Few-step models are trained for it: a single step visits 999.
        - linspace: 999, 979, 958, …, 0.

        Whatever the spacing, a step at t ends at t − T // steps, as in the reference. Raises BadInput for too many.
        """
        if self.config["timestep_spacing"] == "trailing":
            ts = np.arange(self.T, 0, -self.T / steps)[:steps].round() - 1
        elif self.config["timestep_spacing"] == "linspace":
            ts = np.linspace(0, self.T - 1, steps).round()[::-1]
        else:
            ts = np.arange(steps)[::-1] * (self.T // steps) + self.config["steps_offset"]
        if steps > self.T or ts[0] >= self.T:
            raise BadInput(f"--steps {steps}: too many for this model's schedule of {self.T} timesteps; give fewer")
        return ts.astype(int).tolist()

    def alpha_bar_at(self, t: int) -> Tensor:
        """ᾱ_t, and its value for the end of the walk below t = 0."""
        return self.alpha_bar[t] if t >= 0 else self.final_alpha_bar

    def add_noise(self, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_0, eps (B, 4, h, w), t (B,) -> z_t (B, 4, h, w)."""
        alpha_bar = self.alpha_bar.to(z_0.device)[t].view(-1, 1, 1, 1)
        return (alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps).to(z_0.dtype)

    def target(self, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the UNet is to predict from z_t: ε, or for a v-prediction model v = √ᾱ_t ε − √(1 − ᾱ_t) z_0."""
        if self.config["prediction_type"] == "epsilon":
            return eps
        alpha_bar = self.alpha_bar.to(z_0.device)[t].view(-1, 1, 1, 1)
        return (alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0).to(z_0.dtype)

    def eps_from(self, output: Tensor, z_t: Tensor, t: int) -> Tensor:
        """ε from the UNet's output at timestep t."""
        if self.config["prediction_type"] == "epsilon":
            return output
        return self.alpha_bar[t].sqrt().item() * output + (1 - self.alpha_bar[t]).sqrt().item() * z_t


def ddim_step(eps: Tensor, z_t: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float = 0.0,
              noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One step of DDIM from ᾱ_t to ᾱ_{t−1} -> z_{t−1} and the current guess ẑ_0, each (B, 4, h, w).

    η = 0 is deterministic; η = 1 is DDPM's noise, and needs `noise` (B, 4, h, w) ~ N(0, 1).
    """
    a, a_prev = float(alpha_bar), float(alpha_bar_prev)
    z_0 = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
    z_prev = a_prev**0.5 * z_0 + (1 - a_prev - sigma**2) ** 0.5 * eps
    return (z_prev + sigma * noise if sigma > 0 else z_prev), z_0


def ddim(eps_model: Callable[[Tensor, int], Tensor], z_T: Tensor, schedule: Schedule, steps: int = STEPS,
         eta: float = 0.0, generators: list[torch.Generator] | None = None,
         edit: Callable[[Tensor, int], Tensor] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walks from z_T (B, 4, h, w) to z_0; yields (t, z_{t−1}, ẑ_0) after every step.

    eps_model(z, t) -> eps; generators, one a picture, draw the steps' noise where η > 0. edit(z, t) -> z changes each
    step's result, t its timestep, below 0 at the end: what is known of the picture can be put back there.
    """
    z, stride = z_T, schedule.T // steps
    for t in schedule.timesteps(steps):
        eps = eps_model(z, t)
        noise = torch.cat([draw_noise(z.shape[1:], g) for g in generators]).to(z) if eta > 0 else None
        z, z_0 = ddim_step(eps, z, schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - stride), eta, noise)
        z = edit(z, t - stride) if edit else z
        yield t, z, z_0


def seeded(seed: int, count: int = 1) -> list[torch.Generator]:
    """One CPU generator a picture, seed + index: neither device nor batch size changes a picture."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw_noise(shape, generator: torch.Generator) -> Tensor:
    """(1, *shape) ~ N(0, 1), drawn on the CPU in float32."""
    return torch.randn((1, *shape), generator=generator)


@torch.no_grad()
def sample(unet: UNet, schedule: Schedule, prompts: Prompts, unconditional: Prompts, generators: list[torch.Generator],
           shape: tuple[int, int, int], branches=(), mask: Tensor | None = None, z_ref: Tensor | None = None,
           steps: int = STEPS, guidance: float = GUIDANCE, eta: float = 0.0, inpainting: Tensor | None = None,
           on_step: Callable[[int, Tensor, Tensor], None] | None = None,
           guide: Callable[[Callable, Tensor, int], Tensor] | None = None,
           edit: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
    """Denoises a batch of B = len(generators) pictures -> z_0 (B, *shape) float32, scaled as the UNet's latents are.

    prompts, unconditional: encodings with and without the prompt, B rows each; branches, mask and inpainting as in
    `predict_noise`; z_ref (B, *shape): where given, z_T is this latent noised to the first timestep, not pure noise
    (section 3.3). Both passes of the guidance run as one batch; guidance 1 runs the conditional one alone.
    For other methods on the same walk, guide(eps_model, z, t) -> eps stands in for eps_model(z, t), and edit is ddim's.
    """
    weight = unet.conv_in.weight
    z_T = torch.cat([draw_noise(shape, g) for g in generators]).to(weight.device)  # float32 whatever the weights are
    if z_ref is not None:
        first = torch.full((len(z_T),), schedule.timesteps(steps)[0], device=z_T.device)
        z_T = schedule.add_noise(z_ref.to(z_T), z_T, first)

    # With guidance prompts and mask have 2 B rows and z has B: attention.to_rows doubles it where the first prompt is read
    passes = 1
    if guidance != 1:
        passes, prompts = 2, Prompts(*(torch.cat(pair) for pair in zip(unconditional, prompts)))
    # What stays the same over the steps: what the networks make of it is computed at the first one only
    prompts = Prompts(*map(Reused, prompts))
    branches = [(branch, Reused(hint)) for branch, hint in branches]
    mask = None if mask is None else Reused(mask.repeat(passes, 1, 1, 1))

    def eps_model(z: Tensor, t: int) -> Tensor:
        t_all = torch.full((1,), t, device=z.device)
        output = predict_noise(unet, z.to(weight.dtype), t_all, prompts, branches, mask, inpainting).float()
        if guidance != 1:
            without, with_prompt = output.chunk(2)
            output = without + guidance * (with_prompt - without)  # classifier-free guidance
        return schedule.eps_from(output, z, t)

    z = z_T
    model = partial(guide, eps_model) if guide else eps_model
    for t, z, z_0 in ddim(model, z_T, schedule, steps, eta, generators, edit):
        if on_step:
            on_step(t, z, z_0)
    return z


def timestep_weights(schedule: Schedule, kind: str) -> Tensor:
    """The weight of each timestep's error, (T,): 1 ('uniform', Eq. 1), or by its signal-to-noise ratio.

    Nearly clean z_t make most of the error of ε, little of which can be learnt; the noisiest, where the scene is
    decided, make almost none. 'min-snr' (Hang et al. 2023, γ = 5) weights the former down, 'debias' (Yu et al. 2023)
    the former down and the latter up.
    """
    if kind == "uniform":
        return torch.ones(schedule.T)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    weight = snr.clamp(max=5) / snr if kind == "min-snr" else snr.rsqrt()
    return weight if schedule.config["prediction_type"] == "epsilon" else weight * snr / (snr + 1)
