"""Tests: LaMa against its specification written out, its public file's names, its toy's training, and its commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAMA, equal_weights, random, random_lama, relative_error
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import generate
import train
from data import Canvas, load_ad
from rivals import lab, lama_training
from rivals.lama import LAMA_FILE, LaMa, lama_config, load_lama
from rivals.lama_training import Discriminator, LaMaLoss
from rivals.stages import RIVAL_STAGES
from sampler import SamplerSettings
from support.datasets import read_items
from support.files import BadInput
from support.images import load_cutout, to_tensor
from toy.world import write_world
from weights import main as weights_main, save_module

LAYOUT = Path(__file__).resolve().parents[2] / "shared" / "layouts" / "big_lama_generator.json"
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

    x = norm("model.1.bn_l", conv("model.1.ffc.convl2l", x, padding=3)).relu()
    for n in range(2, levels + 1):
        x = norm(f"model.{n}.bn_l", conv(f"model.{n}.ffc.convl2l", x, stride=2)).relu()
    n = levels + 1
    l, g = (norm(f"model.{n}.bn_{k}", conv(f"model.{n}.ffc.convl2{k}", x, stride=2)).relu() for k in "lg")
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


@pytest.mark.parametrize("size", [(64, 48), (37, 50), (16, 71), (24, 24), (20, 9)])
def test_lama_equals_its_specification_written_out(lama, size):
    """Also at odd widths of the spectrum. Padding at the right and the bottom is numpy's 'symmetric'."""
    rgb, M = random(2, 3, *size).sigmoid(), (random(2, 1, *size, seed=1) > 0).float()
    padded = [(0, 0), (0, 0), *((0, -n % 8 if n > 8 else 8 + -n % 8) for n in size)]
    picture, m = (torch.from_numpy(np.pad(x.numpy(), padded, mode="symmetric")) for x in (rgb, 1 - M))
    output = specified(lama.state_dict(), LAMA["levels"], LAMA["blocks"], torch.cat([picture * (1 - m), m], dim=1))
    expected = (1 - M) * output[:, :, : size[0], : size[1]] + M * rgb
    assert relative_error(lama(rgb, M), expected) < ROUNDING


def test_the_product_is_kept_and_soft_edges_are_painted(lama):
    rgb, M = random(1, 3, 32, 32).sigmoid(), torch.zeros(1, 1, 32, 32)
    M[..., 8:24, 8:24], M[..., 8:24, 8] = 1, 0.5
    painted = lama(rgb, M)
    assert torch.equal(painted[..., 8:24, 9:24], rgb[..., 8:24, 9:24]) and torch.equal(painted, lama(rgb, M.floor()))
    assert not torch.isclose(painted, rgb).all(dim=1)[M[:, 0] < 1].any()


def test_what_is_hidden_is_not_read(lama):
    rgb, M = random(1, 3, 32, 32).sigmoid(), (random(1, 1, 32, 32, seed=1) > 0).float()
    assert torch.equal(lama(rgb, M) * (1 - M), lama(rgb * M, M) * (1 - M))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (8, 8)])
def test_pictures_smaller_than_a_step_of_the_coarsest_level_are_painted(lama, size):
    painted = lama(random(1, 3, *size).sigmoid(), torch.zeros(1, 1, *size))
    assert painted.shape == (1, 3, *size) and painted.isfinite().all()


# ---------------------------------------------------------------- public files


@pytest.mark.skipif(not LAYOUT.is_file(), reason=f"needs the public file's names and shapes in {LAYOUT}")
def test_every_tensor_of_big_lama_has_its_place():
    shapes = {name: shape for name, shape in json.loads(LAYOUT.read_text()).items() if "num_batches" not in name}
    with torch.device("meta"):
        lama = LaMa(lama_config({name: torch.empty(shape) for name, shape in shapes.items()}))
    assert {name: list(tensor.shape) for name, tensor in lama.state_dict().items()} == shapes
    assert sum(p.numel() for p in lama.parameters() if p.requires_grad) == 50_975_875
    assert (lama.size, lama.multiple) == (512, 8)


