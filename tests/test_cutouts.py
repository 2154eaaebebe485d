"""Tests: support/cutouts.py: whatever a file stores at soft edges, in shadows and in glass, the colours are right."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from generate import paste_back
from support import images
from support.cutouts import SOLID

SIDE = 200
WALL = np.stack([*np.indices((SIDE, SIDE)) / SIDE, np.full((SIDE, SIDE), 0.3)], -1) * 255  # no colour occurs twice


def shape(inset=0, blur=0.7, move=(0, 0)):
    """The alpha of a box with round corners, (H, W, 1): a product, its shadow or its inside."""
    picture, (x, y) = Image.new("L", (SIDE, SIDE)), move
    corners = [60 + x + inset, 50 + y + inset, 140 + x - inset, 150 + y - inset]
    ImageDraw.Draw(picture).rounded_rectangle(corners, 12, 255)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)))[..., None] / 255


def layers(*parts):
    """Lays (colour, alpha) over one another, the lowest first -> F (H, W, 3) and M (H, W, 1)."""
    mixed = M = 0
    for colour, alpha in parts:
        mixed, M = mixed * (1 - alpha) + np.multiply(colour, alpha), M * (1 - alpha) + alpha
    return mixed / np.maximum(M, 1e-6), M


def save(path, levels, **how):
    """Writes levels from 0 to 255, (H, W, C), as a picture."""
    Image.fromarray(levels.squeeze().clip(0, 255).round().astype(np.uint8)).save(path, **how)
    return path


def load(picture, mask=None):
    """What load_cutout makes of a file: its colours, (H, W, 3) from 0 to 255, and its mask, (H, W, 1)."""
    rgb, M = (x.permute(1, 2, 0).numpy() for x in images.load_cutout(picture, mask))
    return 255 * rgb, M


def stored(tmp_path, colours, M, **how):
    """The colours that are seen of a cut-out that stores these colours, (H, W, 3) from 0 to 255."""
    return load(save(tmp_path / "x.png", np.concatenate([colours, 255 * M], -1), **how))[0]


BLACK, RED, WHITE, STEEL, DARK = (0, 0, 0), (200, 40, 40), (240, 240, 235), (60, 90, 150), (20, 20, 20)
PRODUCTS = {
    f"{name} {colour}": layers(*below, (colour, shape(blur=blur)))
    for colour in (RED, WHITE, DARK)
    for name, below, blur in [("sharp", [], 0.7), ("feathered", [], 4),
                              ("drop shadow", [(BLACK, 0.45 * shape(0, 7, (9, 11)))], 0.7),
                              ("tight shadow", [(BLACK, 0.6 * shape(0, 2, (2, 3)))], 0.7)]}
AMBIGUOUS = {
    "shadow on all sides": layers((BLACK, 0.45 * shape(0, 7)), (RED, shape())),
    "glass": layers((WHITE, shape(blur=0) - shape(8, 0)), (STEEL, 0.5 * shape(8, 0)))}


@pytest.mark.parametrize("hidden", [BLACK, (255, 255, 255), (90, 140, 60)])
@pytest.mark.parametrize("name", PRODUCTS | AMBIGUOUS)
def test_straight_colours_stay_whatever_lies_under_alpha_0(name, hidden, tmp_path):
    F, M = (PRODUCTS | AMBIGUOUS)[name]
    seen = np.round(255 * M) > 0
    got = stored(tmp_path, np.where(seen, F, hidden), M)
    assert np.abs(got - F)[seen[..., 0]].max() <= 0.51


MIXED = [(name, background) for name in PRODUCTS for background in (BLACK, (255, 255, 255), WALL)
         if background is BLACK or "shadow" not in name]


@pytest.mark.parametrize("name, background", MIXED)
def test_a_background_that_is_mixed_in_is_taken_out(name, background, tmp_path):
    """Black is a premultiplied cut-out, as rembg writes it; the others are a photo's, which hold no shadow."""
    F, M = PRODUCTS[name]
    got = stored(tmp_path, M * F + (1 - M) * background, M)
    assert (np.abs(got - F) * M).max() < 8


@pytest.mark.parametrize("background, how", [(BLACK, {}), (WALL, {}), (None, {}),
                                             (None, {"format": "WEBP", "quality": 80})])
def test_where_nothing_of_a_product_is_seen_its_colour_is_continued(background, how, tmp_path):
    """Without a background the colours are straight, with white under alpha 0, or in a WebP with noise."""
    M = shape(blur=2)
    colours = np.where(M > 0, RED, 255) if background is None else M * RED + (1 - M) * background
    assert np.abs(stored(tmp_path, colours, M, **how) - RED)[M[..., 0] < 0.85].mean() < 4


@pytest.mark.parametrize("name, black, white", [("mask.png", 0, 255), ("mask.jpg", 4, 250)])
def test_a_photo_and_its_mask_leave_no_old_background_and_solid_pixels_as_they_are(name, black, white, tmp_path):
    """A JPEG's mask has noise and, as here, a raised black."""
    true = shape(blur=2)
    photo = (WHITE * true + (1 - true) * WALL).round()
    got, M = load(save(tmp_path / "photo.png", photo), save(tmp_path / name, black + (white - black) * true))
    assert np.abs(got - WHITE)[((true > 0.15) & (true < 0.85))[..., 0]].mean() < 4
    assert np.abs(got - photo)[M[..., 0] == 1].max() < 0.01
    assert (M[true == 0] <= 1 - SOLID).mean() > 0.9


def test_a_contact_shadow_in_the_mask_darkens_the_new_floor(tmp_path):
    """A red box on white, whose mask holds its shadow: over green the shadow is black, and not red."""
    box, shadow = shape(blur=0), 0.45 * shape(0, 5, (0, 12))
    F, M = layers((BLACK, shadow), (RED, box))
    got, _ = load(save(tmp_path / "photo.png", F * M + 255 * (1 - M)), save(tmp_path / "mask.png", 255 * M))
    under = ((box == 0) & (shadow > 0.2))[..., 0]
    assert (got * M)[under].mean() < 5


def test_a_haze_in_the_mask_hides_nothing_of_the_scene():
    M = torch.from_numpy(np.maximum(shape(), WALL[..., :1] / 255 * 12 / 255)).permute(2, 0, 1).float()
    stripes = (torch.arange(SIDE) // 4 % 2).float().expand(3, SIDE, SIDE)
    pasted = paste_back(stripes, M, (0, 0, SIDE, SIDE), torch.full_like(stripes, 0.5), M) / 255
    far = torch.from_numpy(shape(-8, 0) == 0).permute(2, 0, 1).expand_as(pasted)
    assert (pasted - stripes)[far].abs().max() < 0.06


def test_a_cutout_that_fills_its_frame_is_told_to_leave_room(tmp_path, capsys):
    M = np.ones((SIDE, SIDE, 1))
    M[:9, :9] = 0
    stored(tmp_path, np.multiply(RED, M), M)
    assert capsys.readouterr().err.endswith("no room for a background; generate.py --margin makes some\n")
