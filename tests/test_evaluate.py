"""Tests: metrics and t-SNE against closed forms, rivals against their equations, tables and figures end to end."""

import math
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP_CONFIG, random, random_lama, randomise, refused, relative_error, write_tiny_toy
from PIL import Image
from test_paint_by_example import (
    folder as example,  # noqa: F401 (a fixture, and what it needs)
    pbe,  # noqa: F401
)

import evaluate
import train
from clip import CLIP
from data import Canvas, background_hint, load_ad, prompt_texts
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet
from programs.models import TOY
from programs.settings import parser, settle
from rivals import eq3, lab as methods, metrics, networks
from rivals.baselines import blended_diffusion, stable_diffusion
from rivals.lama import LAMA_FILE
from rivals.metrics import embed_pictures, frechet, interval, joint_frechet
from rivals.networks import Networks
from rivals.stages import RIVAL_STAGES
from rivals.tsne import neighbour_probabilities, scatter, tsne, tsne_loss
from sampler import SamplerSettings, seeded
from support import tensors as cache
from support.datasets import Item, read_items
from support.files import read_json
from support.images import load_masked, open_image, to_tensor
from support.plots import COLOURS, draw_curves
from toy.products import PRODUCTS
from toy.world import TOY_DATA, write_world
from weights import (
    TEXT_FILE,
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
    write_world(root, size=64, base=0, ads=16, bg1k=5, pairs=6, workers=1, parts=("ads",))
    return root / "ads"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, example):  # noqa: F811
    """The options that name all networks of an evaluation; these are random, at 64 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    identifiers = {category: f"sks {i}" for i, category in enumerate(sorted(PRODUCTS))}
    write_tiny_toy(folder, identifiers)
    config = control_config(read_json(folder / "base" / "unet" / "config.json"), 4)
    branches = {"controlnet": ControlNet(config), "cg-plain": CategoryGenerator(config | {"attention": "plain"}),
                "pg-controlnet": PersonalityGenerator(config)}
    for i, (name, branch) in enumerate(branches.items()):
        save_control(randomise(branch, seed=i), folder / name, categories=None if name == "controlnet" else identifiers)
    for i, name in enumerate(("clip", "guide-clip")):
        save_module(randomise(CLIP(CLIP_CONFIG), seed=i), folder / name, TEXT_FILE)
    save_module(random_lama(), folder / "lama", LAMA_FILE)
    names = ("cg", "pg", *branches, "clip", "guide-clip", "lama")
    options = {f"--{name}": folder / name for name in names}
    return options | {"--weights": folder / "base", "--paint-by-example": example}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return load_stable_diffusion(TOY / "base")


# ---------------------------------------------------------------- metrics


def test_similarity_is_100_times_the_mean_cosine_of_each_picture_and_its_target():
    measured = evaluate.Measured(None, torch.eye(2), None, torch.tensor([[2.0, 0.0], [1.0, 1.0]]), None)
    found = [measured.similarity(torch.tensor(rows)).item() for rows in ([0], [1], [0, 1])]
    assert found == pytest.approx([100, 100 / math.sqrt(2), 50 + 50 / math.sqrt(2)])


def test_processes_embed_a_share_each(ads, tiny, tmp_path, monkeypatch):
    """Of five parts the first of two processes embeds the first, third and fifth, then waits for the other two."""
    clip, sizes, pictures = load_clip(tiny["--clip"]), [], [(item.image, None) for item in read_items(ads)[0][:9]]
    alone = torch.cat([clip.encode_image(clip.preprocess(to_tensor(open_image(path))[None])) for path, _ in pictures])

    def the_other_embeds():
        assert sizes == [2, 2, 1]
        monkeypatch.setattr(cache, "barrier", lambda: None)
        monkeypatch.setattr(cache, "processes", lambda: (1, 2))
        embed_pictures(clip, pictures, tmp_path)

    monkeypatch.setattr(metrics, "PART", 2)
    monkeypatch.setattr(cache, "processes", lambda: (0, 2))
    monkeypatch.setattr(cache, "barrier", the_other_embeds)
    encode = clip.encode_image
    monkeypatch.setattr(clip, "encode_image", lambda x: sizes.append(len(x)) or encode(x))
    assert torch.allclose(embed_pictures(clip, pictures, tmp_path), alone, atol=1e-5) and sizes == [2, 2, 1, 2, 2]


@pytest.mark.parametrize("n", [300, 12])  # more samples than dimensions, and fewer: singular covariances
def test_frechet_is_the_one_by_eigenvalues(n):
    """tr (Σ_x Σ_y)^½ is the sum of the roots of the eigenvalues of Σ_x Σ_y."""
    x, y = random(2, n, 20, dtype=torch.float64).cumsum(dim=2)
    y = 1 + y[5:].flip(1)  # fewer, elsewhere and along other axes
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root
    assert frechet(x, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_joint_frechet_sees_pictures_that_were_swapped():
    """Embeddings s and -s belong to two conditions, 1 and -1. Swapped, they are the same set, at distance 0.

    Together with the conditions they are two lines, along (s, α) and (-s, α) with α = s. By the closed form their
    distance is 2(s² + α²) - 2|α² - s²| = 4s².
    """
    conditions, s = torch.tensor([[1.0], [-1.0]] * 50, dtype=torch.float64), 3
    originals = s * conditions
    assert abs(frechet(-originals, originals).item()) < 1e-9
    assert joint_frechet(originals, originals, conditions).item() == pytest.approx(0, abs=1e-9)
    expected = 4 * s**2 * 100 / 99  # covariances are unbiased
    assert joint_frechet(-originals, originals, conditions).item() == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    x = random(400) * 3 + 10
    value, half = interval(lambda i: x[i].mean(), 400, resamples=2000)
    assert value == pytest.approx(x.mean().item()) and half == pytest.approx(1.96 * x.std().item() / 20, rel=0.08)


@pytest.mark.parametrize("height", [48, 20])
def test_clips_preprocessing_is_openais(height):
    """It is Pillow's bicubic resizing of the shorter side, then the middle, up to Pillow's rounding to 8 bits."""
    side = CLIP_CONFIG["vision_config"]["image_size"]
    x = (random(height, 2 * height, 3).sigmoid() * 255).byte()
    theirs = to_tensor(Image.fromarray(x.numpy()).resize((2 * side, side), Image.Resampling.BICUBIC))
    ours = CLIP(CLIP_CONFIG).preprocess(x.permute(2, 0, 1)[None] / 255)[0]
    assert (ours - theirs[:, :, side // 2 : -side // 2]).abs().max() < 1.6 / 255


# ---------------------------------------------------------------- the rivals


@pytest.fixture
def canvas(ads) -> Canvas:
    """Two ads, each the other's reference."""
    rgb, mask = (torch.stack(x) for x in zip(*(load_ad(item, 64) for item in read_items(ads)[0][:2])))
    return Canvas(rgb, mask, [prompt_texts("mug", None)] * 2, seeded(0, 2), rgb.flip(0), mask.flip(0))


