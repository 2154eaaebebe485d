"""Tests: generate.py through its command line, on a tiny random model: frames, pixels, seeds, data sets, bad input."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny_toy
from PIL import Image

import generate
from data import AdInputs, background_hint, product_hint
from model import CategoryGenerator
from programs import gallery, models
from programs.gallery import HARMLESS, record_of, sampler_settings
from sampler import SamplerSettings
from support.files import one_line_errors, write_json
from support.images import fit, resize
from toy.stages import TOY_UNET
from weights import StableDiffusion, control_config, save_control

ROOT = Path(generate.__file__).parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
CATEGORIES = {"mug": "sks 0", "running shoe": "sks 1", "watch": "sks 2"}
QUICK = "--steps 2 --refine 1 --device cpu --dtype float32".split()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_tiny_toy(folder, CATEGORIES)
    return folder


@pytest.fixture
def run(toy, tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder on the tiny model -> (the paths it printed, stderr)."""
    for module in (gallery, models):
        monkeypatch.setattr(module, "TOY", toy)
    monkeypatch.chdir(tmp_path)

    def main(*arguments):
        capsys.readouterr()
        with one_line_errors():
            generate.main([*QUICK, *map(str, arguments)])
        out, err = capsys.readouterr()
        return [Path(line) for line in out.splitlines()], err

    return main


def disc(h, w, soft=2.0):
    """A soft mask (h, w) uint8: 255 in a disc, 0 outside."""
    y, x = np.mgrid[:h, :w] + 0.5
    distance = np.hypot((y - h / 2) / h, (x - w / 2) / w) * min(h, w)
    return (((min(h, w) * 0.3 - distance) / soft + 0.5).clip(0, 1) * 255).round().astype(np.uint8)


def noisy(h, w, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels), dtype=np.uint8)


def cutout(path, h=48, w=48, seed=0):
    """An RGBA file -> its pixels and mask."""
    rgb, mask = noisy(h, w, seed=seed), disc(h, w)
    Image.fromarray(np.dstack([rgb, mask])).save(path, lossless=True)
    return rgb, mask


def pixels(path):
    return np.asarray(Image.open(path))


def mug(path="mug.png", *arguments):
    """The options for one product."""
    return "--product", path, "--category", "mug", *arguments


# ---------------------------------------------------------------- the product stays unchanged


