"""Tests: the toy ad world: what the base may learn, what is left to CG, what the tests have not seen."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import toy.world
from data import load_ad
from support.datasets import read_items
from toy.canvas import Canvas, tint
from toy.products import ALL_PRODUCTS, OTHERS, PRODUCTS, Product
from toy.scenes import SCENES, Brand, Floor, Scene
from toy.world import ads_jobs, base_jobs, draw_layers, draw_picture, write_world

N = len(PRODUCTS)  # categories
OWN_SCENES = {name: product.scene for name, product in PRODUCTS.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, size=64, base=64, ads=2 * N, bg1k=N, pairs=N, workers=1)
    return root


def test_the_same_seed_draws_the_same_files(world, tmp_path):
    write_world(tmp_path / "again", size=64, base=64, ads=2 * N, bg1k=N, pairs=N, workers=2)
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((world / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_the_real_reader_reads_every_split(world):
    for split, count in (("bg60k", 2 * N), ("bg1k", N), ("bgpair", N)):
        items, notes = read_items(world / "ads", split)
        assert len(items) == count and not items[0].inverted and {i.category for i in items} == set(PRODUCTS), notes
        assert all((item.reference is not None) == (split == "bgpair") for item in items)
        image, mask = load_ad(items[0], 64)
        assert image.shape == (3, 64, 64) and mask.min() == 0 and mask.max() == 1


def test_each_category_has_a_scene_of_its_own_and_the_plain_wall_is_none():
    assert sorted([*OWN_SCENES.values(), "plain wall"]) == sorted(SCENES)


@pytest.mark.parametrize("scene", SCENES)
def test_every_layout_and_element_that_a_scene_names_is_painted(scene):
    """Each word paints something of its own, other than every other word and an unknown one."""
    entry = SCENES[scene]

    def picture(layout, elements):
        canvas = Canvas(64, 64)
        try:
            entry.paint(canvas, Brand(0), layout, elements)
        except KeyError:
            return None
        return canvas.image.tobytes()

    assert len({picture(layout, entry.elements[0]) for layout in (*entry.layouts, "unknown")}) == 5
    assert len({picture(entry.layouts[0], elements) for elements in (*entry.elements, "unknown")}) == 5


def test_a_new_category_is_a_function_and_an_entry_and_so_is_its_scene(tmp_path):
    """Wherever they are in their tables, the ads show it in its scene, and no other category's picture changes."""

    def kite(canvas, colour, rng):
        canvas.polygon([(0.5, 0.0), (1.0, 0.4), (0.5, 1.0), (0.0, 0.4)], colour)

    def meadow(canvas, brand, layout, elements):
        canvas.rectangle(-0.1, -0.1, 1.1, 1.1, tint(brand.hue, 0.6, 0.7))
        return Floor(0.7, 0.9)

    def pictures():
        return {name: [x.tobytes() for x in draw_picture(name, ALL_PRODUCTS[name].scene, 3, 5, 64)]
                for name in ALL_PRODUCTS if name != "kite"}

    before = pictures()
    products = {"kite": Product(kite, "meadow", 0.8, (0.3, 0.4), ("red", "blue"))} | PRODUCTS
    scenes = {"meadow": Scene(meadow, "a meadow", ("a", "b", "c", "d"), ("e", "f", "g", "h"))} | SCENES
    with patch.dict(PRODUCTS, products, clear=True), patch.dict(SCENES, scenes, clear=True):
        assert pictures() == before
        ads = ads_jobs(tmp_path / "ads", 0, N + 1, N + 1, 64, random.Random(0))
        base = base_jobs(tmp_path / "base", 200, 64, random.Random(0))
        kites = [job for job in ads if job.product == "kite"]
        assert len(kites) == 2 and {job.product: job.scene for job in ads} == OWN_SCENES | {"kite": "meadow"}
        assert "kite" in {job.product for job in base} and "meadow" in {job.scene for job in base}
        assert ' kite"' in (tmp_path / "base" / "metadata.jsonl").read_text()
        for job in kites:
            image, mask = draw_picture("kite", job.scene, job.brand, job.seed, 64)
            assert tuple(image[0, 0]) == tint(Brand(job.brand).hue, 0.6, 0.7) and (mask == 255).any()


