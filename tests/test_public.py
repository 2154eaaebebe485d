"""Tests: public weights in every layout: names and shapes of the real files, single files written with the original
names, and the pictures that the reference pipelines paint from the same weights and noise.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_weights, random, randomise, refused, relative_error
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import generate
import train
from clip import CLIP, TextEncoder
from data import Canvas
from generate import paint
from model import CategoryGenerator, ControlNet, UNet
from rivals.paint_by_example import PaintByExampleEncoder, encoder_config
from sampler import SamplerSettings, draw_noise, seeded
from support.files import write_json
from support.images import to_image
from support.layouts import RENAMES, split_by_model, text_config, under_our_names, unet_config, vae_config
from support.tensors import read_tensors
from toy.stages import train_tokenizer
from vae import VAE
from weights import (
    TEXT_FILE,
    UNET_FILE,
    build_module,
    control_config,
    load_control,
    load_stable_diffusion,
    public_tensors,
    save_control,
    save_module,
)

LAYOUTS = Path(__file__).resolve().parents[2] / "shared" / "layouts"
ROUNDING = 1e-5  # of the largest value: the rounding of float32 sums in another order
layouts = pytest.mark.skipif(not LAYOUTS.is_dir(), reason=f"needs the public files' names and shapes in {LAYOUTS}")

# ---------------------------------------------------------------- the real files' names and shapes


def layout(name: str) -> dict[str, Tensor]:
    """A public file's tensors, by name: shapes without values."""
    shapes = json.loads((LAYOUTS / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def config(path: str) -> dict:
    """A public folder's configuration, such as that in sd15_diffusers/unet/config.json."""
    folder, file = path.split("/", 1)
    return json.loads((LAYOUTS / f"{folder}_configs.json").read_text())[file]


def fill(kind: type, settings: dict, tensors: dict[str, Tensor], renames: list = RENAMES) -> nn.Module:
    """Each tensor lands on one parameter of its shape, and each parameter gets one: only counters are left over.

    Where single files have no config.json, the shapes imply it.
    """
    named = under_our_names(tensors, renames)
    module = build_module(kind, settings, named, Path("public"), "meta", torch.float32)
    assert all(re.search("position_ids|num_batches", name) for name in named.keys() - module.state_dict().keys())
    configure = {UNet: unet_config, ControlNet: unet_config, VAE: vae_config, PaintByExampleEncoder: encoder_config,
                 TextEncoder: partial(text_config, activation=settings.get("hidden_act"))}.get(kind)
    implied = configure(named) if configure else {}
    assert all(implied[field] == settings[field] for field in implied.keys() & settings.keys())
    return module


SCHEDULE_BUFFERS = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@layouts
@pytest.mark.parametrize("name, folder", [
    ("sd15_single_file", "sd15_diffusers"), ("sd15_full_ema_single_file", "sd15_diffusers"),
    ("sd15_inpainting_single_file", "sd15_inpainting_diffusers")])
def test_each_tensor_of_a_single_file_lands_on_one_parameter_and_shapes_imply_the_configuration(name, folder):
    """What is not read: the noise schedule, the positions, and a second UNet of averages."""
    tensors = layout(name)
    parts = split_by_model(tensors)
    for part, kind in (("unet", UNet), ("vae", VAE), ("text_encoder", TextEncoder)):
        fill(kind, config(f"{folder}/{part}/config.json"), parts[part])
    assert not parts[""] and not parts["controlnet"]
    not_read = [key for key in tensors if key.startswith("model_ema.") or key in SCHEDULE_BUFFERS | {POSITIONS}]
    assert len(tensors) == len(not_read) + sum(map(len, parts.values()))


@layouts
@pytest.mark.parametrize("name, kind, path", [
    ("sd15_diffusers_unet", UNet, "sd15_diffusers/unet/config.json"),
    ("sd15_inpainting_diffusers_unet", UNet, "sd15_inpainting_diffusers/unet/config.json"),
    ("sd21_diffusers_unet", UNet, "sd21_diffusers/unet/config.json"),
    ("sd15_diffusers_vae", VAE, "sd15_diffusers/vae/config.json"),
    ("sd15_diffusers_vae_old_attn", VAE, "sd15_diffusers/vae/config.json"),
    ("sd15_diffusers_text_encoder", TextEncoder, "sd15_diffusers/text_encoder/config.json"),
    ("sd21_text_encoder", TextEncoder, "sd21_diffusers/text_encoder/config.json"),
    ("controlnet_diffusers", ControlNet, "controlnet_diffusers/config.json"),
    ("controlnet_v11p_sd15_inpaint_single_file", ControlNet, "controlnet_diffusers/config.json"),
    ("clip_vit_b32", CLIP, "clip_vit_b32/config.json"),
    ("clip_vit_l14", CLIP, "clip_vit_l14/config.json")])
def test_each_tensor_of_a_folder_lands_on_one_parameter_and_shapes_imply_the_configuration(name, kind, path):
    tensors = layout(name)
    fill(kind, config(path), split_by_model(tensors)["controlnet"] or tensors)


# ---------------------------------------------------------------- the original code's names
# Each rule turns a part of our names into the original's; numbers are counted by a function.

UNET_NAMES = [
    (r"(resnets\.\d\.)norm1", r"\1in_layers.0"), (r"(resnets\.\d\.)conv1", r"\1in_layers.2"),
    (r"(resnets\.\d\.)norm2", r"\1out_layers.0"), (r"(resnets\.\d\.)conv2", r"\1out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"), (r"conv_shortcut", "skip_connection"),
    (r"^time_embedding\.linear_(\d)", lambda n: f"time_embed.{2 * n - 2}"),
    (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda level, layer: f"input_blocks.{3 * level + layer + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda level, layer: f"input_blocks.{3 * level + layer + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda level: f"input_blocks.{3 * level + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda n: f"middle_block.{2 * n}"), (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda level, layer: f"output_blocks.{3 * level + layer}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda level, layer: f"output_blocks.{3 * level + layer}.1"),
    # the first level has no attention before its upsampling
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda level: f"output_blocks.{3 * level + 2}.{2 if level else 1}"),
    (r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"), (r"^controlnet_mid_block", "middle_block_out.0"),
    (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"^controlnet_cond_embedding\.blocks\.(\d)", lambda n: f"input_hint_block.{2 * n + 2}"),
    (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14")]
VAE_NAMES = [
    (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda level: f"up.{3 - level}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda level: f"up.{3 - level}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda n: f"mid.block_{n + 1}"),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"), (r"attn_1\.to_", "attn_1.")]
OPENCLIP_NAMES = [
    (r"text_model\.encoder\.layers", "transformer.resblocks"), (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn", "attn"), (r"layer_norm(\d)", r"ln_\1"), (r"fc1", "c_fc"), (r"fc2", "c_proj"),
    (r"text_model\.embeddings\.token", "token"), (r"text_model\.embeddings\.position_.*", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final")]


def original(module: nn.Module, prefix: str, names: list[tuple] = ()) -> dict[str, Tensor]:
    """A network's weights, as the original code names them; queries, keys and values of one name are one matrix."""
    tensors = {}
    for name, tensor in public_tensors(module).items():
        for pattern, new in names:
            name = re.sub(pattern, new if isinstance(new, str) else lambda m, f=new: f(*map(int, m.groups())), name)
        name = prefix + name
        tensors[name] = torch.cat([tensors[name], tensor]) if name in tensors else tensor.clone()
    return tensors


def original_unet(module: UNet | ControlNet, prefix: str) -> dict[str, Tensor]:
    return original(module, prefix, UNET_NAMES)


def original_vae(module: VAE) -> dict[str, Tensor]:
    """Its attention is of 1x1 convolutions."""
    tensors = original(module, "first_stage_model.", VAE_NAMES)
    return {name: t[:, :, None, None] if "attn_1" in name and t.ndim == 2 else t for name, t in tensors.items()}


def original_text_sd2(module: TextEncoder) -> dict[str, Tensor]:
    """Also with the layer (its 24th), the projection and the scale that SD 2.x ignores."""
    prefix = "cond_stage_model.model."
    tensors = original(module, prefix, OPENCLIP_NAMES)
    last = {name.replace("resblocks.0.", "resblocks.23."): t.clone() for name, t in tensors.items()}
    return last | tensors | {f"{prefix}text_projection": torch.ones(64, 64), f"{prefix}logit_scale": torch.ones(())}


# ---------------------------------------------------------------- single files
# Shapes imply a configuration only with the public constants: 32 groups, and 8 heads or heads of 64 channels.

WIDE = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": [32, 64, 96, 64], "attention_head_dim": 8, "cross_attention_dim": 64,
        "use_linear_projection": False, "sample_size": 16,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
WIDE_SD2 = WIDE | {"block_out_channels": [64, 128, 64, 64], "attention_head_dim": [1, 2, 1, 1],
                   "use_linear_projection": True}
WIDE_VAE = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
            "block_out_channels": [32, 32, 64, 96], "layers_per_block": 2, "norm_num_groups": 32,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4}
WIDE_TEXT = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 600, "hidden_size": 64,
             "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_act": "quick_gelu",
             "max_position_embeddings": 77, "eos_token_id": 599}
# What is in some files, and not read: of training, of other tools, of the CLIP that the text encoder is a part of
LEFT_OVERS = {"model_ema.decay": (), "denoiser.sigmas": (1000,), "embedding_manager.initial_embeddings": (4,),
              "cond_stage_model.logit_scale": (), "cond_stage_model.text_projection": (4, 4),
              "cond_stage_model.transformer.text_projection.weight": (4, 4), "first_stage_model.loss.logvar": (),
              "cond_stage_model.transformer.vision_model.embeddings.class_embedding": (4,), POSITIONS: (1, 77),
              **dict.fromkeys(SCHEDULE_BUFFERS, (1000,))}


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """single(version) -> file, networks, tensors: a tiny SD 1 or 2; its tokenizer and schedule lie beside the file."""
    made = {}

    def build(version: int):
        if version not in made:
            folder = tmp_path_factory.mktemp(f"sd{version}")
            unet, vae = randomise(UNet(WIDE if version == 1 else WIDE_SD2)), randomise(VAE(WIDE_VAE), seed=3)
            text = randomise(TextEncoder(WIDE_TEXT | ({"hidden_act": "gelu"} if version == 2 else {})), seed=4)
            tensors = {name: torch.zeros(shape) for name, shape in LEFT_OVERS.items()} | original_vae(vae)
            tensors |= original_unet(unet, "model.diffusion_model.")
            tensors |= original_text_sd2(text) if version == 2 else original(text, "cond_stage_model.transformer.")
            save_file(tensors, folder / "sd.safetensors")
            train_tokenizer(["a photo of a mug"] * 3, 600, 77, folder / "tokenizer")
            (folder / "tokenizer" / "tokenizer_config.json").unlink()  # single files have none
            write_json({"prediction_type": "v_prediction"}, folder / "scheduler_config.json")
            made[version] = folder / "sd.safetensors", (unet, vae, text), tensors
        return made[version]

    return build


@pytest.mark.parametrize("version, prediction, size", [(1, "epsilon", 512), (2, "v_prediction", 768)])
@torch.no_grad()
def test_a_single_file_holds_the_same_networks_as_folders_and_as_for_diffusers(single, version, prediction, size):
    """The configurations inferred from shapes are the same, too: the networks compute the same."""
    file, (unet, vae, text), tensors = single(version)
    sd = load_stable_diffusion(file, tokenizer=file.parent / "tokenizer")
    z, t, P, ids = random(1, 4, 8, 8), torch.tensor([500]), random(1, 77, 64), torch.arange(77)[None]
    for ours, theirs, given in ((sd.unet, unet, (z, t, P)), (sd.vae.decode, vae.decode, (z,)),
                                (sd.text_encoder, text, (ids,))):
        assert relative_error(ours(*given), theirs(*given)) < ROUNDING
    assert equal_weights(sd.text_encoder, text)
    assert (sd.schedule.config["prediction_type"], sd.size) == (prediction, size)
    assert sd.tokenizer([""])[0, -1] == (sd.tokenizer.end if version == 1 else sd.tokenizer.bpe.token_to_id("!"))

    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    assert equal_weights(sd.unet, utils.convert_ldm_unet_checkpoint(dict(tensors), unet.config))
    assert equal_weights(sd.vae, utils.convert_ldm_vae_checkpoint(dict(tensors), vae.config))


@pytest.mark.parametrize("version, size", [(1, 512), (2, 768)])
def test_the_marker_v_pred_says_what_a_single_file_predicts_and_prefixes_of_training_nothing(
        single, tmp_path, version, size):
    """SD 2 needs no schedule beside it then."""
    file, (unet, *_), tensors = single(version)
    save_file({f"state_dict.module.{name}": tensor for name, tensor in tensors.items()} | {"v_pred": torch.zeros(0)},
              tmp_path / "sd.safetensors")
    sd = load_stable_diffusion(tmp_path / "sd.safetensors", tokenizer=file.parent / "tokenizer")
    assert equal_weights(sd.unet, unet)
    assert (sd.schedule.config["prediction_type"], sd.size) == ("v_prediction", size)


@pytest.mark.parametrize("form", ["folder", "whole.safetensors", "own.safetensors"])
def test_another_vae_can_be_given_as_a_folder_or_a_single_file_to_a_file_without_one(single, tmp_path, form, capsys):
    """And if a file also holds averages of its weights, it is said that they are not read."""
    file, (unet, *_), tensors = single(1)
    other, bare = randomise(VAE(WIDE_VAE), seed=9), tmp_path / "bare.safetensors"
    save_module(other, tmp_path / "folder", UNET_FILE)
    save_file(original_vae(other), tmp_path / "whole.safetensors")
    save_file(other.state_dict(), tmp_path / "own.safetensors")
    save_file({name: x for name, x in tensors.items() if not name.startswith("first_stage_model.")}, bare)
    sd = load_stable_diffusion(bare, tokenizer=file.parent / "tokenizer", vae=tmp_path / form)
    assert equal_weights(sd.vae, other) and equal_weights(sd.unet, unet)
    assert f"{bare} also holds moving averages of its weights, model_ema.*: they" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_controlnet_in_one_file_with_and_without_prefix(single, tmp_path, prefix):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    control = randomise(ControlNet(control_config(WIDE, 8)))
    tensors = original_unet(control, prefix)
    base = single(1)[2] if prefix else {}  # a whole checkpoint of ControlNet's training
    save_file(tensors | base, tmp_path / "control.safetensors")
    loaded = load_control(tmp_path / "control.safetensors", "category")
    assert type(loaded) is CategoryGenerator and equal_weights(loaded, control)
    assert loaded.config | control.config == control.config | loaded.config  # they agree on all fields that both have
    assert equal_weights(loaded, utils.convert_controlnet_checkpoint(tensors, control.config))


def test_numbers_at_odd_addresses_are_read(tmp_path):
    """Some public files have headers of odd length."""
    numbers, header = random(2), b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + numbers.numpy().tobytes())
    read = read_tensors(tmp_path / "x.safetensors")["x"]
    assert len(header) % 2 == 1 and read.data_ptr() % 4 == 0
    assert torch.equal(read, numbers)


# ---------------------------------------------------------------- files that are something else


@pytest.mark.parametrize("kind, names", {
    "SDXL": ["conditioner.embedders.0.x", "model.diffusion_model.input_blocks.0.0.weight"],
    "a LoRA": ["lora_unet_mid_block.lora_down.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a VAE": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "a TextEncoder": ["text_model.final_layer_norm.weight"],
    "SD 3 or Flux": ["model.diffusion_model.joint_blocks.0.x"],
    "a textual inversion": ["emb_params"],
}.items())
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path, kind, names):
    save_file({name: torch.zeros(3) for name in names}, tmp_path / "x.safetensors")
    with refused(f"x.safetensors is not a whole Stable Diffusion.*it looks like {kind}"):
        load_stable_diffusion(tmp_path / "x.safetensors")


def test_a_base_given_as_controlnet_is_named_as_what_it_is(single):
    with refused("holds no ControlNet; it looks like a whole Stable Diffusion"):
        load_control(single(1)[0])


@pytest.mark.parametrize("name, shape, words", [
    ("model.diffusion_model.out.2.bias", None, "does not fit a UNet: conv_out.bias is missing"),
    ("model.diffusion_model.out.2.weight", None, "does not hold a whole UNet .*conv_out.weight"),
    ("first_stage_model.extra", 1, "does not fit a VAE: extra is not part"),
    ("extra", 1, "extra .*not part of one"),
    ("first_stage_model.", None, "sd.safetensors holds no VAE; give one by --vae"),
])
def test_what_does_not_fit_in_a_single_file_is_named(single, tmp_path, name, shape, words):
    """shape: that of the tensor in the file, or None if all that begin with the name are missing."""
    tensors = {key: tensor for key, tensor in single(1)[2].items() if not key.startswith(name)}
    save_file(tensors | ({name: torch.ones(shape)} if shape else {}), tmp_path / "sd.safetensors")
    with refused(words, "sd.safetensors"):
        load_stable_diffusion(tmp_path / "sd.safetensors")


def test_what_lies_beside_a_single_file_is_asked_for(single, tmp_path):
    with refused(r"vocab.json and merges.txt there, or name the folder .* by --tokenizer"):
        load_stable_diffusion(single(1)[0])
    shutil.copy(single(2)[0], tmp_path)
    with refused("scheduler_config.json is missing: an SD 2.x may predict ε or v"):
        load_stable_diffusion(tmp_path / "sd.safetensors", tokenizer=single(2)[0].parent / "tokenizer")


# ---------------------------------------------------------------- the reference pipelines' pictures

SIZE, STEPS, SEED = 64, 4, 7
MUG = "A photo of mug"


def product() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 20:48, 24:44] = 1
    return (255 * random(1, 3, SIZE, SIZE).sigmoid()).round() / 255, mask


@pytest.fixture
def mug(tmp_path) -> Path:
    """The product as a photo."""
    rgb, mask = product()
    picture = to_image(rgb[0])
    picture.putalpha(to_image(mask[0]))
    (tmp_path / "ads").mkdir()
    picture.save(tmp_path / "ads" / "mug.png")
    return tmp_path / "ads" / "mug.png"


@pytest.fixture
def pipeline(tmp_path):
    """pipeline(kind) -> a tiny one of diffusers, which has written itself to tmp_path / "sd"."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")

    def build(kind: str, **parts):
        train_tokenizer([MUG] * 3, 600, 77, tmp_path / "tokenizer")
        unet = WIDE | {"in_channels": 9 if "Inpaint" in kind else 4}
        pipe = getattr(diffusers, kind)(
            unet=randomise(diffusers.UNet2DConditionModel.from_config(unet)),
            vae=randomise(diffusers.AutoencoderKL.from_config(WIDE_VAE), seed=3),
            text_encoder=randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**WIDE_TEXT)), seed=4),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
            scheduler=diffusers.DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                set_alpha_to_one=False, clip_sample=False),
            safety_checker=None, feature_extractor=None, **parts)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / "sd")
        return pipe

    return build


@torch.inference_mode()
def painted_by(pipe, **inputs) -> np.ndarray:
    """The pipeline's picture from our noise, (H, W, 3) in [0, 1]."""
    noise = draw_noise((4, SIZE // 8, SIZE // 8), seeded(SEED)[0])
    picture = pipe(MUG, height=SIZE, width=SIZE, num_inference_steps=STEPS, guidance_scale=2.0, latents=noise,
                   output_type="np", **inputs).images[0]
    assert picture.std() > 0.1
    return picture


def painted_by_us(folder: Path, *options: str) -> np.ndarray:
    generate.main([f"--weights={folder / 'sd'}", f"--out={folder}", f"--steps={STEPS}", f"--seed={SEED}",
                   f"--size={SIZE}", "--dtype=float32", *options])
    return np.asarray(Image.open(next(folder.glob(f"*_{SEED}.png"))).convert("RGB")) / 255


def test_prompt_paints_the_text_to_image_pipelines_picture_and_what_it_saves_in_half_precision_is_loaded(
        pipeline, tmp_path):
    pipe = pipeline("StableDiffusionPipeline")
    expected = painted_by(pipe)
    assert np.abs(painted_by_us(tmp_path, f"--prompt={MUG}") - expected).mean() <= 1 / 255
    pipe.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert equal_weights(load_stable_diffusion(tmp_path / "half").unet.half(), pipe.unet.state_dict())


@pytest.mark.parametrize("hint, around", [("product", 0.0), ("inpaint", -1.0)])
def test_controlnet_paints_the_controlnet_pipelines_picture(pipeline, tmp_path, mug, hint, around):
    diffusers = pytest.importorskip("diffusers")
    save_control(randomise(ControlNet(control_config(WIDE, 8)), seed=1), tmp_path / "control")
    control = diffusers.ControlNetModel.from_pretrained(tmp_path / "control")
    rgb, mask = product()
    expected = painted_by(pipeline("StableDiffusionControlNetPipeline", controlnet=control),
                          image=rgb * mask + around * (1 - mask))
    ours = painted_by_us(tmp_path, f"--product={mug}", "--category=mug", f"--controlnet={tmp_path / 'control'}",
                         f"--hint={hint}")
    ours[18:50, 22:46] = expected[18:50, 22:46]  # the product, and the pixel around it over which the scene continues
    assert np.abs(ours - expected).mean() <= 1 / 255


@torch.inference_mode()
def test_an_inpainting_base_paints_the_inpainting_pipelines_picture(pipeline, tmp_path, monkeypatch):
    rgb, mask = product()
    pipe = pipeline("StableDiffusionInpaintPipeline")
    posterior = type(pipe.vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist)
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())  # we take the mean, not a draw
    expected = painted_by(pipe, image=rgb, mask_image=1 - mask, strength=1.0)
    canvas = Canvas(rgb, mask, [(MUG,) * 3], seeded(SEED))
    ours = paint(load_stable_diffusion(tmp_path / "sd"), canvas, SamplerSettings(steps=STEPS))
    assert np.abs(ours[0].permute(1, 2, 0).numpy() - expected).mean() <= 1 / 255


@pytest.mark.slow
def test_cg_trains_beside_an_inpainting_base_and_reads_z_alone(pipeline, tmp_path, mug):
    base = pipeline("StableDiffusionInpaintPipeline").unet.conv_in.weight
    (mug.parent / "metadata.jsonl").write_text(2 * '{"file_name": "mug.png", "category": "mug"}\n')
    train.main(["cg", f"--data={mug.parent}", f"--weights={tmp_path / 'sd'}", f"--size={SIZE}", "--batch=2",
                "--steps=1", f"--out={tmp_path}"])
    torch.testing.assert_close(load_control(tmp_path / "cg").conv_in.weight, base[:, :4], atol=1e-4, rtol=0)  # lr 1e-5


# ---------------------------------------------------------------- full size: python -m pytest -m full_size


@pytest.mark.full_size
@torch.inference_mode()
def test_the_real_sizes_agree_with_the_references_within_a_thousandth(tmp_path):
    """UNet (859.5M), ControlNet, VAE decoder and text encoder in SD 1.5's configurations, random weights, float32."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    z, t, P = random(1, 4, 32, 32), torch.tensor([501]), random(1, 77, 768)
    hint, ids = random(1, 3, 256, 256).sigmoid(), torch.randint(49408, (1, 77))
    unet = WIDE | {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
    vae = WIDE_VAE | {"block_out_channels": [128, 256, 512, 512]}
    text = WIDE_TEXT | {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                        "num_attention_heads": 12}

    def flat(outputs) -> list[Tensor]:
        return [outputs] if isinstance(outputs, Tensor) else [x for part in outputs for x in flat(part)]

    for kind, settings, file, their_kind, method, *given in (
            (UNet, unet, UNET_FILE, diffusers.UNet2DConditionModel, "forward", z, t, P),
            (ControlNet, control_config(unet, 8), UNET_FILE, diffusers.ControlNetModel, "forward", z, t, P, hint),
            (VAE, vae, UNET_FILE, diffusers.AutoencoderKL, "decode", z),
            (TextEncoder, text, TEXT_FILE, transformers.CLIPTextModel, "forward", ids)):
        ours = randomise(kind(settings))
        save_module(ours, tmp_path / kind.__name__, file)
        theirs = their_kind.from_pretrained(tmp_path / kind.__name__)
        expected = flat(getattr(theirs, method)(*given, return_dict=False))
        assert max(map(relative_error, flat(getattr(ours, method)(*given)), expected)) < 1e-3