@pytest.mark.parametrize("h, w", [(48, 48), (30, 150), (150, 31), (200, 200)])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_cutout_keeps_frame_and_pixels(run, h, w, suffix):
    rgb, mask = cutout(f"mug.{suffix}", h, w)
    [path], _ = run(*mug(f"mug.{suffix}"))
    result = pixels(path)
    assert result.shape == (h, w, 3)
    assert (result[mask == 255] == rgb[mask == 255]).all()
    assert (result[mask == 0] != rgb[mask == 0]).mean() > 0.9


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photo_with_mask_file_keeps_pixels(run, suffix):
    Image.fromarray(noisy(40, 70)).save(f"mug.{suffix}")
    Image.fromarray(disc(40, 70)).save("mask.png")
    [path], _ = run(*mug(f"mug.{suffix}", "--mask", "mask.png"))
    solid = disc(40, 70) == 255
    assert (pixels(path)[solid] == pixels(f"mug.{suffix}")[solid]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_pixels(run, dtype):
    rgb, mask = cutout("mug.png")
    [path], _ = run(*mug(), "--reference", "mug.png", "--dtype", dtype)
    assert (pixels(path)[mask == 255] == rgb[mask == 255]).all()


@pytest.mark.parametrize("with_reference", [False, True])
def test_exif_rotation_is_applied_once(run, with_reference):
    exif = Image.Exif()
    exif[274] = 6  # stored on its side
    Image.fromarray(noisy(40, 70)).save("mug.jpg", exif=exif)
    upright = np.rot90(pixels("mug.jpg"), -1)  # (70, 40)
    Image.fromarray(disc(70, 40)).save("mask.png")
    cutout("ad.png", 33, 90, seed=1)
    [path], _ = run(*mug("mug.jpg", "--mask", "mask.png", *(["--reference", "ad.png"] if with_reference else [])))
    assert pixels(path).shape == (70, 40, 3)
    assert (pixels(path)[disc(70, 40) == 255] == upright[disc(70, 40) == 255]).all()


def test_no_halo_of_the_old_background(run):
    """A grey product gives the same ad from a white and from a black background: soft edges keep nothing of either."""
    mask = disc(64, 64, soft=8)
    results = []
    for name, background in (("white", 255), ("black", 0)):
        photo = mask / 255 * 128 + (1 - mask / 255) * background
        Image.fromarray(photo.round().astype(np.uint8)).convert("RGB").save(f"{name}.png")
        Image.fromarray(mask).save("mask.png")
        [path], _ = run(*mug(f"{name}.png", "--mask", "mask.png"))
        results.append(pixels(path).astype(int))
    assert np.abs(results[0] - results[1]).max() <= 3


def test_no_glow_of_the_painted_product():
    """The networks paint a red disc in a white room, one canvas pixel too wide; after pasting that pixel is white."""
    small, large = (torch.from_numpy(disc(side, side)).float()[None] / 255 for side in (32, 128))
    blurred = F.avg_pool2d(small, 3, stride=1, padding=1)
    painted, red = 1 - torch.tensor([0.0, 1, 1])[:, None, None] * blurred, torch.tensor([1.0, 0, 0])[:, None, None]
    pasted = generate.paste_back(painted, small, (0, 0, 32, 32), red.expand(3, 128, 128), large) / 255
    naive = red * large + resize(painted, 128, 128) * (1 - large)
    room = (large == 0).expand_as(pasted)
    assert naive[room].min() < 0.8 and pasted[room].min() > 0.97
    assert torch.equal(pasted[(large == 1).expand_as(pasted)], red.expand(3, 128, 128)[(large == 1).expand_as(pasted)])


def test_the_product_is_exact_where_a_jpegs_mask_is_not_quite_white():
    """White in a JPEG mask is often 253, and counts as product: a black product stays black in a white room."""
    black, mask = torch.zeros(3, 8, 8), torch.full((1, 8, 8), 253 / 255)
    mask[:, :, :2] = 0
    pasted = generate.paste_back(torch.ones(3, 8, 8), mask, (0, 0, 8, 8), black, mask)
    assert pasted[:, :, 2:].max() == 0 and pasted[:, :, :2].min() == 255


# ---------------------------------------------------------------- reproducible pictures


def test_seeds_decide_and_num_counts_on(run):
    cutout("mug.png")
    [a], _ = run(*mug(), "--seed", 5, "--out", "a")
    (b, c, together), _ = run(*mug(), "--seed", 4, "--num", 2, "--out", "b")
    (d, e, _), _ = run(*mug(), "--seed", 4, "--num", 2, "--batch", 1, "--out", "d")
    assert [p.name for p in (a, b, c, together)] == ["mug_5.png", "mug_4.png", "mug_5.png", "sheet.png"]
    assert (pixels(a) == pixels(e)).all()
    for one, of_two in ((d, b), (e, c)):  # painted alone or in a batch: equal up to rounding
        assert np.abs(pixels(one).astype(int) - pixels(of_two)).max() <= 1
    assert (pixels(b) != pixels(c)).any()


def test_category_reference_and_start_matter(run):
    cutout("mug.png")
    for name in ("ad", "other"):
        cutout(f"{name}.png", seed=len(name))
    results = [pixels(run(*mug(), *more)[0][0]) for more in (
        (), ("--category", "watch"), ("--reference", "ad.png"), ("--reference", "other.png"),
        ("--reference", "ad.png", "--start", "noise"), ("--plain-prompt", "--category", "teapot"))]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a != b).any()


def test_reference_mask_file_equals_alpha(run):
    cutout("mug.png")
    rgb, mask = cutout("ad.png", 50, 60, seed=1)
    Image.fromarray(rgb).save("rgb.png"), Image.fromarray(mask).save("mask.png")
    [a], _ = run(*mug(), "--reference", "ad.png", "--out", "a")
    [b], _ = run(*mug(), "--reference", "rgb.png", "--reference-mask", "mask.png", "--out", "b")
    assert (pixels(a) == pixels(b)).all()


def test_every_product_after_every_reference_and_a_sheet_of_all(run):
    for name, seed in (("mug", 0), ("cup", 1), ("ad", 2), ("banner", 3)):
        cutout(f"{name}.png", seed=seed)
    paths, _ = run("--product", "mug.png", "cup.png", "--category", "mug", "watch", "--reference", "ad.png",
                   "banner.png", "--out", "all", "--batch", 3)
    assert [p.name for p in paths] == ["mug_like_ad_0.png", "mug_like_banner_0.png", "cup_like_ad_0.png",
                                       "cup_like_banner_0.png", "sheet.png"]
    [one], _ = run("--product", "cup.png", "--category", "watch", "--reference", "ad.png", "--out", "one")
    assert np.abs(pixels(one).astype(int) - pixels(paths[2])).max() <= 1