def test_in_the_base_set_category_and_scene_are_independent_and_captions_name_both(world):
    items = read_items(world / "base")[0]
    pairs = Counter((item.category, next(s for s in SCENES.values() if item.scene.startswith(s.phrase)).phrase)
                    for item in items)
    own = sum(n for (category, phrase), n in pairs.items() if SCENES[OWN_SCENES[category]].phrase == phrase)
    plain = sum(n for (_, phrase), n in pairs.items() if phrase == SCENES["plain wall"].phrase)
    assert len(items) / 3 < plain < 2 * len(items) / 3 and own < (len(items) - plain) / 2
    assert len(pairs) > len(items) / 3
    assert all(item.product.endswith(item.category) for item in items)


def test_in_half_of_the_training_ads_the_product_does_not_show_the_category(tmp_path):
    """So the scene has to be learnt from the prompt. Test ads and the base set show the category's own product."""
    base = base_jobs(tmp_path / "base", 200, 64, random.Random(0))
    train, bg1k = 300 * N, 8 * N
    jobs = ads_jobs(tmp_path / "ads", train, bg1k, bg1k, 64, random.Random(0))
    others = Counter(job.scene for job in jobs[:train] if job.product in OTHERS)
    assert set(others) == set(OWN_SCENES.values()) and all(110 < n < 190 for n in others.values())  # of 300 each
    assert all(job.product in OTHERS or OWN_SCENES[job.product] == job.scene for job in jobs[:train])
    assert all(OWN_SCENES[job.product] == job.scene for job in jobs[train:])
    assert {job.product for job in base} == set(PRODUCTS)


@pytest.mark.parametrize("scene", SCENES)
def test_two_ads_of_a_brand_are_closer_than_ads_of_two_brands(scene):
    """Apart from the product and a slight pan of the camera, a brand's scene is always the same picture."""
    a, b, other = (np.asarray(draw_layers("watch", scene, brand, seed, 64)[0]).astype(float)
                   for brand, seed in ((7, 0), (7, 1), (8, 0)))
    assert np.abs(a - b).mean() < np.abs(a - other).mean() / 2


def test_the_brands_of_the_test_splits_are_in_no_training_picture(tmp_path):
    rng = random.Random(0)
    base = base_jobs(tmp_path / "base", 2000, 64, rng)
    ads = ads_jobs(tmp_path / "ads", 2000, 64, 64, 64, rng)
    train = {job.brand for job in base + ads[:2000]}
    test = {job.brand for job in ads[2000:]}
    assert len(ads[2000:]) == 128 and len(test) == 64 and not train & test
    look = [tuple(vars(Brand(seed)).values()) for seeds in (train, test) for seed in seeds]
    assert len(set(look)) == len(look), "no two brands look alike"


@pytest.mark.parametrize("name", ALL_PRODUCTS)
def test_within_the_mask_is_the_product_alone_and_edges_are_soft(name):
    image, mask = draw_picture(name, ALL_PRODUCTS[name].scene, 3, 5, 64)
    assert (mask[0] == 0).all() and (mask > 0).mean() > 0.03
    assert ((mask > 0) & (mask < 255)).any(), "edges are anti-aliased"
    _, product = draw_layers(name, ALL_PRODUCTS[name].scene, 3, 5, 64)
    solid = mask == 255
    colours = np.asarray(product.convert("RGB").reduce(2)).astype(int)
    assert np.abs(image[solid].astype(int) - colours[solid]).max() <= 1


@pytest.mark.parametrize("size", [64, 96, 256])
def test_any_resolution_shows_the_same_picture(size):
    """The world at another size, reduced to 32 pixels, is the world at 128, reduced."""
    pictures = []
    for s in (128, size):
        image = torch.tensor(draw_picture("perfume", "podium", 1, 1, s)[0]).permute(2, 0, 1)[None].float()
        pictures.append(torch.nn.functional.interpolate(image, size=(32, 32), mode="area"))
    assert (pictures[0] - pictures[1]).abs().mean() < 6


def test_what_is_there_already_is_left_as_it_is(world, capsys):
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    write_world(world, size=64, base=2, ads=2, bg1k=1, pairs=1, parts=("ads",))
    assert "ads is there already" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in world.rglob("*")}


def test_an_interrupted_drawing_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.world, "ProcessPoolExecutor", lambda workers: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "data", size=64, base=2, ads=2, bg1k=1, pairs=1)
    assert not (tmp_path / "data" / "base").exists() and not (tmp_path / "data" / "ads").exists()


def test_the_command_runs_from_any_folder_and_refuses_in_one_line(tmp_path):
    script = Path(toy.world.__file__).resolve()
    done = subprocess.run([sys.executable, script, "--out", "data", "--bg1k", "0"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--pairs 0" in done.stderr
    assert not [*tmp_path.iterdir()]
