"""Tests: the losses from which the toy's base learns the second pass, the decoder's and the UNet's, written out."""

from pathlib import Path

import pytest
import torch
from conftest import random

from data import TrainingSamples
from sampler import Schedule
from support.datasets import Item
from toy.stages import EDGES, SECOND_PASS, TwoSizes, UNetLoss, VAELoss, near_edges


def test_near_edges_is_1_within_two_pixels_of_a_step_and_0_beyond():
    x = torch.full((1, 3, 12, 16), -0.5)
    x[:, 1, :, 8:] = 0.0  # between columns 7 and 8
    assert near_edges(x)[0, 0].tolist() == [[0.0] * 5 + [1.0] * 5 + [0.0] * 6] * 12


@pytest.mark.parametrize("distance, weight", [(-12, 1), (0, 1 + EDGES)])
def test_an_error_beside_an_edge_counts_more_in_the_decoders_loss(distance, weight):
    """The loss of a decoder that is wrong by 0.5 in one column, at a distance from a vertical edge."""

    class Wrong:
        scaling_factor = 1.0

        def encode(self, x):
            self.x = x
            return torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 8), -30.0)

        def decode(self, z):
            x = self.x.clone()
            x[..., (x[0, 0, 0] < 0).sum() + distance] += 0.5  # the first column of the white half, or one further left
            return x

    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1.0
    loss = VAELoss(Wrong(), torch.eye(3), 64, decoder_only=True)({"image": image}, torch.Generator().manual_seed(1))
    pooled = (0.5 / 4) ** 2 / 8  # one column of four in a block, one block of eight
    assert loss.item() == pytest.approx(pooled + weight * 0.5 / 32, rel=1e-4)


def test_two_sizes_noises_the_enlarged_picture_no_further_than_the_second_pass_goes():
    items = [Item(Path(f"{i}.png"), None, "mug") for i in range(5)]
    small, large = ({name: torch.zeros(5, 4, side, side) for name in ("mean", "logvar")} for side in (16, 32))
    first = torch.arange(len(items)).view(-1, 1, 1, 1).expand(-1, 4, 32, 32)
    samples = TwoSizes(*(TrainingSamples(items, 64, [latents], pictures=False)
                         for latents in (small, large | {"z_first": first})))
    drawn = [samples[3, seed] for seed in range(64)]
    assert len(samples) == len(items)
    assert {s["z_0"].shape[1] for s in drawn} == {16} and {s["large_z_0"].shape[1] for s in drawn} == {32}
    assert max(s["large_t"] for s in drawn) in range(SECOND_PASS // 2, SECOND_PASS)
    assert max(s["t"] for s in drawn) > SECOND_PASS
    assert all(torch.equal(s["large_z_first"], first[3]) for s in drawn)


class Base:
    """A Stable Diffusion whose UNet keeps its inputs and returns a given output."""

    schedule = Schedule()
    texts: list = []

    def prompts(self, texts):
        self.texts.append(texts)
        return torch.zeros(len(texts), 1, 1)

    def unet(self, z, t, P):
        self.z_t = z
        return torch.zeros_like(z)  # so that the error is the square of the target


def test_the_loss_of_two_sizes_adds_the_unweighted_error_without_a_prompt():
    sd, t = Base(), torch.tensor([3, 700])
    batch = {"index": torch.tensor([0, 1]), "z_0": random(2, 4, 8, 8), "eps": random(2, 4, 8, 8, seed=1), "t": t}
    large = {"z_0": random(2, 4, 16, 16), "z_first": random(2, 4, 16, 16, seed=3), "t": t // 4,
             "eps": random(2, 4, 16, 16, seed=2), "drop": torch.tensor([0.0, 0.0])}
    weight = torch.arange(1000.0)
    loss = UNetLoss(sd, [("a mug", "a wall"), ("a bag", "a beach")], weight)
    total = loss(batch | {f"large_{name}": x for name, x in large.items()}, torch.Generator())
    first = (batch["eps"].square().mean(dim=(1, 2, 3)) * weight[t]).mean()
    assert torch.allclose(total, first + large["eps"].square().mean(), rtol=1e-4) and sd.texts[1] == ["", ""]


@pytest.mark.parametrize("t, drop, far", [(350, 1.0, 1.0), (350, 0.5, 0.5), (150, 1.0, 0.5), (150, 0.0, 0.0)])
def test_the_second_pass_learns_the_noise_that_leads_from_the_first_ones_picture_to_the_drawn_one(t, drop, far):
    sd, (z_0, z_first, eps) = Base(), (random(1, 4, 8, 8, seed=k) for k in range(3))
    loss = UNetLoss(sd, [], torch.ones(1000)).second_pass(z_0, z_first, eps, torch.tensor([t]), torch.tensor([drop]))
    a = sd.schedule.alpha_bar[t].item()
    z_start = (1 - far) * z_0 + far * z_first
    z_t = a**0.5 * z_start + (1 - a) ** 0.5 * eps
    wanted = (z_t - a**0.5 * z_0) / (1 - a) ** 0.5  # so that (z_t − √(1 − ᾱ) ε) / √ᾱ = z_0
    assert torch.allclose(sd.z_t, z_t, atol=1e-5) and torch.allclose(loss, wanted.square().mean(), rtol=1e-4)
