"""Tests: generate.py through its command line, on a tiny random model: frames, pixels, seeds, data sets, bad input."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import write_tiny_toy
from PIL import Image, ImageOps

import generate
from data import AdInputs, background_hint, product_hint, prompt_texts
from model import CategoryGenerator
from programs import gallery, models
from sampler import SamplerSettings
from support.files import BadInput, one_line_errors, write_json
from support.images import fit, grow_frame, resize
from toy.stages import TOY_UNET
from weights import UNET_FILE, StableDiffusion, control_config, save_control

ROOT = Path(generate.__file__).parent
CATEGORIES = {"mug": "sks 0", "running shoe": "sks 1", "watch": "sks 2", gallery.SAMPLE: "sks 3"}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_tiny_toy(folder, CATEGORIES)
    (folder / "samples").symlink_to(ROOT / "toy" / "samples")
    return folder


LOADED = {name: cache(getattr(models, name)) for name in ("load_stable_diffusion", "load_control")}


@pytest.fixture
def run(toy, tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder on a copy of the tiny model -> (the paths it printed, stderr)."""
    for module in (gallery, models):
        monkeypatch.setattr(module, "TOY", toy)
    for name, load in LOADED.items():
        monkeypatch.setattr(models, name, lambda *arguments, load=load: deepcopy(load(*arguments)))
    monkeypatch.chdir(tmp_path)

    def main(*arguments, refine=1):
        capsys.readouterr()
        passes = ["--refine", str(refine)] if refine else []
        with one_line_errors():
            generate.main([*"--steps 2 --device cpu --dtype float32".split(), *passes, *map(str, arguments)])
        out, err = capsys.readouterr()
        return [Path(line) for line in out.splitlines()], err

    return main


@pytest.fixture
def refused(run, capsys):
    """Runs a command line that must end with status 2 -> its one line on stderr, after `said`."""
    def main(*arguments, said=""):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == said
        return err

    return main


def disc(h, w, soft=2.0):
    """A soft mask (h, w) uint8: 255 in a disc, 0 outside."""
    y, x = np.mgrid[:h, :w] + 0.5
    distance = np.hypot((y - h / 2) / h, (x - w / 2) / w) * min(h, w)
    return (((min(h, w) * 0.3 - distance) / soft + 0.5).clip(0, 1) * 255).round().astype(np.uint8)


def cutout(path, h=48, w=48, seed=0):
    """Writes a noisy disc as an RGBA file, and without alpha as rgb.png and mask.png."""
    rgb, mask = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8), disc(h, w)
    Image.fromarray(np.dstack([rgb, mask])).save(path, lossless=True)
    Image.fromarray(rgb).save("rgb.png")
    Image.fromarray(mask).save("mask.png")


def pixels(path):
    return np.asarray(Image.open(path))


def same(a, b):
    """Whether two pictures are equal up to rounding, as those of one seed are alone and in a batch."""
    return np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


def manifest(folder="out"):
    return [json.loads(line) for line in Path(folder, "manifest.jsonl").read_text().splitlines()]


MUG = "--product", "mug.png", "--category", "mug"

# ---------------------------------------------------------------- the product stays unchanged


@pytest.mark.parametrize("options, h, w", [
    ("--product mug.webp", 150, 31), ("--product mug.png --reference ad.png --dtype bfloat16", 30, 150),
    ("--product side.jpg --mask mask.png --reference ad.png", 40, 70), ("--product mug.png --dtype float16", 200, 200)])
def test_a_product_keeps_its_frame_and_its_pixels_on_a_new_background(run, options, h, w):
    cutout("ad.png", 33, 90, seed=1)
    for path in ("mug.png", "mug.webp"):
        cutout(path, h, w)
    exif = Image.Exif()
    exif[274] = 6  # a photo that is stored on its side
    Image.open("rgb.png").rotate(90, expand=True).save("side.jpg", exif=exif)
    product = options.split()[1]
    [path], _ = run("--category", "mug", *options.split())
    rgb, mask = np.asarray(ImageOps.exif_transpose(Image.open(product)))[..., :3], pixels("mask.png")
    result = pixels(path)
    assert result.shape == (h, w, 3)
    assert (result[mask == 255] == rgb[mask == 255]).all()
    assert (result[mask == 0] != rgb[mask == 0]).mean() > 0.9


