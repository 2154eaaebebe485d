"""Evaluation: the metrics against closed forms and scipy, the baselines against their equations, tables end to end."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP_CONFIG, random

import evaluate
from clip import CLIP
from data import background_hint, load_ad
from generate import TOY, prompt_texts
from model import UNet
from rivals.baselines import blended_diffusion, stable_diffusion
from sampler import ddim, seeded
from support.datasets import read_items
from support.figures import neighbour_probabilities, scatter, tsne, tsne_loss
from support.files import BadInput
from support.metrics import frechet, interval, joint_frechet, similarity
from toy.world import write_world
from weights import StableDiffusion, load_clip, load_stable_diffusion


@pytest.fixture(scope="module")
def ads(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, size=128, base=0, ads=16, bg1k=5, pairs=10, workers=1, parts=("ads",))
    return root / "ads"


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return load_stable_diffusion(TOY / "base")


# ---------------------------------------------------------------- metrics


def test_similarity_is_100_times_the_cosine_of_each_pair():
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]]), torch.tensor([[6.0, 8.0], [0.0, 5.0], [1.0, 0.0]])
    assert torch.allclose(similarity(x, y), torch.tensor([100.0, 0.0, 100 / math.sqrt(2)]), atol=1e-4)


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
def test_frechet_is_the_one_by_scipys_matrix_square_root(n):
    linalg = pytest.importorskip("scipy.linalg")
    x = random(n, 20, dtype=torch.float64) @ random(20, 20, seed=1, dtype=torch.float64)
    y = random(n + 5, 20, seed=2, dtype=torch.float64) @ random(20, 20, seed=3, dtype=torch.float64) + 0.5
    # The root of Σ_x Σ_y has the trace of that of Σ_x^½ Σ_y Σ_x^½, whose root is well behaved when they are singular
    root_x = torch.from_numpy(linalg.sqrtm(x.T.cov().numpy() + 1e-14 * torch.eye(20).numpy()).real)
    root = linalg.sqrtm((root_x @ y.T.cov() @ root_x + 1e-14 * torch.eye(20)).numpy()).real
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace()
    assert frechet(x, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_of_a_set_and_itself_is_nothing():
    x = random(40, 16)
    assert abs(frechet(x, x).item()) < 1e-10 * x.square().sum().item()


def test_joint_frechet_sees_pictures_that_were_swapped():
    """Embeddings s and -s of two conditions, 1 and -1. Swapped they are the same set, at distance 0; together with the
    conditions two lines, along (s, α) and (-s, α) with α = s: by the closed form 2(s² + α²) - 2|α² - s²| = 4s².
    """
    conditions, s, n = torch.tensor([[1.0], [-1.0]] * 50, dtype=torch.float64), 3, 100
    originals = s * conditions
    assert abs(frechet(-originals, originals).item()) < 1e-9
    assert joint_frechet(originals, originals, conditions).item() == pytest.approx(0, abs=1e-9)
    expected = 4 * s**2 * n / (n - 1)  # the covariances are unbiased ones
    assert joint_frechet(-originals, originals, conditions).item() == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    x = random(400, dtype=torch.float64) * 3 + 10
    value, half = interval(lambda i: x[i].mean(), len(x), resamples=2000)
    assert value == pytest.approx(x.mean().item())
    assert half == pytest.approx(1.96 * x.std().item() / math.sqrt(len(x)), rel=0.08)


@pytest.mark.parametrize("height, width", [(100, 70), (64, 129), (32, 32), (20, 27)])
def test_clips_preprocessing_is_the_reference_processors(height, width):
    """Up to the reference's rounding to 8 bits: at most one level and a half."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision", reason="its image processors need it") if not hasattr(
        transformers, "CLIPImageProcessorPil") else None
    from PIL import Image

    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = CLIP_CONFIG["vision_config"]["image_size"]
    x = (random(3, height, width).sigmoid() * 255).round()
    image = Image.fromarray(x.permute(1, 2, 0).byte().numpy())
    reference = processor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_normalize=False)
    theirs = reference(image, return_tensors="pt")["pixel_values"]
    assert (CLIP(CLIP_CONFIG).preprocess(x[None] / 255) - theirs).abs().max() < 1.6 / 255


