"""Tests: LaMa against its specification written out, its public file's names, its toy's training, and its commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAMA, equal_weights, random, random_lama, refused, relative_error
from PIL import Image
from safetensors.torch import save_file
from test_public import fill, layout, layouts
from torch import Tensor

import generate
import train
from data import Canvas
from rivals import lab, lama_training
from rivals.lama import LAMA_FILE, LaMa, lama_config, load_lama
from rivals.lama_training import Discriminator, LaMaLoss
from rivals.stages import RIVAL_STAGES
from sampler import SamplerSettings
from support.images import load_cutout, to_image, to_tensor
from toy.world import write_world
from weights import save_module

ROUNDING = 1e-5  # of the largest value: the rounding of float32 sums in another order

# ---------------------------------------------------------------- the specification, written out


def specified(weights: dict[str, Tensor], levels: int, blocks: int, x: Tensor) -> Tensor:
    """What big-lama's code computes from (B, 4, H, W), layer by layer, with its public weights' numbers and names.

    tests/bench.py measures it as the reference: the original's operations, in its order.
    """

    def norm(name: str, x: Tensor) -> Tensor:
        parts = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-5)

    def conv(name: str, x: Tensor, padding: int = 1, stride: int = 1) -> Tensor:
        if padding:
            x = F.pad(x, (padding,) * 4, mode="reflect")
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride)

    def fourier_unit(name: str, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        parts = torch.view_as_real(torch.fft.rfftn(x, dim=(2, 3), norm="ortho"))  # (B, C, h, w // 2 + 1, 2)
        channels = parts.permute(0, 1, 4, 2, 3).reshape(B, 2 * C, h, w // 2 + 1)  # real, imaginary, real, ...
        channels = norm(f"{name}.bn", conv(f"{name}.conv_layer", channels, 0)).relu()
        parts = channels.view(B, C, 2, h, w // 2 + 1).permute(0, 1, 3, 4, 2).contiguous()
        return torch.fft.irfftn(torch.view_as_complex(parts), s=(h, w), dim=(2, 3), norm="ortho")

    def spectral_transform(name: str, g: Tensor) -> Tensor:
        x = norm(f"{name}.conv1.1", conv(f"{name}.conv1.0", g, 0)).relu()
        return conv(f"{name}.conv2", x + fourier_unit(f"{name}.fu", x), 0)

    def both(name: str, l: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        l_new = conv(f"{name}.ffc.convl2l", l) + conv(f"{name}.ffc.convg2l", g)
        g_new = conv(f"{name}.ffc.convl2g", l) + spectral_transform(f"{name}.ffc.convg2g", g)
        return norm(f"{name}.bn_l", l_new).relu(), norm(f"{name}.bn_g", g_new).relu()

    def from_local(n: int, to: str, x: Tensor, padding: int = 1, stride: int = 2) -> Tensor:
        return norm(f"model.{n}.bn_{to}", conv(f"model.{n}.ffc.convl2{to}", x, padding, stride)).relu()

    x = from_local(1, "l", x, padding=3, stride=1)
    for n in range(2, levels + 1):
        x = from_local(n, "l", x)
    l, g = (from_local(levels + 1, to, x) for to in "lg")
    for n in range(levels + 2, levels + 2 + blocks):
        l_new, g_new = both(f"model.{n}.conv2", *both(f"model.{n}.conv1", l, g))
        l, g = l + l_new, g + g_new
    x, up = torch.cat([l, g], dim=1), levels + 3 + blocks
    for n in range(up, up + 3 * levels, 3):
        x = F.conv_transpose2d(x, weights[f"model.{n}.weight"], weights[f"model.{n}.bias"], 2, 1, 1)
        x = norm(f"model.{n + 1}", x).relu()
    return conv(f"model.{up + 3 * levels + 1}", x, padding=3).sigmoid()


@pytest.fixture(scope="module")
def lama() -> LaMa:
    return random_lama()


def scene(*size: int) -> tuple[Tensor, Tensor]:
    """Two pictures, and masks of 0, 1/2 and 1."""
    return random(2, 3, *size).sigmoid(), random(2, 1, *size, seed=1).round().clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("size", [(64, 48), (37, 50), (20, 9), (8, 8), (1, 3)])
def test_lama_paints_what_its_specification_written_out_does_from_a_mask_of_one_where_it_paints_and_keeps_the_rest(
        lama, size):
    """At odd widths of the spectrum and at sizes below a step, too. Padding is numpy's 'symmetric'."""
    rgb, M = scene(*size)
    painted, hidden = lama(rgb, M), (M < 1).float()  # soft edges are painted anew
    padded = [(0, 0), (0, 0), *((0, max(16, -(-n // 8) * 8) - n) for n in size)]
    picture, m = (torch.from_numpy(np.pad(x.numpy(), padded, mode="symmetric")) for x in (rgb, hidden))
    output = specified(lama.state_dict(), LAMA["levels"], LAMA["blocks"], torch.cat([picture * (1 - m), m], dim=1))
    expected = hidden * output[:, :, : size[0], : size[1]] + (1 - hidden) * rgb
    assert relative_error(painted, expected) < ROUNDING
    assert torch.equal(painted * (M == 1), rgb * (M == 1))  # the product, bit for bit
    assert torch.equal(lama.paint(Canvas(rgb, M, [], []), SamplerSettings()), painted)  # as generate.paint does


# ---------------------------------------------------------------- public files


@layouts
def test_every_tensor_of_big_lama_has_its_place():
    tensors = layout("big_lama_generator")
    lama = fill(LaMa, lama_config(tensors), tensors)
    assert (lama.size, lama.multiple, lama.config["blocks"]) == (512, 8, 18)


@pytest.mark.parametrize("prefix", ["", "generator.", "model.generator.", "state_dict.generator."])
def test_every_form_that_circulates_is_read_as_float32(lama, tmp_path, prefix):
    """In half precision; where training wrote it, with its counts of steps and its discriminator."""
    half = {name: tensor.half() for name, tensor in lama.state_dict().items()}
    tensors = {prefix + name: tensor for name, tensor in half.items()}
    if prefix:
        tensors |= {f"{prefix}model.1.bn_l.num_batches_tracked": torch.tensor(7), "discriminator.0": torch.zeros(3)}
    save_file(tensors, tmp_path / "lama.safetensors")
    assert equal_weights(load_lama(tmp_path / "lama.safetensors"), {name: x.float() for name, x in half.items()})


@pytest.mark.parametrize("change, message", [
    (lambda own: {"discriminator.0": torch.zeros(3)}, "holds no generator of LaMa; give big-lama's weights"),
    (lambda own: {"model.diffusion_model.out.2.bias": torch.zeros(4)}, "LaMa; it looks like a whole Stable Diffusion"),
    (lambda own: dict(list(own.items())[:40]), "does not (fit a|hold a whole) LaMa"),
], ids=["discriminator", "base", "cut short"])
def test_weights_that_are_no_lama_are_refused_in_a_line(lama, tmp_path, change, message):
    save_file(change(lama.state_dict()), tmp_path / "x.safetensors")
    with refused(f"x.safetensors .*{message}"):
        load_lama(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- training


def test_each_network_learns_from_its_own_terms_alone():
    """From the one loss, LaMa gets only the gradients of its terms, and the discriminator only those of its own."""
    torch.manual_seed(0)
    loss, (real, M) = LaMaLoss(LaMa(LAMA), Discriminator(4)), scene(32, 32)
    known = (M == 1).float()
    painted = loss.lama.fill(real, known)
    both = loss({"image": real, "mask": M}, None)
    for network, own in ((loss.lama, loss.of_lama(real, painted)),
                         (loss.discriminator, loss.of_discriminator(real, painted.detach(), known))):
        parameters = [p for p in network.parameters() if p.requires_grad]
        ours, expected = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (both, own))
        assert all(map(torch.allclose, ours, expected))
    assert loss.of_lama(real, real) < loss.of_lama(real, painted)  # the ad itself is best


@pytest.mark.slow
def test_the_stage_lama_trains_draws_sheets_and_ends_at_the_same_weights_when_resumed(tmp_path, monkeypatch):
    """The same running statistics of its normalisation layers, too."""
    write_world(tmp_path, size=32, base=0, ads=16, bg1k=8, pairs=2, workers=1, parts=("ads",))
    monkeypatch.setattr(lama_training, "TOY_LAMA", LAMA)
    for name, *options in (("whole", "4"), ("parts", "2"), ("parts", "4", "--resume")):
        train.main(["lama", f"--data={tmp_path / 'ads'}", "--size=32", "--batch=4", f"--out={tmp_path / name}",
                    "--decay=0", "--steps", *options], RIVAL_STAGES)
    whole, parts = (load_lama(tmp_path / name / "lama") for name in ("whole", "parts"))
    assert equal_weights(parts, whole) and whole.size == 32
    assert whole.model[1].bn_l.running_mean.any()
    assert (tmp_path / "whole" / "training" / "lama" / "sheet_000004.png").is_file()


# ---------------------------------------------------------------- its commands


@pytest.fixture(scope="module")
def folder(lama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lama") / "lama"
    save_module(lama, folder, LAMA_FILE)
    return folder


def test_lama_paints_products_in_their_frames(folder, tmp_path, capsys):
    """The product's pixels are kept, and a picture's PNG says how it was painted."""
    rgb, M = scene(40, 56)
    product, mask, path = (tmp_path / name for name in ("mug.png", "mask.png", "mug_3.png"))
    to_image(rgb[0]).save(product)
    to_image(M[0]).save(mask)
    lab.main(["paint", f"--lama={folder}", f"--product={product}", f"--mask={mask}", "--seed=3", f"--out={tmp_path}"])
    assert capsys.readouterr().out.splitlines() == [str(path)]
    picture, (rgb, M) = Image.open(path), load_cutout(product, mask)
    assert ((to_tensor(picture) - rgb) * (M == 1)).abs().max() < 1 / 255
    how = json.loads(picture.text["how"])
    assert (how["image"], how["seed"], how["how"]["method"]) == (str(product), 3, "lama")
    with refused("--size 100: must be a multiple of 8, such as 96"):
        lab.main(["paint", f"--lama={folder}", f"--product={product}", f"--mask={mask}", "--size=100"])
    with refused("no command paints it again"):
        generate.main(["--how", str(path)])


@pytest.mark.parametrize("options, message", [
    ("", "which rival"), ("--lama=x", "mug.png: no such file"),
    ("--lama=x --category=mug", "unrecognized arguments: --category=mug"),
    ("--lama=x --reference=mug.png", "--lama and --reference exclude each other"),
    ("--lama=x --paint-by-example=x", "--lama and --paint-by-example exclude each other"),
    ("--paint-by-example=x", "--paint-by-example goes with --reference"),
    ("--paint-by-example=x --reference=nowhere.png", "nowhere.png: no such file")])
def test_bad_use_of_a_rival_is_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with refused(message):
        lab.main(["paint", "--product=mug.png", *options.split()])
    assert not any(tmp_path.iterdir())
