"""Tests: the mathematics. Every equation is written out again here, naively, and the code must agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SD1, inputs, random, randomise, relative_error
from torch import nn

import model
from attention import Attention, TransformerBlock, attend, mask_at
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet, predict_noise
from sampler import Conditions, SamplerSettings, Schedule, ddim, ddim_step, sample, seeded
from weights import control_config

B, N, C, L, D, HEADS = 2, 9, 12, 5, 8, 3  # pictures, positions, channels, prompt tokens, text width, heads


# ---------------------------------------------------------------- attention, Eq. 2 and 3


def attention_written_out(q, k, v, heads, causal=False):
    """One number at a time: the softmax of q·k/√d over the positions seen, then the mean of v weighted by it."""
    out, d = torch.zeros_like(q), q.shape[-1] // heads
    for b in range(q.shape[0]):
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            for n in range(q.shape[1]):
                seen = n + 1 if causal else k.shape[1]
                weights = [math.exp(sum(q[b, n, own] * k[b, l, own]) / math.sqrt(d)) for l in range(seen)]
                out[b, n, own] = sum(w * v[b, l, own] for l, w in enumerate(weights)) / sum(weights)
    return out


def CA(layer, x, P):
    """Cross-attention from the layer's weights, with its output layer."""
    q, k, v = x @ layer.to_q.weight.T, P @ layer.to_k.weight.T, P @ layer.to_v.weight.T
    return attention_written_out(q, k, v, layer.heads) @ layer.to_out[0].weight.T + layer.to_out[0].bias


def with_features(*pairs):
    """Pairs of a branch and its hint -> pairs of a branch and its hint's features, as `predict_noise` takes them."""
    return [(branch, branch.hint_features(hint)) for branch, hint in pairs]


@pytest.fixture
def layer():
    return randomise(Attention(C, HEADS, D))


@pytest.fixture
def x():
    return random(B, N, C, seed=1)


@pytest.fixture
def P_fg():
    return random(B, L, D, seed=2)


@pytest.fixture
def P_bg():
    return random(B, L, D, seed=3)


SOFT = torch.linspace(0, 1, N).view(1, N, 1).expand(B, N, 1)
HARD = (SOFT > 0.4).float()


@pytest.mark.parametrize("causal", [False, True])
def test_attend_equals_softmax_of_qk_over_root_d_times_v(causal):
    q, k, v = (random(B, N, C, seed=i) for i in range(3))
    torch.testing.assert_close(attend(q, k, v, HEADS, causal), attention_written_out(q, k, v, HEADS, causal))


def test_attend_takes_a_context_of_another_length():
    q, k, v = random(B, N, C), random(B, L, C, seed=1), random(B, L, C, seed=2)
    torch.testing.assert_close(attend(q, k, v, HEADS), attention_written_out(q, k, v, HEADS))


def test_causal_attention_does_not_see_later_positions():
    q, k, v = (random(B, N, C, seed=i) for i in range(3))
    before = attend(q, k, v, HEADS, causal=True)
    k[:, 5:], v[:, 5:] = 7.0, -7.0
    assert torch.equal(attend(q, k, v, HEADS, causal=True)[:, :5], before[:, :5])


def test_cross_attention_equals_ca_written_out(layer, x, P_fg):
    torch.testing.assert_close(layer(x, P_fg), CA(layer, x, P_fg))


def test_self_attention_is_attention_on_itself(x):
    layer = randomise(Attention(C, HEADS))
    torch.testing.assert_close(layer(x), CA(layer, x, x))


@pytest.mark.parametrize("M", [SOFT, HARD], ids=["soft", "hard"])
def test_mask_guided_attention_equals_eq3_written_out(layer, x, P_fg, P_bg, M):
    torch.testing.assert_close(layer.mask_guided(x, P_fg, P_bg, M),
                               CA(layer, x, P_fg) * M + CA(layer, x, P_bg) * (1 - M))


@pytest.mark.parametrize("M", [torch.ones(B, N, 1), SOFT, HARD], ids=["ones", "soft", "hard"])
def test_eq3_with_equal_prompts_is_eq2(layer, x, P_fg, M):
    torch.testing.assert_close(layer.mask_guided(x, P_fg, P_fg, M), layer(x, P_fg))