def test_a_single_product_in_each_of_several_categories(run):
    for name in ("mug", "ad"):
        cutout(f"{name}.png", seed=len(name))
    names = ["mug_watch_0.png", "mug_running_shoe_0.png"]
    paths, _ = run("--product", "mug.png", "--category", "watch", "running shoe", "--out", "all")
    assert [p.name for p in paths] == [*names, "sheet.png"]
    [one], _ = run("--product", "mug.png", "--category", "running shoe", "--out", "one")
    assert np.abs(pixels(one).astype(int) - pixels(paths[1])).max() <= 1 and (pixels(one) != pixels(paths[0])).any()
    after, _ = run("--product", "mug.png", "--category", "watch", "running shoe", "--reference", "ad.png",
                   "--out", "two")
    assert [p.name for p in after] == ["mug_watch_like_ad_0.png", "mug_running_shoe_like_ad_0.png", "sheet.png"]


def test_prompt_paints_at_the_base_size_or_the_given(run):
    [path], _ = run("--prompt", "a photo of a mug")
    assert pixels(path).shape == (64, 64, 3)
    paths, _ = run("--prompt", "a photo of a mug", "--size", 96, "--num", 2)
    assert [pixels(p).shape for p in paths] == [(96, 96, 3)] * 2


def test_with_plain_prompt_known_categories_keep_their_identifier_and_others_do_without(toy):
    identifiers = models.identifiers_of({"mug", "teapot"}, toy / "cg", plain_prompt=True)
    assert {name: generate.prompt_texts(name, identifier) for name, identifier in identifiers.items()} == {
        "mug": ("A photo of mug, in the background of sks 0", "A photo of mug", "in the background of sks 0"),
        "teapot": ("A photo of teapot",) * 3}


def test_a_branch_from_before_a_category_was_added_belongs_with_cg_and_one_with_other_identifiers_does_not(tmp_path):
    def branch(name, identifiers):
        (tmp_path / name).mkdir()
        (tmp_path / name / "categories.json").write_text(json.dumps(identifiers))
        return tmp_path / name

    cg = branch("cg", {"mug": "sks 0", "watch": "sks 1", "apron": "sks 2"})
    models.check_identifiers(cg, branch("before", {"mug": "sks 0", "watch": "sks 1"}))
    models.check_identifiers(cg, branch("after", {"mug": "sks 0", "watch": "sks 1", "apron": "sks 2", "bag": "sks 3"}))
    for name, identifiers in (("shifted", {"mug": "sks 0", "watch": "sks 2"}), ("others", {"bag": "sks 0"})):
        with pytest.raises(models.BadInput, match="other categories"):
            models.check_identifiers(cg, branch(name, identifiers))


# ---------------------------------------------------------------- the second pass


def refined(*arguments):
    """The options for a second pass that begins at the last of two steps."""
    return "--refine", 2, "--refine-from", 400, *arguments


def test_the_toy_has_a_second_pass_by_the_base_alone_and_other_bases_have_one_on_request():
    def how(*arguments, **others):
        return sampler_settings(generate.options("").parse_args([*map(str, arguments)]), **others)

    assert how() == SamplerSettings(refine=2, refine_from=how().refine_from, refine_alone=True)
    assert how("--refine", 1).refine == how(refine=1).refine == 1
    assert how("--weights", "sd") == SamplerSettings()
    assert how("--weights", "sd", *refined()) == SamplerSettings(refine=2, refine_from=400)


def test_keep_first_saves_the_picture_that_a_first_pass_alone_paints(run):
    rgb, mask = cutout("mug.png", 60, 90)
    [alone], _ = run(*mug(), "--out", "alone")
    [final, first], _ = run(*mug(), *refined("--keep-first"))
    assert [p.name for p in (final, first)] == ["mug_0.png", "mug_0_first.png"]
    assert (pixels(first) == pixels(alone)).all() and (pixels(final) != pixels(first)).any()
    assert (pixels(final)[mask == 255] == rgb[mask == 255]).all()
    [line], _ = run("--how", first)
    [again], _ = run(*shlex.split(str(line))[2:], "--out", "again")
    assert (pixels(again) == pixels(alone)).all()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_a_second_pass_paints_a_seed_the_same_alone_and_in_a_batch(run, sampler):
    cutout("mug.png")
    (_, together, _), _ = run(*mug(), *refined("--sampler", sampler, "--num", 2, "--out", "two"))
    [alone], _ = run(*mug(), *refined("--sampler", sampler, "--seed", 1, "--out", "one"))
    assert np.abs(pixels(together).astype(int) - pixels(alone)).max() <= 1


