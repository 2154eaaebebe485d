"""Tests: large pictures through the VAE: strips of rows give the whole map's numbers."""

import copy

import pytest
import torch
from conftest import VAE_CONFIG, random, randomise, relative_error

from support import strips
from vae import VAE


def both(vae, x, z):
    """An encoded picture and a decoded latent."""
    return vae.encode(x)[0], vae.decode(z)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("positions", [100, 2000])  # strips of one row of the largest maps, and of many
def test_strips_show_no_seam(monkeypatch, positions, layout):
    """Up to float32's rounding, 1e-5 of the largest value: a thousandth of one of 255 levels."""
    vae = randomise(VAE(VAE_CONFIG)).to(memory_format=layout)
    inputs = random(2, 3, 64, 72), random(2, 4, 8, 9)
    whole = both(vae, *inputs)
    monkeypatch.setattr(strips, "STRIP", positions)
    for ours, theirs in zip(both(vae, *inputs), whole):
        assert relative_error(ours, theirs) < 1e-5
        assert ours.stride() == theirs.stride(), "a map in another layout is copied by the next layer"


@torch.no_grad()
def test_strips_in_half_precision_are_as_exact_as_the_whole(monkeypatch):
    vae, inputs = randomise(VAE(VAE_CONFIG)), (random(2, 3, 64, 72), random(2, 4, 8, 9))
    half = copy.deepcopy(vae).bfloat16()
    exact, whole = both(vae, *inputs), both(half, *(x.bfloat16() for x in inputs))
    monkeypatch.setattr(strips, "STRIP", 500)
    for ours, theirs, wanted in zip(both(half, *(x.bfloat16() for x in inputs)), whole, exact):
        assert (ours - wanted).abs().mean() < 1.5 * (theirs - wanted).abs().mean()


def test_with_gradients_the_map_stays_whole(monkeypatch):
    vae, z = randomise(VAE(VAE_CONFIG)), random(1, 4, 8, 9).requires_grad_()
    whole = vae.decode(z)
    monkeypatch.setattr(strips, "STRIP", 500)
    again = vae.decode(z)
    assert torch.equal(again, whole)
    again.square().mean().backward()
    assert z.grad.abs().min() > 0
