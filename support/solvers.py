"""Support: what is not the paper's beside DDIM and Eq. 1: DPM-Solver++ for fewer steps, and weights for the loss.

`schedule` is a sampler.Schedule.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def dpm(eps_model: Callable[[Tensor, int], Tensor], z_T: Tensor, schedule, steps: int,
        edit: Callable[[Tensor, int], Tensor] | None = None,
        start: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2), called as sampler.ddim. Second order: it uses ẑ_0 of two steps.

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


def timestep_weights(schedule, kind: str) -> Tensor:
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
