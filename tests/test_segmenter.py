"""Tests: the segmenter and what duplicates counts with it: pasted products, a learnt example, pictures of our own."""

import pytest
import torch
from conftest import random
from torch import Generator, Tensor

import evaluate
import train
from data import load_ad
from rivals import eq3, lab as methods, segmenter
from rivals.lab import Networks
from rivals.segmenter import Segmenter, SegmenterLoss, load_segmenter, paste
from support.datasets import read_items
from support.files import BadInput
from support.images import load_masked, save_image
from toy.world import write_world

WIDTHS = (8, 16, 16, 16, 16)


@pytest.fixture(scope="module")
def ads(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, size=64, base=0, ads=16, bg1k=8, pairs=2, workers=1, parts=("ads",))
    return root / "ads"


def test_a_pasted_product_is_smaller_whole_and_labelled_and_nothing_else_changes():
    """A white square of 16 x 16 pixels on black, pasted into grey: it has its place and size, and grey stays grey."""
    product = torch.zeros(40, 3, 64, 64)
    product[:, :, 24:40, 24:40] = 1
    category = torch.arange(1, 41)
    image, label = paste(torch.full_like(product, 0.5), torch.zeros(40, 64, 64, dtype=torch.long), product,
                         product[:, :1], category, Generator().manual_seed(0))
    scale, y, x = torch.rand(3, 40, generator=Generator().manual_seed(0))
    scale = segmenter.SCALE[0] + (segmenter.SCALE[1] - segmenter.SCALE[0]) * scale
    row, column = (torch.arange(64) + 0.5).view(1, 64, 1), (torch.arange(64) + 0.5).view(1, 1, 64)
    away = torch.maximum((row - 64 * y.view(-1, 1, 1)).abs(), (column - 64 * x.view(-1, 1, 1)).abs())  # (40, 64, 64)
    half = 8 * scale.view(-1, 1, 1)
    assert (label[away < half - 1] > 0).all() and ((label == 0) | (label == category.view(-1, 1, 1))).all()
    assert (label[away > half + 1] == 0).all() and (image[:, 0][away > half + 2] == 0.5).all()
    assert ((image[:, 0] > 0.75) == (label > 0)).all()


def test_pictures_of_any_size_get_a_label_per_four_pixels():
    net = Segmenter({"categories": ["mug", "cap"], "widths": WIDTHS})
    assert net(random(2, 3, 72, 100)).shape == (2, 3, 18, 25)


