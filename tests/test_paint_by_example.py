"""Tests: Paint by Example: the picture of diffusers' pipeline, the public files, and the places where errors hide."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SD1, VAE_CONFIG, VISION_CONFIG, equal_weights, random, randomise, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from test_public import WIDE, WIDE_VAE, Mover, config, layout, layouts, original_unet, original_vae

import train
from clip import CLIP
from data import AdInputs, Canvas
from model import UNet
from programs.models import TOY, ModelChoice
from programs.settings import parser, settle
from rivals import lab, paint_by_example_training
from rivals.paint_by_example import (
    GUIDANCE,
    PREFIXES,
    RENAMES,
    PaintByExample,
    PaintByExampleEncoder,
    encoder_config,
    load_paint_by_example,
)
from rivals.paint_by_example_training import exemplars_from, paint_by_example_task
from rivals.stages import RIVAL_STAGES
from sampler import SamplerSettings, Schedule, draw_noise, seeded
from support.files import BadInput, write_json
from support.images import resize, to_image, to_tensor
from support.layouts import split_by_model, under_our_names
from support.tensors import model_fingerprint
from toy.world import TOY_DATA, write_world
from vae import VAE
from weights import CLIP_FILE, UNET_FILE, StableDiffusion, build_module, load_clip, load_stable_diffusion, save_module

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
    write_json({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
               | {"set_alpha_to_one": False}, root / "scheduler" / "scheduler_config.json")
    return root


def scene(batch: int = 1, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and masks of products whose edges lie between the latent's cells."""
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, 16:40, 24:48] = 1
    return random(batch, 3, size, size, seed=5).sigmoid(), mask


def unet_inputs(unet: torch.nn.Module, paint) -> list[SimpleNamespace]:
    """The UNet's inputs at each step while paint() runs."""
    calls = []

    def note(module, args, kwargs):
        context = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        calls.append(SimpleNamespace(z=args[0].clone(), context=context.clone()))

    hook = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        paint()
    finally:
        hook.remove()
    return calls


def paint(pbe: PaintByExample, count: int = 1, guidance: float = GUIDANCE) -> torch.Tensor:
    rgb, mask = scene(count)
    exemplars = random(count, 3, 32, 32, seed=6).sigmoid()
    return pbe.paint(Canvas(rgb, mask, [], seeded(0, count), exemplars), SamplerSettings(STEPS, guidance))


# ---------------------------------------------------------------- beside diffusers


def their_encoder(folder: Path) -> torch.nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
    from transformers import CLIPVisionConfig

    settings = CLIPVisionConfig(**{k: v for k, v in ENCODER.items() if k not in ("model_type", "architectures")})
    theirs = PaintByExampleImageEncoder(settings).eval()
    names = {f"model.{name.removeprefix('model.vision_model.')}" if name.startswith("model.") else name: tensor
             for name, tensor in load_file(folder / "image_encoder" / CLIP_FILE).items()}
    if any(name.startswith("model.vision_model.") for name in theirs.state_dict()):  # before transformers 5
        names = load_file(folder / "image_encoder" / CLIP_FILE)
    theirs.load_state_dict(names, strict=True)
    return theirs


@torch.no_grad()
def test_the_image_encoder_makes_diffusers_token_and_unconditional_vector(pbe, folder):
    exemplar = random(2, 3, 32, 32, seed=7).sigmoid()
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP.mean, CLIP.std))
    token, without = their_encoder(folder)((exemplar - mean) / std, return_uncond_vector=True)
    assert relative_error(pbe.encode(exemplar), token) < TOLERANCE
    assert torch.equal(pbe.unconditional, without)
    assert len(pbe.image_encoder.mapper["blocks"]) == 2  # (9 + 1) // 5, as diffusers counts them


