"""Tests: the shipped toy: its size and layout; the reference implementations paint the same pictures with it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from safetensors import safe_open

from data import Canvas, product_hint, prompt_texts
from generate import encode_prompts, paint
from model import Prompts
from programs.models import TOY, identifiers_of
from sampler import Conditions, SamplerSettings, draw_noise, sample, seeded
from support.files import read_json
from support.images import load_cutout, load_masked
from toy.products import PRODUCTS, product_caption
from toy.scenes import Brand, scene_caption
from toy.world import SAMPLES
from weights import load_clip, load_control, load_stable_diffusion

WEIGHTS = [path for folder in ("base", "cg", "cg-plain", "pg", "clip")
           for path in sorted((TOY / folder).rglob("*.safetensors"))]
STEPS = 10
REFERENCES = {name: sample for name, sample in SAMPLES.items() if sample.reference_seed is not None}


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion(TOY / "base")


@pytest.fixture(scope="module")
def clip():
    return load_clip(TOY / "clip")


@torch.inference_mode()
def embed(clip, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) -> CLIP embeddings (B, n) of length 1."""
    side = clip.config["vision_config"]["image_size"]
    return F.normalize(clip.encode_image(F.interpolate(pictures, size=(side, side), mode="area")), dim=-1)


def canvas(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample reduced to the toy's canvas: (1, 3, 128, 128) and its mask."""
    load = load_masked if name.endswith("_reference") else load_cutout
    rgb, mask = load(TOY / "samples" / f"{name}.png")
    return tuple(F.interpolate(x[None], size=(128, 128), mode="area") for x in (rgb, mask))


def painted(sd, names: list[str], categories: list[str], references: list[str] = (), seeds=None) -> torch.Tensor:
    """The samples `names` painted by CG as products of `categories`, or by CG and PG in the style of `references`."""
    rgb, mask = (torch.cat(x) for x in zip(*map(canvas, names)))
    styles = [torch.cat(x) for x in zip(*(canvas(f"{name}_reference") for name in references))]
    identifiers = identifiers_of(set(PRODUCTS), TOY / "cg")
    texts = [prompt_texts(category, identifiers[category]) for category in categories]
    cg, pg = load_control(TOY / "cg", "category"), load_control(TOY / "pg", "personality") if references else None
    generators = [seeded(seed)[0] for seed in seeds or range(len(names))]
    return paint(sd, Canvas(rgb, mask, texts, generators, *styles), SamplerSettings(steps=STEPS), cg, pg)


def test_it_is_at_most_36_mb():
    assert len(WEIGHTS) == 7  # text encoder, UNet, VAE, CG, CG with plain attention, PG, CLIP
    ignored = TOY / "data"  # drawn on demand, not shipped
    files = [p for p in TOY.rglob("*") if p.is_file() and ignored not in p.parents and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 36e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: str(p.relative_to(TOY)))
def test_weights_are_fp16_and_finite(path):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16 and tensor.isfinite().all(), name


def test_cg_and_pg_know_the_worlds_categories():
    """Each has its own identifier. PG, which also reads P, has the same ones for the categories it was trained on."""
    cg, pg = (read_json(TOY / branch / "categories.json") for branch in ("cg", "pg"))
    assert set(cg) == set(PRODUCTS) and len(set(cg.values())) == len(cg) and pg.items() <= cg.items()


@torch.inference_mode()
def test_text_to_image_is_diffusers_picture_for_the_same_noise(sd):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(TOY / "base", safety_checker=None,
                                                                 torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "A photo of red sneaker, in the background of a beach by the sea, pink and blue, palm, sun"
    size = sd.unet.config["sample_size"] * sd.vae.factor
    blank = torch.zeros(1, 3, size, size)
    ours = paint(sd, Canvas(blank, blank[:, :1], [(prompt,) * 3], seeded(3)), SamplerSettings(steps=STEPS))
    noise = draw_noise(sd.latent_shape(size, size), seeded(3)[0])
    theirs = pipeline(prompt, height=size, width=size, num_inference_steps=STEPS, guidance_scale=2.0, latents=noise,
                      output_type="pt").images
    assert (ours - theirs).abs().mean() <= 1 / 255


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["cg", "pg"])
def test_branches_open_as_diffusers_controlnets_and_agree(sd, kind):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.ControlNetModel.from_pretrained(TOY / kind)
    P = encode_prompts(sd, [prompt_texts("perfume", "sks 1")]).P
    hint = product_hint(*canvas("perfume"))
    z, t = torch.randn(1, 4, 32, 32, generator=seeded(0)[0]), torch.tensor([481])
    ours = load_control(TOY / kind)(z, t, P, hint)
    down, middle = theirs(z, t, P, hint, return_dict=False)
    for a, b in zip(ours, [*down, middle], strict=True):
        assert relative_error(a, b) < 1e-4


@torch.inference_mode()
def test_the_shipped_branches_as_plain_controlnets_paint_diffusers_picture(sd):
    """diffusers can't do Eq. 3 and 4, so both branches use ordinary attention and no mask."""
    diffusers = pytest.importorskip("diffusers")
    float32 = {"torch_dtype": torch.float32}
    controls = [diffusers.ControlNetModel.from_pretrained(TOY / kind, **float32) for kind in ("cg", "pg")]
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        TOY / "base", controlnet=diffusers.MultiControlNetModel(controls), safety_checker=None, **float32)
    pipeline.set_progress_bar_config(disable=True)
    (rgb, mask), prompt = canvas("perfume"), "A photo of perfume, in the background of sks 1"
    P, without = (Prompts(*[sd.prompts([text])] * 3) for text in (prompt, ""))
    hint, shape = product_hint(rgb, mask), sd.latent_shape(*rgb.shape[2:])
    ours = [load_control(TOY / kind) for kind in ("cg", "pg")]
    given = Conditions(P, without, [(branch, branch.hint_features(hint)) for branch in ours])
    z = sample(sd.unet, sd.schedule, given, seeded(3), shape, SamplerSettings(steps=10))
    theirs = pipeline(prompt, image=[hint, hint], num_inference_steps=10, guidance_scale=2.0,
                      latents=draw_noise(shape, seeded(3)[0]), output_type="pt").images
    assert (sd.decode(z) - theirs).abs().mean() <= 1 / 255