@pytest.mark.parametrize("counters", [False, True])
@pytest.mark.parametrize("prefix", ["", "generator.", "model.generator.", "state_dict.generator."])
def test_every_form_that_circulates_is_read(lama, tmp_path, prefix, counters):
    """Files with and without the counts of training steps, and with what only training needs."""
    tensors = {prefix + name: tensor for name, tensor in lama.state_dict().items()}
    if counters:
        tensors |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in tensors
                    if name.endswith("running_var")}
    if prefix:
        tensors["discriminator.model0.0.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "lama.safetensors")
    loaded = load_lama(tmp_path / "lama.safetensors")
    assert equal_weights(loaded, lama) and loaded.config["global_channels"] == LAMA["global_channels"]


def test_weights_in_half_precision_are_read_as_float32(lama, tmp_path):
    save_file({name: tensor.half() for name, tensor in lama.state_dict().items()}, tmp_path / "lama.safetensors")
    assert {x.dtype for x in load_lama(tmp_path / "lama.safetensors").parameters()} == {torch.float32}


def test_the_public_pickle_is_converted(lama, tmp_path, capsys):
    """A training checkpoint has the weights under "state_dict", beside counters and an optimiser's state."""
    state = {f"generator.{name}": tensor for name, tensor in lama.state_dict().items()}
    torch.save({"epoch": 40, "state_dict": state, "optimizer_states": [{"step": 9}]}, tmp_path / "best.ckpt")
    with pytest.raises(BadInput, match="weights.py convert .*best.ckpt .*best.safetensors"):
        load_lama(tmp_path / "best.ckpt")
    weights_main(["convert", str(tmp_path / "best.ckpt"), str(tmp_path / "best.safetensors")])
    assert f"give {tmp_path / 'best.safetensors'} where these weights are asked for" in capsys.readouterr().out
    assert equal_weights(load_lama(tmp_path / "best.safetensors"), lama)


def tensors_of(kind: str, lama: LaMa) -> dict[str, Tensor]:
    own = {name: tensor.clone() for name, tensor in lama.state_dict().items()}
    return {"discriminator": {"discriminator.model0.0.weight": torch.zeros(3)},
            "base": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)},
            "unet": {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3)},
            "cut short": dict(list(own.items())[:40]),
            "misshapen": own | {"model.1.bn_l.bias": torch.zeros(7)},
            "extra": own | {"model.99.weight": torch.zeros(7)}}[kind]