# ---------------------------------------------------------------- baselines


def test_an_edited_walk_ends_at_what_is_put_back(sd):
    z_known, eps, M = random(1, 4, 8, 8), random(1, 4, 8, 8, seed=1), (random(1, 1, 8, 8, seed=2) > 0).float()

    def edit(z, t):
        known = sd.schedule.add_noise(z_known, eps, torch.tensor([t])) if t >= 0 else z_known
        return M * known + (1 - M) * z

    *_, (t, z, _) = ddim(lambda z, t: 0.3 * z, random(1, 4, 8, 8, seed=3), sd.schedule, 5, edit=edit)
    assert torch.equal(z * M, z_known * M) and not torch.allclose(z * (1 - M), z_known * (1 - M))


def products(ads, count=2):
    pairs = [load_ad(item, 128) for item in read_items(ads)[0][:count]]
    return torch.stack([rgb for rgb, _ in pairs]), torch.stack([mask for _, mask in pairs])


def test_inpainting_keeps_the_product_and_paints_the_rest(sd, ads):
    rgb, mask = products(ads)
    painted = stable_diffusion(sd, rgb, mask, [prompt_texts("mug", None)] * 2, seeded(0, 2), steps=3)
    through_vae = sd.decode(sd.encode(rgb * mask + 0.5 * (1 - mask)))
    inside = -F.max_pool2d(-mask, 15, 1, 7) > 0.99  # well away from the edge, over which the VAE's decoder looks
    assert inside.any() and ((painted - through_vae) * inside).abs().max() < 0.15
    assert ((painted - 0.5) * (1 - mask)).abs().mean() > 0.05


def test_an_inpainting_unet_is_told_the_product(sd, ads, monkeypatch):
    """Beside z_t it reads the mask of what to paint, 1 − M, and the latent of the product on grey."""
    wide = UNet(sd.unet.config | {"in_channels": 9}).requires_grad_(False)
    seen = []
    monkeypatch.setattr(UNet, "forward", lambda self, z, *_: seen.append(z) or z[:, :4])
    rgb, mask = products(ads)
    nine = StableDiffusion(sd.tokenizer, sd.text_encoder, wide, sd.vae, sd.schedule)
    stable_diffusion(nine, rgb, mask, [prompt_texts("mug", None)] * 2, seeded(0, 2), steps=2)
    M = F.interpolate((mask > 0.5).float(), size=(32, 32))
    hard = (mask > 0.5).float()
    product = sd.encode(rgb * hard + 0.5 * (1 - hard))
    assert all(torch.equal(z[:2], torch.cat([z[:2, :4], 1 - M, product], dim=1)) for z in seen) and len(seen) == 2


def test_blended_diffusion_follows_the_gradient_of_the_clip_distance(sd, ads, monkeypatch):
    """ε − ε_unguided = strength √(1 − ᾱ_t) ∇_z D: here by finite differences, through UNet (a stand-in) and decoder."""
    clip, (rgb, mask) = load_clip(TOY / "clip").double(), (x.double() for x in products(ads))
    reference, reference_mask, t, strength, found = rgb.flip(0), mask.flip(0), 601, 7.0, {}
    monkeypatch.setattr("baselines.sample", lambda *_, guide, **_k: found.update(guide=guide) or random(2, 4, 32, 32))
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, z: F.interpolate(z[:, :3], scale_factor=4).sigmoid())
    blended_diffusion(sd, rgb, mask, [prompt_texts("mug", None)] * 2, seeded(0, 2), reference, reference_mask, clip,
                      strength)

    def eps_model(z, t):
        return 0.4 * z.sin()

    def distance(z):
        a = sd.schedule.alpha_bar[t].item()
        picture = sd.decode((z - math.sqrt(1 - a) * eps_model(z, t)) / math.sqrt(a))
        x, y = (clip.encode_image(background_hint(*pair)) for pair in ((picture, mask), (reference, reference_mask)))
        return 2 - F.cosine_similarity(x, y).sum()

    z, direction = (random(2, 4, 32, 32, seed=i, dtype=torch.float64) for i in (0, 1))
    slope = (distance(z + 1e-5 * direction) - distance(z - 1e-5 * direction)) / 2e-5
    expected = strength * math.sqrt(1 - sd.schedule.alpha_bar[t].item()) * slope
    added = found["guide"](eps_model, z, t) - eps_model(z, t)
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
    """Before it is made symmetric; here by points on a circle, which are all alike, so that P is symmetric already."""
    angle = torch.arange(n).double() * 2 * math.pi / n
    P = neighbour_probabilities(torch.stack([angle.cos(), angle.sin()], dim=1), perplexity)
    assert P.sum().item() == pytest.approx(1) and torch.equal(P, P.T) and not P.diag().any()
    assert torch.special.entr(P * n).sum(1).exp().tolist() == pytest.approx([min(perplexity, (n - 1) / 3)] * n)


