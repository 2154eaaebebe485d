"""Tests: support/cutouts.py: whatever a file stores at soft edges, in shadows and in glass, the colours are right."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from generate import paste_back
from support import images

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


def load(tmp_path, colours, M, **how):
    """What load_cutout makes of a cut-out that stores these colours, (H, W, 3) from 0 to 255."""
    path = tmp_path / f"x.{'webp' if how else 'png'}"
    Image.fromarray(np.concatenate([colours, 255 * M], -1).clip(0, 255).round().astype(np.uint8)).save(path, **how)
    return 255 * images.load_cutout(path)[0].permute(1, 2, 0).numpy()


BLACK, RED, WHITE, STEEL = (0, 0, 0), (200, 40, 40), (240, 240, 235), (60, 90, 150)
PRODUCTS = {
    f"{name} {colour}": layers(*below, (colour, shape(blur=blur)))
    for colour in (RED, WHITE)
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
    got = load(tmp_path, np.where(seen, F, hidden), M)
    assert np.abs(got - F)[seen[..., 0]].max() <= 0.51


MIXED = [(name, background) for name in PRODUCTS for background in (BLACK, (255, 255, 255), WALL)
         if background is BLACK or "shadow" not in name]


@pytest.mark.parametrize("name, background", MIXED)
def test_a_background_that_is_mixed_in_is_taken_out(name, background, tmp_path):
    """Black is a premultiplied cut-out, as rembg writes it; the others are a photo's, which hold no shadow."""
    F, M = PRODUCTS[name]
    got = load(tmp_path, M * F + (1 - M) * background, M)
    assert (np.abs(got - F) * M).max() < 8


def test_a_contact_shadow_in_the_mask_darkens_the_new_floor(tmp_path):
    """A red box on white, whose mask holds its shadow: over green the shadow is black, and not red."""
    box, shadow = shape(blur=0), 0.45 * shape(0, 5, (0, 12))
    F, M = layers((BLACK, shadow), (RED, box))
    Image.fromarray((F * M + 255 * (1 - M)).round().astype(np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray((255 * M[..., 0]).round().astype(np.uint8)).save(tmp_path / "mask.png")
    got, _ = images.load_cutout(tmp_path / "photo.png", tmp_path / "mask.png")
    under = ((box == 0) & (shadow > 0.2))[..., 0]
    assert (255 * got.permute(1, 2, 0).numpy() * M)[under].mean() < 5


def test_a_haze_in_the_mask_hides_nothing_of_the_scene():
    M = torch.from_numpy(np.maximum(shape(), WALL[..., :1] / 255 * 12 / 255)).permute(2, 0, 1).float()
    stripes = (torch.arange(SIDE) // 4 % 2).float().expand(3, SIDE, SIDE)
    pasted = paste_back(stripes, M, (0, 0, SIDE, SIDE), torch.full_like(stripes, 0.5), M) / 255
    far = torch.from_numpy(shape(-8, 0) == 0).permute(2, 0, 1).expand_as(pasted)
    assert (pasted - stripes)[far].abs().max() < 0.06


def test_a_cutout_that_fills_its_frame_is_told_to_leave_room(tmp_path, capsys):
    M = np.ones((SIDE, SIDE, 1))
    M[:9, :9] = 0
    load(tmp_path, np.multiply(RED, M), M)
    assert capsys.readouterr().err.endswith("leave room around the product in the file\n")