def test_the_product_is_pasted_exactly_and_without_a_glow_of_the_painted_one():
    """The networks paint a red disc in a white room, one canvas pixel too wide; after pasting that pixel is white.

    The product is blue. White in a JPEG mask is often 253, and counts as product.
    """
    small, large = (torch.from_numpy(disc(side, side)).float()[None] / 255 for side in (32, 128))
    blue = torch.tensor([0, 0, 1.0])[:, None, None].expand(3, 128, 128)
    painted = 1 - torch.tensor([0, 1.0, 1.0])[:, None, None] * F.avg_pool2d(small, 3, stride=1, padding=1)
    pasted = generate.paste_back(painted, small * 253 / 255, (0, 0, 32, 32), blue, large * 253 / 255) / 255
    naive = blue * large + resize(painted, 128, 128) * (1 - large)
    room, solid = ((large == level).expand(3, 128, 128) for level in (0, 1))
    assert naive[room].min() < 0.8 and pasted[room].min() > 0.97
    assert torch.equal(pasted[solid], blue[solid])


# ---------------------------------------------------------------- which pictures


@pytest.mark.parametrize("options", [(), ("--refine", 2, "--refine-from", 400, "--sampler", "dpm++")])
def test_a_seed_paints_the_same_picture_alone_and_in_a_batch_and_num_counts_on(run, options):
    cutout("mug.png")
    (four, five, sheet), _ = run(*MUG, *options, "--seed", 4, "--num", 2)
    assert [path.name for path in (four, five, sheet)] == ["mug_4.png", "mug_5.png", "sheet.png"]
    [alone], _ = run(*MUG, *options, "--seed", 5, "--out", "alone")
    (_, single, _), _ = run(*MUG, *options, "--seed", 4, "--num", 2, "--batch", 1, "--out", "single")
    assert (pixels(alone) == pixels(single)).all() and same(alone, five)
    assert not same(four, five)


def test_category_reference_and_start_matter(run):
    """A reference's mask may be its alpha channel or a file."""
    for name in ("mug", "other", "ad"):
        cutout(f"{name}.png", seed=len(name))
    like = "--reference", "ad.png"
    results = [pixels(run(*MUG, *more)[0][0]) for more in (
        (), ("--category", "watch"), like, ("--reference", "other.png"), (*like, "--start", "noise"),
        ("--plain-prompt", "--category", "teapot"))]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a != b).any()
    [by_file], _ = run(*MUG, "--reference", "rgb.png", "--reference-mask", "mask.png")
    assert (pixels(by_file) == results[2]).all()


@pytest.mark.parametrize("options, names, alone, place", [
    ("--product mug.png cup.png --category mug watch --reference ad.png banner.png --batch 3",
     "mug_like_ad_0 mug_like_banner_0 cup_like_ad_0 cup_like_banner_0",
     "--product cup.png --category watch --reference ad.png", 2),
    ("--product mug.png --category watch 'running shoe' --reference ad.png",
     "mug_watch_like_ad_0 mug_running_shoe_like_ad_0",
     "--product mug.png --category 'running shoe' --reference ad.png", 1)], ids=["products", "categories"])
def test_every_product_is_painted_after_every_reference_or_one_in_several_categories(run, options, names, alone, place):
    for seed, name in enumerate(("mug", "cup", "ad", "banner")):
        cutout(f"{name}.png", seed=seed)
    paths, _ = run(*shlex.split(options), "--out", "all")
    assert [path.stem for path in paths] == [*names.split(), "sheet"]
    [one], _ = run(*shlex.split(alone))
    assert [k for k, path in enumerate(paths[:-1]) if same(one, path)] == [place]


@pytest.mark.parametrize("options, sides", [
    ("", [64]), ("--size 96 --num 2", [96, 96]), ("--refine 2 --refine-from 400", [128])])
def test_a_prompt_paints_at_the_bases_size_or_the_given_or_as_much_larger(run, options, sides):
    paths, _ = run("--prompt", "a photo of a mug", *options.split())
    assert [pixels(path).shape for path in paths] == [(side, side, 3) for side in sides]


def test_another_base_has_no_second_pass_by_itself():
    assert gallery.sampler_settings(gallery.options("").parse_args(["--weights", "sd"])) == SamplerSettings()