@pytest.mark.parametrize("with_reference", [False, True])
def test_inpainting_keeps_the_products_latent_and_paints_the_rest(sd, canvas, with_reference, monkeypatch):
    """It keeps the latent of the product on grey, or of the product pasted onto the reference, where M > 0.5."""
    scene = canvas.reference if with_reference else 0.5
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, z: z)
    z = stable_diffusion(sd, canvas if with_reference else canvas._replace(reference=None), SamplerSettings(steps=3))
    z_known = sd.encode(canvas.rgb * canvas.mask + scene * (1 - canvas.mask))
    M = F.interpolate((canvas.mask > 0.5).float(), size=z.shape[2:])
    assert 0 < M.mean() < 1 and torch.equal(z * M, z_known * M)
    assert ((z - z_known) * (1 - M)).abs().mean() > 0.1 * z_known.abs().mean()


def test_an_inpainting_unet_reads_the_product(sd, canvas, monkeypatch):
    """Beside z_t, as with a base of our own method."""
    wide, seen = replace(sd, unet=UNet(sd.unet.config | {"in_channels": 9})), []
    monkeypatch.setattr(UNet, "forward", lambda self, z, *_: seen.append(z) or z[:, :4])
    stable_diffusion(wide, canvas, SamplerSettings(steps=2))
    assert len(seen) == 2 and all(torch.equal(z[:2, 4:], wide.inpainting(canvas.rgb, canvas.mask)) for z in seen)


