"""Tests: metrics and t-SNE against closed forms, rivals against their equations, tables and figures end to end."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP_CONFIG, VISION_CONFIG, random, random_lama, randomise

import evaluate
import train
from clip import CLIP, TextEncoder, load_tokenizer
from data import background_hint, load_ad
from generate import Canvas, prompt_texts
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet, predict_noise
from programs.models import TOY
from programs.settings import parser, settle
from rivals import eq3, lab as methods, networks
from rivals.baselines import blended_diffusion, stable_diffusion
from rivals.lama import LAMA_FILE
from rivals.networks import Networks
from rivals.paint_by_example import PaintByExampleEncoder
from rivals.stages import RIVAL_STAGES
from rivals.tsne import neighbour_probabilities, scatter, tsne, tsne_loss
from sampler import Painting, ddim, seeded
from support import metrics, tensors as cache
from support.datasets import read_items
from support.files import BadInput, read_json
from support.images import load_masked, open_image, save_image, to_tensor
from support.metrics import embed_pictures, frechet, interval, joint_frechet, similarity
from support.plots import COLOURS, choose, draw_curves
from toy.products import PRODUCTS
from toy.stages import TOY_TEXT, TOY_UNET, TOY_VAE, train_tokenizer
from toy.world import TOY_DATA, write_world
from vae import VAE
from weights import (
    CLIP_FILE,
    TEXT_FILE,
    UNET_FILE,
    StableDiffusion,
    control_config,
    load_clip,
    load_control,
    load_stable_diffusion,
    save_control,
    save_module,
)


@pytest.fixture(scope="module")
def ads(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, size=64, base=0, ads=16, bg1k=5, pairs=10, workers=1, parts=("ads",))
    return root / "ads"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The options that name all networks of an evaluation; these are random, at 64 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(["a photo of mug, in the background of sks 0 1 2"] * 9, 600, 32, folder / "base" / "tokenizer")
    tokenizer = load_tokenizer(folder / "base" / "tokenizer")
    text = TOY_TEXT | {"vocab_size": tokenizer.bpe.get_vocab_size(), "eos_token_id": tokenizer.end, "hidden_size": 32}
    unet = TOY_UNET | {"sample_size": 16, "block_out_channels": [8, 16, 16, 16], "cross_attention_dim": 32}
    save_module(randomise(TextEncoder(text)), folder / "base" / "text_encoder", TEXT_FILE)
    save_module(randomise(VAE(TOY_VAE | {"block_out_channels": [8, 8, 16]})), folder / "base" / "vae", UNET_FILE)
    save_module(randomise(UNet(unet)), folder / "base" / "unet", UNET_FILE)
    options, config = {"--weights": folder / "base"}, control_config(unet, 4)
    branches = {"cg": CategoryGenerator(config), "pg": PersonalityGenerator(config), "controlnet": ControlNet(config),
                "cg-plain": CategoryGenerator(config | {"attention": "plain"}),
                "pg-controlnet": PersonalityGenerator(config)}
    identifiers = {category: f"sks {i}" for i, category in enumerate(sorted(PRODUCTS))}
    for i, (name, branch) in enumerate(branches.items()):
        options[f"--{name}"] = folder / name
        save_control(randomise(branch, seed=i), folder / name, categories=None if name == "controlnet" else identifiers)
    options["--lama"] = folder / "lama"
    save_module(random_lama(), folder / "lama", LAMA_FILE)
    options["--paint-by-example"] = folder / "paint-by-example"
    encoder = PaintByExampleEncoder(VISION_CONFIG | {"projection_dim": 32, "mapper_blocks": 1})
    save_module(randomise(encoder), folder / "paint-by-example" / "image_encoder", CLIP_FILE)
    save_module(randomise(UNet(unet | {"in_channels": 9})), folder / "paint-by-example" / "unet", UNET_FILE)
    shutil.copytree(folder / "base" / "vae", folder / "paint-by-example" / "vae")
    for i, name in enumerate(("clip", "guide-clip")):
        options[f"--{name}"] = folder / name
        save_module(randomise(CLIP(CLIP_CONFIG), seed=i), folder / name, TEXT_FILE)
    return options


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return load_stable_diffusion(TOY / "base")


# ---------------------------------------------------------------- metrics


def test_similarity_is_100_times_the_cosine_of_each_pair():
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]]), torch.tensor([[6.0, 8.0], [0.0, 5.0], [1.0, 0.0]])
    assert torch.allclose(similarity(x, y), torch.tensor([100.0, 0.0, 100 / math.sqrt(2)]), atol=1e-4)


@pytest.mark.parametrize("rank, share", [(0, [2, 2, 1]), (1, [2, 2])])
def test_processes_embed_a_share_each(rank, share, tiny, tmp_path, monkeypatch):
    """Two processes have five parts: the second process embeds the second and the fourth, then waits for the first."""
    def the_other_embeds():
        shares.append([*sizes])
        monkeypatch.setattr(cache, "barrier", lambda: None)
        monkeypatch.setattr(cache, "processes", lambda: (1 - rank, 2))
        embed_pictures(clip, [(path, None) for path in paths], tmp_path / "kept")

    monkeypatch.setattr(metrics, "PART", 2)
    monkeypatch.setattr(cache, "processes", lambda: (rank, 2))
    monkeypatch.setattr(cache, "barrier", the_other_embeds)
    clip, paths, sizes, shares = load_clip(tiny["--clip"]), [tmp_path / f"{i}.png" for i in range(9)], [], []
    encode = clip.encode_image
    monkeypatch.setattr(clip, "encode_image", lambda x: sizes.append(len(x)) or encode(x))
    for i, path in enumerate(paths):
        save_image(random(3, 40, 40, seed=i).sigmoid(), path)
    together = embed_pictures(clip, [(path, None) for path in paths], tmp_path / "kept")
    assert shares == [share] and sum(sizes) == 9
    alone = torch.cat([encode(clip.preprocess(to_tensor(open_image(path))[None])) for path in paths])
    assert torch.allclose(together, alone, atol=1e-5)


def with_moments(n: int, mean: torch.Tensor, spread: torch.Tensor, seed: int) -> torch.Tensor:
    """n samples whose mean and covariance are exactly `mean` and diag(spread²)."""
    x = random(n, len(mean), seed=seed, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(n - 1)
    return x * spread + mean


def test_frechet_is_the_closed_form_of_gaussians_with_diagonal_covariances():
    (mu_x, mu_y), (s_x, s_y) = random(2, 6, dtype=torch.float64), random(2, 6, seed=1, dtype=torch.float64).abs() + 0.1
    expected = (mu_x - mu_y).square().sum() + (s_x - s_y).square().sum()
    measured = frechet(with_moments(50, mu_x, s_x, 2), with_moments(80, mu_y, s_y, 3))
    assert measured == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("n", [300, 12])  # more samples than dimensions, and fewer: singular covariances
def test_frechet_is_the_one_by_roots_of_matrices(n):
    """tr (Σ_x Σ_y)^½ = tr (Σ_x^½ Σ_y Σ_x^½)^½: roots of symmetric matrices, by their eigenvalues."""
    x = random(n, 20, dtype=torch.float64) @ random(20, 20, seed=1, dtype=torch.float64)
    y = random(n + 5, 20, seed=2, dtype=torch.float64) @ random(20, 20, seed=3, dtype=torch.float64) + 0.5
    eigenvalues, vectors = torch.linalg.eigh(x.T.cov())
    root_x = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root_x @ y.T.cov() @ root_x).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * trace
    assert frechet(x, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_of_a_set_and_itself_is_nothing():
    x = random(40, 16)
    assert abs(frechet(x, x).item()) < 1e-10 * x.square().sum().item()


def test_joint_frechet_sees_pictures_that_were_swapped():
    """Embeddings s and -s belong to two conditions, 1 and -1. Swapped, they are the same set, at distance 0.

    Together with the conditions they are two lines, along (s, α) and (-s, α) with α = s. By the closed form their
    distance is 2(s² + α²) - 2|α² - s²| = 4s².
    """
    conditions, s, n = torch.tensor([[1.0], [-1.0]] * 50, dtype=torch.float64), 3, 100
    originals = s * conditions
    assert abs(frechet(-originals, originals).item()) < 1e-9
    assert joint_frechet(originals, originals, conditions).item() == pytest.approx(0, abs=1e-9)
    expected = 4 * s**2 * n / (n - 1)  # covariances are unbiased
    assert joint_frechet(-originals, originals, conditions).item() == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    x = random(400, dtype=torch.float64) * 3 + 10
    value, half = interval(lambda i: x[i].mean(), len(x), resamples=2000)
    assert value == pytest.approx(x.mean().item())
    assert half == pytest.approx(1.96 * x.std().item() / math.sqrt(len(x)), rel=0.08)


@pytest.mark.parametrize("height, width", [(100, 70), (64, 129), (32, 32), (20, 27)])
def test_clips_preprocessing_is_the_reference_processors_resizing_and_openais_crop(height, width):
    """Up to the reference's rounding to 8 bits, at most one and a half levels. The crop starts at half of the margin,
    rounded to even.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision", reason="its image processors need it") if not hasattr(
        transformers, "CLIPImageProcessorPil") else None
    from PIL import Image

    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = CLIP_CONFIG["vision_config"]["image_size"]
    x = (random(3, height, width).sigmoid() * 255).round()
    image = Image.fromarray(x.permute(1, 2, 0).byte().numpy())
    reference = processor(size={"shortest_edge": side}, do_center_crop=False, do_normalize=False)
    resized = reference(image, return_tensors="pt")["pixel_values"]
    top, left = (round((size - side) / 2) for size in resized.shape[2:])
    theirs = resized[:, :, top : top + side, left : left + side]
    assert (CLIP(CLIP_CONFIG).preprocess(x[None] / 255) - theirs).abs().max() < 1.6 / 255