def test_a_second_pass_of_a_prompt_is_as_much_larger(run):
    [path, first], _ = run("--prompt", "a photo of a mug", *refined("--keep-first"))
    assert pixels(path).shape == pixels(first).shape == (128, 128, 3)


@pytest.mark.parametrize("alone", [False, True])
def test_the_second_pass_sees_the_ads_at_its_own_size_and_starts_from_the_first_picture(toy, monkeypatch, alone):
    """A wide ad on canvases of 64 and 128 pixels, by all networks or by the base alone without prompt and guidance.

    The second pass starts from I ⊗ M + enlarged ⊗ (1 − M), the product itself on the first pass's enlarged picture.
    """
    seen, encoded, (h, w) = [], [], (40, 90)
    models_ = models.load_models(models.ModelChoice(dtype="float32", device="cpu", weights=toy / "base",
                                                    cg=toy / "cg", pg=toy / "pg"), None, {"mug"}, with_pg=True)
    real_sample, real_encode = generate.sample, StableDiffusion.encode
    monkeypatch.setattr(generate, "sample", lambda *a: seen.append(a) or real_sample(*a))
    monkeypatch.setattr(StableDiffusion, "encode", lambda sd, x: encoded.append(x) or real_encode(sd, x))
    rgb, mask = torch.rand(3, h, w), torch.from_numpy(disc(h, w)).float()[None] / 255
    ad = AdInputs(rgb, mask, ("a mug in sks 0", "a mug", "sks 0"), 0, (rgb.flip(2), mask))
    how = SamplerSettings(steps=2, refine=2, refine_from=600, refine_alone=alone)
    painted, real_paint = [], generate.paint
    monkeypatch.setattr(generate, "paint", lambda *a, **how: painted.append(real_paint(*a, **how)) or painted[-1])
    generate.paint_ads([ad], models_, how)
    (_, _, small, *_), (_, _, large, _, shape, way, z_ref, _, start) = seen
    assert (small.mask.shape, large.mask.shape) == ((1, 1, 32, 64), (1, 1, 64, 128)) and start == 600
    assert torch.equal(large.mask[0], fit(mask, 64, 128, "contain")[0])
    (I, M), enlarged = (fit(x, 64, 128, "contain")[0] for x in (rgb, mask)), resize(painted[0][0], 64, 128)
    torch.testing.assert_close(encoded[-1][0], I * M + enlarged * (1 - M))
    assert shape == (4, 16, 32)
    if alone:
        assert large.branches == [] and way.guidance == 1 and torch.equal(large.prompts.P, large.unconditional.P)
    else:
        hints = (product_hint(*(fit(x, 64, 128, "contain")[0][None] for x in (rgb, mask))),
                 background_hint(*(fit(x, 64, 128, "cover")[0][None] for x in ad.reference)))
        for (branch, features), hint in zip(large.branches, hints, strict=True):
            assert torch.equal(features, branch.hint_features(hint))
        assert torch.equal(large.prompts.P, small.prompts.P) and way == how


def test_a_rivals_picture_gets_the_second_pass_too(toy, monkeypatch):
    models_ = models.load_models(models.ModelChoice(dtype="float32", device="cpu", weights=toy / "base"), None)
    encoded, real = [], StableDiffusion.encode
    monkeypatch.setattr(StableDiffusion, "encode", lambda sd, x: encoded.append(x) or real(sd, x))
    ad = AdInputs(torch.zeros(3, 64, 64), torch.zeros(1, 64, 64), ("",) * 3, 0)
    how = SamplerSettings(steps=2, refine=2, refine_from=600)
    [[final, first]] = generate.paint_ads([ad], models_, how, lambda canvas, on_step: canvas.rgb + 0.5, keep_first=True)
    torch.testing.assert_close(encoded[0], torch.full((1, 3, 128, 128), 0.5))
    assert (first == 128).all() and (final != 128).any()


# ---------------------------------------------------------------- data sets