@torch.no_grad()
def test_a_picture_and_the_unets_inputs_are_those_of_diffusers_pipeline(pbe, folder, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PaintByExamplePipeline(
        diffusers.AutoencoderKL.from_pretrained(folder / "vae"), their_encoder(folder),
        diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1), None, None)
    theirs.set_progress_bar_config(disable=True)
    posterior = type(theirs.vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist)
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())  # we take the mean, not a draw
    rgb, mask = scene()
    exemplar = random(1, 3, 32, 32, seed=6).sigmoid()
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP.mean, CLIP.std))
    expected, ours = [], []

    def call() -> None:
        noise = draw_noise((4, SIZE // 8, SIZE // 8), seeded(0)[0])
        expected.append(theirs(example_image=(exemplar - mean) / std, image=2 * rgb - 1, mask_image=1 - mask,
                               num_inference_steps=STEPS, guidance_scale=5.0, latents=noise, output_type="np").images)

    wanted = unet_inputs(theirs.unet, call)
    given = unet_inputs(pbe.sd.unet, lambda: ours.append(paint(pbe)))
    assert len(given) == len(wanted) == STEPS
    for a, b in zip(given, wanted):
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
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP.mean, CLIP.std))
    difference = pbe.image_encoder.preprocess(to_tensor(wide)[None])[0] * std + mean - squashed
    assert difference.abs().max() <= 1.01 / 255  # Pillow rounds to 8 bits, twice
    margin = to_tensor(wide)[None].clone()
    margin[..., :40] = 0  # which a crop of the middle would not see
    assert relative_error(pbe.encode(margin), pbe.encode(to_tensor(wide)[None])) > 1e-3


@torch.no_grad()
def test_attention_of_the_single_token_is_its_value_projected(pbe):
    attention, x = pbe.image_encoder.mapper["blocks"][0].attn1, random(2, 1, 24, seed=9)
    torch.testing.assert_close(attention(x), attention.to_out[0](attention.to_v(x)))


@torch.no_grad()
def test_the_unconditional_vector_goes_past_mapper_norm_and_projection(pbe):
    without, exemplars = unet_inputs(pbe.sd.unet, lambda: paint(pbe, count=2))[0].context.chunk(2)
    assert torch.equal(without, pbe.image_encoder.uncond_vector.expand(2, 1, 24))
    torch.testing.assert_close(exemplars, pbe.encode(random(2, 3, 32, 32, seed=6).sigmoid()))


def test_the_latent_comes_before_the_mask_unlike_in_stable_diffusion_inpainting(pbe):
    rgb, mask = scene()
    ours, theirs = pbe.inpainting(rgb, mask), pbe.sd.inpainting(rgb, mask)
    torch.testing.assert_close(ours[:, :4], theirs[:, 1:])
    assert set(theirs[:, :1].unique().tolist()) == {0, 1}


def test_the_mask_is_one_on_what_is_kept_unlike_in_stable_diffusion_inpainting(pbe):
    rgb, mask = scene()
    assert torch.equal(pbe.inpainting(rgb, mask)[:, 4:], 1 - pbe.sd.inpainting(rgb, mask)[:, :1])


def test_what_is_to_be_painted_is_grey_before_it_is_encoded_and_soft_edges_are_kept_from_one_half_on(pbe):
    rgb, mask = scene()
    soft = mask.clone()
    soft[:, :, 16], soft[:, :, 17] = 0.5 * mask[:, :, 16], 0.499 * mask[:, :, 17]
    hard = mask.clone()
    hard[:, :, 17] = 0
    other = torch.where(hard == 1, rgb, random(1, 3, SIZE, SIZE, seed=4).sigmoid())
    assert torch.equal(pbe.inpainting(other, soft), pbe.inpainting(rgb, hard))
    grey = torch.where(hard == 1, rgb, torch.tensor(0.5))
    torch.testing.assert_close(pbe.inpainting(rgb, soft)[:, :4], pbe.sd.encode(grey))


def test_the_mask_is_reduced_bilinearly_without_antialiasing(pbe):
    mask = (random(1, 1, SIZE, SIZE, seed=3) > 0).float()
    cells = mask.unfold(2, 8, 8).unfold(3, 8, 8)  # (1, 1, 8, 8, rows, columns)
    expected = cells[..., 3:5, 3:5].mean(dim=(-2, -1))
    assert len(expected.unique()) == 5  # 0, 1/4, 1/2, 3/4, 1
    assert torch.equal(pbe.inpainting(random(1, 3, SIZE, SIZE).sigmoid(), mask)[:, 4:], expected)


