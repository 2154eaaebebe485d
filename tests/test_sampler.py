"""Tests: what is ours beside the paper: DPM-Solver++, the second pass, the loss's weightings, the noise offset;
activations that are recomputed, and attention weights that are seen.
"""

import pytest
import torch
from conftest import SD1, Still, inputs, random, randomise, relative_error

from attention import Attention
from data import diffuse
from model import CategoryGenerator, Prompts, UNet, predict_noise
from programs.trainer import recompute_activations
from sampler import Conditions, SamplerSettings, Schedule, ddim, sample, seeded
from support.files import BadInput
from support.solvers import dpm, timestep_weights
from weights import control_config

# ---------------------------------------------------------------- DPM-Solver++ and the second pass


def model(z, t):
    """A stand-in for a UNet, neither linear in z nor the same at every step."""
    return torch.tanh(z) * (1 + t / 1000)


@pytest.mark.parametrize("spacing, steps, to_one, prediction", [
    ("leading", 20, False, "epsilon"), ("leading", 10, True, "v_prediction"), ("trailing", 20, False, "v_prediction"),
    ("linspace", 20, True, "epsilon")])
def test_dpm_goes_the_same_way_as_dpm_solver_multistep_scheduler(spacing, steps, to_one, prediction):
    """The reference's timesteps differ from DDIM's, so it is given ours. euler_at_final makes its last step first-order
    for any number of steps, and final_sigmas_type makes it end at the final ᾱ of DDIM's `set_alpha_to_one`.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True,
        euler_at_final=True, final_sigmas_type="zero" if to_one else "sigma_min")
    schedule = Schedule({"prediction_type": prediction, "timestep_spacing": spacing, "set_alpha_to_one": to_one})
    theirs.set_timesteps(timesteps=schedule.timesteps(steps))
    z = z_T = random(2, 4, 8, 8)
    ours = dpm(lambda z, t: schedule.eps_from(model(z, t), z, t), z_T, schedule, steps)
    for t, (our_t, our_z, _) in zip(theirs.timesteps.tolist(), ours, strict=True):
        z = theirs.step(model(z, t), t, z).prev_sample
        assert our_t == t and relative_error(our_z, z) < 1e-5


@pytest.mark.parametrize("to_one", [False, True])
def test_dpms_only_step_is_ddims(to_one):
    """The first step has no step before it, the last none after it; the step of a walk of one is both."""
    schedule, z_T = Schedule({"set_alpha_to_one": to_one}), random(2, 4, 8, 8)
    [(_, *ours)], [(_, *theirs)] = (list(steps(model, z_T, schedule, 1)) for steps in (dpm, ddim))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs))


def test_dpm_is_of_second_order():
    """Twice as many steps divide the distance from the exact end by about four, with DDIM by about two."""
    schedule, z = Schedule(), random(2, 4, 8, 8, dtype=torch.float64)

    def end(sampler, steps):
        *_, (_, z_0, _) = sampler(model, z, schedule, steps, start=801)  # all start there
        return z_0

    exact = end(dpm, 250)
    dpms, ddims = ([(end(sampler, steps) - exact).abs().mean() for steps in (25, 50)] for sampler in (dpm, ddim))
    assert dpms[0] / dpms[1] > 3 > 2.5 > ddims[0] / ddims[1] > 1.5


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_second_pass_walks_the_steps_from_T_on_from_the_picture_noised_to_the_first_of_them(sampler):
    still, schedule, z_ref = Still(), Schedule(), random(3, 4, 16, 16, seed=8)
    prompts, how = Prompts(*[torch.zeros(3, 7, 8)] * 3), SamplerSettings(steps=50, guidance=1, sampler=sampler)
    sample(still, schedule, Conditions(prompts, prompts), seeded(0, 3), (4, 16, 16), how, z_ref, start=310)
    assert [t for _, t in still.seen] == list(range(301, 0, -20))
    noise = torch.cat([torch.randn((1, 4, 16, 16), generator=g) for g in seeded(0, 3)])
    torch.testing.assert_close(still.seen[0][0], schedule.add_noise(z_ref, noise, torch.full((3,), 301)))


def test_no_step_as_late_as_T_is_an_error():
    with pytest.raises(BadInput, match="--refine-from: none of the 50 steps is that late; raise it, or give more"):
        Schedule({"timestep_spacing": "trailing"}).timesteps(50, 18)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_timestep_weights_are_1_or_the_papers_of_min_snr_and_debias_written_out(prediction):
    schedule = Schedule({"prediction_type": prediction})
    assert timestep_weights(schedule, "uniform").eq(1).all()
    for t in (0, 100, 500, 999):
        snr = float(schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t]))
        in_eps = 1 if prediction == "epsilon" else snr / (snr + 1)  # an error in v is this much larger
        min_snr, debias = (timestep_weights(schedule, kind)[t].item() for kind in ("min-snr", "debias"))
        assert min_snr == pytest.approx(min(snr, 5) / snr * in_eps, rel=1e-4)
        assert debias == pytest.approx(snr**-0.5 * in_eps, rel=1e-4)


def test_noise_offset_moves_the_noise_by_a_constant_a_channel():
    mean = std = torch.zeros(4, 8, 8)
    plain, moved = (diffuse(mean, std, seeded(0)[0], 1000, offset)[1] for offset in (0.0, 0.5))
    offset = moved - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[..., 0, 0].unique()) == 4 and offset.std() > 0.1


def test_recomputed_activations_give_the_same_gradients(unet):
    """Gradient checkpointing, through CG and the frozen UNet's decoder."""
    i, gradients = inputs(2), []
    for recompute in (False, True):
        base, branch = UNet(SD1), CategoryGenerator(control_config(SD1, factor=8))
        base.load_state_dict(unet.state_dict())
        base.requires_grad_(False)
        randomise(branch, seed=1).requires_grad_(True)
        for network in (base, branch) if recompute else ():
            recompute_activations(network)
        branches = [(branch, branch.hint_features(i.hint))]
        predict_noise(base, i.z, i.t, i.prompts, branches, i.mask).square().mean().backward()
        gradients.append([p.grad for p in branch.parameters()])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_watched_weights_are_those_that_attention_uses():
    layer, x = randomise(Attention(24, 3, 16)), random(2, 9, 24)
    P_fg, P_bg, M, seen = random(2, 5, 16, seed=1), random(2, 5, 16, seed=2), random(2, 9, 1, seed=3).sigmoid(), []
    layer.on_weights = seen.append
    blend = layer.mask_guided(x, P_fg, P_bg, M)
    fg, bg = ((w @ layer.to_v(P).unflatten(-1, (3, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
              for w, P in zip(seen, (P_fg, P_bg), strict=True))
    torch.testing.assert_close(blend, layer.to_out[0](fg * M + bg * (1 - M)))