def test_with_plain_prompt_known_categories_keep_their_identifier_and_others_do_without(toy):
    assert models.identifiers_of({"mug", "teapot"}, toy / "cg", plain_prompt=True) == {"mug": "sks 0", "teapot": None}
    assert prompt_texts("teapot", None) == ("A photo of teapot",) * 3


def test_branches_belong_together_if_they_share_categories_and_know_each_by_one_identifier(tmp_path):
    """One of them may know more: categories can be added to a trained CG."""
    def branch(identifiers):
        write_json(identifiers, tmp_path / str(len(identifiers)) / "categories.json")
        return tmp_path / str(len(identifiers))

    cg = branch({"mug": "sks 0", "watch": "sks 1", "apron": "sks 2"})
    models.check_identifiers(cg, branch({"mug": "sks 0", "watch": "sks 1"}))
    models.check_identifiers(cg, branch({"mug": "sks 0", "watch": "sks 1", "apron": "sks 2", "bag": "sks 3"}))
    for identifiers in ({"mug": "sks 0", "watch": "sks 2"}, {"bag": "sks 0"}):
        with pytest.raises(BadInput, match="other categories"):
            models.check_identifiers(cg, branch(identifiers))


def test_a_sheet_is_never_an_earlier_commands(run):
    cutout("mug.png")
    run(*MUG, "--num", 2)
    assert Path("out/sheet.png").exists()
    run("--prompt", "a mug")
    assert not Path("out/sheet.png").exists()


def test_no_arguments_paint_the_sample_with_the_toys_second_pass_by_the_base_alone(run):
    paths, _ = run(refine=None)
    assert [str(p) for p in paths] == ["out/sneaker_0.png", "out/sneaker_like_sneaker_reference_0.png", "out/sheet.png"]
    product = pixels(ROOT / "toy" / "samples" / "sneaker.png")
    solid = product[..., 3] == 255
    for path in paths[:2]:
        assert (pixels(path)[solid] == product[solid, :3]).all()
        how = json.loads(Image.open(path).text["how"])["how"]
        assert (how["refine"], how["refine_from"], how["refine_alone"]) == (2, gallery.TOY_REFINE["refine_from"], True)


# ---------------------------------------------------------------- room, and how strongly


def test_a_margin_and_an_aspect_widen_the_frame_and_resample_nothing(run):
    cutout("mug.png", 60, 40)  # the disc fills 38 of 60 rows and 26 of 40 columns
    product = pixels("mug.png")
    solid = product[..., 3] == 255
    for options, (h, w) in {"--margin 0.2": (64, 44), "--aspect 3:2": (60, 90), "--aspect 1:3": (120, 40)}.items():
        [path], _ = run(*MUG, *options.split())
        picture = pixels(path)
        top, left = (h - 60) // 2, (w - 40) // 2
        assert picture.shape == (h, w, 3)
        assert (picture[top : top + 60, left : left + 40][solid] == product[solid, :3]).all()


@pytest.mark.parametrize("box, margin, pads", [
    ((10, 20, 90, 80), 0.1, (0, 0, 0, 0)),  # left, top, right, bottom of 100 x 100: there is room
    ((0, 0, 100, 100), 0.25, (50, 50, 50, 50)), ((0, 20, 50, 80), 0.2, (25, 0, 0, 0))])
def test_a_frame_grows_only_where_a_margin_is_missing(box, margin, pads):
    mask, (left, top, right, bottom) = torch.zeros(1, 100, 100), box
    mask[:, top:bottom, left:right] = 0.05  # faint, as where a mask has little contrast
    rgb, grown = grow_frame(torch.rand(3, 100, 100), mask, margin, None, "mug.png")
    assert torch.equal(grown, F.pad(mask, pads)) and rgb.shape[1:] == grown.shape[1:]


def test_a_frame_that_would_be_too_large_is_named_and_the_others_are_painted(refused, items, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25_000)
    err = refused("--data", items, "--margin", 0.4, said="out: 3 painted, 0 were there, 2 broken\n")
    assert err.count("png: --margin and --aspect would make over 25,000 pixels of it") == 2