def test_the_five_channels_are_without_noise_and_the_same_at_every_step(pbe):
    rgb, mask = scene()
    steps = unet_inputs(pbe.sd.unet, lambda: paint(pbe))
    assert all(torch.equal(step.z[:, 4:], pbe.inpainting(rgb, mask)) for step in steps)
    assert torch.equal(steps[0].z[:, :4], draw_noise((4, 8, 8), seeded(0)[0]))  # z_T is pure noise


@torch.no_grad()
def test_guidance_one_runs_the_pass_with_the_exemplar_alone(pbe):
    alone = unet_inputs(pbe.sd.unet, lambda: paint(pbe, guidance=1))
    assert all(torch.equal(step.context, pbe.encode(random(1, 3, 32, 32, seed=6).sigmoid())) for step in alone)


def test_the_batch_does_not_change_a_picture(pbe):
    torch.testing.assert_close(paint(pbe, count=2)[:1], paint(pbe), atol=TOLERANCE, rtol=TOLERANCE)


# ---------------------------------------------------------------- public files


@layouts
@pytest.mark.parametrize("vae", ["vae", "vae_old_attn"])
def test_each_tensor_of_the_public_folder_lands_on_one_parameter_of_its_shape(vae):
    for kind, part, ignored in ((PaintByExampleEncoder, "image_encoder", 1), (UNet, "unet", 0), (VAE, vae, 0)):
        tensors = layout(f"paint_by_example_diffusers_{part}")
        tensors = under_our_names(tensors, RENAMES) if part == "image_encoder" else under_our_names(tensors)
        settings = config("paint_by_example_diffusers", f"{part.removesuffix('_old_attn')}/config.json")
        module = build_module(kind, settings, tensors, Path(part), "meta", torch.float32)
        assert len(module.state_dict()) == len(tensors) - ignored  # position_ids


@layouts
def test_each_tensor_of_the_public_single_file_lands_on_one_parameter_of_its_shape():
    tensors = layout("paint_by_example_single_file")
    parts = split_by_model(tensors, PREFIXES)
    assert set(parts[""]) == {"learnable_vector", "proj_out.weight", "proj_out.bias"}
    encoder = under_our_names(parts["image_encoder"] | parts[""], RENAMES)
    settings, public = encoder_config(encoder), config("paint_by_example_diffusers", "image_encoder/config.json")
    assert {name: settings[name] for name in settings.keys() & public.keys()} == {
        name: public[name] for name in settings.keys() & public.keys()}
    assert settings["mapper_blocks"] == 5 == (public["num_hidden_layers"] + 1) // 5
    module = build_module(PaintByExampleEncoder, settings, encoder, Path("pbe"), "meta", torch.float32)
    assert len(module.state_dict()) == len(encoder)
    assert len(tensors) == 1403 == len(parts["unet"]) + len(parts["vae"]) + 392 + 60 + 2 + 3 + 12