# ---------------------------------------------------------------- the rivals


def test_an_edited_walk_ends_at_what_is_put_back(sd):
    z_known, eps, M = random(1, 4, 8, 8), random(1, 4, 8, 8, seed=1), (random(1, 1, 8, 8, seed=2) > 0).float()

    def edit(z, t):
        known = sd.schedule.add_noise(z_known, eps, torch.tensor([t])) if t >= 0 else z_known
        return M * known + (1 - M) * z

    *_, (t, z, _) = ddim(lambda z, t: 0.3 * z, random(1, 4, 8, 8, seed=3), sd.schedule, 5, edit=edit)
    assert torch.equal(z * M, z_known * M) and not torch.allclose(z * (1 - M), z_known * (1 - M))


def canvas_of(ads, count=2, **more) -> Canvas:
    pairs = [load_ad(item, 64) for item in read_items(ads)[0][:count]]
    rgb, mask = (torch.stack(x) for x in zip(*pairs))
    return Canvas(rgb, mask, [prompt_texts("mug", None)] * count, seeded(0, count), **more)


@pytest.mark.parametrize("with_reference", [False, True])
def test_inpainting_keeps_the_products_latent_and_paints_the_rest(sd, ads, with_reference, monkeypatch):
    """It keeps the latent of the product on grey, or of the product pasted onto the reference, where M > 0.5."""
    canvas = canvas_of(ads)
    scene = canvas.rgb.flip(0) if with_reference else torch.full_like(canvas.rgb, 0.5)
    if with_reference:
        canvas = canvas._replace(reference=scene, reference_mask=canvas.mask.flip(0))
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, z: z)
    z = stable_diffusion(sd, canvas, Painting(steps=3))
    z_known = sd.encode(canvas.rgb * canvas.mask + scene * (1 - canvas.mask))
    M = F.interpolate((canvas.mask > 0.5).float(), size=z.shape[2:])
    assert 0 < M.mean() < 1 and torch.equal(z * M, z_known * M)
    assert ((z - z_known) * (1 - M)).abs().mean() > 0.1 * z_known.abs().mean()


