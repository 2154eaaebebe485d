"""Tests: Paint by Example: the picture of diffusers' pipeline, the public files, and the places where errors hide."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SD1, VAE_CONFIG, VISION_CONFIG, equal_weights, random, randomise, refused, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from test_public import WIDE, WIDE_VAE, config, fill, layout, layouts, original, original_unet, original_vae

import train
from clip import CLIP
from data import Canvas
from model import UNet
from programs.models import TOY
from rivals import lab, paint_by_example_training
from rivals.paint_by_example import (
    GUIDANCE,
    PREFIXES,
    RENAMES,
    PaintByExample,
    PaintByExampleEncoder,
    load_paint_by_example,
)
from rivals.paint_by_example_training import ExampleLoss, exemplars_from, initial
from rivals.stages import RIVAL_STAGES
from sampler import SamplerSettings, Schedule, draw_noise, seeded
from support.files import write_json
from support.images import resize, to_image, to_tensor
from support.layouts import split_by_model
from toy.world import write_world
from vae import VAE
from weights import CLIP_FILE, UNET_FILE, StableDiffusion, load_clip, load_stable_diffusion, save_module

NINE = SD1 | {"in_channels": 9}
ENCODER = VISION_CONFIG | {"architectures": ["PaintByExampleImageEncoder"], "num_hidden_layers": 9,
                           "projection_dim": 24}
TOLERANCE = 1e-4  # of the largest value, in float32
SIZE, STEPS = 64, 3


@pytest.fixture(scope="module")
def pbe() -> PaintByExample:
    unet, vae = randomise(UNet(NINE), seed=1), randomise(VAE(VAE_CONFIG), seed=3)
    encoder = randomise(PaintByExampleEncoder(ENCODER), seed=2)
    return PaintByExample(StableDiffusion(None, None, unet, vae, Schedule()), encoder)


@pytest.fixture(scope="module")
def folder(pbe, tmp_path_factory) -> Path:
    """A public folder with the same weights."""
    root = tmp_path_factory.mktemp("pbe")
    save_module(pbe.image_encoder, root / "image_encoder", CLIP_FILE)
    save_module(pbe.sd.unet, root / "unet", UNET_FILE)
    save_module(pbe.sd.vae, root / "vae", UNET_FILE)
    write_json({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1,
                "set_alpha_to_one": False}, root / "scheduler" / "scheduler_config.json")
    return root


def scene(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and masks, whose edges lie between the latent's cells: there diffusers' nearest pixels are ours."""
    mask = torch.zeros(batch, 1, SIZE, SIZE)
    mask[:, :, 16:40, 24:48] = 1
    mask[:, :, 24:32, 40:] *= 0.499
    return random(batch, 3, SIZE, SIZE, seed=5).sigmoid(), mask


EXEMPLARS = random(2, 3, 32, 32, seed=6).sigmoid()


def unet_inputs(unet: torch.nn.Module, paint) -> list[SimpleNamespace]:
    """The UNet's inputs at each step while paint() runs."""
    calls = []

    def note(module, args, kwargs):
        z, _, context = (*args, *kwargs.values())[:3]
        calls.append(SimpleNamespace(z=z.clone(), context=context.clone()))

    with unet.register_forward_pre_hook(note, with_kwargs=True):
        paint()
    return calls


def paint(pbe: PaintByExample, count: int = 1) -> torch.Tensor:
    return pbe.paint(Canvas(*scene(count), [], seeded(0, count), EXEMPLARS[:count]), SamplerSettings(STEPS, GUIDANCE))


# ---------------------------------------------------------------- beside diffusers


MEAN, STD = (torch.tensor(values)[:, None, None] for values in (CLIP.mean, CLIP.std))


def their_encoder(folder: Path) -> torch.nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
    from transformers import CLIPVisionConfig

    theirs = PaintByExampleImageEncoder(CLIPVisionConfig.from_pretrained(folder)).eval()
    new = "model.embeddings.class_embedding" in theirs.state_dict()  # transformers 5 leaves out a part of the names
    theirs.load_state_dict({name.replace("model.vision_model.", "model.") if new else name: tensor
                            for name, tensor in load_file(folder / CLIP_FILE).items()})
    return theirs