def test_eq3_on_an_all_product_mask_is_eq2_with_the_products_prompt(layer, x, P_fg, P_bg):
    torch.testing.assert_close(layer.mask_guided(x, P_fg, P_bg, torch.ones(B, N, 1)), layer(x, P_fg))


def test_eq3_on_an_all_background_mask_is_eq2_with_the_backgrounds_prompt(layer, x, P_fg, P_bg):
    torch.testing.assert_close(layer.mask_guided(x, P_fg, P_bg, torch.zeros(B, N, 1)), layer(x, P_bg))


def test_in_one_layer_product_positions_do_not_depend_on_P_bg_nor_background_positions_on_P_fg(layer, x, P_fg, P_bg):
    product = HARD.bool().squeeze(-1)
    out = layer.mask_guided(x, P_fg, P_bg, HARD)
    other_bg = layer.mask_guided(x, P_fg, random(B, L, D, seed=9), HARD)
    other_fg = layer.mask_guided(x, random(B, L, D, seed=9), P_bg, HARD)
    assert torch.equal(out[product], other_bg[product]) and not torch.allclose(out[~product], other_bg[~product])
    assert torch.equal(out[~product], other_fg[~product]) and not torch.allclose(out[product], other_fg[product])


@pytest.mark.parametrize("masked", [False, True], ids=["eq2", "eq3"])
def test_transformer_block_adds_self_attention_then_eq2_or_eq3_then_feed_forward(x, P_fg, P_bg, masked):
    block = randomise(TransformerBlock(C, HEADS, D))

    def norm(layer, x):
        deviation = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (deviation + 1e-5).sqrt() * layer.weight + layer.bias

    y = norm(block.norm1, x)
    x_in = x + CA(block.attn1, y, y)
    y = norm(block.norm2, x_in)
    if masked:
        x_out = x_in + CA(block.attn2, y, P_fg) * SOFT + CA(block.attn2, y, P_bg) * (1 - SOFT)  # Eq. 3
    else:
        x_out = x_in + CA(block.attn2, y, P_fg)  # Eq. 2
    projection, out = block.ff.net[0].proj, block.ff.net[2]
    hidden = norm(block.norm3, x_out) @ projection.weight.T + projection.bias
    value, gate = hidden[..., : 4 * C], hidden[..., 4 * C:]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    expected = x_out + (value * gelu) @ out.weight.T + out.bias
    ours = block(x, (P_fg, P_bg), SOFT) if masked else block(x, P_fg)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_mask_averaged_in_two_steps_is_the_mask_averaged_in_one():
    """`sample` averages M to the latent's size once, and the networks average the result."""
    mask = random(2, 1, 64, 64).sigmoid()
    torch.testing.assert_close(mask_at(mask_at(mask, 16, 16), 4, 4), mask_at(mask, 4, 4))