def test_blended_diffusion_follows_the_gradient_of_the_clip_distance(sd, canvas, monkeypatch):
    """ε − ε_unguided = strength √(1 − ᾱ_t) ∇_z D, with a stand-in for the UNet."""
    clip, t, guides = randomise(CLIP(CLIP_CONFIG)), 601, []
    monkeypatch.setattr("rivals.baselines.stable_diffusion", lambda *arguments: guides.append(arguments[-1]))
    blended_diffusion(sd, canvas, SamplerSettings(), clip, strength=7.0)
    alpha_bar, z = sd.schedule.alpha_bar[t], random(2, 4, 16, 16).requires_grad_()
    sigma = (1 - alpha_bar).sqrt()

    def eps_model(z, t):
        return 0.4 * z.sin()

    def embed(picture, mask):
        return clip.encode_image(clip.preprocess(background_hint(picture, mask)))

    z_0 = (z - sigma * eps_model(z, t)) / alpha_bar.sqrt()
    D = -F.cosine_similarity(embed(sd.decode(z_0), canvas.mask), embed(canvas.reference, canvas.reference_mask))
    expected = 7 * sigma * torch.autograd.grad(D.sum(), z)[0]
    assert relative_error(guides[0](eps_model, z, t) - eps_model(z, t), expected) < 1e-4


# ---------------------------------------------------------------- figures


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
    x = random(12, 5, dtype=torch.float64)
    y, P = x[:, :2], neighbour_probabilities(x, 3)
    assert (tsne_loss(y, P) - torch.special.entr(P).sum()).item() == pytest.approx(kl_divergence(x, y, 3))


@pytest.mark.parametrize("x", [
    random(3, 16), random(40, 30), random(5, 8).repeat(8, 1) + 0.1 * random(40, 8), random(5, 8).repeat(4, 1),
    1e-4 * random(12, 8) + 10,
])  # three points, one cluster, five clusters, each point four times, nearly equal points
def test_tsne_is_nearer_than_the_principal_components_at_their_best_size(x):
    y, (U, S, _) = tsne(x, steps=200), torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    best = min(kl_divergence(x, 2.0**k * (U * S)[:, :2] / S[0], 30) for k in range(-6, 10))
    assert y.isfinite().all() and kl_divergence(x, y, 30) < 0.95 * best


def test_tsne_of_equal_points_is_a_picture_too():
    y = tsne(torch.ones(20, 5), steps=50)
    assert y.isfinite().all() and scatter(y, [("CG", "mug")] * 20, ["mug"]).size == (1130, 900)


def test_a_curve_falls_with_the_loss_and_one_bad_batch_does_not_flatten_it():
    page = draw_curves({"loss": [(20 * i, 1e6 if i == 50 else 1 / i) for i in range(1, 101)]}, "", "step")
    colour = to_tensor(Image.new("RGB", (1, 1), COLOURS[0]))
    near = (to_tensor(page) - colour).abs().amax(0) < 0.15
    top = [int(near[30:, x].nonzero().min()) for x in (120, 300, 800)]
    assert top[0] + 100 < top[1] < top[2]
    assert draw_curves({"one point": [(1, 0.0)]}, "", "").size == page.size


# ---------------------------------------------------------------- the command line


QUICK = ["--steps", "1", "--dtype", "float32", "--device", "cpu"]


