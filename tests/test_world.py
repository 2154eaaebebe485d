"""The toy ad world keeps its promises: what the base may learn, what is left to CG, what the tests have not seen."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

import toy.world
from data import load_ad
from support.datasets import read_items
from toy.world import ALL_PRODUCTS, CATEGORIES, OTHERS, SCENES, Brand, draw, layers, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, size=64, base=64, ads=16, bg1k=8, pairs=8, workers=1)
    return root


def test_the_same_seed_draws_the_same_files(world, tmp_path):
    write_world(tmp_path / "again", size=64, base=64, ads=16, bg1k=8, pairs=8, workers=2)
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((world / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_the_real_reader_reads_every_split(world):
    for split, count in (("bg60k", 16), ("bg1k", 8), ("bgpair", 8)):
        items, notes = read_items(world / "ads", split)
        assert len(items) == count and not items[0].inverted and {i.category for i in items} == set(CATEGORIES), notes
        assert all((item.reference is not None) == (split == "bgpair") for item in items)
        image, mask = load_ad(items[0], 64)
        assert image.shape == (3, 64, 64) and mask.min() == 0 and mask.max() == 1


def test_there_are_8_categories_each_with_a_scene_of_its_own():
    assert len(CATEGORIES) == 8 and len(set(CATEGORIES.values())) == len(CATEGORIES)
    assert set(SCENES) - set(CATEGORIES.values()) == {"plain wall"}


def test_in_the_base_set_category_and_scene_are_independent_and_captions_tell_both(world):
    items = read_items(world / "base")[0]
    pairs = Counter((item.category, next(s for s in SCENES.values() if item.scene.startswith(s.phrase)).phrase)
                    for item in items)
    own = sum(n for (category, phrase), n in pairs.items() if SCENES[CATEGORIES[category]].phrase == phrase)
    plain = sum(n for (_, phrase), n in pairs.items() if phrase == SCENES["plain wall"].phrase)
    assert len(items) / 3 < plain < 2 * len(items) / 3 and own < (len(items) - plain) / 2
    assert len(pairs) > len(items) / 3
    assert all(item.product.endswith(item.category) for item in items)


def test_in_half_of_the_training_ads_the_product_does_not_tell_the_category(tmp_path):
    """So that the scene is to be learnt from the prompt; test ads, and the base set, show the category's own."""
    base = toy.world.base_jobs(tmp_path / "base", 200, 64, random.Random(0))
    jobs = toy.world.ads_jobs(tmp_path / "ads", 2400, 64, 64, 64, random.Random(0))
    others = Counter(job.scene for job in jobs[:2400] if job.kind in OTHERS)
    assert set(others) == set(CATEGORIES.values()) and all(110 < n < 190 for n in others.values())  # of 300 each
    assert all(job.kind in OTHERS or CATEGORIES[job.kind] == job.scene for job in jobs[:2400])
    assert all(CATEGORIES[job.kind] == job.scene for job in jobs[2400:]) and {j.kind for j in base} == set(CATEGORIES)


@pytest.mark.parametrize("scene", SCENES)
def test_two_ads_of_a_brand_are_closer_than_ads_of_two_brands(scene):
    """Behind other products and up to a slight pan of the camera, a brand's scene is one picture."""
    a, b, other = (np.asarray(layers("watch", scene, brand, seed, 64)[0]).astype(float)
                   for brand, seed in ((7, 0), (7, 1), (8, 0)))
    assert np.abs(a - b).mean() < np.abs(a - other).mean() / 2


def test_the_brands_of_the_test_splits_are_in_no_training_picture(tmp_path):
    rng = random.Random(0)
    base = toy.world.base_jobs(tmp_path / "base", 2000, 64, rng)
    ads = toy.world.ads_jobs(tmp_path / "ads", 2000, 64, 64, 64, rng)
    train = {job.brand_seed for job in base + ads[:2000]}
    test = {job.brand_seed for job in ads[2000:]}
    assert len(ads[2000:]) == 128 and len(test) == 64 and not train & test
    look = [tuple(vars(Brand(seed)).values()) for seeds in (train, test) for seed in seeds]
    assert len(set(look)) == len(look), "no two brands look alike"


@pytest.mark.parametrize("kind", ALL_PRODUCTS)
def test_within_the_mask_is_the_product_alone_and_edges_are_soft(kind):
    image, mask = draw(kind, CATEGORIES.get(kind, "podium"), 3, 5, 64)
    assert (mask[0] == 0).all() and (mask > 0).mean() > 0.03
    assert ((mask > 0) & (mask < 255)).any(), "edges are anti-aliased"
    _, product = layers(kind, CATEGORIES.get(kind, "podium"), 3, 5, 64)
    solid = mask == 255
    colours = np.asarray(product.convert("RGB").reduce(2)).astype(int)
    assert np.abs(image[solid].astype(int) - colours[solid]).max() <= 1


@pytest.mark.parametrize("size", [64, 96, 256])
def test_any_resolution_shows_the_same_picture(size):
    """The world at another size, reduced to 32 pixels, is the world at 128, reduced."""
    pictures = []
    for s in (128, size):
        image = torch.tensor(draw("perfume", "podium", 1, 1, s)[0]).permute(2, 0, 1)[None].float()
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