def original_encoder(module: PaintByExampleEncoder) -> dict[str, torch.Tensor]:
    """The weights as the original code names them."""
    m = Mover(module, "cond_stage_model.")
    for i in range(len(module.mapper["blocks"])):
        ours, theirs = f"mapper.blocks.{i}.", f"mapper.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [m.left.pop(f"{ours}attn1.to_{x}.{kind}") for x in "qkv"]
            m.moved[f"{m.prefix}{theirs}attn.c_qkv.{kind}"] = torch.cat(parts)
        for a, b in (("norm1.", "ln_1."), ("attn1.to_out.0.", "attn.c_proj."), ("norm3.", "ln_2."),
                     ("ff.net.0.proj.", "mlp.c_fc."), ("ff.net.2.", "mlp.c_proj.")):
            m.move(ours + a, theirs + b)
    m.move("model.", "transformer.")
    m.move("final_layer_norm.", "final_ln.")
    m.prefix = ""
    m.move("uncond_vector", "learnable_vector")
    m.move("proj_out.", "proj_out.")
    assert not m.left
    positions = {"cond_stage_model.transformer.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    return m.moved | positions | {"betas": torch.zeros(1000)}


@pytest.fixture(scope="module")
def single() -> tuple[dict[str, torch.Tensor], list[torch.nn.Module]]:
    """A single file, whose widths let the shapes imply the configuration; and its networks."""
    settings = ENCODER | {"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64, "num_hidden_layers": 2,
                          "mapper_blocks": 3}
    parts = [randomise(PaintByExampleEncoder(settings), seed=2), randomise(UNet(WIDE | {"in_channels": 9}), seed=1),
             randomise(VAE(WIDE_VAE), seed=3)]
    return (original_encoder(parts[0]) | original_unet(parts[1], "model.diffusion_model.") | original_vae(parts[2]),
            parts)


def test_the_folder_and_the_single_file_hold_the_same_networks(folder, pbe, single, tmp_path):
    save_file({f"state_dict.{name}": tensor for name, tensor in single[0].items()}, tmp_path / "pbe.safetensors")
    loaded = load_paint_by_example(tmp_path / "pbe.safetensors")
    for ours, theirs in zip((loaded.image_encoder, loaded.sd.unet, loaded.sd.vae), single[1]):
        assert equal_weights(ours, theirs)
    loaded = load_paint_by_example(folder)
    for ours, theirs in zip((loaded.image_encoder, loaded.sd.unet, loaded.sd.vae),
                            (pbe.image_encoder, pbe.sd.unet, pbe.sd.vae)):
        assert equal_weights(ours, theirs)


def test_its_fingerprint_changes_with_each_of_its_parts(folder):
    before = model_fingerprint(folder)
    for part in ("image_encoder", "unet", "vae"):
        os.utime(folder / part / "config.json", (len(part), len(part)))
        assert model_fingerprint(folder) != before
        before = model_fingerprint(folder)


def test_it_paints_in_half_precision(folder):
    half = load_paint_by_example(folder, dtype=torch.bfloat16)
    assert paint(half).isfinite().all()


# ---------------------------------------------------------------- training at the toy's scale


@pytest.fixture(scope="module")
def ads(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root, size=32, base=0, ads=16, bg1k=2, pairs=2, workers=1, parts=("ads",))
    return root / "ads"


def test_an_exemplar_is_a_large_crop_of_the_picture_squashed_flipped_and_turned(monkeypatch):
    ramp = torch.arange(64) + 0.5
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])  # of its own x, y
    many, generator = picture.repeat(100, 1, 1, 1), torch.Generator().manual_seed(0)
    turned = exemplars_from(many, generator)[:, :2, 31:33, 31:33]
    assert ((turned[:, 1, 0, 1] - turned[:, 1, 0, 0]).abs() > 0.1).float().mean() > 0.5
    monkeypatch.setattr(paint_by_example_training, "ANGLE", 0)
    x, y = exemplars_from(many, generator)[:, :2, 2:-2, 2:-2].unbind(1)
    torch.testing.assert_close(x, x[:, :1].expand_as(x)), torch.testing.assert_close(y, y[..., :1].expand_as(y))
    width, height = (x[:, 0, -1] - x[:, 0, 0]) / 59, (y[:, -1, 0] - y[:, 0, 0]) / 59
    assert 30 < (width < 0).sum() < 70 and (height > 0).all()
    for part in (width.abs(), height):
        assert 0.499 < part.min() < 0.55 and 0.95 < part.max() < 1.001
    assert x.min() >= 0 and x.max() <= 64


def settings_for(ads: Path, out: Path, *options: str):
    args = parser("", RIVAL_STAGES).parse_args(["paint-by-example", "--data", str(ads), "--size", "32", "--batch", "4",
                                                "--out", str(out), "--device", "cpu", *options])
    return settle(vars(args), RIVAL_STAGES["paint-by-example"].settings, TOY_DATA)