def test_an_inpainting_unet_reads_the_product(sd, ads, monkeypatch):
    """Beside z_t it reads the mask of what to paint, 1 − M, and the latent of the product on grey."""
    wide = UNet(sd.unet.config | {"in_channels": 9}).requires_grad_(False)
    seen = []
    monkeypatch.setattr(UNet, "forward", lambda self, z, *_: seen.append(z) or z[:, :4])
    canvas = canvas_of(ads)
    stable_diffusion(replace(sd, unet=wide), canvas, Painting(steps=2))
    hard = (canvas.mask > 0.5).float()
    product = sd.encode(canvas.rgb * hard + 0.5 * (1 - hard))
    M = F.interpolate(hard, size=product.shape[2:])
    assert all(torch.equal(z[:2], torch.cat([z[:2, :4], 1 - M, product], dim=1)) for z in seen) and len(seen) == 2


def test_blended_diffusion_follows_the_gradient_of_the_clip_distance(sd, ads, monkeypatch):
    """ε − ε_unguided = strength √(1 − ᾱ_t) ∇_z D, by finite differences through the decoder and a stand-in UNet."""
    clip, canvas = randomise(CLIP(CLIP_CONFIG)).double(), canvas_of(ads)
    rgb, mask = canvas.rgb.double(), canvas.mask.double()
    reference, reference_mask, t, strength, found = rgb.flip(0), mask.flip(0), 601, 7.0, []
    canvas = canvas._replace(rgb=rgb, mask=mask, reference=reference, reference_mask=reference_mask)
    monkeypatch.setattr("rivals.baselines.stable_diffusion", lambda *arguments: found.append(arguments[-1]))
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, z: F.interpolate(z[:, :3], scale_factor=4).sigmoid())
    blended_diffusion(sd, canvas, Painting(), clip, strength)

    def eps_model(z, t):
        return 0.4 * z.sin()

    def distance(z):
        a = sd.schedule.alpha_bar[t].item()
        picture = sd.decode((z - math.sqrt(1 - a) * eps_model(z, t)) / math.sqrt(a))
        x, y = (clip.encode_image(clip.preprocess(background_hint(*pair)))
                for pair in ((picture, mask), (reference, reference_mask)))
        return 2 - F.cosine_similarity(x, y).sum()

    z, direction = (random(2, 4, 16, 16, seed=i, dtype=torch.float64) for i in (0, 1))
    slope = (distance(z + 1e-5 * direction) - distance(z - 1e-5 * direction)) / 2e-5
    expected = strength * math.sqrt(1 - sd.schedule.alpha_bar[t].item()) * slope
    added = found[0](eps_model, z, t) - eps_model(z, t)
    assert (added * direction).sum().item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------- figures


def clusters(sizes, spreads, dimensions=20, seed=0):
    """Far clusters of these sizes and standard deviations, and the cluster of each row."""
    x = [spread * random(n, dimensions, seed=seed + i) + 12 * random(1, dimensions, seed=seed + 100 + i)
         for i, (n, spread) in enumerate(zip(sizes, spreads))]
    return torch.cat(x), torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def kl_divergence(x, y, perplexity):
    """KL(P ‖ Q), written out: Q by Student's t with one degree of freedom."""
    P, w = neighbour_probabilities(x.double(), perplexity), 1 / (1 + (y[:, None] - y).double().square().sum(2))
    Q = w.fill_diagonal_(0) / w.sum()
    return (P * (P / Q).log())[P > 0].sum().item()