def test_clip_finds_the_categories_own_scenes_in_what_cg_paints(sd, clip):
    """CLIP has seen every product in every scene. It names the scenes behind 32 products, four of each category.

    A scene's text is the mean over the captions of many brands, so that no palette or layout counts. CLIP finds 19 of
    them. By chance it would find 4, and 12 or more in three of ten thousand draws.
    """
    names = [name for name in REFERENCES if name[-1] not in "234"]
    categories = [SAMPLES[name].product for name in names]
    scenes = [PRODUCTS[category].scene for category in categories]
    texts = [f"in the background of {scene_caption(scene, Brand(k))}" for scene in scenes for k in range(64)]
    text = F.normalize(clip.encode_text(sd.tokenizer(texts)), dim=-1).unflatten(0, (len(names), 64)).mean(dim=1)
    seeds = [100 * k + i for k in range(4) for i in range(len(names))]
    found = (embed(clip, painted(sd, names * 4, categories * 4, seeds=seeds)) @ text.T).argmax(dim=1)
    assert (found == torch.arange(len(names)).repeat(4)).float().mean() >= 12 / 32


def test_the_category_decides_cgs_scene_and_not_the_product(sd):
    """A sneaker as each category: of a mug's backgrounds, the nearest is that as the same category (same noise).

    A CG that chose the scene by the product's looks would paint the same eight times.
    """
    sneaker, mug = (painted(sd, [name] * len(PRODUCTS), list(PRODUCTS), seeds=[0] * len(PRODUCTS))
                    for name in ("sneaker", "mug"))
    background = (1 - canvas("sneaker")[1]) * (1 - canvas("mug")[1])
    distance = (sneaker[:, None] - mug).abs() * background  # (sneaker as, mug as, 3, H, W)
    found = distance.mean(dim=(2, 3, 4)).argmin(dim=1)
    assert (found == torch.arange(len(PRODUCTS))).sum() >= 3 / 4 * len(PRODUCTS)


def test_pg_follows_its_reference(sd):
    """Each of four perfumes in the style of each of four references: of the four, that background is the nearest."""
    names = ["perfume", "perfume_2", "perfume_3", "perfume_4"]
    pictures = painted(sd, [name for name in names for _ in names], ["perfume"] * 16, names * 4).unflatten(0, (4, 4))
    products = torch.cat([canvas(name)[1] for name in names])[:, None, None]  # (4, 1, 1, 1, H, W)
    references, masks = (torch.cat(x) for x in zip(*(canvas(f"{name}_reference") for name in names)))
    both = (1 - products) * (1 - masks)  # (4, 1, 4, 1, H, W): background in the picture and in the reference
    distance = (pictures[:, :, None] - references).abs() * both  # (product, its reference, any reference, 3, H, W)
    assert distance.mean(dim=(3, 4, 5)).argmin(dim=2).tolist() == [[0, 1, 2, 3]] * 4


def test_clip_finds_a_pictures_caption(sd, clip):
    """Each sample's reference finds its caption among the captions of all."""
    captions = [f"A photo of {product_caption(ad.product, ad.reference_seed)}, in the background of "
                f"{scene_caption(PRODUCTS[ad.product].scene, Brand(ad.brand))}" for ad in REFERENCES.values()]
    text = F.normalize(clip.encode_text(sd.tokenizer(captions)), dim=-1)
    found = embed(clip, torch.cat([canvas(f"{name}_reference")[0] for name in REFERENCES])) @ text.T
    assert found.argmax(dim=1).tolist() == list(range(len(REFERENCES)))