def test_the_loss_of_tsne_is_the_kl_divergence_and_its_gradient_is_right():
    x, y = random(12, 5, dtype=torch.float64), random(12, 2, seed=1, dtype=torch.float64)
    P = neighbour_probabilities(x, 3)
    assert (tsne_loss(y, P)[0] - torch.special.entr(P).sum()).item() == pytest.approx(kl_divergence(x, y, 3))
    expected = torch.autograd.functional.jacobian(lambda y: tsne_loss(y, P, 4)[0], y)
    torch.testing.assert_close(tsne_loss(y, P, 4)[1], expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes, spreads", [([25, 25, 25], [1, 1, 1]), ([60, 20, 6, 30], [1, 0.1, 2, 0.01])])
def test_tsne_keeps_apart_what_is_apart(sizes, spreads, seed):
    """Every point's nearest neighbours in the plane are of its own cluster."""
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


# ---------------------------------------------------------------- the command line


def command(ads, out, *arguments):
    evaluate.main([*map(str, arguments), "--data", str(ads), "--out", str(out), "--steps", "2", "--controlnet",
                   str(TOY / "cg"), "--tuned", str(TOY / "cg"), "--guide-clip", str(TOY / "clip"), "--dtype", "float32"])


@pytest.fixture(scope="module")
def results(ads, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    for what in ("table1", "table2", "table4"):
        with redirect_stdout(io.StringIO()) as printed:
            command(ads, out, what)
        (out / f"{what}.printed").write_text(printed.getvalue())
    return out


@pytest.mark.parametrize("table, count, painted", [("table1", 5, 5), ("table2", 10, 8), ("table4", 10, 5)])
def test_a_table_is_printed_and_kept_with_its_figures(results, table, count, painted):
    content = json.loads((results / f"{table}.json").read_text())
    measured = [row["measured"] for row in content["rows"] if row["measured"]]
    assert len(measured) == painted and {row["n"] for row in measured} == {count}
    text = (results / f"{table}.md").read_text()
    assert (results / f"{table}.printed").read_text() == text
    for row in measured:
        assert ("joint" in row) == (table == "table1")
        for value, half in [row[metric] for metric in ("similarity", "frechet", "joint") if metric in row]:
            assert half > 0 and f"{value:.2f} ± {half:.2f}" in text
    assert ("| LaMa | not yet | 88.33 | not yet | 8.24 | not yet |" in text) == (table == "table1")


@pytest.mark.parametrize("table, ours", [("table1", "CG"), ("table2", "CG + PG")])
def test_ours_is_ahead_by_the_difference_of_the_figures(results, table, ours):
    """Their interval is of the difference on the same items: none between a method and itself."""
    rows = [row for row in json.loads((results / f"{table}.json").read_text())["rows"] if row["measured"]]
    for protocol in {row["protocol"] for row in rows}:
        theirs = {row["method"]: row["measured"] for row in rows if row["protocol"] == protocol}
        for figures in theirs.values():
            for metric, sign in [("similarity", 1), ("frechet", -1), ("joint", -1)][: 3 if table == "table1" else 2]:
                by = sign * (theirs[ours][metric][0] - figures[metric][0])
                assert figures["ours_ahead"][metric][0] == pytest.approx(by, abs=1e-4)
        assert all(by == [0, 0] for by in theirs[ours]["ours_ahead"].values())


def test_the_figures_are_those_of_the_pictures(results, ads):
    """CG's similarity in Table 1, from the files of its pictures and the originals."""
    clip, folder = load_clip(TOY / "clip"), next((results / "pictures" / "bg1k").glob("cg-*"))
    items = read_items(ads, "bg1k")[0]
    x, y = (clip.encode_image(torch.stack([evaluate.to_tensor(evaluate.open_image(path)) for path in paths]))
            for paths in (sorted(folder.glob("*.png"))[: len(items)], [item.image for item in items]))
    row = next(row for row in json.loads((results / "table1.json").read_text())["rows"] if row["method"] == "CG")
    assert row["measured"]["similarity"][0] == pytest.approx(similarity(x, y).mean().item(), rel=1e-4)


def test_tables_share_pictures_and_nothing_is_painted_twice(results, ads, capsys):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.png")}
    assert len(list((results / "pictures" / "ref").iterdir())) == 8  # 4 rows of Table 2, 5 of Table 4, one in both
    command(ads, results, "table1")
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.png")} == before
    assert "painting" not in capsys.readouterr().err
    command(ads, results, "table1", "--guidance", "1.5", "--limit", "2")  # other settings: other pictures
    assert len(list((results / "pictures" / "bg1k").iterdir())) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("figure", ["tsne", "fig6", "fig9", "fig10"])
def test_a_figure_is_drawn(results, ads, figure, capsys):
    command(ads, results, figure)
    image = evaluate.open_image(results / f"{figure}.png")
    assert min(image.size) > 200 and len(image.resize((64, 64)).getcolors(4096)) > 8
    if figure == "tsne":
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines[:3]] == ["original", "CG", "ControlNet"]
        assert all("nearest to it" in line for line in lines[:3])


def test_the_three_trainings_of_fig7(results, ads, tmp_path, monkeypatch):
    """They differ as Fig. 7 says: no perturbation, dilation alone, dilation and mixup; each runs on first use only."""
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.main", commands.append)
    monkeypatch.setattr(evaluate.Lab, "branch", lambda self, name: evaluate.load_branch(
        "category" if name == "cg" else "personality", TOY / name[:2], self.sd, self.args))
    monkeypatch.setattr(evaluate, "version", lambda path: str(path))
    command(ads, tmp_path / "results", "fig7", "--limit", "2")
    options = {tuple(c[c.index("--steps") + 2 : c.index("--out")]) for c in commands}
    assert options == {("--theta", "0", "--sigma", "1", "1"), ("--sigma", "1", "1"), ()}
    assert all(c[:3] == ["pg", "--steps", "600"] for c in commands)
    assert (tmp_path / "results" / "fig7.png").is_file()


def test_pictures_are_kept_for_what_they_were_painted_of(ads, tmp_path, monkeypatch):
    """The first items of a split share the whole split's pictures; other pairs, or a changed picture, have their own."""
    monkeypatch.setattr(evaluate, "paint_items", lambda *_: None)
    data = shutil.copytree(ads, tmp_path / "ads")

    def folder(*limit: str) -> Path:
        args = evaluate.parse(["table2", "--data", str(data), "--device", "cpu", "--out", str(tmp_path / "out"), *limit])
        args.dtype = torch.float32
        lab = evaluate.Lab(args)
        return lab.pictures("cg", lab.items("ref"), "ref")[0].parent

    whole, info = folder(), data / "bgpair_info.txt"
    assert folder("--limit", "2") == whole
    rows = [line.split("\t") for line in info.read_text().splitlines()]
    rows[0][1], rows[1][1] = rows[1][1], rows[0][1]
    info.write_text("".join("\t".join(row) + "\n" for row in rows))
    paired = folder()
    os.utime(read_items(data, "bgpair")[0][0].image, (0, 0))
    assert len({whole, paired, folder()}) == 3


def test_under_torchrun_the_first_process_alone_trains_the_guides_clip(tmp_path):
    """Its loss compares all pictures of a batch, so that they can't be dealt out; the second waits for it."""
    write_world(tmp_path, base=8, workers=1, parts=("base",))
    (tmp_path / "both.py").write_text(
        "import torch.distributed as dist\n"
        "import evaluate\n"
        f"evaluate.TRAINED['guide-clip'] = 'clip', 1, ['--batch', '4', '--data', {str(tmp_path / 'base')!r}]\n"
        "dist.init_process_group('gloo')\n"
        "print(evaluate.Lab(evaluate.parse(['table2', '--device', 'cpu'])).path('guide-clip'))\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    run = subprocess.run([*torchrun, "both.py"], cwd=tmp_path, text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(Path(evaluate.__file__).parent)})
    assert run.returncode == 0, run.stderr
    one, other = run.stdout.split()
    assert one == other and run.stderr.count("training, once") == 1
    load_clip(tmp_path / one)


@pytest.mark.parametrize("arguments, message", [
    (["table9"], "table9: must be one of table1, table2"),
    (["table1", "--data", "nowhere"], "no such data set"),
    (["table1", "--limit", "1"], "must be a whole number from 2"),
    (["table2", "--weights", str(TOY / "base")], "--guide-clip is missing"),
    (["fig9", "--limit", "3"], "no category has two pairs"),
    (["table1", "--clip", "nowhere"], "nowhere is missing"),
    (["table2", "--pg", "nowhere", "--guide-clip", str(TOY / "clip")], "nowhere is missing"),
    (["table1", "--weights", "nowhere", "--cg", str(TOY / "cg"), "--clip", str(TOY / "clip")], "nowhere is missing"),
    (["table1", "--weights", str(TOY / "base"), "--cg", str(TOY / "cg")], "--clip is missing"),
    (["fig7", "--weights", str(TOY / "base"), "--cg", str(TOY / "cg")], "fig7 is the toy's"),
    (["table1", "--out", str(TOY / "README.md")], "README.md"),
])
def test_bad_use_is_one_line(arguments, message, tmp_path, monkeypatch, ads):
    monkeypatch.chdir(tmp_path)
    given = [] if "--data" in arguments else ["--data", str(ads)]
    with pytest.raises(BadInput, match=message) as error:
        evaluate.main([*arguments, *given, *(["--steps", "1"] if "--limit" not in arguments else []),
                       *([] if "--guide" in message else ["--controlnet", str(TOY / "cg"), "--tuned", str(TOY / "cg")])])
    assert "\n" not in str(error.value) and not Path("results", "pictures").exists(), "said before anything is painted"


def test_what_is_missing_is_said_before_anything_is_painted(ads, tmp_path):
    """A category that CG was not trained on; and the line that only --tuned can give is left out where it is missing."""
    shutil.copytree(TOY / "cg", tmp_path / "cg")
    (tmp_path / "cg" / "categories.json").write_text('{"mug": "sks 0"}')
    with pytest.raises(BadInput, match="CG was not trained on category '[a-z ]+'; choose one of mug$"):
        command(ads, tmp_path / "results", "table1", "--cg", str(tmp_path / "cg"))
    evaluate.main(["table1", "--data", str(ads), "--out", str(tmp_path / "results"), "--steps", "1", "--limit", "2",
                   "--weights", str(TOY / "base"), "--cg", str(TOY / "cg"), "--controlnet", str(TOY / "cg"),
                   "--clip", str(TOY / "clip")])
    rows = json.loads((tmp_path / "results" / "table1.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "LaMa", "Stable Diffusion", "ControlNet", "CG", "originals of other products"]


def test_an_ad_that_cannot_be_read_is_named_and_left_out_of_the_centres(ads, results, tmp_path, capsys):
    shutil.copytree(ads, tmp_path / "ads")
    read_items(tmp_path / "ads")[0][0].image.write_bytes(b"")
    command(tmp_path / "ads", tmp_path / "results", "tsne")
    out, err = capsys.readouterr()
    assert err.count("skipped") == 1 and "nan" not in out and len(out.splitlines()) == 4