@pytest.fixture
def items(tmp_path):
    """Five items: two frames, one with a reference; the fifth's category is another."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(5):
        cutout(folder / f"{i}.png", 48 if i < 3 else 40, 48 if i < 3 else 90, seed=i)
    lines = [{"file_name": f"{i}.png", "category": "watch" if i == 4 else "mug"} for i in range(5)]
    lines[2]["reference"] = "4.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_data_equals_single_pictures_and_goes_on(run, items, capsys):
    (items / "1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run("--data", items, "--seed", 7, "--out", "all")
    out, err = capsys.readouterr()  # the others are painted all the same
    assert out.endswith("all: 4 painted, 0 were there, 1 broken\n") and "1.png" in err
    assert err.endswith("1 items can't be used, more than 1%; they are named above\n")
    lines = [json.loads(line) for line in Path("all/manifest.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["file"], line["category"]) for line in lines] == [
        (7 + i, f"{i:06}_{i}.png", "watch" if i == 4 else "mug") for i in (0, 2, 3, 4)]
    for i in (0, 2, 4):
        more = ("--reference", items / "4.png") if i == 2 else ()
        [path], _ = run(*mug(items / f"{i}.png"), "--category", "watch" if i == 4 else "mug", "--seed", 7 + i, *more)
        assert np.abs(pixels(path).astype(int) - pixels(f"all/{i:06}_{i}.png")).max() <= 1

    before = {p: p.stat().st_mtime_ns for p in Path("all").iterdir()}
    Path("all/000003_3.png").unlink()
    with open("all/manifest.jsonl", "a") as file:
        file.write('{"item": 1, "fi')  # left by a process killed while writing
    cutout(items / "1.png")
    out, _ = run("--data", items, "--seed", 7, "--out", "all", "--batch", 1)
    assert str(out[-1]) == "all: 2 painted, 3 were there, 0 broken"
    lines = [json.loads(line)["file"] for line in Path("all/manifest.jsonl").read_text().splitlines()]
    assert sorted(set(lines)) == [f"{i:06}_{i}.png" for i in range(5)]
    for name in ("000000_0.png", "000002_2.png", "000004_4.png"):
        assert Path("all", name).stat().st_mtime_ns == before[Path("all", name)]


def test_data_with_keep_first_has_both_pictures_and_one_line_an_item(run, items):
    run("--data", items, "--limit", 3, *refined("--out", "all"))
    before = {p.name: p.read_bytes() for p in Path("all").glob("*.png")}
    out, _ = run("--data", items, "--limit", 3, *refined("--out", "all", "--keep-first"))
    assert str(out[-1]) == "all: 3 painted, 0 were there, 0 broken"  # again, because their first pictures were not kept
    out, _ = run("--data", items, "--limit", 3, *refined("--out", "all", "--keep-first"))
    assert str(out[-1]) == "all: 0 painted, 3 were there, 0 broken"
    after = {p.name: p.read_bytes() for p in Path("all").glob("*.png")}
    assert after.keys() - before.keys() == {f"{i:06}_{i}_first.png" for i in range(3)}
    assert all(after[name] == before[name] for name in before)
    files = [json.loads(line)["file"] for line in Path("all/manifest.jsonl").read_text().splitlines()]
    assert {*files} == {f"{i:06}_{i}.png" for i in range(3)}


@pytest.mark.parametrize("other, difference", [
    (("--seed", 8), "with seed 7"), (("--guidance", 3), "with guidance 2.0"),
    (("--start", "noise"), "with start reference"), (("--eta", 1), "with eta 0.0"),
    (("--sampler", "dpm++"), "with sampler ddim"), (("--refine", 2), "with refine 1")])
def test_pictures_painted_in_another_way_are_not_taken_for_done(run, items, other, difference, capsys):
    run("--data", items, "--seed", 7, "--out", "all")
    with pytest.raises(SystemExit):
        run("--data", items, *(() if "--seed" in other else ("--seed", 7)), *other, "--out", "all")
    assert capsys.readouterr().err.endswith(f"error: --out all holds 000000_0.png, which was painted {difference}; "
                                            "name another folder, or give the options it was painted with\n")


def test_a_new_option_is_part_of_the_record_unless_it_is_listed_as_harmless():
    """Otherwise a forgotten name would let pictures painted with another value count as done."""
    args = generate.options("").parse_args([])
    args.sparkle = 3
    record = record_of(args, SamplerSettings(), models.Models(*[None] * 8))
    assert record["sparkle"] == 3 and not set(record) & HARMLESS
    recorded = {"steps", "sampler", "guidance", "eta", "size", "refine", "refine_from", "start", "plain_prompt",
                "weights", "tokenizer", "cg", "pg", "controlnet", "hint", "dtype", "prompt"}
    assert {*vars(args)} - HARMLESS - {"sparkle"} == recorded


@pytest.mark.parametrize("options", [
    ("--product", "mug.png", "--category", "mug", "--seed", 3),
    ("--product", "mug.png", "--category", "watch", "--reference", "my ad.png", "--start", "noise",
     "--guidance", "3.5"),
    ("--product", "rgb.png", "--mask", "mask.png", "--category", "running shoe", "--eta", "0.5", "--size", "96"),
    ("--product", "mug.png", "--category", "teapot", "--plain-prompt"),
    ("--product", "mug.png", "--category", "mug", "--sampler", "dpm++", "--refine", 2, "--refine-from", 600),
    ("--prompt", "a photo of a mug", "--seed", 9)])
def test_a_picture_says_how_it_was_painted_and_the_command_paints_it_again(run, toy, options):
    rgb, mask = cutout("mug.png")
    cutout("my ad.png", seed=1)
    Image.fromarray(rgb).save("rgb.png"), Image.fromarray(mask).save("mask.png")
    [path], _ = run(*options)
    [line], _ = run("--how", path)
    words = shlex.split(str(line))
    assert words[:2] == ["python", "generate.py"]
    [again], _ = run(*words[2:], "--out", "again")
    assert (pixels(again) == pixels(path)).all()


def test_a_data_sets_picture_says_how_it_was_painted(run, items):
    run("--data", items, "--seed", 7, "--limit", 3, "--batch", 1, "--out", "all")
    [line], _ = run("--how", "all/000002_2.png")
    [again], _ = run(*shlex.split(str(line))[2:], "--out", "again")
    assert (pixels(again) == pixels("all/000002_2.png")).all()


def test_a_sheet_is_never_an_earlier_commands(run):
    cutout("mug.png")
    run(*mug(), "--num", 2)
    assert Path("out/sheet.png").exists()
    run(*mug())
    assert not Path("out/sheet.png").exists()
    run(*mug(), "--num", 2)
    run("--prompt", "a mug")
    assert not Path("out/sheet.png").exists()


def test_pictures_of_weights_trained_on_are_not_taken_for_done(run, items, toy, tmp_path, capsys):
    shutil.copytree(toy / "cg", tmp_path / "my_cg")
    run("--data", items, "--cg", tmp_path / "my_cg", "--limit", 1, "--out", "all")
    [file] = (tmp_path / "my_cg").glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    with pytest.raises(SystemExit):
        run("--data", items, "--cg", tmp_path / "my_cg", "--limit", 1, "--out", "all")
    assert "painted with other weights" in capsys.readouterr().err


def test_a_batch_that_was_interrupted_is_painted_again_as_a_whole(run, items, monkeypatch):
    """Its pictures are then those of an uninterrupted run; existing ones are not written again."""
    sizes, paint_ads = [], generate.paint_ads
    monkeypatch.setattr(generate, "paint_ads", lambda ads, **how: sizes.append(len(ads)) or paint_ads(ads, **how))
    run("--data", items, "--out", "all", "--batch", 3)
    pictures = {path: path.read_bytes() for path in Path("all").glob("*.png")}
    for name in ("000001_1.png", "000003_3.png"):
        Path("all", name).unlink()
    out, _ = run("--data", items, "--out", "all", "--batch", 3)
    assert str(out[-1]) == "all: 2 painted, 3 were there, 0 broken" and sizes == [3, 2, 3, 2]
    assert {path: path.read_bytes() for path in Path("all").glob("*.png")} == pictures


@pytest.mark.parametrize("line", [{}, {"file": 1}, {"file": "a", "image": "a", "category": "b", "seed": 0, "how": 1}])
def test_a_line_of_a_manifest_that_does_not_say_how_is_refused(line, run, items, capsys):
    Path("out").mkdir()
    Path("out/manifest.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit):
        run("--data", items)
    assert "error: out/manifest.jsonl:1 does not say how a picture was painted; remove" in capsys.readouterr().err


def test_two_processes_share_a_data_set(run, items, monkeypatch):
    """They are started as by torchrun, but one after the other."""
    run("--data", items, "--out", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        run("--data", items, "--out", "two")
    names = [sorted(p.name for p in Path(out).iterdir()) for out in ("one", "two")]
    assert names[0] == names[1] and "sheet.png" in names[0]
    for name in names[0]:
        if name.endswith(".png"):
            assert np.abs(pixels(f"one/{name}").astype(int) - pixels(f"two/{name}")).max() <= 1
    assert np.abs(pixels("one/sheet.png").astype(int) - pixels("two/sheet.png")).max() <= 1, "the last one has them all"
    lines = [sorted(json.loads(line)["file"] for line in Path(out, "manifest.jsonl").read_text().splitlines())
             for out in ("one", "two")]
    assert lines[0] == lines[1] and len(lines[0]) == 5


def test_data_with_an_unknown_category_stops_before_painting(run, items, toy, capsys):
    text = (items / "metadata.jsonl").read_text().replace("watch", "teapot")
    (items / "metadata.jsonl").write_text(text)
    with pytest.raises(SystemExit):
        run("--data", items)
    known = toy / "cg" / "categories.json"
    assert capsys.readouterr().err == (f"error: CG was not trained on category 'teapot'; choose one from {known}, such "
                                       "as mug, running shoe, watch; generate.py --plain-prompt paints others too\n")
    assert not Path("out").exists()
    assert str(run("--data", items, "--plain-prompt")[0][-1]).startswith("out: 5 painted")


# ---------------------------------------------------------------- the whole command


def command(*arguments, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / "generate.py", *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True)


def test_no_arguments_paint_the_sample(run, toy):
    if not (toy / "samples").exists():
        (toy / "samples").symlink_to(ROOT / "toy" / "samples")
    for branch in ("cg", "pg"):
        (toy / branch / "categories.json").write_text(json.dumps(CATEGORIES | {gallery.SAMPLE: "sks 3"}))
    paths, _ = run(*refined())
    assert [str(p) for p in paths] == ["out/perfume_0.png", "out/perfume_like_perfume_reference_0.png", "out/sheet.png"]
    product = pixels(ROOT / "toy" / "samples" / "perfume.png")
    solid = product[..., 3] == 255
    for path in paths[:2]:
        assert (pixels(path)[solid] == product[solid, :3]).all()
    assert pixels(paths[2]).shape[1] > 4 * 256
    for branch in ("cg", "pg"):
        (toy / branch / "categories.json").write_text(json.dumps(CATEGORIES))


def test_the_script_itself(toy, tmp_path):
    cutout(tmp_path / "mug.png")
    models = ("--weights", toy / "base", "--cg", toy / "cg", "--pg", toy / "pg")
    done = command(*mug("mug.png", *models, "--steps", 1), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out/mug_0.png\n")
    assert "\r" not in done.stderr  # no bar where stderr is no terminal
    failed = command("--steps", 0, cwd=tmp_path)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == "error: argument --steps: '0' must be a whole number from 1 to 500\n"


# ---------------------------------------------------------------- bad input


@pytest.fixture
def files(tmp_path):
    """Good files, and one of each kind of bad one."""
    cutout(tmp_path / "mug.png")
    Image.fromarray(noisy(48, 48)).save(tmp_path / "rgb.png")
    Image.fromarray(disc(48, 48)).save(tmp_path / "mask.png")
    Image.fromarray(disc(40, 48)).save(tmp_path / "small.png")
    for name, level in (("black", 0), ("white", 255)):
        Image.fromarray(np.full((48, 48), level, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "mug.png").read_bytes()[:999])
    (tmp_path / "folder").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "metadata.jsonl").write_text("")


BAD = {  # options: what the line says
    "--product gone.png --category mug": "gone.png: no such file",
    "--product empty.png --category mug": "empty.png: not a readable image",
    "--product text.png --category mug": "text.png: not a readable image",
    "--product cut.png --category mug": "cut.png: not a readable image",
    "--product folder --category mug": "folder: not a readable image",
    "--product rgb.png --category mug": "by --mask",
    "--product rgb.png --category mug --mask gone.png": "gone.png: no such file",
    "--product rgb.png --category mug --mask small.png": "small.png is 48 x 40",
    "--product rgb.png --category mug --mask black.png": "black.png is empty",
    "--product rgb.png --category mug --mask white.png": "white.png covers the whole picture",
    "--product mug.png --category teapot": "such as mug, running shoe, watch; generate.py --plain-prompt",
    "--product mug.png": "--product goes with --category; add that one",
    "--category mug": "--category goes with --product",
    "--mask mask.png": "--mask goes with --product",
    "--product mug.png --category rice cooker": "not trained on category 'cooker'",
    "--product mug.png mug2.png --category rice cooker mug": "--category: 3 given for 2 of --product",
    "--product mug.png mug2.png --category mug --mask mask.png": "--mask: 1 given for 2 of --product",
    "--product mug.png folder/mug.png --category mug": "two pictures would be named mug_0.png; rename a file",
    "--reference mug.png": "--reference goes with --product",
    "--product mug.png --category mug --reference rgb.png": "by --reference-mask",
    "--product mug.png --category mug --reference text.png": "text.png: not a readable image",
    "--product mug.png --category mug --reference rgb.png --reference-mask small.png": "by --reference-mask",
    "--product mug.png --category mug --reference-mask mask.png": "--reference-mask goes with --reference",
    "--product mug.png --category mug --prompt mug": "--product and --prompt exclude each other",
    "--product mug.png --category mug --controlnet c --cg d": "--controlnet and --cg exclude each other",
    "--product mug.png --category mug --hint inpaint": "--hint goes with --controlnet",
    "--prompt mug --cg c": "--prompt and --cg exclude each other",
    "--product mug.png --category mug --controlnet gone.safetensors": "gone.safetensors is missing",
    "--how gone.png": "No such file or directory",
    "--how mug.png": "mug.png: no command paints it again",
    "--how text.png": "text.png: no command paints it again",
    "--prompt mug --weights gone.safetensors": "gone.safetensors is missing",
    "--product mug.png --category mug --split bg1k": "--split goes with --data",
    "--data gone": "gone: no such data set",
    "--data folder": "folder: no such data set",
    "--data nothing": "nothing: the data set is empty",
    "--data folder --split bg2k": "--split bg2k",
    "--data folder --num 2": "--num",
    "--steps 0": "--steps: '0' must be a whole number from 1 to 500",
    "--steps 501": "--steps",
    "--steps many": "--steps",
    "--size 65": "--size 65: must be a multiple of 32, such as 64",
    "--size -64": "--size",
    "--size 1000000": "--size",
    "--eta 0.5 --sampler dpm++": "--eta goes with --sampler ddim",
    "--sampler euler": "--sampler",
    "--refine 0": "--refine: '0' must be a whole number from 1 to 8",
    "--refine 8 --size 1024": "--refine 8: paints 8192 pixels, more than 4096; lower it, or --size",
    "--refine 2 --refine-from 0": "--refine-from: '0' must be a whole number from 1 to 999",
    "--refine 2 --sampler dpm++ --steps 1 --weights trailing": "--refine-from: none of the 1 steps is that late",
    "--refine-from 300": "--refine-from and --keep-first go with a second pass; add --refine 2",
    "--keep-first": "--keep-first go with a second pass; add --refine 2",
    "--guidance 0": "--guidance",
    "--guidance nan": "--guidance",
    "--num 0": "--num",
    "--batch 0": "--batch",
    "--seed -1": "--seed",
    "--start middle": "--start",
    "--dtype float8": "--dtype",
    "--device toaster": "--device toaster: no such device here",
    "--device cuda:77": "--device cuda:77: no such device here",
    "--device meta": "--device meta: no such device here",
    "--out mug.png": "--out mug.png:",
    "--out mug.png/below": "--out mug.png/below:",
    "--colour red": "--colour",
    "--weights gone --prompt mug": "gone is missing",
    "--weights folder --prompt mug": "folder",
    "--weights model.ckpt --prompt mug": "model.ckpt is a pickle",
    "--weights {toy}/base --product mug.png --category mug": "--cg is missing",
    "--weights {toy}/base --cg {toy}/cg --product mug.png --category mug --reference mug.png": "--pg is missing",
    "--cg folder --product mug.png --category mug": "categories.json is missing",
    "--cg other --product mug.png --category mug": "belong together",
    "--pg renamed --product mug.png --category mug --reference mug.png": "trained on other categories",
    "--product mug.png --category rice-cooker rice_cooker": "would be named mug_rice_cooker_0.png",
    "--prompt mug --out " + "o" * 300: "File name too long",
    "--pg garbage --product mug.png --category mug --reference mug.png": "is not a whole safetensors file",
    "--pg pickled --product mug.png --category mug --reference mug.png": "is a pickle",
    "--tokenizer folder --prompt mug": "folder holds no tokenizer",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_writes_nothing(run, files, toy, tmp_path, options, capsys):
    for name, kept in (("garbage", WEIGHTS), ("pickled", "model.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / kept).write_bytes(b"garbage")
        (tmp_path / name / "config.json").write_bytes((toy / "pg" / "config.json").read_bytes())
    shutil.copytree(toy / "pg", tmp_path / "renamed")
    (tmp_path / "renamed" / "categories.json").write_text(json.dumps({"mug": "sks 1"}))
    if "trailing" in options:
        shutil.copytree(toy / "base", tmp_path / "trailing")
        write_json({"timestep_spacing": "trailing"}, tmp_path / "trailing" / "scheduler" / "scheduler_config.json")
    if "other" in options:
        unet = TOY_UNET | {"block_out_channels": [8, 16, 16, 24], "cross_attention_dim": 32}
        save_control(CategoryGenerator(control_config(unet, 4)), tmp_path / "other", categories=CATEGORIES)
    arguments = options.format(toy=toy).split()
    if not {"--product", "--prompt", "--data"} & set(arguments):
        arguments += ["--prompt", "mug"] if "--category" not in options and "--mask" not in options else []
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[options] in err
    assert sorted(tmp_path.rglob("*")) == before
