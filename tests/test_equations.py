"""Tests: the paper's sections 3 and 5.1. Every equation is written out again here, naively, and the code must agree."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SD1, Still, inputs, random, randomise, relative_error, write_tiny_toy
from torch import nn

import data
import generate
import train
from attention import Attention, SplitPrompt, TransformerBlock, attend, mask_at
from data import IDENTIFIER, Canvas, diffuse, dilate, perturb, prompt_texts
from generate import encode_prompts, paint
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, predict_noise
from programs.latents import category_prompts
from programs.settings import number_categories
from programs.trainer import batches_of_keys, update_averages
from sampler import Conditions, SamplerSettings, Schedule, ddim, ddim_step, sample, seeded
from support.checks import list_folder
from support.images import save_image
from weights import control_config

B, N, C, L, D, HEADS = 2, 9, 12, 5, 8, 3  # pictures, positions, channels, prompt tokens, text width, heads
SOFT = torch.linspace(0, 1, N).view(1, N, 1).expand(B, N, 1)
HARD = (SOFT > 0.4).float()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- Eq. 2 and 3: CG's attention (section 3.2)


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


@pytest.fixture
def x():
    return random(B, N, C, seed=1)


@pytest.fixture
def P_fg():
    return random(B, L, D, seed=2)


@pytest.fixture
def P_bg():
    return random(B, L, D, seed=3)


@pytest.mark.parametrize("causal, length", [(False, L), (True, N)])
def test_attend_equals_softmax_of_qk_over_root_d_times_v(causal, length):
    q, k, v = random(B, N, C), random(B, length, C, seed=1), random(B, length, C, seed=2)
    torch.testing.assert_close(attend(q, k, v, HEADS, causal), attention_written_out(q, k, v, HEADS, causal))


@pytest.mark.parametrize("M", [SOFT, HARD], ids=["soft", "hard"])
def test_mask_guided_attention_equals_eq3_written_out(x, P_fg, P_bg, M):
    layer = randomise(Attention(C, HEADS, D))
    expected = CA(layer, x, P_fg) * M + CA(layer, x, P_bg) * (1 - M)
    torch.testing.assert_close(layer.mask_guided(x, P_fg, P_bg, M), expected)


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
    value, gate = (norm(block.norm3, x_out) @ projection.weight.T + projection.bias).split(4 * C, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    expected = x_out + (value * gelu) @ out.weight.T + out.bias
    ours = block(x, SplitPrompt(P_fg, P_bg), SOFT) if masked else block(x, P_fg)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_mask_at_is_the_mean_over_each_positions_area_in_one_step_or_two():
    """`sample` averages M to the latent's size once, and the networks average the result."""
    mask = random(2, 1, 16, 16).sigmoid()
    for h, w in ((8, 4), (2, 2)):
        mean = mask.view(2, 1, h, 16 // h, w, 16 // w).mean((3, 5))
        torch.testing.assert_close(mask_at(mask, h, w), mean)
        torch.testing.assert_close(mask_at(mask_at(mask, 8, 8), h, w), mean)


def test_every_cross_attention_of_cg_is_mask_guided_with_M_at_its_resolution(unet, cg, monkeypatch):
    i, calls = inputs(), []

    def spy(self, x, P_fg, P_bg, M):
        calls.append((x.shape[1], P_fg, P_bg, M))
        return torch.zeros_like(x)

    monkeypatch.setattr(Attention, "mask_guided", spy)
    predict_noise(unet, i.z, i.t, i.prompts, [(cg, cg.hint_features(i.hint))], i.mask)
    assert [n for n, *_ in calls] == [256, 256, 64, 64, 16, 16, 4]  # two per level in three levels, and the middle
    for n, P_fg, P_bg, M in calls:
        side = math.isqrt(n)
        torch.testing.assert_close(M, i.mask.view(2, side, 128 // side, side, 128 // side).mean((2, 4)).view(2, n, 1))
        assert torch.equal(P_fg, i.prompts.P_fg) and torch.equal(P_bg, i.prompts.P_bg)


# ---------------------------------------------------------------- Eq. 4 and the branches (sections 3.1 and 3.3)


def test_eq4_pg_is_a_controlnet_on_P_times_one_minus_M_and_exactly_zero_on_the_product(pg):
    i = inputs()
    i.mask = torch.linspace(0, 2, 128).clamp(max=1).expand(2, 1, 128, 128)  # a ramp; the right half is the product
    assert all(conv.bias.abs().min() > 0 for conv in (*pg.controlnet_down_blocks, pg.controlnet_mid_block))
    controlnet = ControlNet(pg.config)
    controlnet.load_state_dict(pg.state_dict())
    xs = controlnet(i.z, i.t, i.prompts.P, i.hint_ref)
    ys = pg(i.z, i.t, pg.context(i.prompts), i.hint_ref, i.mask)
    assert [y.shape[-1] for y in ys] == [16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2]
    for y, x in zip(ys, xs, strict=True):
        h, w = y.shape[2:]
        M = i.mask.view(2, 1, h, 128 // h, w, 128 // w).mean((3, 5))
        torch.testing.assert_close(y, x * (1 - M), atol=1e-4, rtol=1e-4)
        assert (y[..., w // 2:] == 0).all()


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


def test_zero_convolutions_leave_sd_exactly_unchanged_at_the_start_and_learn_from_the_first_step(unet, fresh):
    i, (cg, pg) = inputs(), fresh
    for branch in fresh:
        branch.requires_grad_(True)
    branches = [(cg, cg.hint_features(i.hint)), (pg, pg.hint_features(i.hint_ref))]
    predicted = predict_noise(unet, i.z, i.t, i.prompts, branches, i.mask)
    assert torch.equal(predicted, unet(i.z, i.t, i.prompts.P))
    predicted.square().mean().backward()
    for branch in fresh:
        for conv in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
            assert conv.weight.grad.abs().max() > 0


def test_predict_noise_adds_the_sum_of_cg_and_pg_to_the_symmetrical_features_of_sds_decoder(unet, cg, pg):
    """Fig. 2. The decoder is written out: each of 12 sums is added to its own skip connection, the last to the middle.
    """
    i = inputs()
    P, P_fg, P_bg = i.prompts
    xs, ys = cg(i.z, i.t, SplitPrompt(P_fg, P_bg), i.hint, i.mask), pg(i.z, i.t, P, i.hint_ref, i.mask)
    time = unet.embed_time(i.t)
    z, skips = unet.encode(unet.conv_in(i.z), time, P)
    *skips, z = [s + x + y for s, x, y in zip([*skips, z], xs, ys, strict=True)]
    for block in unet.up_blocks:
        z = block(z, skips, time, P)
    expected = unet.conv_out(F.silu(unet.conv_norm_out(z)))
    branches = [(cg, cg.hint_features(i.hint)), (pg, pg.hint_features(i.hint_ref))]
    torch.testing.assert_close(predict_noise(unet, i.z, i.t, i.prompts, branches, i.mask), expected)


# ---------------------------------------------------------------- the prompts and the hints (sections 3.2 and 3.3)


def test_the_prompts_are_those_of_section_3_2_and_the_identifier_is_sks_and_the_categorys_id():
    identifiers = number_categories(["mug", "perfume"], IDENTIFIER, {})
    assert identifiers == {"mug": "sks 0", "perfume": "sks 1"}
    assert prompt_texts("perfume", "sks 1") == (
        "A photo of perfume, in the background of sks 1", "A photo of perfume", "in the background of sks 1")


def test_P_P_fg_and_P_bg_are_the_encodings_of_their_own_texts():
    sd = SimpleNamespace(prompts=lambda texts: torch.tensor([len(text) for text in texts]).view(-1, 1, 1))
    P, P_fg, P_bg = encode_prompts(sd, [("4444", "1", "22"), ("55555", "1", "333")])
    assert (P.flatten().tolist(), P_fg.flatten().tolist(), P_bg.flatten().tolist()) == ([4, 5], [1, 1], [2, 3])


def test_cg_sees_the_product_and_pg_the_references_background_unperturbed(monkeypatch):
    """I ⊗ M and I_ref ⊗ (1 − M_ref), each by its own mask; M, the product's, goes to Eq. 3 and 4."""
    I, M, I_ref, M_ref = (random(2, channels, 8, 8, seed=n).sigmoid() for n, channels in enumerate((3, 1, 3, 1)))
    sd = SimpleNamespace(
        unet=SimpleNamespace(conv_in=nn.Conv2d(4, 4, 1)), schedule=Schedule(), encode=lambda images: images + 7,
        decode=lambda z: z, inpainting=lambda rgb, mask: None, latent_shape=lambda h, w: (3, h, w),
        prompts=lambda texts: torch.zeros(len(texts), L, D))
    seen = {}

    def sample_nothing(unet, schedule, given, generators, shape, how, z_ref, *_):
        seen.update(hints=[hint for _, hint in given.branches], mask=given.mask, z_ref=z_ref)
        return torch.zeros(2, *shape)

    monkeypatch.setattr(generate, "sample", sample_nothing)
    cg, pg = (SimpleNamespace(hint_features=lambda hint: hint) for _ in range(2))
    paint(sd, Canvas(I, M, [("", "", "")] * 2, seeded(0, 2), I_ref, M_ref), SamplerSettings(), cg, pg)
    for hint, expected in zip(seen["hints"], (I * M, I_ref * (1 - M_ref)), strict=True):
        torch.testing.assert_close(hint, expected)
    assert torch.equal(seen["mask"], M) and torch.equal(seen["z_ref"], I_ref + 7)


# ---------------------------------------------------------------- Eq. 1


def test_eq1_is_the_mean_square_of_eps_minus_its_prediction_with_the_weights_and_dropped_prompts_written_out(
        unet, cg, pg):
    x, schedule = inputs(2), Schedule()
    weight = 1 + torch.arange(1000) / 100  # in Eq. 1 all are 1
    table = random(3, 3, 7, 24, seed=5)  # two categories and '', for P, P_fg, P_bg
    eq1 = train.Eq1(unet, schedule, [(cg, "product"), (pg, "background")], category_prompts(table, [1, 0, 1], "cpu"),
                    0.5, weight)
    image, eps = random(2, 3, 128, 128, seed=6).sigmoid(), random(2, 4, 16, 16, seed=7)
    loss = eq1({"z_0": x.z, "eps": eps, "t": x.t, "image": image, "mask": x.mask, "background": x.hint_ref,
                "index": torch.tensor([2, 1]), "drop": torch.tensor([0.6, 0.4])})

    a = torch.tensor(alpha_bars())[x.t].view(2, 1, 1, 1)
    prompts = Prompts(*(table[[1, 2], k] for k in range(3)))  # the second ad's are dropped
    branches = [(cg, cg.hint_features(image * x.mask)), (pg, pg.hint_features(x.hint_ref))]
    predicted = predict_noise(unet, a.sqrt() * x.z + (1 - a).sqrt() * eps, x.t, prompts, branches, x.mask)
    expected = ((eps - predicted).square().mean((1, 2, 3)) * weight[x.t]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_eq1_draws_z_0_from_the_posterior_eps_from_a_normal_distribution_and_t_uniformly():
    mean, std = random(4, 64, 64, seed=9), torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1)
    z_0, eps, _ = diffuse(mean, std, generator(), 1000)
    for noise in ((z_0 - mean) / std, eps):
        assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
    times = {int(diffuse(mean[:, :1, :1], std, generator(seed), 10)[2]) for seed in range(200)}
    assert times == set(range(10))


# ---------------------------------------------------------------- Eq. 5 and 6: the background perturbation


@pytest.mark.parametrize("theta", [1, 2, 5])
def test_dilate_equals_eq5_written_out(theta):
    M = random(1, 11, 13).sigmoid()
    expected = torch.zeros_like(M)
    around = range(-(theta // 2), (theta + 1) // 2)
    for i in range(11):
        for j in range(13):
            expected[0, i, j] = max(M[0, i + di, j + dj] for di in around for dj in around
                                    if 0 <= i + di < 11 and 0 <= j + dj < 13)
    assert torch.equal(dilate(M, theta), expected)


@pytest.mark.parametrize("given, low, high", [({}, 0.75, 0.95), ({"sigma": (1, 1)}, 1, 1)], ids=["paper", "none"])
def test_mixup_equals_eq6_written_out_and_the_hint_is_its_background(given, low, high):
    I, I_rand, M = (random(channels, 16, 16, seed=n).sigmoid() for n, channels in enumerate((3, 3, 1)))
    hint = perturb(I, M, I_rand, generator(), theta=0, **given)
    sigma = low + (high - low) * torch.rand((), generator=generator())
    torch.testing.assert_close(hint, (sigma * I + (1 - sigma) * I_rand) * (1 - M))


M_64 = F.pad(torch.ones(1, 10, 14), (20, 30, 22, 32))  # a small product in a picture of 64 x 64 pixels
DILATED = dilate(M_64, 6)  # θ: 50 pixels of 512 are 6 of 64


def masked(seed: int) -> torch.Tensor:
    """M_aug, from the hint of a white ad mixed with itself."""
    white = torch.ones(3, 64, 64)
    return 1 - perturb(white, M_64, white, generator(seed))[:1].round()


def test_without_random_masks_and_translation_the_mask_is_dilated_by_theta_of_512_pixels(monkeypatch):
    monkeypatch.setattr(data, "random_masks", lambda h, w, generator: torch.zeros(1, h, w))
    monkeypatch.setattr(data, "TRANSLATION", 0)
    assert torch.equal(masked(0), DILATED)


def test_translation_adds_a_copy_of_the_dilated_mask_moved_by_at_most_its_part_of_the_picture(monkeypatch):
    monkeypatch.setattr(data, "random_masks", lambda h, w, generator: torch.zeros(1, h, w))
    for seed in range(5):
        M_aug, far = masked(seed), int(data.TRANSLATION * 64)
        moved = [(dy, dx) for dy in range(-far, far + 1) for dx in range(-far, far + 1)
                 if torch.equal(M_aug, DILATED.maximum(DILATED.roll((dy, dx), dims=(1, 2))))]
        assert moved and (0, 0) not in moved


def test_random_masks_hide_more_in_most_samples_and_nothing_in_some(monkeypatch):
    monkeypatch.setattr(data, "TRANSLATION", 0)
    added = [(masked(seed) - DILATED).sum().item() for seed in range(30)]
    assert min(added) == 0 and 10 < sum(extra > 0 for extra in added) < 30


class Reached(Exception):
    """Training would start now."""


@pytest.fixture(scope="module")
def pgs_training(tmp_path_factory):
    """What `train.py pg` trains with on a base that is not the toy's: its settings, its task, AdamW's arguments.

    The first of its three ads is white, the others are black. The same small product stands in each.
    """
    root = tmp_path_factory.mktemp("pg")
    write_tiny_toy(root, {"mug": "sks 0"})
    for n in range(3):
        save_image(torch.full((3, 64, 64), float(n == 0)), root / "ads" / "mug" / f"{n}.png")
        save_image(M_64, root / "ads" / "mug" / f"{n}_mask.png")
    list_folder(root / "ads")
    found = SimpleNamespace()

    def task(settings):
        found.settings, found.task = settings, train.STAGES["pg"].task(settings)
        return found.task

    def adamw(parameters, *given, **named):
        found.adamw = named
        raise Reached

    options = {"data": root / "ads", "weights": root / "base", "cg": root / "cg", "out": root / "run", "size": 64,
               "batch": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached):
        patch.setattr(torch.optim, "AdamW", adamw)
        stages = {"pg": replace(train.STAGES["pg"], task=task)}
        train.main(["pg", *(str(word) for name, value in options.items() for word in (f"--{name}", value))], stages)
    return found


def test_pgs_training_perturbs_the_hints_mask_and_mixes_it_with_another_ad(pgs_training):
    """Dilated and moved masks, random masks and mixup, all at once: θ and σ reach the samples."""
    samples = pgs_training.task.samples
    given = [samples[0, seed] for seed in range(20)]
    hints = torch.stack([sample["background"][0] for sample in given])
    assert all((sample["image"] == 1).all() for sample in given), "the target stays as it is"
    shares = hints.flatten(1).amax(1)  # σ: white shines through the black of another ad
    assert 0.75 <= shares.min() < 0.8 and 0.9 < shares.max() <= 0.95
    M_aug = (hints == 0).float()
    assert (M_aug >= DILATED).all() and len({int(mask.sum()) for mask in M_aug}) > 10
    assert torch.equal(samples[0, 3]["background"], given[3]["background"]), "the seed decides"


# ---------------------------------------------------------------- the settings of section 5.1


def test_the_settings_are_those_of_section_5_1_and_where_it_is_silent_those_of_controlnet(pgs_training):
    assert (data.THETA, data.SIGMA) == (50, (0.75, 0.95))
    assert SamplerSettings() == SamplerSettings(
        steps=50, guidance=2.0, eta=0.0, from_reference=True, sampler="ddim", refine=1)
    paper = {"lr": 1e-5, "epochs": 300, "batch": 128, "size": 512, "prompt_dropout": 0.5, "weighting": "uniform",
             "noise_offset": 0, "ema": 0, "warmup": 0, "decay": 0, "clip_gradient": 0}
    assert paper == train.PAPER
    assert all(getattr(pgs_training.settings, name) == value for name, value in paper.items()
               if name not in ("batch", "size"))  # these two are given
    assert pgs_training.adamw["weight_decay"] == 0.01


def test_every_epoch_has_each_ad_once_in_an_order_of_its_own_and_every_sample_a_seed_of_its_own():
    keys = [key for batch in batches_of_keys(count=10, batch=4, seed=0, start=0, steps=5, rank=0, world=1)
            for key in batch]
    first, second = ([index for index, _ in epoch] for epoch in (keys[:10], keys[10:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert len({seed for _, seed in keys}) == 20


def test_the_ema_keeps_ema_of_its_value_and_at_first_less():
    """At step n it keeps (1 + n) / (10 + n), until that reaches ema."""
    for step, kept in ((0, 0.1), (10, 0.55), (1000, 0.9)):
        averages = [torch.ones(2), torch.ones(3)]
        update_averages(averages, [torch.zeros(2), torch.zeros(3)], step, ema=0.9)
        assert all(torch.allclose(average, torch.tensor(kept)) for average in averages)


# ---------------------------------------------------------------- the noise schedule and DDIM (section 5.1)


def alpha_bars():
    """ᾱ_0 … ᾱ_999 of scaled-linear β from 0.00085 to 0.012."""
    product, values = 1.0, []
    for t in range(1000):
        root = math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))
        product *= 1 - root**2
        values.append(product)
    return values


def test_50_timesteps_are_981_961_down_to_1():
    assert Schedule().timesteps(50) == list(range(981, 0, -20))


def test_add_noise_is_root_alpha_bar_z_plus_root_one_minus_alpha_bar_eps():
    z_0, eps, t, a = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999]), alpha_bars()
    z_t = Schedule().add_noise(z_0, eps, t)
    for i, step in enumerate(t):
        torch.testing.assert_close(z_t[i], math.sqrt(a[step]) * z_0[i] + math.sqrt(1 - a[step]) * eps[i],
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_eps_or_v_and_gives_eps_back(prediction):
    schedule, z_0, eps = Schedule({"prediction_type": prediction}), random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1)
    for t in (1, 500, 981):
        times, a = torch.full((3,), t), alpha_bars()[t]
        target = schedule.target(z_0, eps, times)
        expected = eps if prediction == "epsilon" else math.sqrt(a) * eps - math.sqrt(1 - a) * z_0
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
        eps_again = schedule.eps_from(target, schedule.add_noise(z_0, eps, times), t)
        torch.testing.assert_close(eps_again, eps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_equals_equation_12_of_its_paper(eta):
    eps, x_t, noise = (random(2, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    a, a_prev = alpha_bars()[501], alpha_bars()[481]
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)  # Eq. 16
    predicted_x_0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
    direction = math.sqrt(1 - a_prev - sigma**2) * eps
    ours, z_0 = ddim_step(eps, x_t, *torch.tensor([a, a_prev], dtype=torch.float64), eta, noise)
    torch.testing.assert_close(ours, math.sqrt(a_prev) * predicted_x_0 + direction + sigma * noise)
    torch.testing.assert_close(z_0, predicted_x_0)


def test_ddim_walks_down_to_alpha_bar_0_and_recovers_z_0_exactly_from_a_perfect_eps():
    schedule, z_0, eps = Schedule(), *(random(2, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(2))
    a = schedule.alpha_bar.double()
    z_T = a[981].sqrt() * z_0 + (1 - a[981]).sqrt() * eps
    walk = list(ddim(lambda z, t: (z - a[t].sqrt() * z_0) / (1 - a[t]).sqrt(), z_T, schedule))
    assert [t for t, _, _ in walk] == schedule.timesteps(50)
    for t, z, guess in walk:
        to = max(t - 20, 0)
        torch.testing.assert_close(guess, z_0)
        torch.testing.assert_close(z, a[to].sqrt() * z_0 + (1 - a[to]).sqrt() * eps)


# ---------------------------------------------------------------- guidance and z_T (sections 3.3 and 5.1)


@pytest.fixture
def prompts():
    return Prompts(*(random(3, 7, 24, seed=20 + i) for i in range(3)))


@pytest.fixture
def unconditional():
    return Prompts(*[random(1, 7, 24, seed=30).expand(3, 7, 24)] * 3)


def own_noise(seed: int) -> torch.Tensor:
    """The noise that three pictures start from, with the seeds seed, seed + 1 and seed + 2."""
    return torch.cat([torch.randn((1, 4, 16, 16), generator=generator(seed + n)) for n in range(3)])


@torch.no_grad()
def test_guidance_equals_two_separate_passes_that_keep_the_hints(
        unet, cg, pg, prompts, unconditional, monkeypatch):
    i, schedule, guidance = inputs(3), Schedule(), 2.0
    branches = [(cg, cg.hint_features(i.hint)), (pg, pg.hint_features(i.hint_ref))]
    monkeypatch.delattr(ControlNet, "hint_features")  # a walk does not encode the hints again
    ours = sample(unet, schedule, Conditions(prompts, unconditional, branches, i.mask), seeded(0, 3), (4, 16, 16),
                  SamplerSettings(steps=2, guidance=guidance))
    z, a = own_noise(0), alpha_bars()
    for t, t_next in ((501, 1), (1, 0)):
        times = torch.full((3,), t)
        with_prompt = predict_noise(unet, z, times, prompts, branches, i.mask)
        without = predict_noise(unet, z, times, unconditional, branches, i.mask)
        eps = without + guidance * (with_prompt - without)
        z_0 = (z - math.sqrt(1 - a[t]) * eps) / math.sqrt(a[t])
        z = math.sqrt(a[t_next]) * z_0 + math.sqrt(1 - a[t_next]) * eps
    assert relative_error(ours, z) < 1e-4


def test_guidance_1_ignores_the_unconditional_prompts(unet, prompts):
    nothing = Prompts(*(torch.full_like(p, torch.nan) for p in prompts))
    z = sample(unet, Schedule(), Conditions(prompts, nothing), seeded(0, 3), (4, 16, 16),
               SamplerSettings(2, guidance=1))
    assert z.isfinite().all()


@pytest.mark.parametrize("with_reference", [False, True])
def test_z_T_is_noise_of_each_pictures_seed_or_the_references_latent_noised_to_the_first_timestep(
        with_reference, prompts, unconditional):
    still, z_ref, a, steps = Still(), random(3, 4, 16, 16, seed=8), alpha_bars()[981], []
    given, how = Conditions(prompts, unconditional), SamplerSettings()
    z = sample(still, Schedule(), given, seeded(7, 3), (4, 16, 16), how, z_ref if with_reference else None,
               on_step=lambda t, z, z_0: steps.append((t, z)))
    noised = math.sqrt(a) * z_ref + math.sqrt(1 - a) * own_noise(7)
    torch.testing.assert_close(still.seen[0][0], noised if with_reference else own_noise(7), rtol=1e-4, atol=1e-5)
    assert [t for _, t in still.seen] == [t for t, _ in steps] == list(range(981, 0, -20))
    assert torch.equal(steps[-1][1], z), "on_step sees the result last"
