"""Tests: the toy ad world: what the base may learn, what is left to CG, what the tests have not seen."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import refused

import toy.world
from data import load_ad
from support.datasets import read_items
from toy.canvas import Canvas
from toy.products import ALL_PRODUCTS, OTHERS, PRODUCTS
from toy.scenes import SCENES, Brand
from toy.world import ads_jobs, base_jobs, draw_layers, draw_picture, write_world

N = len(PRODUCTS)  # categories
OWN_SCENES = {name: product.scene for name, product in PRODUCTS.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, size=64, base=64, ads=2 * N, bg1k=N, pairs=N, workers=1)
    return root


def contents(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_seed_draws_the_same_files_and_what_is_there_is_left_as_it_is(world, tmp_path, capsys):
    write_world(tmp_path, size=64, base=64, ads=2 * N, bg1k=N, pairs=N, workers=2)
    before = contents(world)
    assert contents(tmp_path) == before
    write_world(tmp_path, size=64, base=2, ads=2, bg1k=1, pairs=1, parts=("ads",))
    assert "ads is there already" in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize("split, count", [("bg60k", 2 * N), ("bg1k", N), ("bgpair", N)])
def test_the_real_reader_reads_every_split(world, split, count):
    items, notes = read_items(world / "ads", split)
    assert len(items) == count and {item.category for item in items} == {*PRODUCTS}, notes
    assert all(bool(item.reference) == (split == "bgpair") for item in items)
    image, mask = load_ad(items[0], 64)
    assert image.shape == (3, 64, 64) and mask[0, 0, 0] == 0 and mask.max() == 1


@pytest.mark.parametrize("scene", SCENES)
def test_every_layout_and_element_that_a_scene_names_is_painted(scene):
    """Each of the four words paints something of its own, other than an unknown one."""
    entry = SCENES[scene]
    all_layouts, all_elements = entry.layouts.split(), entry.elements.split()

    def picture(layout, elements):
        canvas = Canvas(64, 64)
        try:
            entry.paint(canvas, Brand(0), layout, elements)
        except KeyError:
            return None
        return canvas.image.tobytes()

    assert len({picture(layout, all_elements[0]) for layout in (*all_layouts, "unknown")}) == 5
    assert len({picture(all_layouts[0], elements) for elements in (*all_elements, "unknown")}) == 5


def test_a_new_category_is_an_entry_and_so_is_its_scene(tmp_path):
    """Wherever they are in their tables, the ads show it in its scene, and no other category's picture changes."""
    def pictures():
        return [draw_picture(name, scene, 3, 5, 64)[0].tobytes() for name, scene in OWN_SCENES.items()]

    before = pictures()
    products = {"kite": PRODUCTS["watch"]._replace(scene="meadow")} | PRODUCTS
    scenes = {"meadow": SCENES["beach"]._replace(phrase="a meadow")} | SCENES
    with patch.dict(PRODUCTS, products, clear=True), patch.dict(SCENES, scenes, clear=True):
        assert pictures() == before
        ads = ads_jobs(tmp_path / "ads", 0, N + 1, 0, 64, random.Random(0))
        base = base_jobs(tmp_path / "base", 200, 64, random.Random(0))
    assert {job.product: job.scene for job in ads} == OWN_SCENES | {"kite": "meadow"}
    assert "kite" in {job.product for job in base} and "meadow" in {job.scene for job in base}


def test_in_the_base_set_category_and_scene_are_independent_and_captions_name_both(world):
    """Half of the pictures have the plain wall, which is the scene of no category."""
    assert sorted([*OWN_SCENES.values(), "plain wall"]) == sorted(SCENES)
    items = read_items(world / "base")[0]
    scenes = [next(name for name, s in SCENES.items() if item.scene.startswith(s.phrase)) for item in items]
    own = sum(OWN_SCENES[item.category] == scene for item, scene in zip(items, scenes))
    plain = scenes.count("plain wall")
    assert len(items) / 3 < plain < 2 * len(items) / 3 and own < (len(items) - plain) / 2
    assert all(item.product.endswith(item.category) for item in items)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Those of the base set, of the training ads, of BG1k and of the pairs' references."""
    root, rng = tmp_path_factory.mktemp("jobs"), random.Random(0)
    base, ads = base_jobs(root / "base", 2000, 64, rng), ads_jobs(root / "ads", 300 * N, 64, 64, 64, rng)
    return base, ads[: 300 * N], ads[300 * N :][:64], ads[300 * N + 64 :]


def test_in_half_of_the_training_ads_the_product_does_not_show_the_category(jobs):
    """So the scene has to be learnt from the prompt. Test ads and the base set show the category's own product."""
    base, train, *test = jobs
    others = Counter(job.scene for job in train if job.product in OTHERS)
    assert others.keys() == {*OWN_SCENES.values()} and all(110 < n < 190 for n in others.values())  # of 300 each
    for own in (*test, [job for job in train if job.product not in OTHERS]):
        assert {(job.product, job.scene) for job in own} == {*OWN_SCENES.items()}
    assert {job.product for job in base} == {*PRODUCTS}


def test_the_brands_of_the_test_splits_are_in_no_training_picture(jobs):
    """And the two ads of a pair are of one brand."""
    base, train, own, references = ([job.brand for job in part] for part in jobs)
    assert own == references and len({*own}) == 64 and not {*base, *train} & {*own}
    looks = [tuple(vars(Brand(seed)).values()) for seed in {*base, *train, *own}]
    assert len({*looks}) == len(looks), "no two brands look alike"


@pytest.mark.parametrize("scene", SCENES)
def test_two_ads_of_a_brand_are_closer_than_ads_of_two_brands(scene):
    """Apart from the product and a slight pan of the camera, a brand's scene is always the same picture."""
    a, b, other = (np.array(draw_layers("watch", scene, brand, seed, 64)[0], float)
                   for brand, seed in ((7, 0), (7, 1), (8, 0)))
    assert np.abs(a - b).mean() < np.abs(a - other).mean() / 2


@pytest.mark.parametrize("name", ALL_PRODUCTS)
def test_within_the_mask_is_the_product_alone_and_edges_are_soft(name):
    scene = ALL_PRODUCTS[name].scene
    (image, mask), (_, product) = draw_picture(name, scene, 3, 5, 64), draw_layers(name, scene, 3, 5, 64)
    solid, colours = mask == 255, np.asarray(product.convert("RGB").reduce(2)).astype(int)
    assert not mask[0].any() and (mask > 0).mean() > 0.03 and ((mask > 0) & ~solid).any()
    assert np.abs(image[solid] - colours[solid]).max() <= 1


def test_any_resolution_shows_the_same_picture():
    """Reduced to 32 pixels, it is the same up to a few levels."""
    small, large = (draw_picture("perfume", "podium", 1, 1, size)[0].reshape(32, size // 32, 32, -1, 3).mean((1, 3))
                    for size in (64, 96))
    assert np.abs(small - large).mean() < 6


def test_an_interrupted_drawing_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.world, "ProcessPoolExecutor", lambda workers: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path, size=64, base=2, ads=2, bg1k=1, pairs=1)
    assert not (tmp_path / "base").exists()


def test_pairs_without_test_images_are_refused_and_nothing_is_written(tmp_path):
    with refused("--pairs 0"):
        toy.world.main(["--out", str(tmp_path / "data"), "--bg1k", "0"])
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_command_runs_from_any_folder(tmp_path):
    subprocess.run([sys.executable, Path(toy.world.__file__).resolve(), "--sheet", "sheet.png", "--size", "64"],
                   cwd=tmp_path, check=True)
    assert (tmp_path / "sheet.png").is_file()