@pytest.mark.parametrize("n, perplexity", [(40, 10), (7, 30)])
def test_each_points_neighbours_have_the_wanted_perplexity(n, perplexity):
    """The perplexity is that before P is made symmetric. Points on a circle are all alike: their P is symmetric."""
    angle = torch.arange(n).double() * 2 * math.pi / n
    P = neighbour_probabilities(torch.stack([angle.cos(), angle.sin()], dim=1), perplexity)
    assert P.sum().item() == pytest.approx(1) and torch.equal(P, P.T) and not P.diag().any()
    assert torch.special.entr(P * n).sum(1).exp().tolist() == pytest.approx([min(perplexity, (n - 1) / 3)] * n)


def test_the_loss_of_tsne_is_the_kl_divergence():
    x, y = random(12, 5, dtype=torch.float64), random(12, 2, seed=1, dtype=torch.float64)
    P = neighbour_probabilities(x, 3)
    assert (tsne_loss(y, P) - torch.special.entr(P).sum()).item() == pytest.approx(kl_divergence(x, y, 3))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes, spreads", [([25, 25, 25], [1, 1, 1]), ([60, 20, 6, 30], [1, 0.1, 2, 0.01])])
def test_tsne_keeps_apart_what_is_apart(sizes, spreads, seed):
    """Every point's nearest neighbours in the plane are from its own cluster."""
    x, cluster = clusters(sizes, spreads, seed=1000 * seed)
    y = tsne(x, perplexity=10, steps=250)
    nearest = torch.cdist(y, y).fill_diagonal_(math.inf).topk(5, largest=False).indices
    assert torch.equal(cluster[nearest], cluster[:, None].expand(-1, 5))


@pytest.mark.parametrize("x", [
    *(random(n, 16, seed=n) for n in range(3, 11)), random(100, 30), clusters([25] * 15, [3] * 15, 64)[0],
    random(9, 8).repeat(4, 1), torch.linspace(0, 1, 40)[:, None].expand(40, 3), 1e-4 * random(20, 8) + 10,
], ids=[*map(str, range(3, 11)), "one cluster", "375", "each four times", "a line", "nearly equal"])
def test_tsne_is_nearer_than_the_principal_components_at_their_best_size(x):
    y, (U, S, _) = tsne(x), torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    components = (U * S)[:, :2] / S[0]
    best = min(kl_divergence(x, 2.0**k * components, 30) for k in range(-6, 10))
    assert y.isfinite().all() and kl_divergence(x, y, 30) < 0.95 * best


def test_tsne_of_equal_points_is_a_picture_too():
    y = tsne(torch.ones(20, 5))
    assert y.isfinite().all()
    assert scatter(y, [("CG", "mug")] * 20, ["mug"]).size == (1130, 900)