@pytest.mark.parametrize("h, w", [(16, 16), (8, 4), (2, 2)])
def test_mask_at_is_the_mean_over_each_positions_area(h, w):
    mask = random(2, 1, 16, 16).sigmoid()
    small, (a, b) = mask_at(mask, h, w), (16 // h, 16 // w)
    for i in range(h):
        for j in range(w):
            area = mask[:, 0, i * a:(i + 1) * a, j * b:(j + 1) * b]
            torch.testing.assert_close(small[:, 0, i, j], area.mean((1, 2)))


def test_every_cross_attention_of_cg_is_mask_guided_with_M_at_its_resolution(cg, monkeypatch):
    i, calls = inputs(), []

    def spy(self, x, P_fg, P_bg, M):
        calls.append((x.shape[1], P_fg, P_bg, M))
        return torch.zeros_like(x)

    monkeypatch.setattr(Attention, "mask_guided", spy)
    cg(i.z, i.t, (i.prompts.P_fg, i.prompts.P_bg), i.hint, i.mask)
    assert [n for n, *_ in calls] == [256, 256, 64, 64, 16, 16, 4]  # two per level in three levels, and the middle
    for n, P_fg, P_bg, M in calls:
        side = math.isqrt(n)
        expected = i.mask.view(2, side, 128 // side, side, 128 // side).mean((2, 4)).view(2, n, 1)
        torch.testing.assert_close(M, expected)
        assert P_fg is i.prompts.P_fg and P_bg is i.prompts.P_bg


def test_cg_with_plain_attention_is_a_controlnet_on_P_and_mask_guided_cg_is_not(unet, cg):
    """`train.py cg --attention plain` writes "attention": "plain" to config.json."""
    i = inputs()
    plain, controlnet = CategoryGenerator(cg.config | {"attention": "plain"}), ControlNet(cg.config)
    for network in (plain, controlnet):
        network.load_state_dict(cg.state_dict())
    ours, theirs, guided = (predict_noise(unet, i.z, i.t, i.prompts, with_features((network, i.hint)), i.mask)
                            for network in (plain, controlnet, cg))
    assert torch.equal(ours, theirs) and relative_error(guided, theirs) > 0.01


def test_cg_with_equal_prompts_is_a_plain_controlnet(cg):
    i = inputs()
    plain = ControlNet(cg.config)
    plain.load_state_dict(cg.state_dict())
    for ours, theirs in zip(cg(i.z, i.t, (i.prompts.P, i.prompts.P), i.hint, i.mask),
                            plain(i.z, i.t, i.prompts.P, i.hint), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- Eq. 4 and the branches


def test_eq4_pg_leaves_the_product_exactly_zero_and_the_background_exactly_a_controlnets(pg):
    i = inputs()
    i.mask = torch.zeros_like(i.mask)
    i.mask[..., 64:] = 1  # the right half is the product
    plain = ControlNet(pg.config)
    plain.load_state_dict(pg.state_dict())
    assert all(conv.bias.abs().min() > 0 for conv in (*pg.controlnet_down_blocks, pg.controlnet_mid_block))
    ys, xs = pg(i.z, i.t, i.prompts.P, i.hint_ref, i.mask), plain(i.z, i.t, i.prompts.P, i.hint_ref)
    assert [y.shape[-1] for y in ys] == [16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2]
    for y, x in zip(ys, xs, strict=True):
        half = y.shape[-1] // 2
        assert (y[..., half:] == 0).all()
        assert torch.equal(y[..., :half], x[..., :half]) and (x[..., half:] != 0).any()


def test_eq4_at_soft_edges_is_y_times_one_minus_M(pg):
    i = inputs()
    plain = ControlNet(pg.config)
    plain.load_state_dict(pg.state_dict())
    ys, xs = pg(i.z, i.t, i.prompts.P, i.hint_ref, i.mask), plain(i.z, i.t, i.prompts.P, i.hint_ref)
    for y, x in zip(ys, xs, strict=True):
        h, w = y.shape[2:]
        M = i.mask.view(2, 1, h, 128 // h, w, 128 // w).mean((3, 5))
        torch.testing.assert_close(y, x * (1 - M), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [CategoryGenerator, PersonalityGenerator])
def test_cg_and_pg_have_exactly_a_controlnets_parameters(kind):
    config = control_config(SD1, factor=8)
    with torch.device("meta"):
        ours, plain = kind(config).state_dict(), ControlNet(config).state_dict()
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in plain.items()}


@pytest.fixture
def fresh(unet):
    """CG and PG as they are when training starts."""
    branches = [kind(control_config(SD1, factor=8)) for kind in (CategoryGenerator, PersonalityGenerator)]
    for branch in branches:
        randomise(branch, seed=5).init_from_unet(unet)
    return branches


def test_branches_start_as_copies_of_the_unets_encoder(unet, fresh):
    weights = unet.state_dict()
    for branch in fresh:
        copied = {n: p for n, p in branch.state_dict().items() if not n.startswith("controlnet_")}
        assert {n.split(".")[0] for n in copied} == {"conv_in", "time_embedding", "down_blocks", "mid_block"}
        for name, p in copied.items():
            assert torch.equal(p, weights[name]), name
            assert p.data_ptr() != weights[name].data_ptr(), f"{name} is shared, so training would change SD"


def test_zero_convolutions_leave_sd_exactly_unchanged_at_the_start(unet, fresh):
    i, (cg, pg) = inputs(), fresh
    alone = unet(i.z, i.t, i.prompts.P)
    for branches in ([(cg, i.hint)], [(pg, i.hint_ref)], [(cg, i.hint), (pg, i.hint_ref)]):
        assert torch.equal(predict_noise(unet, i.z, i.t, i.prompts, with_features(*branches), i.mask), alone)


def test_zero_convolutions_learn_from_the_first_step(unet, fresh):
    i, (cg, pg) = inputs(), fresh
    for branch in fresh:
        branch.requires_grad_(True)
    branches = with_features((cg, i.hint), (pg, i.hint_ref))
    predict_noise(unet, i.z, i.t, i.prompts, branches, i.mask).square().mean().backward()
    for branch in fresh:
        for conv in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
            assert conv.weight.grad.abs().max() > 0


def test_predict_noise_gives_each_branch_its_prompts_and_sums_the_branches(unet, cg, pg):
    i = inputs()
    P, P_fg, P_bg = i.prompts
    plain = randomise(ControlNet(cg.config), seed=6)
    xs = cg(i.z, i.t, (P_fg, P_bg), i.hint, i.mask)
    ys = pg(i.z, i.t, P, i.hint_ref, i.mask)
    cs = plain(i.z, i.t, P, i.hint)
    expected = unet(i.z, i.t, P, [x + y + c for x, y, c in zip(xs, ys, cs, strict=True)])
    branches = with_features((cg, i.hint), (pg, i.hint_ref), (plain, i.hint))
    ours = predict_noise(unet, i.z, i.t, i.prompts, branches, i.mask)
    torch.testing.assert_close(ours, expected)
    assert relative_error(unet(i.z, i.t, P), expected) > 0.01  # the branches matter


def test_each_residual_is_added_to_its_own_skip_connection(unet):
    """The decoder is written out; one of the 13 residuals at a time is not zero."""
    i = inputs(1)
    time = unet.embed_time(i.t)
    middle, left = unet.encode(unet.conv_in(i.z), time, i.prompts.P)
    tensors = [*left, middle]
    assert len(tensors) == 13
    for n, tensor in enumerate(tensors):
        residuals = [torch.zeros_like(x) for x in tensors]
        residuals[n] = random(*tensor.shape, seed=n)
        x, skips = middle + residuals[-1], [s + r for s, r in zip(left, residuals)]
        for block in unet.up_blocks:
            x = block(x, skips, time, i.prompts.P)
        expected = unet.conv_out(F.silu(unet.conv_norm_out(x)))
        torch.testing.assert_close(unet(i.z, i.t, i.prompts.P, residuals), expected)


# ---------------------------------------------------------------- noise schedule and DDIM


def alpha_bars():
    """ᾱ_0 … ᾱ_999 of scaled-linear β from 0.00085 to 0.012, in float64."""
    product, values = 1.0, []
    for t in range(1000):
        root = math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))
        product *= 1 - root**2
        values.append(product)
    return values


def test_alpha_bar_is_the_product_of_one_minus_scaled_linear_beta():
    torch.testing.assert_close(Schedule().alpha_bar.double(), torch.tensor(alpha_bars(), dtype=torch.float64),
                               rtol=1e-4, atol=0)


def test_50_timesteps_are_981_961_down_to_1():
    assert Schedule().timesteps(50) == list(range(981, 0, -20))


def test_the_last_step_ends_at_the_alpha_bar_of_step_0():
    schedule = Schedule()
    assert schedule.alpha_bar_at(1 - 20) == schedule.alpha_bar[0]
    assert Schedule({"set_alpha_to_one": True}).alpha_bar_at(1 - 20) == 1


def test_add_noise_is_root_alpha_bar_z_plus_root_one_minus_alpha_bar_eps():
    z_0, eps, t, a = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999]), alpha_bars()
    z_t = Schedule().add_noise(z_0, eps, t)
    for i, step in enumerate(t):
        torch.testing.assert_close(z_t[i], math.sqrt(a[step]) * z_0[i] + math.sqrt(1 - a[step]) * eps[i],
                                   rtol=1e-4, atol=1e-5)