def test_a_scale_multiplies_a_branchs_outputs_and_a_negative_prompt_stands_for_the_empty_one(run, monkeypatch):
    """Scale 0 of PG, from noise, is CG alone; what a walk is given shows the rest."""
    given, paint = [], generate.sample

    def look(unet, schedule, conditions, *others):
        given.append((schedule.config["timestep_spacing"], conditions))
        return paint(unet, schedule, conditions, *others)

    monkeypatch.setattr(generate, "sample", look)
    cutout("mug.png"), cutout("ad.png", seed=1)
    [alone], _ = run(*MUG)
    style = *MUG, "--reference", "ad.png", "--start", "noise"
    [styled], _ = run(*style)
    [off], _ = run(*style, "--pg-scale", 0, "--out", "off")
    assert same(alone, off) and not same(alone, styled)
    run(*style, "--cg-scale", 0.5, "--pg-scale", 1.5, "--negative", "a blurred mug", "--spacing", "trailing")
    spacing, conditions = given[-1]
    assert spacing == "trailing" and [branch.scale for branch, _ in conditions.branches] == [0.5, 1.5]
    sd = models.load_stable_diffusion(models.TOY / "base", "cpu", torch.float32, None)
    assert torch.equal(conditions.unconditional.P, sd.prompts(["a blurred mug"]))


# ---------------------------------------------------------------- the second pass



@pytest.fixture
def encoded(monkeypatch):
    """The pictures that the VAE encodes."""
    pictures, encode = [], StableDiffusion.encode
    monkeypatch.setattr(StableDiffusion, "encode", lambda sd, x: pictures.append(x) or encode(sd, x))
    return pictures


@pytest.mark.parametrize("alone", [False, True])
def test_the_second_pass_sees_the_ad_at_its_own_size_and_starts_from_the_first_picture(toy, monkeypatch, encoded,
                                                                                       alone):
    """A wide ad on canvases of 64 and 128 pixels, by all networks or by the base alone without prompt and guidance.

    The second pass starts from I ⊗ M + enlarged ⊗ (1 − M), the product itself on the first pass's enlarged picture.
    """
    seen, painted, sample, paint = [], [], generate.sample, generate.paint
    monkeypatch.setattr(generate, "sample", lambda *a: seen.append(a) or sample(*a))
    monkeypatch.setattr(generate, "paint", lambda *a, **how: painted.append(paint(*a, **how)) or painted[-1])
    rgb, mask = torch.rand(3, 40, 90), torch.from_numpy(disc(40, 90)).float()[None] / 255
    ad = AdInputs(rgb, mask, ("a mug in sks 0", "a mug", "sks 0"), 0, (rgb.flip(2), mask.roll(9, 2)))
    how = SamplerSettings(steps=2, refine=2, refine_from=600, refine_alone=alone)
    choice = models.ModelChoice(toy / "base", cg=toy / "cg", pg=toy / "pg", dtype="float32", device="cpu")
    generate.paint_ads([ad], models.load_models(choice, None, {"mug"}, with_pg=True), how)

    (_, _, small, *_), (_, _, large, _, _, way, _, _, start) = seen
    (I, M), enlarged = (fit(x, 64, 128, "contain")[0][None] for x in (rgb, mask)), resize(painted[0][0], 64, 128)
    torch.testing.assert_close(encoded[-1], I * M + enlarged * (1 - M))
    assert small.mask.shape == (1, 1, 32, 64) and torch.equal(large.mask, M)
    assert start == 600
    if alone:
        assert large.branches == [] and way.guidance == 1 and torch.equal(large.prompts.P, large.unconditional.P)
    else:
        hints = product_hint(I, M), background_hint(*(fit(x, 64, 128, "cover")[0][None] for x in ad.reference))
        for (branch, features), hint in zip(large.branches, hints, strict=True):
            assert torch.equal(features, branch.hint_features(hint))
        assert torch.equal(large.prompts.P, small.prompts.P) and way == how


# ---------------------------------------------------------------- a picture says how it was painted


@pytest.mark.parametrize("options", [
    "--product mug.png --category watch --reference 'my ad.png' --start noise --guidance 3.5",
    "--product rgb.png --mask mask.png --category teapot --plain-prompt --eta 0.5 --size 96 --seed 3",
    "--product mug.png --category mug --sampler dpm++ --refine 2 --refine-from 600",
    "--product mug.png --category mug --cg-scale 0 --negative=-blurred --spacing trailing --margin 0.3 --aspect 3:2",
    "--prompt 'a photo of a mug'",
    "--data set --seed 7 --batch 1 --limit 3"])