def command(ads, out, models, *arguments):
    options = [str(word) for pair in models.items() for word in pair]
    evaluate.main([*map(str, arguments), "--data", str(ads), "--out", str(out), *QUICK, *options])


def lab_with(data, out, models, *options):
    words = [str(word) for pair in models.items() for word in pair]
    args = evaluate.options().parse_args(["tsne", "--data", str(data), *words, *options])
    return evaluate.lab_of(args, out, args.limit)


@pytest.mark.parametrize("name", ["lama", "paint-by-example", "stable-diffusion", "blended-diffusion", "cg",
                                  "controlnet+its-pg", "cg-plain+pg"])
def test_every_kind_of_method_paints_around_the_product(name, ads, tiny, tmp_path):
    lab = lab_with(ads, tmp_path, tiny, *QUICK)
    item = lab.items("ref")[0]
    path, = lab.pictures(name, [item], "ref")
    picture, (rgb, mask) = to_tensor(open_image(path)), load_masked(item.image, item.mask)
    assert torch.allclose(picture[:, mask[0] == 1], rgb[:, mask[0] == 1])
    assert (picture - rgb)[:, mask[0] == 0].abs().mean() > 0.05


def noise(method, *_):
    """In place of a method's models, which load slowly: pictures of noise, others for each method and ad."""
    seed = 1000 * [*methods.METHODS.values()].index(method)
    return SimpleNamespace(sd=None, dtype="float32"), lambda ads: [
        (255 * random(*ad.rgb.shape, seed=seed + ad.seed).sigmoid()).byte() for ad in ads]


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setattr(methods, "load", noise)


@pytest.fixture(scope="module")
def results(ads, tiny, tmp_path_factory):
    """All tables, of pictures of noise. Intervals are from few bootstrap samples, which saves time."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "load", noise)
        patch.setattr(evaluate, "interval", partial(interval, resamples=5))
        for what in evaluate.TABLES:
            with (out / f"{what}.printed").open("w") as printed, redirect_stdout(printed):
                command(ads, out, tiny, what)
    return out


def rows_of(results, table) -> dict[str, dict]:
    """What was measured, by row."""
    return {row["method"]: row["measured"] for row in read_json(results / f"{table}.json")["rows"]}


@pytest.mark.parametrize("table, count, painted", [("table1", 5, 7), ("table2", 6, 12), ("table4", 6, 6)])
def test_a_table_is_printed_and_kept_with_its_figures(results, table, count, painted):
    measured = [row["measured"] for row in read_json(results / f"{table}.json")["rows"] if row["measured"]]
    assert len(measured) == painted and {row["n"] for row in measured} == {count}
    text, printed = (results / f"{table}.md").read_text(), (results / f"{table}.printed").read_text()
    assert printed.startswith(text + f"\n{results / table}.md\n{results / table}.json\nnext: ")
    metrics = ["similarity", "frechet"] + ["joint"] * (table == "table1")
    for row in measured:
        assert [*row] == ["n", *metrics, "ours_ahead"]
        for value, half in (row[metric] for metric in metrics):
            assert half > 0 and f"{value:.2f} ± {half:.2f}" in text


def test_ours_is_ahead_by_the_difference_of_the_figures(results):
    """The interval is that of the difference on the same items, so between a method and itself it has no width."""
    rows = rows_of(results, "table1")
    for figures in rows.values():
        for metric, sign in (("similarity", 1), ("frechet", -1), ("joint", -1)):
            by = sign * (rows["CG"][metric][0] - figures[metric][0])
            assert figures["ours_ahead"][metric][0] == pytest.approx(by, abs=1e-4)
    assert all(by == [0, 0] for by in rows["CG"]["ours_ahead"].values())


def test_the_figures_are_those_of_the_pictures(results, ads, tiny, tmp_path):
    """CG's similarity in Table 1 is computed again, from the files of its pictures and the originals."""
    painted, = (results / "pictures" / "bg1k").glob("cg-????????")
    x, y = (embed_pictures(load_clip(tiny["--clip"]), [(path, None) for path in paths], tmp_path)
            for paths in (sorted(painted.glob("*.png")), [item.image for item in read_items(ads, "bg1k")[0]]))
    figures = rows_of(results, "table1")["CG"]
    assert figures["similarity"][0] == pytest.approx(100 * F.cosine_similarity(x, y).mean().item(), rel=1e-4)


