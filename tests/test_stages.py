"""Tests: the losses from which the toy's base learns the second pass, the decoder's and the UNet's, written out."""

from pathlib import Path

import pytest
import torch
from conftest import random

from data import TrainingSamples
from sampler import Schedule
from support.datasets import Item
from toy.stages import EDGES, SECOND_PASS, TwoSizes, UNetLoss, VAELoss


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("distance, weight", [(-4, 1), (-3, 1 + EDGES), (1, 1 + EDGES), (2, 1)])
def test_errors_within_two_pixels_of_an_edge_count_more_in_the_decoders_loss(distance, weight, upright):
    """The decoder is wrong by 0.5 in one column, or row, at this distance from the first white one."""

    class Wrong:
        scaling_factor = 1.0

        def encode(self, x):
            self.x = x
            return torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 8), -30.0)

        def decode(self, z):
            x = self.x.clone()
            lines = x if upright else x.mT
            lines[..., (lines[0, 0, 0] < 0).sum() + distance] += 0.5
            return x

    image = torch.zeros(1, 3, 64, 64)
    (image if upright else image.mT)[..., 32:] = 1.0
    loss = VAELoss(Wrong(), torch.eye(3), 64, decoder_only=True)({"image": image}, torch.Generator().manual_seed(1))
    pooled = (0.5 / 4) ** 2 / 8  # one line of four in a block, one block of eight
    assert loss.item() == pytest.approx(pooled + weight * 0.5 / 32, rel=1e-4)


def test_two_sizes_noises_the_enlarged_picture_no_further_than_the_second_pass_goes():
    items = [Item(Path(f"{i}.png"), None, "mug") for i in range(5)]
    small, large = ({name: torch.zeros(5, 4, side, side) for name in ("mean", "logvar")} for side in (16, 32))
    large["z_first"] = torch.arange(5).view(-1, 1, 1, 1).expand(-1, 4, 32, 32)
    samples = TwoSizes(*(TrainingSamples(items, 64, [latents], pictures=False) for latents in (small, large)))
    drawn = [samples[3, seed] for seed in range(64)]
    assert {(s["z_0"].shape[1], s["large_z_0"].shape[1]) for s in drawn} == {(16, 32)}
    assert max(s["large_t"] for s in drawn) in range(SECOND_PASS // 2, SECOND_PASS)
    assert max(s["t"] for s in drawn) > SECOND_PASS
    assert all((s["large_z_first"] == 3).all() for s in drawn)


class Base:
    """A Stable Diffusion whose UNet keeps its latest input and finds no noise: the error is the square of the noise."""

    schedule = Schedule()

    def prompts(self, texts):
        self.texts = texts
        return torch.zeros(len(texts), 1, 1)

    def unet(self, z, t, P):
        self.z_t = z
        return torch.zeros_like(z)


def test_the_unets_loss_adds_a_second_pass_without_words_or_weights():
    """It starts between the drawn picture's latent and the first pass's, and its ε leads to the drawn one."""
    sd, weight = Base(), torch.linspace(0, 1, 1000)
    first = {"index": torch.arange(4), "z_0": random(4, 4, 8, 8), "eps": random(4, 4, 8, 8, seed=1),
             "t": torch.tensor([3, 700, 20, 500])}
    z_0, z_first, eps = (random(4, 4, 16, 16, seed=seed) for seed in (2, 3, 4))
    t, drop = torch.tensor([350, 350, 150, 150]), torch.tensor([1, 0.5, 1, 0])
    second = {"z_0": z_0, "z_first": z_first, "eps": eps, "t": t, "drop": drop}
    batch = first | {f"large_{name}": x for name, x in second.items()}
    loss = UNetLoss(sd, [("a mug, a wall", "a mug", "a wall")] * 4, weight)(batch, torch.Generator())
    a, far = sd.schedule.alpha_bar[t].view(-1, 1, 1, 1), torch.tensor([1, 0.5, 0.5, 0]).view(-1, 1, 1, 1)
    z_t = a.sqrt() * ((1 - far) * z_0 + far * z_first) + (1 - a).sqrt() * eps
    wanted = (z_t - a.sqrt() * z_0) / (1 - a).sqrt()  # so that (z_t − √(1 − ᾱ) ε) / √ᾱ = z_0
    weighted = (first["eps"].square().mean(dim=(1, 2, 3)) * weight[first["t"]]).mean()
    assert torch.allclose(sd.z_t, z_t, atol=1e-5) and sd.texts == [""] * 4
    assert torch.allclose(loss, weighted + wanted.square().mean(), rtol=1e-4)