def test_how_prints_the_command_that_paints_a_picture_again(run, items, options):
    cutout("my ad.png", seed=1)
    cutout("mug.png")
    run(*shlex.split(options))
    path = Path("out/000002_2.png") if "--data" in options else next(Path("out").glob("*.png"))
    [line], _ = run("--how", path)
    words = shlex.split(str(line))
    assert words[:2] == ["python", "generate.py"]
    [again], _ = run(*words[2:], "--out", "again")
    assert (pixels(again) == pixels(path)).all()


def test_a_new_option_is_part_of_the_record_unless_it_is_listed_as_harmless():
    """Otherwise a forgotten name would let pictures painted with another value count as done."""
    args = gallery.options("").parse_args([])
    args.sparkle = 3
    record = gallery.record_of(args, SamplerSettings(), models.Models(*[None] * 8))
    assert record["sparkle"] == 3 and not record.keys() & gallery.HARMLESS
    assert {*vars(args)} - gallery.HARMLESS == {
        "steps", "sampler", "guidance", "eta", "size", "refine", "refine_from", "start", "plain_prompt", "weights",
        "tokenizer", "vae", "cg", "pg", "controlnet", "hint", "dtype", "no_metadata", "prompt", "negative", "cg_scale",
        "pg_scale", "spacing", "margin", "aspect", "sparkle"}


def test_a_pictures_text_names_files_from_where_the_command_ran_and_can_be_left_out(run, items, toy, tmp_path):
    """A whole path may hold the user's name."""
    own = "--cg", shutil.copytree(toy / "cg", tmp_path / "own")
    [path], _ = run("--product", items / "0.png", "--category", "mug", *own)
    how = json.loads(Image.open(path).text["how"])
    assert (how["image"], how["how"]["cg"]) == ("set/0.png", "own")
    [path], _ = run("--prompt", "a mug", "--no-metadata")
    assert not Image.open(path).text


# ---------------------------------------------------------------- data sets


@pytest.fixture
def items(run, tmp_path):
    """Five items: two frames, one with a reference; the fifth's category is another."""
    folder, lines = tmp_path / "set", []
    folder.mkdir()
    for i, (h, w) in enumerate([(48, 48)] * 3 + [(40, 90)] * 2):
        cutout(folder / f"{i}.png", h, w, seed=i)
        lines.append({"file_name": f"{i}.png", "category": "watch" if i == 4 else "mug"})
    lines[2]["reference"] = "4.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_data_paints_item_i_as_a_single_picture_with_seed_plus_i_and_skips_broken_ones(run, refused, items):
    (items / "1.png").write_bytes(b"no image")
    err = refused("--data", items, "--seed", 7, said="out: 4 painted, 0 were there, 1 broken\n")
    assert "1.png" in err and err.endswith("1 items can't be used, more than 1%; they are named above\n")
    assert [(line["seed"], line["file"], line["category"]) for line in manifest()] == [
        (7 + i, f"{i:06}_{i}.png", "watch" if i == 4 else "mug") for i in (0, 2, 3, 4)]
    for i, category, *more in ((2, "mug", "--reference", items / "4.png"), (4, "watch")):
        [path], _ = run("--product", items / f"{i}.png", "--category", category, "--seed", 7 + i, *more, "--out", "one")
        assert same(path, f"out/{i:06}_{i}.png")


def test_data_goes_on_where_it_stopped_and_paints_an_interrupted_batch_again_as_a_whole(run, items, monkeypatch):
    """Its pictures are then those of an uninterrupted run; existing ones are not written again."""
    def files():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").glob("0*.png")}

    sizes, paint = [], generate.paint
    monkeypatch.setattr(generate, "paint", lambda sd, canvas, **how: sizes.append(len(canvas.rgb)) or paint(
        sd, canvas, **how))
    run("--data", items, "--batch", 2)
    before = files()
    Path("out/000001_1.png").unlink()
    with open("out/manifest.jsonl", "a") as file:
        file.write('{"item": 1, "fi')  # left by a process killed while writing
    out, _ = run("--data", items, "--batch", 2)
    assert str(out[-1]) == "out: 1 painted, 4 were there, 0 broken" and sizes == [2, 1, 1, 1, 2]
    after = files()
    assert {path for path in before if before[path] != after[path]} == {Path("out/000001_1.png")}
    assert all(after[path][0] == before[path][0] for path in before)
    assert {line["file"] for line in manifest()} == {path.name for path in before}