def test_tables_and_figures_share_pictures_and_nothing_is_painted_twice(results, ads, tiny, monkeypatch):
    """Tables 2 and 4 have 5 and 6 rows, one of them in both; Fig. 5a is of Table 1's pictures."""
    assert len(list((results / "pictures" / "ref").iterdir())) == 10
    monkeypatch.setattr(methods, "paint_items", None)  # can't be called
    command(ads, results, tiny, "tsne")


@pytest.mark.parametrize("figure, limit, printed", [
    ("tsne", 5, ["original", "CG", "ControlNet"]), ("fig6", 2, []), ("fig9", 6, []), ("fig10", 6, []),
])
def test_a_figure_is_drawn(results, ads, tiny, figure, limit, printed, noisy, capsys):
    command(ads, results, tiny, figure, "--limit", limit)
    image = open_image(results / f"{figure}.png")
    assert min(image.size) > 100 and len(image.resize((64, 64)).getcolors(4096)) > 8
    out = capsys.readouterr().out
    assert re.findall("(.*): .*the nearest centre", out) == printed
    assert f"{results / figure}.png\nnext: " in out


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """The commands of the programs that train. In their place, a stand-in leaves the toy's PG; the first one fails."""
    found = []

    def run(command, env, **_):
        assert not env.keys() & {"RANK", "WORLD_SIZE"}
        out = Path(command[command.index("--out") + 1])
        shutil.copytree(TOY / "pg", out / command[2], dirs_exist_ok=True)
        found.append(command[2:])
        return subprocess.CompletedProcess(command, len(found) == 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks.subprocess, "run", run)
    return found


def test_an_interrupted_training_is_resumed_and_a_failed_one_is_not_taken_for_done(trainings):
    lab = Networks({"weights": None}, "cpu")
    with refused("the training failed, as it says above"):
        lab.path("guide-clip")
    assert lab.path("guide-clip").name == "clip" and lab.path("guide-clip").is_dir()
    assert ["--resume" in command for command in trainings] == [True, True]


def test_the_three_trainings_of_fig7(ads, trainings, noisy):
    """They differ as Fig. 7 says: no perturbation, dilation alone, dilation and mixup; each runs on first use only."""
    trainings.append("one that fails")
    for _ in range(2):
        command(ads, "results", {}, "fig7", "--limit", "2")
    assert [" ".join(words[: words.index("--out")]) for words in trainings[1:]] == [
        f"pg --steps 600 {options}--cg {TOY / 'cg'}" for options in ("--theta 0 --sigma 1 1 ", "--sigma 1 1 ", "")]
    assert Path("results", "fig7.png").is_file()


def test_fig7_takes_references_that_are_large_off_centre_or_of_another_category(monkeypatch):
    masks = torch.zeros(4, 1, 8, 8)
    masks[:, :, 3:5, 3:5] = masks[1, :, :, 1:7] = masks[2, :, 3:5, :5] = 1
    items = [Item(i, None, "mug" if i < 3 else "watch", i, i) for i in range(4)]  # numbers stand for files
    monkeypatch.setattr(evaluate, "load_masked", lambda _, i: (None, masks[i]))
    drawn = []
    monkeypatch.setattr(evaluate, "draw_methods", lambda lab, name, columns, *rows: drawn.extend(zip(*rows)))
    evaluate.figure_perturbations(SimpleNamespace(items=lambda protocol: items), each=1)
    assert [(label, item.image, item.reference, item.reference_mask) for item, label in drawn] == [
        ("large", 1, 1, 1), ("off centre", 2, 2, 2), ("other category", 0, 3, 3)]