def test_eps_of_a_v_prediction_model_is_the_eps_that_went_in():
    schedule, z_0, eps = Schedule({"prediction_type": "v_prediction"}), random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1)
    for t in (1, 500, 981):
        steps, a = torch.full((3,), t), alpha_bars()[t]
        v = schedule.target(z_0, eps, steps)
        torch.testing.assert_close(v, math.sqrt(a) * eps - math.sqrt(1 - a) * z_0, rtol=1e-4, atol=1e-5)
        z_t = schedule.add_noise(z_0, eps, steps)
        torch.testing.assert_close(schedule.eps_from(v, z_t, t), eps, rtol=1e-4, atol=1e-5)


def test_the_target_of_an_eps_prediction_model_is_eps():
    schedule, eps = Schedule(), random(3, 4, 2, 2)
    assert schedule.target(random(3, 4, 2, 2, seed=1), eps, torch.tensor([1, 2, 3])) is eps
    assert schedule.eps_from(eps, random(3, 4, 2, 2, seed=1), 5) is eps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_equals_equation_12_of_its_paper(eta):
    eps, x_t, noise = (random(2, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    a, a_prev = alpha_bars()[501], alpha_bars()[481]
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)  # Eq. 16
    predicted_x_0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
    direction = math.sqrt(1 - a_prev - sigma**2) * eps
    expected = math.sqrt(a_prev) * predicted_x_0 + direction + sigma * noise
    ours, z_0 = ddim_step(eps, x_t, *torch.tensor([a, a_prev], dtype=torch.float64), eta, noise)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(z_0, predicted_x_0)


def test_ddim_step_with_eta_1_has_ddpms_posterior():
    x_t, x_0, noise = (random(2, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    a, a_prev = alpha_bars()[500], alpha_bars()[499]
    alpha = a / a_prev
    mean = (math.sqrt(a_prev) * (1 - alpha) * x_0 + math.sqrt(alpha) * (1 - a_prev) * x_t) / (1 - a)
    variance = (1 - a_prev) / (1 - a) * (1 - alpha)
    eps = (x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)
    ours, _ = ddim_step(eps, x_t, *torch.tensor([a, a_prev], dtype=torch.float64), 1.0, noise)
    torch.testing.assert_close(ours, mean + math.sqrt(variance) * noise)


def test_ddim_recovers_z_0_exactly_from_a_perfect_eps():
    schedule, z_0, eps = Schedule(), *(random(2, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(2))
    a = schedule.alpha_bar.double()
    z_T = a[981].sqrt() * z_0 + (1 - a[981]).sqrt() * eps
    walk = list(ddim(lambda z, t: (z - a[t].sqrt() * z_0) / (1 - a[t]).sqrt(), z_T, schedule))
    assert [t for t, _, _ in walk] == schedule.timesteps(50)
    for t, z, guess in walk:
        to = max(t - 20, 0)
        torch.testing.assert_close(guess, z_0)
        torch.testing.assert_close(z, a[to].sqrt() * z_0 + (1 - a[to]).sqrt() * eps)


# ---------------------------------------------------------------- the whole loop


@torch.no_grad()
def test_watched_weights_are_those_that_attention_uses():
    layer, x = randomise(Attention(24, 3, 16)), random(2, 9, 24)
    P_fg, P_bg = random(2, 5, 16, seed=1), random(2, 5, 16, seed=2)
    M, seen = random(2, 9, 1, seed=3).sigmoid(), []
    layer.on_weights = seen.append
    blend = layer.mask_guided(x, P_fg, P_bg, M)
    assert [w.shape for w in seen] == [(2, 3, 9, 5)] * 2 and torch.allclose(seen[0].sum(-1), torch.ones(2, 3, 9))
    read = [(w @ layer.to_v(P).unflatten(-1, (3, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
            for w, P in zip(seen, (P_fg, P_bg))]
    torch.testing.assert_close(blend, layer.to_out[0](read[0] * M + read[1] * (1 - M)))


@torch.no_grad()
def test_both_passes_of_the_guidance_in_one_batch_are_each_pass_alone(unet, cg, pg):
    """One row of z_t serves two prompts, with the same result as row by row."""
    i, without = inputs(2), Prompts(*(random(2, 7, 24, seed=30 + k) for k in range(3)))
    branches, t = with_features((cg, i.hint), (pg, i.hint_ref)), torch.tensor([981])
    both = Prompts(*(torch.cat(pair) for pair in zip(without, i.prompts)))
    together = predict_noise(unet, i.z, t, both, branches, i.mask.repeat(2, 1, 1, 1))
    for half, prompts in zip(together.chunk(2), (without, i.prompts), strict=True):
        assert relative_error(half, predict_noise(unet, i.z, t, prompts, branches, i.mask)) < 1e-5


@torch.inference_mode()
def test_what_does_not_change_over_the_walk_is_computed_before_it(unet, cg, pg, prompts, unconditional, monkeypatch):
    """The hint encoders run once per picture, however many steps follow."""
    i, calls = inputs(3), []
    for branch in (cg, pg):
        encoder = branch.controlnet_cond_embedding
        monkeypatch.setattr(encoder, "forward", lambda hint, f=encoder.forward: calls.append(1) or f(hint))
    given = Conditions(prompts, unconditional, with_features((cg, i.hint), (pg, i.hint_ref)), i.mask)
    sample(unet, Schedule(), given, seeded(0, 3), (4, 16, 16), SamplerSettings(steps=3))
    assert len(calls) == 2


def test_recomputed_activations_give_the_same_gradients(unet):
    """Gradient checkpointing, through CG and the frozen UNet's decoder."""
    i, gradients = inputs(2), []
    for recompute in (False, True):
        base, branch = UNet(SD1), CategoryGenerator(control_config(SD1, factor=8))
        base.load_state_dict(unet.state_dict())
        base.requires_grad_(False)
        randomise(branch, seed=1).requires_grad_(True)
        for network in (base, branch) if recompute else ():
            network.recompute_activations()
        predict_noise(base, i.z, i.t, i.prompts, with_features((branch, i.hint)), i.mask).square().mean().backward()
        gradients.append([p.grad for p in branch.parameters()])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


class Still(nn.Module):
    """A stand-in for the UNet: keeps its inputs and predicts zero noise."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.seen = nn.Conv2d(4, 4, 1), []

    def forward(self, z, t, context, residuals=None):
        self.seen.append((z.clone(), t.clone(), context))
        return torch.zeros(len(context), *z.shape[1:])  # a row per prompt: both guidance passes


@pytest.fixture
def prompts():
    return Prompts(*(random(3, 7, 24, seed=20 + i) for i in range(3)))


@pytest.fixture
def unconditional():
    return Prompts(*[random(1, 7, 24, seed=30).expand(3, 7, 24)] * 3)


def rows(prompts, n):
    return Prompts(*(p[n:n + 1] for p in prompts))


def test_guidance_equals_two_separate_passes_that_keep_the_hints(unet, cg, pg, prompts, unconditional):
    i, schedule, guidance = inputs(3), Schedule(), 2.0
    branches = with_features((cg, i.hint), (pg, i.hint_ref))
    ours = sample(unet, schedule, Conditions(prompts, unconditional, branches, i.mask), seeded(0, 3), (4, 16, 16),
                  SamplerSettings(steps=2, guidance=guidance))
    noise = [torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    z, a = torch.cat(noise), alpha_bars()
    for t, t_next in ((501, 1), (1, 0)):
        steps = torch.full((3,), t)
        with_prompt = predict_noise(unet, z, steps, prompts, branches, i.mask)
        without = predict_noise(unet, z, steps, unconditional, branches, i.mask)
        eps = without + guidance * (with_prompt - without)
        z_0 = (z - math.sqrt(1 - a[t]) * eps) / math.sqrt(a[t])
        z = math.sqrt(a[t_next]) * z_0 + math.sqrt(1 - a[t_next]) * eps
    assert relative_error(ours, z) < 1e-4


def test_guidance_1_ignores_the_unconditional_prompts(unet, prompts):
    nothing = Prompts(*(torch.full_like(p, torch.nan) for p in prompts))
    z = sample(unet, Schedule(), Conditions(prompts, nothing), seeded(0, 3), (4, 16, 16), SamplerSettings(2, guidance=1))
    assert z.isfinite().all()


def test_pictures_start_from_noise_of_their_own_seed(prompts, unconditional):
    still = Still()
    sample(still, Schedule(), Conditions(prompts, unconditional), seeded(7, 3), (4, 16, 16), SamplerSettings(2, guidance=1))
    z_T, t, _ = still.seen[0]
    for n in range(3):
        assert torch.equal(z_T[n], torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7 + n))[0])
    assert (t == 501).all()


def test_with_a_reference_z_T_is_its_latent_noised_to_the_first_timestep(prompts, unconditional):
    still, z_ref, a = Still(), random(3, 4, 16, 16, seed=8), alpha_bars()[981]
    eps = torch.cat([torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(n)) for n in range(3)])
    sample(still, Schedule(), Conditions(prompts, unconditional), seeded(0, 3), (4, 16, 16), SamplerSettings(), z_ref)
    z_T, t, _ = still.seen[0]
    assert len(still.seen) == 50 and (t == 981).all()
    expected = math.sqrt(a) * z_ref + math.sqrt(1 - a) * eps
    torch.testing.assert_close(z_T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_gives_the_same_picture_whatever_the_batch_size(unet, cg, pg, prompts, unconditional, eta):
    i = inputs(3)
    z_ref = random(3, 4, 16, 16, seed=8)
    given = Conditions(prompts, unconditional, with_features((cg, i.hint), (pg, i.hint_ref)), i.mask)
    together = sample(unet, Schedule(), given, seeded(5, 3), (4, 16, 16), SamplerSettings(steps=3, eta=eta), z_ref)
    for n in range(3):
        one = slice(n, n + 1)
        given = Conditions(rows(prompts, n), rows(unconditional, n),
                           with_features((cg, i.hint[one]), (pg, i.hint_ref[one])), i.mask[one])
        alone = sample(unet, Schedule(), given, seeded(5 + n), (4, 16, 16), SamplerSettings(steps=3, eta=eta), z_ref[one])
        assert relative_error(alone, together[one]) < 1e-5


def test_the_noise_of_every_step_comes_from_the_pictures_generator_alone(prompts, unconditional):
    schedule, a = Schedule(), alpha_bars()
    torch.manual_seed(1)
    given, how = Conditions(prompts, unconditional), SamplerSettings(steps=50, guidance=1, eta=1.0)
    ours = sample(Still(), schedule, given, seeded(3, 3), (4, 16, 16), how)
    torch.manual_seed(2)
    assert torch.equal(ours, sample(Still(), schedule, given, seeded(3, 3), (4, 16, 16), how))
    for n in range(3):
        generator = torch.Generator().manual_seed(3 + n)
        z = torch.randn((1, 4, 16, 16), generator=generator)
        for t in range(981, 0, -20):  # eps = 0
            to = max(t - 20, 0)
            sigma = math.sqrt((1 - a[to]) / (1 - a[t]) * (1 - a[t] / a[to]))
            z = math.sqrt(a[to] / a[t]) * z + sigma * torch.randn((1, 4, 16, 16), generator=generator)
        assert relative_error(ours[n:n + 1], z) < 1e-4


def test_on_step_sees_every_step_and_the_last_is_the_result(unet, prompts, unconditional):
    seen = []
    z = sample(unet, Schedule(), Conditions(prompts, unconditional), seeded(0, 3), (4, 16, 16), SamplerSettings(steps=4),
               on_step=lambda t, z, z_0: seen.append((t, z, z_0)))
    assert [t for t, _, _ in seen] == [751, 501, 251, 1] and torch.equal(seen[-1][1], z)
    assert all(z_0.shape == z.shape for _, _, z_0 in seen)


# ---------------------------------------------------------------- small pieces


def test_timestep_encoding_is_cosines_then_sines_of_geometric_frequencies():
    encoding = model.timestep_encoding(torch.tensor([0, 1, 981]), 8)
    for row, t in zip(encoding, (0, 1, 981)):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_a_tiny_unet_has_sd15s_12_skips_and_middle(unet, cg):
    i = inputs()
    residuals = cg(i.z, i.t, (i.prompts.P_fg, i.prompts.P_bg), i.hint, i.mask)
    assert len(residuals) == 13
    assert unet(i.z, i.t, i.prompts.P, residuals).shape == i.z.shape
    assert isinstance(unet, UNet)