@pytest.mark.parametrize("kind, message", [
    ("discriminator", "x.safetensors holds no generator of LaMa; give big-lama's weights"),
    ("base", "x.safetensors holds no generator of LaMa; it looks like a whole Stable Diffusion"),
    ("unet", "x.safetensors holds no generator of LaMa; it looks like a UNet"),
    ("cut short", "x.safetensors does not (fit a|hold a whole) LaMa"),
    ("misshapen", r"does not fit a LaMa: model.1.bn_l.bias has shape \[7\], expected \[4\]"),
    ("extra", "does not fit a LaMa: model.99.weight is not part of this model"),
])
def test_weights_that_are_no_lama_are_refused_in_a_line(lama, tmp_path, kind, message):
    save_file(tensors_of(kind, lama), tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=message) as error:
        load_lama(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def ads(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root, size=32, base=0, ads=16, bg1k=8, pairs=2, workers=1, parts=("ads",))
    return root / "ads"


def batch_of(ads: Path, count: int = 2) -> dict[str, Tensor]:
    image, mask = zip(*(load_ad(item, 32) for item in read_items(ads)[0][:count]))
    return {"image": torch.stack(image), "mask": torch.stack(mask)}


def test_each_network_learns_from_its_own_terms_alone(ads):
    """From the one loss, LaMa gets only the gradients of its terms, and the discriminator only those of its own."""
    torch.manual_seed(0)
    lama, discriminator, batch = LaMa(LAMA), Discriminator(4), batch_of(ads)
    loss = LaMaLoss(lama, discriminator)
    known = (batch["mask"] >= 0.99).float()

    def gradients(value: Tensor) -> list[list[Tensor]]:
        parameters = [[p for p in net.parameters() if p.requires_grad] for net in (lama, discriminator)]
        flat = torch.autograd.grad(value, sum(parameters, []), allow_unused=True)
        return [[g for g in part if g is not None] for part in (flat[: len(parameters[0])], flat[len(parameters[0]) :])]

    painted = lama.fill(batch["image"], known)
    of_lama = gradients(loss.of_lama(batch["image"], painted))
    of_discriminator = gradients(loss.of_discriminator(batch["image"], painted.detach(), known))
    assert not of_lama[1] and not of_discriminator[0]
    both = gradients(loss(batch, None))
    for ours, expected in zip(both, (of_lama[0], of_discriminator[1])):
        assert len(ours) == len(expected) and all(map(torch.allclose, ours, expected))


def test_r1_is_the_length_of_the_gradient_at_real_pictures(ads, monkeypatch):
    """For a discriminator whose logits are linear in the picture, it is known."""
    loss, batch = LaMaLoss(LaMa(LAMA), Discriminator(4)), batch_of(ads)
    slope = random(3, 32, 32)
    monkeypatch.setattr(Discriminator, "forward", lambda self, x: ((x * slope).sum(dim=1, keepdim=True), None))
    values = {}
    for weight in (0.0, 1.0):
        monkeypatch.setattr(lama_training, "R1", weight)
        values[weight] = loss.of_discriminator(batch["image"], batch["image"], batch["mask"])
    assert (values[1.0] - values[0.0]).item() == pytest.approx(slope.square().sum().item(), rel=1e-4)


def trained(ads: Path, out: Path, *options: str) -> Path:
    train.main(["lama", "--data", str(ads), "--size", "32", "--batch", "4", "--out", str(out), "--device", "cpu",
                *options], RIVAL_STAGES)
    return out


@pytest.fixture(scope="module")
def small(request):
    """A smaller network, which trains in seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(lama_training, "TOY_LAMA", LAMA)
    yield
    patch.undo()


def test_lama_learns_to_paint_two_ads(ads):
    """The discriminator is fixed, because the loss need not fall beside one that learns."""
    torch.manual_seed(0)
    loss, batch = LaMaLoss(LaMa(LAMA), Discriminator(4)), batch_of(ads)
    optimizer, errors = torch.optim.AdamW([p for p in loss.lama.parameters() if p.requires_grad], 1e-2), []
    for _ in range(25):
        painted = loss.lama.fill(batch["image"], (batch["mask"] > 0.99).float())
        loss.of_lama(batch["image"], painted).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(F.l1_loss(painted, batch["image"]).item())
    assert errors[-1] < 0.8 * errors[0]


def test_the_stage_lama_trains_writes_a_lama_and_draws_a_sheet(ads, small, tmp_path):
    out = trained(ads, tmp_path / "run", "--steps", "2")
    lama = load_lama(out / "lama")
    assert lama.size == 32 and not torch.equal(lama.model[1].bn_l.running_mean, torch.zeros(LAMA["width"]))
    assert [file.name for file in (out / "training" / "lama").glob("sheet_*.png")] == ["sheet_000002.png"]


def test_a_resumed_training_of_lama_ends_at_the_same_weights(ads, small, tmp_path):
    """This includes the running statistics of its normalisation layers."""
    whole = trained(ads, tmp_path / "whole", "--steps", "6", "--decay", "0")
    trained(ads, tmp_path / "parts", "--steps", "3", "--decay", "0")
    parts = trained(ads, tmp_path / "parts", "--steps", "6", "--decay", "0", "--resume")
    assert equal_weights(load_lama(parts / "lama"), load_lama(whole / "lama"))


# ---------------------------------------------------------------- its commands


@pytest.fixture(scope="module")
def folder(lama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lama") / "lama"
    save_module(lama, folder, LAMA_FILE)
    return folder


def test_a_canvas_is_painted_as_by_generate_paint(lama):
    rgb, mask = random(1, 3, 32, 40).sigmoid(), (random(1, 1, 32, 40, seed=1) > 0).float()
    assert torch.equal(lama.paint(Canvas(rgb, mask, [], []), SamplerSettings()), lama(rgb, mask))


def test_lama_paints_products_in_their_frames(folder, ads, tmp_path, capsys):
    """The product's pixels are kept, and a picture's PNG says how it was painted."""
    item = read_items(ads, "bg1k")[0][0]
    lab.main(["paint", "--lama", str(folder), "--product", str(item.image), "--mask", str(item.mask), "--seed", "3",
              "--out", str(tmp_path)])
    path = tmp_path / f"{item.image.stem}_3.png"
    assert capsys.readouterr().out.splitlines() == [str(path)]
    picture = Image.open(path)
    line = json.loads(picture.text["how"])
    assert (line["image"], line["seed"], line["how"]["method"]) == (str(item.image), 3, "lama")
    rgb, mask = load_cutout(item.image, item.mask)
    assert ((to_tensor(picture) - rgb) * (mask == 1)).abs().max() < 1 / 255
    with pytest.raises(BadInput, match="no command paints it again"):
        generate.main(["--how", str(path)])


@pytest.mark.parametrize("options, message", [
    ("", "required: --product"),
    ("--product {product} --category mug", "unrecognized arguments: --category mug"),
    ("--product {product} --reference {product}", "--lama and --reference exclude each other"),
    ("--product {product} --paint-by-example x", "--lama and --paint-by-example exclude each other"),
    ("--product nowhere.png", "nowhere.png: no such file"),
    ("--product {product} {product}", "two pictures would be named"),
    ("--product {product} --size 100", "--size 100: must be a multiple of 8, such as 96"),
])
def test_bad_use_of_lama_is_one_line(folder, ads, tmp_path, options, message):
    item = read_items(ads, "bg1k")[0][0]
    words = options.format(product=item.image).split()
    masks = ["--mask", *[str(item.mask)] * words.count(str(item.image))] if str(item.image) in words[:2] else []
    with pytest.raises(BadInput, match=message) as error:
        lab.main(["paint", *words, *masks, "--lama", str(folder), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