@torch.no_grad()
def test_a_picture_the_tokens_and_all_that_the_unet_reads_are_those_of_diffusers_pipeline(pbe, folder, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PaintByExamplePipeline(
        diffusers.AutoencoderKL.from_pretrained(folder / "vae"), their_encoder(folder / "image_encoder"),
        diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1), None, None)
    theirs.set_progress_bar_config(disable=True)
    posterior = type(theirs.vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist)
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())  # we take the mean, not a draw
    rgb, mask = scene()
    expected, ours = [], []

    def call() -> None:
        noise = draw_noise((4, SIZE // 8, SIZE // 8), seeded(0)[0])
        expected.append(theirs(example_image=(EXEMPLARS[:1] - MEAN) / STD, image=2 * rgb - 1, mask_image=1 - mask,
                               num_inference_steps=STEPS, guidance_scale=5.0, latents=noise, output_type="np").images)

    wanted = unet_inputs(theirs.unet, call)
    given = unet_inputs(pbe.sd.unet, lambda: ours.append(paint(pbe)))
    for a, b in zip(given, wanted, strict=True):
        for rows in b.z.chunk(2):  # guidance's two passes, which in our UNet are one up to the first cross-attention
            assert relative_error(a.z, rows) < TOLERANCE
        assert relative_error(a.context, b.context) < TOLERANCE  # without exemplar first
    assert expected[0].std() > 0.1
    assert np.abs(ours[0].permute(0, 2, 3, 1).numpy() - expected[0]).max() <= 1 / 255


# ---------------------------------------------------------------- where it is easily got wrong


@torch.no_grad()
def test_the_exemplar_is_squashed_whole_where_clips_own_preprocessing_crops_it(pbe):
    wide = to_image(random(3, 48, 160, seed=8).sigmoid())
    squashed = to_tensor(wide.resize((32, 32), Image.Resampling.BICUBIC))
    difference = pbe.image_encoder.preprocess(to_tensor(wide)[None])[0] * STD + MEAN - squashed
    assert difference.abs().max() <= 1.01 / 255  # Pillow rounds to 8 bits, twice


def test_the_unet_reads_the_picture_grey_where_it_paints_then_a_mask_of_one_where_it_keeps(pbe):
    """The mask has hard edges from 1/2 on, and is reduced bilinearly without antialiasing."""
    levels = torch.tensor([0, 0.499, 0.5, 1])
    rgb, mask = scene()[0], levels[(4 * random(1, 1, SIZE, SIZE, seed=3).sigmoid()).long()]
    keep = (mask >= 0.5).float()
    latent, reduced = pbe.inpainting(rgb, mask).split((4, 1), dim=1)
    torch.testing.assert_close(latent, pbe.sd.encode(rgb * keep + 0.5 * (1 - keep)))
    cells = keep.unfold(2, 8, 8).unfold(3, 8, 8)  # (1, 1, 8, 8, rows, columns)
    assert torch.equal(reduced, cells[..., 3:5, 3:5].mean(dim=(-2, -1)))


def test_the_batch_does_not_change_a_picture(pbe):
    torch.testing.assert_close(paint(pbe, count=2)[:1], paint(pbe), atol=TOLERANCE, rtol=TOLERANCE)


# ---------------------------------------------------------------- public files


@layouts
def test_each_tensor_of_the_public_encoder_lands_on_one_parameter_of_its_shape_from_the_folder_and_the_single_file():
    """The UNet's and the VAE's are an inpainting Stable Diffusion's; 12 belong to the noise schedule, one counts
    positions.
    """
    tensors = layout("paint_by_example_single_file")
    parts = split_by_model(tensors, PREFIXES)
    encoder = parts["image_encoder"] | parts[""]
    assert len(tensors) == 1403 == len(parts["unet"]) + len(parts["vae"]) + len(encoder) + 12 + 1
    settings = config("paint_by_example_diffusers/image_encoder/config.json")
    for tensors in (encoder, layout("paint_by_example_diffusers_image_encoder")):
        assert len(fill(PaintByExampleEncoder, settings, tensors, RENAMES).mapper["blocks"]) == 5


NAMES = [(r"^model\.", "transformer."), (r"^mapper\.blocks", "mapper.resblocks"), (r"\.norm1", ".ln_1"),
         (r"\.norm3", ".ln_2"), (r"attn1\.to_[qkv]", "attn.c_qkv"), (r"attn1\.to_out\.0", "attn.c_proj"),
         (r"ff\.net\.0\.proj", "mlp.c_fc"), (r"ff\.net\.2", "mlp.c_proj"), (r"^final_layer_norm", "final_ln"),
         (r"^uncond_vector", "learnable_vector"), (r"^(?!learnable_vector|proj_out)", "cond_stage_model.")]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Path, list[torch.nn.Module]]:
    """A single file, whose widths let the shapes imply the configuration; and its networks."""
    settings = ENCODER | {"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64, "num_hidden_layers": 2,
                          "mapper_blocks": 3}
    encoder, unet, vae = parts = [randomise(PaintByExampleEncoder(settings), seed=2),
                                  randomise(UNet(WIDE | {"in_channels": 9}), seed=1), randomise(VAE(WIDE_VAE), seed=3)]
    left_overs = {"cond_stage_model.transformer.vision_model.embeddings.position_ids": torch.arange(17)[None],
                  "betas": torch.zeros(1000)}
    file = tmp_path_factory.mktemp("single") / "pbe.safetensors"
    save_file(original(encoder, "", NAMES) | original_unet(unet, "model.diffusion_model.") | original_vae(vae)
              | left_overs, file)
    return file, parts


def test_the_folder_and_the_single_file_hold_the_same_networks(folder, pbe, single):
    for path, parts in (single, (folder, (pbe.image_encoder, pbe.sd.unet, pbe.sd.vae))):
        loaded = load_paint_by_example(path)
        assert all(map(equal_weights, (loaded.image_encoder, loaded.sd.unet, loaded.sd.vae), parts))


def test_it_paints_in_half_precision(folder):
    half = load_paint_by_example(folder, dtype=torch.bfloat16)
    assert paint(half).isfinite().all()


# ---------------------------------------------------------------- training at the toy's scale


def test_an_exemplar_is_a_large_crop_of_the_picture_squashed_flipped_and_turned(monkeypatch):
    positions = torch.arange(64) + 0.5
    picture = torch.stack(torch.meshgrid(positions, positions, indexing="xy"))  # each pixel holds its own x and y
    many, generator = picture.expand(100, 2, 64, 64), torch.Generator().manual_seed(0)
    y = exemplars_from(many, generator)[:, 1]
    assert ((y[:, 31, 32] - y[:, 31, 31]).abs() > 0.1).float().mean() > 0.5
    monkeypatch.setattr(paint_by_example_training, "ANGLE", 0)
    x, y = exemplars_from(many, generator).unbind(1)
    assert min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) <= 64
    width, height = (x[:, 31, 61] - x[:, 31, 2]) / 59, (y[:, 61, 31] - y[:, 2, 31]) / 59
    assert 30 < (width < 0).sum() < 70 and (height > 0).all()
    for part in (width.abs(), height):
        assert 0.499 < part.min() < 0.55 and 0.95 < part.max() < 1.001


