"""Tests: DPM-Solver++ beside diffusers' and beside DDIM; the second pass's part of a walk."""

import pytest
import torch
from conftest import random, relative_error

from model import Prompts
from sampler import Conditions, SamplerSettings, Schedule, ddim, sample, seeded, walk
from support.files import BadInput
from support.solvers import dpm

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def model(z, t):
    """A stand-in for a UNet, neither linear in z nor the same at every step."""
    return torch.tanh(z) * (1 + t / 1000)


class Still(torch.nn.Module):
    """A UNet that predicts zero noise and keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.seen = torch.nn.Conv2d(4, 1, 1), []

    def forward(self, z, t, context, residuals=None):
        self.seen.append((z.clone(), int(t[0])))
        return torch.zeros_like(z)


PROMPTS = Prompts(*(torch.zeros(3, 7, 8) for _ in range(3)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, steps, to_one", [
    ("leading", 10, False), ("leading", 20, True), ("leading", 50, False), ("trailing", 10, True),
    ("trailing", 20, False), ("linspace", 50, False), ("linspace", 20, True)])
def test_dpm_goes_the_same_way_as_dpm_solver_multistep_scheduler(spacing, steps, to_one, prediction):
    """The reference's timesteps differ from DDIM's, so it is given ours. euler_at_final makes its last step first-order
    for any number of steps, and final_sigmas_type makes it end at the final ᾱ of DDIM's `set_alpha_to_one`.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, beta_schedule="scaled_linear", prediction_type=prediction, algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", lower_order_final=True, euler_at_final=True, use_karras_sigmas=False,
        thresholding=False, final_sigmas_type="zero" if to_one else "sigma_min")
    schedule = Schedule({"prediction_type": prediction, "timestep_spacing": spacing, "set_alpha_to_one": to_one})
    theirs.set_timesteps(timesteps=schedule.timesteps(steps))
    z = z_T = random(2, 4, 8, 8)
    ours = dpm(lambda z, t: schedule.eps_from(model(z, t), z, t), z_T, schedule, steps)
    for t, (our_t, our_z, _) in zip(theirs.timesteps.tolist(), ours, strict=True):
        z = theirs.step(model(z, t), t, z).prev_sample
        assert our_t == t and relative_error(our_z, z) < 1e-5


def test_dpms_first_and_last_step_are_ddims():
    """The first has no step before it, the last none after it; the step of a walk of one is both."""
    for to_one in (False, True):
        schedule, z_T = Schedule({"set_alpha_to_one": to_one}), random(2, 4, 8, 8)
        [(_, ours, guess)], [(_, theirs, same_guess)] = (list(steps(model, z_T, schedule, 1)) for steps in (dpm, ddim))
        assert relative_error(ours, theirs) < 1e-5 and relative_error(guess, same_guess) < 1e-5


def test_dpm_is_of_second_order():
    """Twice as many steps divide the distance from the exact end by about four, with DDIM by about two."""
    schedule, z = Schedule(), random(2, 4, 8, 8, dtype=torch.float64)

    # All start at t = 801
    def ends(sampler, steps):
        *_, (_, z_0, _) = sampler(model, z, schedule, steps, start=801)
        return z_0

    exact = ends(dpm, 250)
    of_dpm, of_ddim = ([(ends(sampler, steps) - exact).abs().mean() for steps in (25, 50)] for sampler in (dpm, ddim))
    assert of_dpm[0] / of_dpm[1] > 3 > 2.5 > of_ddim[0] / of_ddim[1] > 1.5


def test_an_edited_walk_of_dpm_ends_at_what_is_put_back():
    schedule, z_known, M = Schedule(), random(1, 4, 8, 8), (random(1, 1, 8, 8, seed=2) > 0).float()
    how, seen = SamplerSettings(steps=5, sampler="dpm++"), []

    def edit(z, t):
        seen.append(t)
        return M * z_known + (1 - M) * z

    *_, (_, z, _) = walk(model, random(1, 4, 8, 8, seed=3), schedule, how, seeded(0), edit)
    assert torch.equal(z * M, z_known * M) and not torch.allclose(z * (1 - M), z_known * (1 - M))
    assert seen == [601, 401, 201, 1, -1]


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_second_pass_walks_the_steps_from_T_on_from_the_picture_noised_to_the_first_of_them(sampler):
    still, schedule, z_ref = Still(), Schedule(), random(3, 4, 16, 16, seed=8)
    given, how = Conditions(PROMPTS, PROMPTS), SamplerSettings(steps=50, guidance=1, sampler=sampler)
    sample(still, schedule, given, seeded(0, 3), (4, 16, 16), how, z_ref, start=310)
    assert [t for _, t in still.seen] == list(range(301, 0, -20))
    noise = torch.cat([torch.randn((1, 4, 16, 16), generator=g) for g in seeded(0, 3)])
    torch.testing.assert_close(still.seen[0][0], schedule.add_noise(z_ref, noise, torch.full((3,), 301)))


def test_no_step_as_late_as_T_is_an_error():
    with pytest.raises(BadInput, match="--refine-from: none of the 50 steps is that late; raise it, or give more"):
        Schedule({"timestep_spacing": "trailing"}).timesteps(50, 18)