def test_it_learns_to_tell_two_products_from_their_scenes(ads):
    """From two ads whose products it must find again, also where they were pasted."""
    torch.manual_seed(0)
    items = read_items(ads)[0][:2]
    image, mask = (torch.stack(part) for part in zip(*(load_ad(item, 64) for item in items)))
    loss = SegmenterLoss(Segmenter({"categories": ["a", "b"], "widths": WIDTHS}), torch.tensor([1, 2]))
    batch = {"image": image.repeat(4, 1, 1, 1), "mask": mask.repeat(4, 1, 1, 1), "index": torch.tensor([0, 1] * 4)}
    optimizer, generator = torch.optim.AdamW(loss.segmenter.parameters(), 1e-2), Generator().manual_seed(0)
    for _ in range(40):
        loss(batch, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    crowded, label = loss.crowd(batch, generator)
    found = loss.segmenter(crowded).argmax(dim=1)
    right, there = found == label[:, 2::4, 2::4], label[:, 2::4, 2::4] > 0
    assert right[there].float().mean() > 0.6 and right[~there].float().mean() > 0.8


def test_the_stage_writes_a_segmenter_and_draws_a_sheet(ads, tmp_path, monkeypatch):
    monkeypatch.setattr(segmenter, "WIDTHS", WIDTHS)
    train.main(["segmenter", "--data", str(ads), "--size", "64", "--batch", "4", "--steps", "2", "--device", "cpu",
                "--out", str(tmp_path)])
    net = load_segmenter(tmp_path / "segmenter")
    assert net.config["categories"] == sorted({item.category for item in read_items(ads)[0]})
    assert [file.name for file in (tmp_path / "training" / "segmenter").glob("sheet_*.png")] == ["sheet_000002.png"]


class FindsRed:
    """In a segmenter's place: pure red is the first category, pure blue the second."""

    config = {"categories": ["laptop", "perfume"]}

    def __call__(self, picture: Tensor) -> Tensor:
        red, green, blue = picture[:, :, 2::4, 2::4].unbind(dim=1)
        return torch.stack([torch.full_like(red, 0.5), red - green - blue, blue - green - red], dim=1)


def test_only_products_away_from_the_picture_s_own_are_found():
    """Its own product is red, and so is what touches it: a square of 16 pixels, 8 pixels away, is the only other."""
    picture, M = torch.zeros(3, 64, 64), torch.zeros(1, 64, 64)
    M[:, 16:32, 16:32] = 1
    picture[0, 12:36, 12:36], picture[2, 44:60, 44:60] = 1, 1
    expected = torch.zeros(16, 16, dtype=torch.long)
    expected[11:15, 11:15] = 2
    assert torch.equal(eq3.further_products(FindsRed(), picture, M), expected)


@pytest.mark.parametrize("h, w, square", [(4, 4, True), (3, 9, False), (9, 3, False), (5, 4, True)])
def test_a_product_counts_from_a_square_of_sixteen_pixels_on(h, w, square):
    found = torch.zeros(16, 16, dtype=torch.bool)
    found[5 : 5 + h, 2 : 2 + w] = True
    assert eq3.has_square(found) == square
    if square:
        found[6, 3] = False
        assert not eq3.has_square(found)


def test_duplicates_counts_pictures_with_another_product(ads, tmp_path, monkeypatch, capsys):
    """ControlNet adds a red product to every picture, plain attention a blue one to every second, CG none."""
    def pictures(lab, name, items, folder):
        paths = [tmp_path / f"{name}_{i}.png" for i in range(len(items))]
        for i, (item, path) in enumerate(zip(items, paths)):
            M = load_masked(item.image, item.mask)[1]
            picture, corner = torch.zeros(3, *M.shape[1:]), M[:, :24, :24].sum() == 0
            assert corner, "the test needs a free corner"
            if name == "controlnet" or name == "cg-plain" and i % 2:
                picture[0 if name == "controlnet" else 2, :16, :16] = 1
            save_image(picture, path)
        return paths

    monkeypatch.setattr(methods.Lab, "pictures", pictures)
    monkeypatch.setattr(Networks, "path", lambda self, name: tmp_path)
    monkeypatch.setattr(eq3, "load_segmenter", lambda folder: FindsRed())
    items = [item for item in read_items(ads, "bg1k")[0] if item.category in FindsRed.config["categories"]]
    monkeypatch.setattr(methods.Lab, "items", lambda self, protocol: items)
    evaluate.main(["duplicates", "--data", str(ads), "--out", str(tmp_path / "out"), "--size", "64"])
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in
            (tmp_path / "out" / "duplicates.md").read_text().splitlines()[2:] if (cells := line.split("|"))}
    first = sum(item.category == "laptop" for item in items) / len(items)
    assert rows["ControlNet"][0].startswith("100.00") and rows["ControlNet"][1].startswith(f"{100 * first:.2f}")
    assert rows["CG"][0].startswith("0.00") and rows["ControlNet"][3].startswith("100.00")
    assert float(rows["CG with plain attention"][0].split()[0]) == pytest.approx(100 * (len(items) // 2) / len(items))
    assert (tmp_path / "out" / "duplicates-cg.png").is_file() and "duplicates.md" in capsys.readouterr().out


def test_duplicates_needs_the_toy(tmp_path):
    with pytest.raises(BadInput, match="this command works with the toy only"):
        Networks({"weights": tmp_path}, {}, "cpu").path("segmenter")