@torch.no_grad()
def test_training_starts_from_the_base_and_the_toys_frozen_clip():
    """The new input channels start at zero."""
    pbe = initial(SimpleNamespace(weights=TOY / "base", device="cpu", seed=0))
    z, t, P = random(1, 9, 8, 8), torch.tensor([500]), random(1, 7, 128, seed=1)
    base = load_stable_diffusion(TOY / "base").unet
    assert relative_error(pbe.sd.unet(z, t, P), base(z[:, :4], t, P)) < TOLERANCE
    frozen = {name for name, p in pbe.image_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in pbe.image_encoder.state_dict() if name.startswith("model.")}


@torch.no_grad()
def test_training_reads_the_five_channels_that_painting_reads(pbe):
    rgb, mask = scene()
    batch = {"image": rgb, "mask": mask, "z_0": random(1, 4, 8, 8), "eps": random(1, 4, 8, 8, seed=1),
             "t": torch.tensor([500]), "drop": torch.ones(1), "inpainting": pbe.sd.inpainting(rgb, mask)}
    loss = ExampleLoss(pbe, 0.1, torch.ones(1000))
    (read,) = unet_inputs(pbe.sd.unet, lambda: loss(batch, torch.Generator()))
    assert torch.equal(read.z[:, 4:], pbe.inpainting(rgb, mask))