def test_pg_is_trained_beside_the_controlnet_as_beside_a_cg_that_computes_the_same(tiny):
    """Table 4 (a): `train.py pg --cg` is given the ControlNet's weights as a CG with plain attention."""
    as_cg = networks.as_plain_cg(tiny["--controlnet"], tiny["--cg"])
    z, t, prompts, hint = random(1, 4, 16, 16), torch.tensor([500]), Prompts(*random(3, 1, 8, 32)), random(1, 3, 64, 64)
    branches = load_control(tiny["--controlnet"], "controlnet"), load_control(as_cg, "category")
    theirs, ours = (branch(z, t, branch.context(prompts), hint, torch.ones(1, 1, 64, 64)) for branch in branches)
    assert all(map(torch.equal, ours, theirs))
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
    assert sorted(painted) == sorted(
        (name, c, f"swapped-{other}", f"A photo of {c}, in the background of {identifiers[other]}", f"A photo of {c}",
         f"in the background of {identifiers[other]}")
        for name in ("cg", "cg-plain") for c in categories for other in categories - {c})
    text = (tmp_path / "swapped.md").read_text()
    for line in text.splitlines()[2:4]:
        shares = [*map(float, re.findall(r"([\d.]+) ±", line))]
        assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.02)
    assert "5 products, each with 4 identifiers" in text and re.search(r"right for [0-5] of 5 held-out ads", text)
    assert open_image(tmp_path / "swapped.png").width > 7 * 64, "a product, and three identifiers for each equation"
    with refused("swapped needs products of two categories; raise --limit"):
        eq3.swapped(SimpleNamespace(data=ads, items=lambda _: read_items(ads, "bg1k")[0][:1]))


def test_pictures_are_kept_for_what_they_were_painted_of(ads, tiny, tmp_path, noisy, monkeypatch):
    """The first items of a split share the whole split's pictures; other settings, pairs or files have their own."""
    monkeypatch.setattr(methods, "paint_items", lambda *_, **__: None)
    data = shutil.copytree(ads, tmp_path / "ads")

    def folder(options):
        lab = lab_with(data, tmp_path, tiny, *options.split())
        return lab.pictures("cg", lab.items("ref"), "ref")[0].parent

    first = folder("")
    harmless = ["--limit 2", "--batch 3", f"--clip {tiny['--guide-clip']}", f"--pg {tiny['--cg']}"]
    assert {*map(folder, harmless)} == {first}
    others = ["--steps 7", "--guidance 3", "--size 32", "--seed 5", "--dtype float32", "--sampler dpm++", "--refine 2",
              "--refine 2 --refine-from 400", f"--cg {tiny['--cg-plain']}"]
    assert len({first, *map(folder, others)}) == 1 + len(others)
    info, (a, b, *_) = data / "bgpair_info.txt", read_items(data, "bgpair")[0]
    info.write_text(info.read_text().replace(a.reference.name, b.reference.name))
    paired = folder("")
    a.image.touch()
    assert len({first, paired, folder("")}) == 3


def test_under_torchrun_one_process_trains_and_the_others_wait(trainings, monkeypatch):
    """Here the second one waits at the barrier while the first one trains, which finds no torchrun's environment."""
    lab, found = Networks({"weights": None}, "cpu"), []

    def the_first_one_trains():
        assert len(trainings) == 1
        monkeypatch.setattr(networks, "barrier", lambda: None)
        monkeypatch.setenv("RANK", "0")
        found.append(lab.path("guide-clip"))

    trainings.append("one that fails")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(networks, "barrier", the_first_one_trains)
    assert [lab.path("guide-clip")] == found and found[0].is_dir() and len(trainings) == 2


@pytest.mark.parametrize("name", networks.TRAINED)
def test_training_takes_the_command_that_makes_a_network(name, tmp_path):
    """On the toy's data and base, with the toy's settings."""
    given = vars(parser("", train.STAGES | RIVAL_STAGES).parse_args([*networks.TRAINED[name], "--device", "cpu"]))
    stage = (train.STAGES | RIVAL_STAGES)[given["stage"]]
    settings = settle(given | {"out": tmp_path}, stage.settings, TOY_DATA / stage.data)
    assert settings.size == 128 and settings.steps and settings.data.parent == TOY_DATA