def test_a_curve_falls_with_the_loss_and_one_bad_batch_does_not_flatten_it():
    raw, smoothed = ([(20 * i, 1e6 if i == bad else 1 / i) for i in range(1, 101)] for bad in (50, None))
    page = draw_curves({"raw": raw, "smoothed": smoothed}, "loss", "step")
    colour = torch.tensor([int(COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    at = (255 * to_tensor(page) - colour.view(3, 1, 1)).abs().amax(0) < 40
    top = [int(at[30:, x].nonzero().min()) for x in (120, 300, 800)]
    assert top[0] + 100 < top[1] < top[2]
    assert all(draw_curves({"raw": line}, "", "").size == page.size for line in (raw[:1], [(1, 0.0)]))


def test_the_same_items_are_chosen_every_time_in_their_order():
    assert choose(list(range(100)), 8) == choose(list(range(100)), 8) == sorted(choose(list(range(100)), 8))
    assert len({*choose(list(range(100)), 8)}) == 8 and choose([1, 2], 8) == [1, 2]


# ---------------------------------------------------------------- the command line


def command(ads, out, models, *arguments):
    options = [str(word) for pair in models.items() for word in pair]
    evaluate.main([*map(str, arguments), "--data", str(ads), "--out", str(out), "--steps", "2", "--dtype", "float32",
                   "--device", "cpu", *options])


@pytest.fixture(scope="module")
def results(ads, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    for what in evaluate.TABLES:
        with redirect_stdout(io.StringIO()) as printed:
            command(ads, out, tiny, what)
        (out / f"{what}.printed").write_text(printed.getvalue())
    return out


@pytest.mark.parametrize("table, count, painted", [("table1", 5, 7), ("table2", 10, 12), ("table4", 10, 6)])
def test_a_table_is_printed_and_kept_with_its_figures(results, table, count, painted):
    content = json.loads((results / f"{table}.json").read_text())
    measured = [row["measured"] for row in content["rows"] if row["measured"]]
    assert len(measured) == painted and {row["n"] for row in measured} == {count}
    text, printed = (results / f"{table}.md").read_text(), (results / f"{table}.printed").read_text()
    assert printed.startswith(text + f"\n{results / table}.md\n{results / table}.json\nnext: ")
    for row in measured:
        assert ("joint" in row) == (table == "table1")
        for value, half in [row[metric] for metric in ("similarity", "frechet", "joint") if metric in row]:
            assert half > 0 and f"{value:.2f} ± {half:.2f}" in text


def test_table_4_says_beside_which_partner_pg_was_trained(results):
    lines = (results / "table4.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and "in CG's place" in line]
    assert ["beside it" in row for row in rows] == [False, True, False] and all("PG trained beside" in r for r in rows)


@pytest.mark.parametrize("table, ours", [("table1", "CG"), ("table2", "CG + PG")])
def test_ours_is_ahead_by_the_difference_of_the_figures(results, table, ours):
    """The interval is that of the difference on the same items, so between a method and itself it has no width."""
    rows = [row for row in json.loads((results / f"{table}.json").read_text())["rows"] if row["measured"]]
    for protocol in {row["protocol"] for row in rows}:
        theirs = {row["method"]: row["measured"] for row in rows if row["protocol"] == protocol}
        for figures in theirs.values():
            for metric, sign in [("similarity", 1), ("frechet", -1), ("joint", -1)][: 3 if table == "table1" else 2]:
                by = sign * (theirs[ours][metric][0] - figures[metric][0])
                assert figures["ours_ahead"][metric][0] == pytest.approx(by, abs=1e-4)
        assert all(by == [0, 0] for by in theirs[ours]["ours_ahead"].values())


def test_the_figures_are_those_of_the_pictures(results, ads, tiny):
    """CG's similarity in Table 1 is computed again, from the files of its pictures and the originals."""
    clip, folder = load_clip(tiny["--clip"]), next((results / "pictures" / "bg1k").glob("cg-????????"))
    items = read_items(ads, "bg1k")[0]
    x, y = (clip.encode_image(torch.cat([clip.preprocess(to_tensor(open_image(path))[None]) for path in paths]))
            for paths in (sorted(folder.glob("*.png"))[: len(items)], [item.image for item in items]))
    row = next(row for row in json.loads((results / "table1.json").read_text())["rows"] if row["method"] == "CG")
    assert row["measured"]["similarity"][0] == pytest.approx(similarity(x, y).mean().item(), rel=1e-4)


def test_tables_share_pictures_and_nothing_is_painted_twice(results, ads, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.png")}
    assert len(list((results / "pictures" / "ref").iterdir())) == 10  # 5 rows of Table 2, 6 of Table 4, one in both
    command(ads, results, tiny, "table1")
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.png")} == before
    assert "painting" not in capsys.readouterr().err
    command(ads, results, tiny, "table1", "--guidance", "1.5", "--limit", "2")  # other settings: other pictures
    assert len(list((results / "pictures" / "bg1k").iterdir())) == 10
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("figure", ["tsne", "fig6", "fig9", "fig10"])
def test_a_figure_is_drawn(results, ads, tiny, figure, capsys):
    command(ads, results, tiny, figure)
    image = open_image(results / f"{figure}.png")
    assert min(image.size) > 100 and len(image.resize((64, 64)).getcolors(4096)) > 8
    *lines, path, following = capsys.readouterr().out.splitlines()
    assert path == str(results / f"{figure}.png") and following.startswith("next: ")
    assert [line.split(":")[0] for line in lines] == (["original", "CG", "ControlNet"] if figure == "tsne" else [])
    assert all("nearest centre" in line for line in lines)


def test_the_three_trainings_of_fig7(ads, tmp_path, monkeypatch):
    """They differ as Fig. 7 says: no perturbation, dilation alone, dilation and mixup; each runs on first use only."""
    commands = []

    def stand_in(command, **_):
        commands.append(command[2:])
        shutil.copytree(TOY / "pg", Path(command[command.index("--out") + 1], "pg"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks.subprocess, "run", stand_in)
    for _ in range(2):
        command(ads, tmp_path / "results", {"--size": 64}, "fig7", "--limit", "2")
    options = [tuple(c[c.index("--steps") + 2 : c.index("--cg")]) for c in commands]
    assert options == [("--theta", "0", "--sigma", "1", "1"), ("--sigma", "1", "1"), ()]
    assert all(c[:3] == ["pg", "--steps", "600"] and c[c.index("--cg") + 1] == str(TOY / "cg") for c in commands)
    assert (tmp_path / "results" / "fig7.png").is_file()


def test_fig7_takes_references_that_are_large_off_centre_or_of_another_category(ads, monkeypatch):
    items = [item for item in read_items(ads, "bgpair")[0] if item.reference]
    taken = []
    monkeypatch.setattr(evaluate, "draw_methods", lambda lab, name, columns, items, labels: taken.extend(
        zip(labels, items)))
    evaluate.figure_perturbations(SimpleNamespace(items=lambda protocol: items), each=1)
    (large, a), (off, b), (other, c) = taken
    assert (large, off, other) == ("large", "off centre", "other category") and c.category == items[0].category
    masks = {item.reference: load_masked(item.reference, item.reference_mask)[1][0] for item in items}
    assert a.reference == max(masks, key=lambda path: masks[path].mean())
    middles = {path: abs(float(mask.nonzero()[:, 1].float().mean()) / (mask.shape[1] - 1) - 0.5)
               for path, mask in masks.items()}
    assert middles[b.reference] == pytest.approx(max(middles.values()), abs=0.01)
    assert next(item.category for item in items if item.reference == c.reference) != c.category


def test_pg_is_trained_beside_the_controlnet_as_beside_a_cg_that_computes_the_same(tiny, tmp_path, monkeypatch):
    """Table 4 (a): `train.py pg --cg` is given the ControlNet's weights as a CG with plain attention."""
    monkeypatch.chdir(tmp_path)
    controlnet = shutil.copytree(tiny["--controlnet"], tmp_path / "controlnet")
    as_cg = networks.as_plain_cg(controlnet, tiny["--cg"])
    theirs, ours = load_control(controlnet, "controlnet"), load_control(as_cg, "category")
    P, P_fg, P_bg = random(3, 1, 8, 32)
    z, t, hint, mask = random(1, 4, 16, 16), torch.tensor([500]), random(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    inputs = (z, t, Prompts(P, P_fg, P_bg), [(branch.requires_grad_(False), branch.hint_features(hint))
                                              for branch in (theirs, ours)], mask)
    sd = load_stable_diffusion(tiny["--weights"])
    by_theirs, by_ours = (predict_noise(sd.unet, *inputs[:3], [branch], mask) for branch in inputs[3])
    assert torch.equal(by_theirs, by_ours)
    assert read_json(as_cg / "categories.json") == read_json(tiny["--cg"] / "categories.json")


def test_a_product_is_painted_with_its_own_words_and_another_category_s_identifier(ads, tiny, tmp_path, monkeypatch):
    """All pairs of different categories, by both attentions; every picture is counted once."""
    painted, pictures = [], methods.Lab.pictures

    def noted(lab, name, items, folder, chosen, texts):
        painted.extend((name, items[i].category, folder, *texts[items[i].category]) for i in chosen)
        return pictures(lab, name, items, folder, chosen, texts)

    monkeypatch.setattr(methods.Lab, "pictures", noted)
    command(ads, tmp_path, tiny, "swapped")
    identifiers = read_json(tiny["--cg"] / "categories.json")
    categories = {category for _, category, *_ in painted}
    assert sorted((name, c, folder) for name, c, folder, *_ in painted) == sorted(
        (name, c, f"swapped-{other}") for name in ("cg", "cg-plain")
        for c in categories for other in categories - {c})
    for _, category, folder, P, P_fg, P_bg in painted:
        assert (P, P_fg) == (f"A photo of {category}, {P_bg}", f"A photo of {category}")
        assert P_bg == f"in the background of {identifiers[folder.removeprefix('swapped-')]}"
    text = (tmp_path / "swapped.md").read_text()
    for line in text.splitlines()[2:4]:
        shares = [float(cell.split("±")[0]) for cell in line.split("|")[2:-1]]
        assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.02)
    assert "5 products, each with 4 identifiers" in text and re.search(r"right for [012] of 2 held-out ads", text)
    assert open_image(tmp_path / "swapped.png").width > 7 * 64, "a product, and three identifiers for each equation"
    with pytest.raises(BadInput, match="swapped needs products of two categories; raise --limit"):
        eq3.swapped(SimpleNamespace(data=ads, items=lambda _: read_items(ads, "bg1k")[0][:1]))


def test_pictures_are_kept_for_what_they_were_painted_of(ads, tiny, tmp_path, monkeypatch):
    """The first items of a split share the whole split's pictures; other settings, pairs or files have their own."""
    monkeypatch.setattr(methods, "paint_items", lambda *_, **__: None)
    data = shutil.copytree(ads, tmp_path / "ads")

    def folder(*options: str, method: str = "cg") -> Path:
        words = [str(word) for pair in tiny.items() for word in pair]
        args = evaluate.options().parse_args(["table2", "--data", str(data), *words, *options])
        lab = evaluate.lab_of(args, tmp_path / "out", args.limit)
        return lab.pictures(method, lab.items("ref"), "ref")[0].parent

    first, info = folder(), data / "bgpair_info.txt"
    for harmless in ("--limit 2", "--batch 3", f"--clip {tiny['--guide-clip']}",
                     f"--pg {tiny['--cg']}"):
        assert folder(*harmless.split()) == first, harmless
    others = ["--steps 7", "--guidance 3", "--size 32", "--seed 5", "--dtype float32", "--sampler dpm++", "--refine 2",
              "--refine 2 --refine-from 400", f"--cg {tiny['--cg-plain']}"]
    assert len({first, *(folder(*other.split()) for other in others)}) == 1 + len(others)
    rows = [line.split("\t") for line in info.read_text().splitlines()]
    rows[0][1], rows[1][1] = rows[1][1], rows[0][1]
    info.write_text("".join("\t".join(row) + "\n" for row in rows))
    paired = folder()
    os.utime(read_items(data, "bgpair")[0][0].image, (0, 0))
    assert len({first, paired, folder()}) == 3


def test_under_torchrun_one_process_trains_and_the_others_wait(tmp_path):
    """A stand-in for train.py makes the folder; it must find no process group in its environment."""
    (tmp_path / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        "assert 'WORLD_SIZE' not in os.environ\n"
        "time.sleep(1)\n"
        "pathlib.Path(sys.argv[sys.argv.index('--out') + 1], 'clip').mkdir(parents=True)\n")
    (tmp_path / "both.py").write_text(
        "import pathlib\n"
        "import torch.distributed as dist\n"
        "from rivals import networks\n"
        f"networks.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        "dist.init_process_group('gloo')\n"
        "path = networks.Networks({'weights': None}, 'cpu').path('guide-clip')\n"
        "pathlib.Path(f'found_{dist.get_rank()}').write_text(f'{path} {path.is_dir()}')\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run([*torchrun, "both.py"], cwd=tmp_path, text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(Path(evaluate.__file__).parent)})
    assert run.returncode == 0, run.stderr
    one, other = ((tmp_path / f"found_{rank}").read_text() for rank in (0, 1))
    assert one == other and one.endswith("clip True") and run.stderr.count("training, once") == 1


@pytest.mark.parametrize("name", networks.TRAINED)
def test_training_takes_the_command_that_makes_a_network(name, tmp_path):
    """On the toy's data and base, with the toy's settings."""
    given = vars(parser("", train.STAGES | RIVAL_STAGES).parse_args([*networks.TRAINED[name], "--device", "cpu"]))
    stage = (train.STAGES | RIVAL_STAGES)[given["stage"]]
    settings = settle(given | {"out": tmp_path}, stage.settings, TOY_DATA / stage.data)
    assert settings.size == 128 and settings.steps and settings.data.parent == TOY_DATA


def test_an_interrupted_training_is_resumed_and_a_failed_one_is_not_taken_for_done(tmp_path, monkeypatch):
    commands, results = [], [1, 0]

    def stand_in(command, **_):
        commands.append(command)
        checkpoint = Path(command[command.index("--out") + 1], "training", "clip", "checkpoint_00000001.safetensors")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        return subprocess.CompletedProcess(command, results.pop(0))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks.subprocess, "run", stand_in)
    lab = Networks({"weights": None}, "cpu")
    with pytest.raises(BadInput, match="the training failed, as it says above"):
        lab.path("guide-clip")
    assert lab.path("guide-clip").parent.is_dir() and lab.path("guide-clip").name == "clip"
    assert ["--resume" in command for command in commands] == [False, True]


# What has to be given so that nothing is trained
OPTIONS = ("--controlnet", "--cg-plain", "--guide-clip", "--lama", "--paint-by-example")


@pytest.mark.parametrize("arguments, message", [
    ("table9", "table9: must be one of table1, table2"),
    ("table1 --data nowhere", "no such data set"),
    ("table1 --limit 1", "must be a whole number from 2"),
    ("table1 --weights {toy}/base --cg {toy}/cg", "--clip is missing"),
    ("table1 --weights {toy}/base", "--cg is missing"),
    ("table2 --weights {toy}/base --cg {toy}/cg --guide-clip", "--guide-clip is missing"),
    ("fig9 --limit 3", "no category has two pairs"),
    ("table1 --clip nowhere", "nowhere is missing"),
    ("table2 --pg nowhere", "nowhere is missing"),
    ("table1 --weights nowhere --cg {toy}/cg --clip {toy}/clip", "nowhere is missing"),
    ("fig7 --weights {toy}/base --cg {toy}/cg", "this command works with the toy only"),
    ("table1 --cg-plain {toy}/cg", "--cg-plain .*cg is a CG with mask-guided attention; give one with plain"),
    ("table1 --hint inpaint --controlnet", "--hint goes with --controlnet"),
    ("table1 --out {toy}/README.md", "README.md"),
])
def test_bad_use_is_one_line(arguments, message, tmp_path, monkeypatch, ads, tiny):
    """An option at the end of a line, without a value, stands for one that is not given."""
    monkeypatch.chdir(tmp_path)
    words = arguments.format(toy=TOY).split()
    options = {"--data": ads} | {option: tiny[option] for option in OPTIONS}
    if words[-1] in OPTIONS:
        options.pop(words.pop())
    with pytest.raises(BadInput, match=message) as error:
        evaluate.main([words[0], *(str(word) for pair in options.items() for word in pair), *words[1:]])
    assert "\n" not in str(error.value) and not Path("results", "pictures").exists(), "said before anything is painted"


def test_what_is_missing_is_said_before_anything_is_painted(ads, tiny, tmp_path):
    """CG was not trained on one category. The row that needs --cg-plain is left out without it; a row of the paper's
    says that its network is not given.
    """
    shutil.copytree(tiny["--cg"], tmp_path / "cg")
    (tmp_path / "cg" / "categories.json").write_text('{"mug": "sks 0"}')
    with pytest.raises(BadInput, match="CG was not trained on category '[a-z ]+'; choose one from .*, such as mug;"):
        command(ads, tmp_path / "results", tiny | {"--cg": tmp_path / "cg"}, "table1")
    given = {name: path for name, path in tiny.items() if name not in ("--cg-plain", "--lama")}
    command(ads, tmp_path / "results", given, "table1", "--limit", "2")
    rows = json.loads((tmp_path / "results" / "table1.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "LaMa", "Stable Diffusion", "ControlNet", "CG", "originals of other products"]
    assert [row["method"] for row in rows if not row["measured"]] == ["LaMa"]
    assert "| LaMa | not given | 88.33 |" in (tmp_path / "results" / "table1.md").read_text()


def test_an_ad_that_cannot_be_read_is_named_and_left_out_of_the_centres(ads, tiny, tmp_path, capsys):
    shutil.copytree(ads, tmp_path / "ads")
    read_items(tmp_path / "ads")[0][0].image.write_bytes(b"")
    command(tmp_path / "ads", tmp_path / "results", tiny, "tsne")
    out, err = capsys.readouterr()
    assert err.count("skipped") == 1 and "nan" not in out and len(out.splitlines()) == 5


# ---------------------------------------------------------------- whose scene?


def test_a_hole_in_a_plain_background_leaves_no_trace(ads):
    """So the probe can't tell a product's outline from what stands around it."""
    masks = [load_ad(item, eq3.SIDE)[1] for item in read_items(ads)[0][:4]]
    colour = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    views = [(colour * (1 - mask) + mask, mask, str(i)) for i, mask in enumerate(masks)]  # white products
    expected = colour.expand(3, eq3.GRID, eq3.GRID).flatten()
    for twice in (False, True):
        assert torch.allclose(eq3.backgrounds(views, twice), expected.expand(4, -1), atol=1e-5)


def test_a_background_is_seen_where_no_product_stands(ads):
    item = read_items(ads)[0][0]
    rgb, mask = load_ad(item, eq3.SIDE)
    seen = eq3.backgrounds([(rgb, mask, "")]).view(3, eq3.GRID, eq3.GRID)
    free = F.max_pool2d(mask, eq3.SIDE // eq3.GRID)[0] == 0
    assert free.float().mean() > 0.3
    assert torch.allclose(seen[:, free], F.avg_pool2d(rgb, eq3.SIDE // eq3.GRID)[:, free], atol=1e-5)


def test_the_toys_probe_knows_the_scenes_of_brands_that_it_has_not_seen(tmp_path, monkeypatch):
    """At least 95% of held-out ads, also where a product of another category is masked too."""
    monkeypatch.setattr(eq3, "DRAWN", 40)
    write_world(tmp_path, size=64, base=0, ads=0, bg1k=64, pairs=0, workers=1, parts=("ads",))
    held_out = read_items(tmp_path / "ads", "bg1k")[0]
    lab = SimpleNamespace(networks=SimpleNamespace(options={"weights": None}), all_items=lambda _: held_out)
    _, exam = eq3.tested_probe(lab, [])
    once, twice = map(int, re.fullmatch(r"(\d+) of 64 held-out ads, and for (\d+) with .*", exam).groups())
    assert min(once, twice) >= 0.95 * 64


def test_a_picture_counts_for_the_scene_that_the_probe_names(ads):
    """A laptop with a watch's and a sneaker's identifier, and a watch without a picture."""
    laptop, watch = (replace(read_items(ads)[0][0], category=name) for name in ("laptop", "watch"))
    painted = {(laptop, "watch"): laptop.image, (laptop, "sneaker"): laptop.image, (watch, "laptop"): Path("nowhere")}
    for named, shares in (("watch", [50, 0, 50, 0]), ("laptop", [0, 100, 0, 0]), ("plain wall", [0, 0, 0, 100])):
        found = eq3.outcomes(painted, [laptop, watch], lambda x, named=named: [named] * len(x))
        assert found[0].tolist() == shares and found[1].isnan().all()


def test_table_1_has_the_floor_of_two_disjoint_sets_of_ads_and_a_zero_by_construction(results, ads):
    rows = {row["method"]: row["measured"] for row in json.loads((results / "table1.json").read_text())["rows"]}
    floor = rows["other ads of the same categories: the floor"]
    items = read_items(ads, "bg1k")[0]
    others = evaluate.other_ads(SimpleNamespace(data=ads), items)
    of = {item.image: item.category for item in read_items(ads)[0]}
    assert [of[path] for path in others] == [item.category for item in items] and len({*others}) == len(items)
    assert floor["n"] == len(items) and floor["frechet"][0] > 0
    same, = (row for name, row in rows.items() if "same set" in name)
    assert same["frechet"][0] == pytest.approx(0, abs=1e-6) and same["joint"][0] > 0
    assert "biased upwards" in (results / "table1.md").read_text()


def test_table_2_has_the_references_themselves(results):
    """They are perfectly similar to themselves; as originals of the product's own they are no other set."""
    rows = json.loads((results / "table2.json").read_text())["rows"]
    for row in (row["measured"] | {"to": row["protocol"]} for row in rows if "references" in row["method"]):
        assert row["similarity"][0] == pytest.approx(100, abs=1e-3)
        assert (row["frechet"][0] > 1e-3) == (row["to"] == "ref")


def test_a_category_with_too_few_ads_has_a_path_to_nothing_in_their_place(ads, tmp_path):
    item = read_items(ads, "bg1k")[0][0]
    count = sum(ad.category == item.category for ad in read_items(ads)[0])
    paths = evaluate.other_ads(SimpleNamespace(data=ads, out=tmp_path), [item] * (count + 1))
    assert [path.exists() for path in paths] == [True] * count + [False]
