"""The shipped toy: its size and layout, and that the reference implementations paint the same pictures with it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conftest import relative_error
from data import load_cutout, load_masked, product_hint
from generate import TOY, encode_prompts, paint, texts_of
from sampler import draw_noise, seeded
from toy.world import CATEGORIES, SAMPLES, SCENES
from weights import load_clip, load_control, load_stable_diffusion, read_json

WEIGHTS = [path for folder in ("base", "cg", "pg", "clip") for path in sorted((TOY / folder).rglob("*.safetensors"))]
STEPS = 10


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion(TOY / "base")


def test_it_is_at_most_30_mb():
    ignored = TOY / "data"  # drawn on demand, not shipped
    files = [p for p in TOY.rglob("*") if p.is_file() and ignored not in p.parents and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 30e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: str(p.relative_to(TOY)))
def test_weights_are_fp16_and_finite(path):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16 and tensor.isfinite().all(), name


def test_cg_and_pg_know_the_worlds_categories():
    assert read_json(TOY / "cg" / "categories.json") == sorted(CATEGORIES) == read_json(TOY / "pg" / "categories.json")


def test_samples_are_cutouts_and_references_with_their_masks():
    for name in SAMPLES:
        load_cutout(TOY / "samples" / f"{name}.png")
        load_masked(TOY / "samples" / f"{name}_reference.png", None, "reference", "--reference-mask")


def test_clip_finds_a_pictures_caption(sd):
    """The sample references among all eight scenes' captions."""
    clip = load_clip(TOY / "clip")
    names = list(CATEGORIES)
    captions = [f"A photo of {name}, in the background of {SCENES[CATEGORIES[name]].phrase}" for name in names]
    text = torch.nn.functional.normalize(clip.encode_text(sd.tokenizer(captions)), dim=-1)
    for sample, (category, *_) in SAMPLES.items():
        image = load_masked(TOY / "samples" / f"{sample}_reference.png")[0][None]
        image = torch.nn.functional.interpolate(image, size=(128, 128), mode="area")
        assert names[(clip.encode_image(image) @ text.T).argmax()] == category


@torch.inference_mode()
def test_text_to_image_is_diffusers_picture_for_the_same_noise(sd):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(TOY / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "A photo of red sneaker, in the background of a beach by the sea, pink and blue, palm, sun"
    size = sd.unet.config["sample_size"] * sd.vae.factor
    blank = torch.zeros(1, 3, size, size)
    ours = paint(sd, blank, blank[:, :1], [(prompt,) * 3], seeded(3), steps=STEPS)
    noise = draw_noise(sd.latent_shape(size, size), seeded(3)[0])
    theirs = pipeline(prompt, height=size, width=size, num_inference_steps=STEPS, guidance_scale=2.0, latents=noise,
                      output_type="pt").images
    assert (ours - theirs).abs().mean() <= 1 / 255


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["cg", "pg"])
def test_branches_open_as_diffusers_controlnets_and_agree(sd, kind):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.ControlNetModel.from_pretrained(TOY / kind)
    rgb, mask = load_cutout(TOY / "samples" / "perfume.png")
    hint = torch.nn.functional.interpolate(product_hint(rgb, mask)[None], size=(128, 128), mode="area")
    P = encode_prompts(sd, [texts_of({"perfume"}, Path(TOY / "cg"), False)["perfume"]]).P
    z, t = torch.randn(1, 4, 32, 32, generator=seeded(0)[0]), torch.tensor([481])
    ours = load_control(TOY / kind)(z, t, P, hint)
    down, middle = theirs(z, t, P, hint, return_dict=False)
    for a, b in zip(ours, [*down, middle], strict=True):
        assert relative_error(a, b) < 1e-4