def test_pictures_painted_in_another_way_are_not_taken_for_done(run, refused, items, toy, tmp_path):
    own = shutil.copytree(toy / "cg", tmp_path / "own")
    done = "--data", items, "--limit", 1, "--seed", 7, "--cg", own
    run(*done)
    for options, difference in ((("--seed", 8), "with seed 7"), (("--guidance", 3), "with guidance 2.0"),
                                (("--start", "noise"), "with start reference"), (("--eta", 1), "with eta 0.0"),
                                (("--sampler", "dpm++"), "with sampler ddim"), (("--refine", 2), "with refine 1")):
        assert refused(*done, *options).endswith(
            f"\nerror: --out out holds 000000_0.png, which was painted {difference}; "
            "name another folder, or give the options it was painted with\n")
    os.utime(own / UNET_FILE, ns=(1, 1))  # as after further training
    assert "painted with other weights" in refused(*done)


@pytest.mark.parametrize("line", [{}, {"file": 1}, {"file": "a", "image": "a", "category": "b", "seed": 0, "how": 1}])
def test_a_line_of_a_manifest_that_does_not_say_how_is_refused(line, refused, items):
    Path("out").mkdir()
    Path("out/manifest.jsonl").write_text(json.dumps(line) + "\n")
    assert "error: out/manifest.jsonl:1 does not say how a picture was painted; remove" in refused("--data", items)


def test_two_processes_share_a_data_set_and_the_first_draws_the_sheet_of_all(run, items, monkeypatch):
    """They are started as by torchrun, but one after the other. One process then finds nothing to do."""
    for world, rank, painted, there in ("2", "1", 2, 0), ("2", "0", 3, 0), ("1", "0", 0, 5):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", rank)
        sheet = Path("out/sheet.png").exists() and pixels("out/sheet.png")
        out, _ = run("--data", items)
        assert str(out[-1]) == f"out: {painted} painted, {there} were there, 0 broken"
    assert (pixels("out/sheet.png") == sheet).all()


def test_too_many_broken_items_are_those_of_the_whole_data_set_and_all_processes(run, refused, items, monkeypatch):
    """In a torchrun, which ends all processes when one fails, each waits for the others."""
    (items / "1.png").write_bytes(b"no image")  # one of two in this process's share
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(gallery, "BROKEN", 0.25)
    out, _ = run("--data", items)
    assert str(out[-1]) == "out: 1 painted, 0 were there, 1 broken"
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "all_reduce", lambda number: number.add_(1))  # the other process's
    assert "2 items can't be used" in refused("--data", items, said="out: 0 painted, 1 were there, 1 broken\n")