@pytest.mark.parametrize("arguments, message", [
    ("table9", "invalid choice: 'table9' .choose from .?table1.?, .?table2"),
    ("table1 --data nowhere", "no such data set"),
    ("table1 --limit 1", "must be a whole number from 2"),
    ("table1 --weights {toy}/base --cg {toy}/cg --controlnet {tiny}/controlnet", "--clip is missing"),
    ("table2 --weights {toy}/base --cg {toy}/cg", "--guide-clip is missing"),
    ("fig9 --limit 3", "no category has two pairs"),
    ("table1 --clip nowhere", "nowhere is missing"),
    ("table1 --weights nowhere --cg {toy}/cg --controlnet {tiny}/controlnet --clip {toy}/clip", "nowhere is missing"),
    ("fig7 --weights {toy}/base --cg {toy}/cg", "this command works with the toy only"),
    ("table1 --cg-plain {toy}/cg", "--cg-plain .*cg is a CG with mask-guided attention; give one with plain"),
    ("table1 --hint inpaint", "--hint goes with --controlnet"),
    ("table1 --out {toy}/README.md", "README.md"),
])
def test_bad_use_is_one_line(arguments, message, tmp_path, monkeypatch, ads, tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "train_once", None)  # can't be called
    words = arguments.format(toy=TOY, tiny=tiny["--cg"].parent).split()
    with refused(message):
        evaluate.main([words[0], "--data", str(ads), *words[1:]])
    assert not Path("results", "pictures").exists(), "said before anything is painted"


def test_what_is_missing_is_said_before_anything_is_painted(ads, tiny, tmp_path, noisy):
    """CG was not trained on one category. The row that needs --cg-plain is left out without it; a row of the paper's
    says that its network is not given.
    """
    shutil.copytree(tiny["--cg"], tmp_path / "cg")
    (tmp_path / "cg" / "categories.json").write_text('{"mug": "sks 0"}')
    with refused("CG was not trained on category '[a-z ]+'; choose one from .*, such as mug;"):
        command(ads, tmp_path, tiny | {"--cg": tmp_path / "cg"}, "table1")
    command(ads, tmp_path, {name: tiny[name] for name in tiny if name not in ("--cg-plain", "--lama")}, "table1",
            "--limit", "2")
    rows = rows_of(tmp_path, "table1")
    assert [*rows] == [row.label for row in evaluate.TABLES["table1"].rows if row.method != "cg-plain"]
    assert [name for name in rows if not rows[name]] == ["LaMa"]
    assert "| LaMa | not given | 88.33 |" in (tmp_path / "table1.md").read_text()


def test_a_centre_is_of_the_backgrounds_of_the_ads_that_can_be_read(ads, tiny, tmp_path, capsys):
    """There are two ads of each category. One of them is broken, so its category's centre is the other's background."""
    data, clip = shutil.copytree(ads, tmp_path / "ads"), load_clip(tiny["--clip"])
    broken, other = read_items(data)[0][:: len(PRODUCTS)]
    broken.image.write_bytes(b"")
    categories, centres = lab_with(data, tmp_path, tiny).centres
    rgb, mask = load_masked(other.image, other.mask)
    x = clip.encode_image(clip.preprocess((rgb * (1 - mask))[None]))
    assert torch.allclose(centres[categories.index(broken.category)], F.normalize(x)[0], atol=1e-5)
    assert centres.isfinite().all() and capsys.readouterr().err.count("skipped") == 1


# ---------------------------------------------------------------- whose scene?


