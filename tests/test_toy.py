"""Tests: the shipped toy: its size and layout; the reference implementations paint the same pictures with it."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data import Canvas, product_hint, prompt_texts
from generate import paint
from model import Prompts
from programs.models import TOY, identifiers_of
from sampler import Conditions, SamplerSettings, draw_noise, sample, seeded
from support.files import read_json
from support.images import load_cutout, load_masked
from toy.products import PRODUCTS
from toy.scenes import Brand, scene_caption
from weights import load_clip, load_control, load_stable_diffusion

STEPS = 4


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion(TOY / "base")


@pytest.fixture(scope="module")
def clip():
    return load_clip(TOY / "clip")


def canvas(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample reduced to the toy's canvas: (1, 3, 128, 128) and its mask."""
    load = load_masked if name.endswith("_reference") else load_cutout
    rgb, mask = load(TOY / "samples" / f"{name}.png")
    return tuple(F.interpolate(x[None], size=(128, 128), mode="area") for x in (rgb, mask))


def painted(sd, name: str, categories: list[str], references: list[str] = ()) -> torch.Tensor:
    """A sample painted by CG as a product of each category, or by CG and PG in the style of each reference.

    All have the same noise.
    """
    rgb, mask = (x.expand(len(categories), -1, -1, -1) for x in canvas(name))
    styles = [torch.cat(x) for x in zip(*map(canvas, references))]
    identifiers = identifiers_of(set(PRODUCTS), TOY / "cg")
    texts = [prompt_texts(category, identifiers[category]) for category in categories]
    cg, pg = load_control(TOY / "cg", "category"), load_control(TOY / "pg", "personality") if references else None
    generators = [seeded(0)[0] for _ in categories]
    return paint(sd, Canvas(rgb, mask, texts, generators, *styles), SamplerSettings(steps=STEPS), cg, pg)


@torch.inference_mode()
def embed(clip, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) -> CLIP embeddings (B, n) of length 1."""
    return F.normalize(clip.encode_image(pictures), dim=-1)


def test_its_weights_are_fp16_and_finite_and_all_is_at_most_36_mb():
    weights = [path for folder in ("base", "cg", "cg-plain", "pg", "clip")
               for path in (TOY / folder).rglob("*.safetensors")]
    assert len(weights) == 7  # text encoder, UNet, VAE, CG, CG with plain attention, PG, CLIP
    for path in weights:
        assert all(x.dtype == torch.float16 and x.isfinite().all() for x in load_file(path).values()), path
    ignored = TOY / "data"  # drawn on demand, not shipped
    files = [p for p in TOY.rglob("*") if p.is_file() and ignored not in p.parents and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 36e6


def test_cg_and_pg_know_the_worlds_categories():
    """Each has its own identifier. PG, which also reads P, has the same ones for the categories it was trained on."""
    cg, pg = (read_json(TOY / branch / "categories.json") for branch in ("cg", "pg"))
    assert set(cg) == set(PRODUCTS) and len(set(cg.values())) == len(cg) and pg.items() <= cg.items()


@torch.inference_mode()
def test_the_shipped_base_and_branches_are_diffusers_and_paint_its_picture(sd):
    """diffusers can't do Eq. 3 and 4, so both branches are plain ControlNets here."""
    diffusers = pytest.importorskip("diffusers")
    float32 = {"torch_dtype": torch.float32}
    controls = [diffusers.ControlNetModel.from_pretrained(TOY / kind, **float32) for kind in ("cg", "pg")]
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        TOY / "base", controlnet=diffusers.MultiControlNetModel(controls), safety_checker=None, **float32)
    pipeline.set_progress_bar_config(disable=True)
    (rgb, mask), prompt = canvas("perfume"), "A photo of perfume, in the background of sks 1"
    P, without = (Prompts(*[sd.prompts([text])] * 3) for text in (prompt, ""))
    hint, shape = product_hint(rgb, mask), sd.latent_shape(*rgb.shape[2:])
    noise, ours = draw_noise(shape, seeded(3)[0]), [load_control(TOY / kind) for kind in ("cg", "pg")]
    given = Conditions(P, without, [(branch, branch.hint_features(hint)) for branch in ours])
    z = sample(sd.unet, sd.schedule, given, seeded(3), shape, SamplerSettings(steps=STEPS))
    theirs = pipeline(prompt, image=[hint, hint], num_inference_steps=STEPS, guidance_scale=2.0, latents=noise,
                      output_type="pt").images
    assert (sd.decode(z) - theirs).abs().mean() <= 0.1 / 255


@pytest.fixture(scope="module")
def as_categories(sd):
    """A sneaker and a mug, each as a product of each category: {name: (C, 3, H, W)}."""
    return {name: painted(sd, name, list(PRODUCTS)) for name in ("sneaker", "mug")}


def test_clip_finds_the_categories_own_scenes_in_what_cg_paints(sd, clip, as_categories):
    """CLIP has seen every product in every scene.

    A scene's text is the mean over the captions of many brands, so that no palette or layout counts. By chance CLIP
    would find 2 of 16 scenes, and 5 or more in one of 25 draws.
    """
    texts = [f"in the background of {scene_caption(product.scene, Brand(k))}"
             for product in PRODUCTS.values() for k in range(64)]
    text = F.normalize(clip.encode_text(sd.tokenizer(texts)), dim=-1).unflatten(0, (-1, 64)).mean(dim=1)
    found = (embed(clip, torch.cat([*as_categories.values()])) @ text.T).argmax(dim=1)
    assert (found == torch.arange(len(PRODUCTS)).repeat(2)).sum() >= 5


def test_the_category_decides_cgs_scene_and_not_the_product(as_categories):
    """Of the mug's backgrounds, the nearest to the sneaker's as a category is that as the same category.

    A CG that chose the scene by the product's looks would paint the same for all of them.
    """
    background = (1 - canvas("sneaker")[1]) * (1 - canvas("mug")[1])
    distance = (as_categories["sneaker"][:, None] - as_categories["mug"]).abs() * background
    found = distance.mean(dim=(2, 3, 4)).argmin(dim=1)
    assert (found == torch.arange(len(PRODUCTS))).sum() >= 3 / 4 * len(PRODUCTS)


def test_pg_follows_its_reference(sd):
    """A perfume in the style of each of four references: of the four, that background is the nearest."""
    names = [f"{name}_reference" for name in ("perfume", "perfume_2", "perfume_3", "perfume_4")]
    references, masks = (torch.cat(x) for x in zip(*map(canvas, names)))
    background = (1 - canvas("perfume")[1]) * (1 - masks)
    pictures = painted(sd, "perfume", ["perfume"] * 4, names)
    distance = (pictures[:, None] - references).abs() * background  # (its reference, any reference, 3, H, W)
    assert distance.mean(dim=(2, 3, 4)).argmin(dim=1).tolist() == [0, 1, 2, 3]