def test_data_with_an_unknown_category_or_a_seed_of_more_than_32_bits_stops_before_painting(run, refused, items, toy):
    lines = items / "metadata.jsonl"
    lines.write_text(lines.read_text().replace("watch", "teapot"))
    assert refused("--data", items) == (
        f"error: CG was not trained on category 'teapot'; choose one from {toy / 'cg' / 'categories.json'}, such "
        "as mug, running shoe, watch, sneaker; generate.py --plain-prompt paints others too\n")
    assert "--seed: the last picture's seed would be 4294967296, more than 4294967295" in refused(
        "--data", items, "--seed", 2**32 - 4)
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_script_itself(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cutout("mug.png")

    def script(*arguments):
        done = subprocess.run([sys.executable, ROOT / "generate.py", *arguments], capture_output=True, text=True)
        assert "\r" not in done.stderr, "a bar where stderr is no terminal"
        return done.returncode, done.stdout, done.stderr

    networks = "--weights", toy / "base", "--cg", toy / "cg"
    assert script(*MUG, *networks, "--steps", "1")[:2] == (0, "out/mug_0.png\n")
    assert script("--steps", "0") == (2, "", "error: argument --steps: '0' must be a whole number from 1 to 500\n")


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def files(toy, tmp_path_factory):
    """Good files, and one of each kind of bad one."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cutout("mug.png")
        Image.fromarray(disc(40, 48)).save("small.png")
        for name in ("folder", "nothing"):
            Path(name).mkdir()
        Path("nothing/metadata.jsonl").touch()
        write_json({"mug": "sks 1"}, shutil.copytree(toy / "pg", "renamed") / Path("categories.json"))
        unet = TOY_UNET | {"block_out_channels": [8, 16, 16, 24], "cross_attention_dim": 32}
        save_control(CategoryGenerator(control_config(unet, 4)), Path("other"), categories=CATEGORIES)
    return folder


BAD = {  # options: what the line says
    "--product mug.png --category mug --margin 0.5": "'0.5' must be a number from 0 to 0.45",
    "--product mug.png --category mug --aspect 3:0": "--aspect: '3:0' must be a ratio of width to height",
    "--product mug.png --category mug --pg-scale nan": "--pg-scale: 'nan' must be a number",
    "--product mug.png --category mug --pg-scale 0": "--pg-scale goes with a reference; add --reference",
    "--product mug.png --category mug --guidance 1 --negative x": "--negative goes with guidance",
    "--prompt mug --margin 0": "--prompt and --margin exclude each other",
    "--product gone.png --category mug": "gone.png: no such file",
    "--product rgb.png --category mug": "by --mask",
    "--product rgb.png --category mug --mask small.png": "small.png is 48 x 40",
    "--product mug.png --category teapot": "such as mug, running shoe, watch, sneaker; generate.py --plain-prompt",
    "--product mug.png": "--product goes with --category; add that one",
    "--category mug": "--category goes with --product",
    "--product mug.png cup.png --category mug --mask mask.png": "--mask: 1 given for 2 of --product",
    # on macOS and Windows one file
    "--product mug.png folder/Mug.png --category mug": "two pictures would be named Mug_0.png; rename a file",
    "--product mug.png --category rice-cooker rice_cooker": "would be named mug_rice_cooker_0.png",
    "--reference mug.png": "--reference goes with --product",
    "--product mug.png --category mug --reference rgb.png": "by --reference-mask",
    "--product mug.png --category mug --reference-mask mask.png": "--reference-mask goes with --reference",
    "--product mug.png --category mug --controlnet c --cg d": "--controlnet and --cg exclude each other",
    "--product mug.png --category mug --hint inpaint": "--hint goes with --controlnet",
    "--product mug.png --category mug --controlnet gone.safetensors": "gone.safetensors is missing",
    "--product mug.png --category mug --split bg1k": "--split goes with --data",
    "--product mug.png --category mug --weights gone --cg {toy}/cg --reference mug.png": "--pg is missing",
    "--product mug.png --category mug --cg folder": "categories.json is missing",
    "--product mug.png --category mug --cg other": "belong together",
    "--product mug.png --category mug --reference mug.png --pg renamed": "trained on other categories",
    "--how mug.png": "mug.png: no command paints it again",
    "--data nothing": "nothing: the data set, or this split of it, is empty",
    "--data folder --split bg2k": "--split bg2k",
    "--data folder --num 2": "--num",
    "--prompt mug --weights model.ckpt": "model.ckpt is a pickle",
    "--prompt mug --tokenizer folder": "folder holds no tokenizer",
    "--prompt mug --steps 501": "--steps: '501' must be a whole number from 1 to 500",
    "--prompt mug --seed 4294967295 --num 2": "--seed: the last picture's seed would be 4294967296",
    "--prompt mug --vae folder": "folder holds no diffusion_pytorch_model.safetensors",
    "--prompt mug --size 65": "--size 65: must be a multiple of 32, such as 64",
    "--prompt mug --eta 0.5 --sampler dpm++": "--eta goes with --sampler ddim",
    "--prompt mug --refine 9": "--refine: '9' must be a whole number from 1 to 8",
    "--prompt mug --refine 8 --size 1024": "--refine 8: paints 8192 pixels, more than 4096; lower it, or --size",
    "--prompt mug --refine 2 --refine-from 0": "--refine-from: '0' must be a whole number from 1 to 999",
    "--prompt mug --refine 2 --sampler dpm++ --steps 1 --spacing trailing": "none of the 1 steps is that late",
    "--prompt mug --refine-from 300": "--refine-from goes with a second pass; add --refine 2",
    "--prompt mug --steps 2.5": "--steps: '2.5' must be a whole number",
    "--prompt mug --guidance nan": "--guidance: 'nan' must be a number from 1 to 30",
    "--prompt mug --out mug.png/new": "mug.png is not a folder that can be written to; choose another",
    "--prompt mug --out " + "o" * 300: "File name too long",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_writes_nothing(refused, files, toy, monkeypatch, options):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    err = refused(*options.format(toy=toy).split())
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[options] in err
    assert sorted(files.rglob("*")) == before