@pytest.mark.slow
def test_the_training_lowers_its_loss_draws_a_sheet_and_leaves_the_image_tower_as_it_is(tmp_path):
    write_world(tmp_path, size=32, base=0, ads=16, bg1k=2, pairs=2, workers=1, parts=("ads",))
    train.main(["paint-by-example", f"--data={tmp_path / 'ads'}", "--size=32", "--batch=4", f"--out={tmp_path}",
                "--device=cpu", "--log-every=4", "--steps=16"], RIVAL_STAGES)
    log = (tmp_path / "training" / "paint-by-example" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["loss"] < json.loads(log[0])["loss"]
    assert (tmp_path / "training" / "paint-by-example" / "sheet_000016.png").is_file()
    trained, clip = load_paint_by_example(tmp_path / "paint-by-example"), load_clip(TOY / "clip")
    assert equal_weights(trained.image_encoder.model["vision_model"], clip.vision_model)


# ---------------------------------------------------------------- its commands


def test_an_exemplar_is_a_whole_reference_squashed_without_a_mask(folder, tmp_path, capsys, monkeypatch):
    """The authors' guidance is the default, and the PNG says how it was painted."""
    (rgb, mask), reference, canvases = scene(), tmp_path / "ad.png", []
    picture = to_image(rgb[0])
    picture.putalpha(to_image(mask[0]))
    picture.save(tmp_path / "mug.png")
    to_image(random(3, 40, 120, seed=9).sigmoid()).save(reference)
    monkeypatch.setattr(PaintByExample, "paint", lambda self, canvas, **_: canvases.append(canvas) or canvas.rgb)
    lab.main(["paint", f"--product={tmp_path / 'mug.png'}", f"--reference={reference}", "--size=64",
              f"--paint-by-example={folder}", f"--out={tmp_path}"])
    whole, side = to_tensor(Image.open(reference)), VISION_CONFIG["image_size"]
    assert torch.equal(canvases[0].reference[0], resize(whole, side, side)) and canvases[0].reference_mask is None
    how = json.loads(Image.open(capsys.readouterr().out.splitlines()[0]).text["how"])
    assert how["reference"] == str(reference) and how["how"]["guidance"] == 5


# ---------------------------------------------------------------- what is refused


def without(tensors: dict, front: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(front)}


@pytest.mark.parametrize("change, words", [
    (lambda t: without(without(t, "learnable"), "cond_stage_model.mapper"),
     "holds no learnable_vector; it looks like a whole Stable Diffusion"),  # as an inpainting one
    (lambda t: without(t, "first_stage_model."), "holds no vae"),
    (lambda t: t | {"extra": torch.zeros(1)}, "extra is not part of this model"),
], ids=["inpainting", "no vae", "extra"])
def test_a_single_file_that_is_no_paint_by_example_is_refused_in_one_line(single, tmp_path, change, words):
    file = tmp_path / "pbe.safetensors"
    save_file(change(load_file(single[0])), file)
    with refused(words, file):
        load_paint_by_example(file)


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "image_encoder").rename(f / "text_encoder"), "holds no image_encoder/; it looks like Stable Diff"),
    (lambda f: save_module(randomise(UNet(SD1)), f / "unet", UNET_FILE), "its UNet reads 4 channels"),
    (lambda f: save_module(randomise(UNet(NINE | {"cross_attention_dim": 32})), f / "unet", UNET_FILE),
     "tokens of width 24, its UNet reads 32"),
], ids=["inpainting", "text to image", "widths"])
def test_a_folder_that_is_no_paint_by_example_is_refused_in_one_line(folder, tmp_path, change, words):
    copy = shutil.copytree(folder, tmp_path / "pbe")
    change(copy)
    with refused(words, copy):
        load_paint_by_example(copy)


def test_paint_by_example_given_as_the_base_is_named_as_what_it_is(single):
    with refused("is not a whole Stable Diffusion: .* are not part of one"):
        load_stable_diffusion(single[0])