def test_training_starts_from_the_base_and_reads_the_five_channels_that_painting_reads(ads, tmp_path):
    """The new input channels start at zero; the clean frozen tower is the toy's CLIP."""
    task = paint_by_example_task(settings_for(ads, tmp_path / "run"))
    unet, encoder = (task.modules["paint-by-example"][name] for name in ("unet", "image_encoder"))
    base = load_stable_diffusion(TOY / "base")
    z, t, P = random(1, 9, 8, 8), torch.tensor([500]), random(1, 7, 128, seed=1)
    with torch.no_grad():
        assert relative_error(unet(z, t, P), base.unet(z[:, :4], t, P)) < TOLERANCE
    assert {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad} == {
        "mapper", "final_layer_norm", "proj_out", "uncond_vector"}

    batch = {name: x[None] if isinstance(x, torch.Tensor) else torch.tensor([x])
             for name, x in task.samples[0, 0].items()}
    read = unet_inputs(unet, lambda: task.loss(batch, torch.Generator().manual_seed(0)))[0].z[:, 4:]
    pbe = PaintByExample(StableDiffusion(None, None, unet, base.vae, base.schedule), encoder)
    with torch.no_grad():
        expected = pbe.inpainting(batch["image"], batch["mask"])
    torch.testing.assert_close(read, expected, rtol=2e-3, atol=2e-3)  # latents are kept in float16