def test_a_hole_in_a_plain_background_leaves_no_trace(ads):
    """So the probe can't tell a product's outline from what stands around it."""
    colour = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    views = [(colour * (1 - mask) + mask, mask, scene) for _, mask, scene in eq3.views(read_items(ads)[0][:4])]
    for twice in (False, True):  # the products are white
        seen = eq3.backgrounds(views, twice).view(4, 3, -1)
        assert torch.allclose(seen, colour[:, 0].expand_as(seen), atol=1e-5)


def test_a_background_is_seen_where_no_product_stands(ads):
    view, = eq3.views(read_items(ads)[0][:1])
    small, M = (F.adaptive_avg_pool2d(x, eq3.GRID) for x in view[:2])
    free, seen = M[0] == 0, eq3.backgrounds([view]).view(small.shape)
    assert free.float().mean() > 0.3 and torch.allclose(seen[:, free], small[:, free], atol=1e-5)


def test_the_toys_probe_knows_the_scenes_of_brands_that_it_has_not_seen(tmp_path, monkeypatch):
    """At least 95% of held-out ads, also where a product of another category is masked too."""
    monkeypatch.setattr(eq3, "DRAWN", 40)
    write_world(tmp_path, size=64, base=0, ads=0, bg1k=64, pairs=0, workers=1, parts=("ads",))
    held_out = read_items(tmp_path / "ads", "bg1k")[0]
    lab = SimpleNamespace(networks=Networks({"weights": None}, "cpu"), all_items=lambda _: held_out)
    _, exam = eq3.tested_probe(lab, [])
    once, twice = map(int, re.fullmatch(r"(\d+) of 64 held-out ads, and for (\d+) with .*", exam).groups())
    assert min(once, twice) >= 0.95 * 64


def test_a_picture_counts_for_the_scene_that_the_probe_names(ads):
    """A laptop with a watch's and a sneaker's identifier, and a watch without a picture."""
    laptop, watch = (replace(read_items(ads)[0][0], category=name) for name in ("laptop", "watch"))
    painted = {(laptop, "watch"): laptop.image, (laptop, "sneaker"): laptop.image, (watch, "laptop"): Path("nowhere")}
    for named, shares in (("watch", [50, 0, 50, 0]), ("laptop", [0, 100, 0, 0]), ("plain wall", [0, 0, 0, 100])):
        found = eq3.outcomes(painted, [laptop, watch], lambda x, named=named: [named])
        assert found[0].tolist() == shares and found[1].isnan().all()


def test_table_1_has_the_floor_of_two_disjoint_sets_of_ads_and_a_zero_by_construction(results):
    *_, same, floor = rows_of(results, "table1").values()
    assert same["frechet"][0] == pytest.approx(0, abs=1e-6) and min(same["joint"][0], floor["frechet"][0]) > 0
    assert floor["n"] == 5 and "biased upwards" in (results / "table1.md").read_text()


def test_table_2_has_the_references_themselves(results):
    """They are perfectly similar to themselves; as originals of the product's own they are no other set."""
    *_, to_ref, to_self = read_json(results / "table2.json")["rows"]
    assert [row["measured"]["similarity"][0] for row in (to_ref, to_self)] == pytest.approx([100, 100])
    assert to_ref["measured"]["frechet"][0] > 1e-3 > to_self["measured"]["frechet"][0]


def test_other_ads_are_a_category_s_each_once_and_then_a_path_to_nothing(ads, tmp_path):
    item = read_items(ads, "bg1k")[0][0]
    its = [ad.image for ad in read_items(ads)[0] if ad.category == item.category]
    *others, nothing = evaluate.other_ads(lab_with(ads, tmp_path, {}), [item] * (len(its) + 1))
    assert sorted(others) == its and not nothing.exists()
    for name in "ab":
        shutil.copy(TOY / "samples" / "mug.png", tmp_path / f"{name}.png")
    lines = ['{"file_name": "a.png", "category": "mug"}', '{"file_name": "b.png", "category": "mug", "split": "%s"}']
    for split, others in ("test", 1), ("train", 0):  # without test lines BG1k is the whole list
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines) % split)
        assert len(lab_with(tmp_path, tmp_path / "out", {}).other_ads) == others