def test_the_training_lowers_its_loss_draws_a_sheet_and_can_be_resumed(ads, tmp_path):
    out = tmp_path / "run"
    options = ("--data", ads, "--size", 32, "--batch", 4, "--out", out, "--device", "cpu", "--log-every", 4)
    train.main(["paint-by-example", *map(str, (*options, "--steps", 16))], RIVAL_STAGES)
    log = [json.loads(line) for line in (out / "training" / "paint-by-example" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert (out / "training" / "paint-by-example" / "sheet_000016.png").is_file()
    trained, clip = load_paint_by_example(out / "paint-by-example"), load_clip(TOY / "clip")
    assert equal_weights(trained.image_encoder.model["vision_model"], clip.vision_model)


# ---------------------------------------------------------------- its commands


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A cut-out, and a wide ad without a mask."""
    root = tmp_path_factory.mktemp("photos")
    rgb, mask = scene()
    picture = to_image(rgb[0])
    picture.putalpha(to_image(mask[0]))
    picture.save(root / "mug.png")
    to_image(random(3, 40, 120, seed=9).sigmoid()).save(root / "ad.png")
    (root / "notes.png").write_text("no picture")
    return root


def test_the_exemplar_is_the_whole_reference_squashed(folder, photos, monkeypatch):
    rgb, mask = scene()
    wide, seen = random(3, 40, 120, seed=9).sigmoid(), []
    monkeypatch.setattr(PaintByExample, "paint", lambda self, canvas, **_: seen.append(canvas) or canvas.rgb)
    _, paint_all = lab.load_rival("paint-by-example", folder, ModelChoice(dtype="float32"), 64, SamplerSettings())
    paint_all([AdInputs(rgb[0], mask[0], ("",) * 3, 0, (wide, wide[:1]))])
    side = VISION_CONFIG["image_size"]
    assert torch.equal(seen[0].reference[0], resize(wide, side, side)) and seen[0].reference_mask is None


def test_an_exemplar_needs_no_mask(folder, photos, tmp_path, capsys):
    """The authors' guidance is the default, and the PNG says how it was painted."""
    words = ["paint", f"--product={photos / 'mug.png'}", f"--reference={photos / 'ad.png'}",
             f"--paint-by-example={folder}", "--size=64", "--steps=2", "--dtype=float32"]
    pictures = []
    for more in ([], ["--guidance=5"], ["--guidance=1"]):
        lab.main([*words, *more, f"--out={tmp_path / str(len(pictures))}"])
        pictures.append(Path(capsys.readouterr().out.splitlines()[0]))
    own, with_five, with_one = (to_tensor(Image.open(picture)) for picture in pictures)
    assert torch.equal(own, with_five) and not torch.equal(own, with_one)
    line = json.loads(Image.open(pictures[0]).text["how"])
    assert line["reference"] == str(photos / "ad.png") and line["how"]["guidance"] == GUIDANCE


@pytest.mark.parametrize("words, message", [
    ("", "required: --product"),
    ("--product mug.png", "--paint-by-example goes with --reference"),
    ("--product mug.png --reference nowhere.png", "nowhere.png: no such file"),
    ("--product mug.png --reference notes.png", "notes.png: not a readable image"),
    ("--product mug.png --reference ad.png --size 100", "--size 100: must be a multiple of 64"),
])
def test_bad_use_is_one_line(folder, photos, monkeypatch, words, message):
    monkeypatch.chdir(photos)
    with pytest.raises(BadInput, match=message) as error:
        lab.main(["paint", *words.split(), "--paint-by-example", str(folder)])
    assert "\n" not in str(error.value) and not Path("out").exists()


# ---------------------------------------------------------------- what is refused


def without(tensors: dict, front: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(front)}


@pytest.mark.parametrize("change, words", [
    (lambda t: without(without(t, "learnable"), "cond_stage_model.mapper"),
     "holds no learnable_vector; it looks like a whole Stable Diffusion"),  # as an inpainting one
    (lambda t: without(t, "first_stage_model."), "holds no vae"),
    (lambda t: without(t, "model.diffusion_model."), "holds no unet"),
    (lambda t: without(t, "cond_stage_model.final_ln."), "final_layer_norm.weight is missing"),
    (lambda t: t | {"extra": torch.zeros(1)}, "extra is not part of this model"),
    (lambda t: {n: x[:, :4] if n.endswith("input_blocks.0.0.weight") else x for n, x in t.items()},
     "its UNet reads 4 channels, Paint by Example's 9"),
], ids=["inpainting", "no vae", "no unet", "no norm", "extra", "text to image"])
def test_a_single_file_that_is_no_paint_by_example_is_refused_in_one_line(single, tmp_path, change, words):
    file = tmp_path / "pbe.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(single[0]).items()}, file)
    with pytest.raises(BadInput, match=words) as error:
        load_paint_by_example(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "image_encoder").rename(f / "text_encoder"), "holds no image_encoder/; it looks like Stable Diff"),
    (lambda f: shutil.rmtree(f / "image_encoder"), "is not Paint by Example: it holds no image_encoder/"),
    (lambda f: shutil.rmtree(f / "unet"), "unet holds no diffusion_pytorch_model.safetensors"),
    (lambda f: save_module(randomise(UNet(SD1)), f / "unet", UNET_FILE), "its UNet reads 4 channels"),
    (lambda f: save_module(randomise(UNet(NINE | {"cross_attention_dim": 32})), f / "unet", UNET_FILE),
     "tokens of width 24, its UNet reads 32"),
    (lambda f: save_module(randomise(BareTower()), f / "image_encoder", CLIP_FILE), "does not fit a PaintByExample"),
], ids=["inpainting", "no encoder", "no unet", "text to image", "widths", "a bare CLIP"])
def test_a_folder_that_is_no_paint_by_example_is_refused_in_one_line(folder, tmp_path, change, words):
    copy = shutil.copytree(folder, tmp_path / "pbe")
    change(copy)
    with pytest.raises(BadInput, match=words) as error:
        load_paint_by_example(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


class BareTower(torch.nn.Module):
    """CLIP's image tower alone, in a folder whose config.json fits."""

    def __init__(self):
        super().__init__()
        self.config, self.model = ENCODER, PaintByExampleEncoder(ENCODER).model


def test_paint_by_example_given_as_the_base_is_named_as_what_it_is(single, tmp_path):
    save_file(single[0], tmp_path / "pbe.safetensors")
    with pytest.raises(BadInput, match="is not a whole Stable Diffusion: .* are not part of one"):
        load_stable_diffusion(tmp_path / "pbe.safetensors")
