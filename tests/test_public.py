"""Tests: public weights in every layout: names and shapes of the real files, single files written with the original
names, and the pictures that the reference pipelines paint from the same weights and noise.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_weights, random, randomise, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate
from clip import CLIP, TextEncoder
from data import Canvas
from generate import paint
from model import CategoryGenerator, ControlNet, UNet
from sampler import SamplerSettings, draw_noise, seeded
from support.files import BadInput, write_json
from support.layouts import RENAMES, our_name, split_by_model, text_config, under_our_names, unet_config, vae_config
from toy.stages import train_tokenizer
from vae import VAE
from weights import (
    TEXT_FILE,
    UNET_FILE,
    build_module,
    control_config,
    load_control,
    load_module,
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


def config(name: str, file: str) -> dict:
    return json.loads((LAYOUTS / f"{name}_configs.json").read_text())[file]


SCHEDULE_BUFFERS = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@layouts
@pytest.mark.parametrize("name", ["sd15_single_file", "sd15_full_ema_single_file", "sd15_inpainting_single_file"])
def test_each_tensor_of_a_single_file_lands_on_one_parameter_of_its_shape(name):
    tensors = layout(name)
    parts = split_by_model(tensors)
    assert not parts[""] and not parts["control"]
    folder = "sd15_inpainting" if "inpainting" in name else "sd15"
    for kind, part in ((UNet, "unet"), (VAE, "vae"), (TextEncoder, "text_encoder")):
        settings = public_config(folder, f"{part}/config.json")
        module = build_module(kind, settings, under_our_names(parts[part]), Path(name), "meta", torch.float32)
        assert len(parts[part]) == len(module.state_dict())  # `build_module` is strict about names and shapes

    ignored = set(tensors) - {prefix + key for prefix, part in (("model.diffusion_model.", "unet"),
                              ("first_stage_model.", "vae"), ("cond_stage_model.transformer.", "text_encoder"))
                              for key in parts[part]}
    averages = {key for key in ignored if key.startswith("model_ema.")}
    assert ignored - averages <= SCHEDULE_BUFFERS | {POSITIONS}
    assert len(averages) == (688 if "ema" in name else len(averages & {"model_ema.decay", "model_ema.num_updates"}))


@layouts
def test_the_averages_in_a_file_that_is_not_pruned_are_a_second_unet():
    """The ignored tensors are a copy of each tensor of the UNet, under names without dots, and two counters."""
    names = layout("sd15_full_ema_single_file")
    copies = {"model_ema." + name.removeprefix("model.").replace(".", "") for name in names
              if name.startswith("model.diffusion_model.")}
    counters = {"model_ema.decay", "model_ema.num_updates"}
    assert {name for name in names if name.startswith("model_ema.")} == copies | counters


FOLDERS = [("sd15_diffusers_unet", UNet, "sd15", "unet/config.json", set()),
           ("sd15_inpainting_diffusers_unet", UNet, "sd15_inpainting", "unet/config.json", set()),
           ("sd21_diffusers_unet", UNet, "sd21_diffusers", "unet/config.json", set()),
           ("sd15_diffusers_vae", VAE, "sd15", "vae/config.json", set()),
           ("sd15_diffusers_vae_old_attn", VAE, "sd15", "vae/config.json", set()),
           ("sd21_diffusers_vae", VAE, "sd21_diffusers", "vae/config.json", set()),
           ("sd21_diffusers_vae_old_attn", VAE, "sd21_diffusers", "vae/config.json", set()),
           ("sd15_diffusers_text_encoder", TextEncoder, "sd15", "text_encoder/config.json",
            {"text_model.embeddings.position_ids"}),
           ("sd21_text_encoder", TextEncoder, "sd21_diffusers", "text_encoder/config.json",
            {"text_model.embeddings.position_ids"}),
           ("controlnet_diffusers", ControlNet, "controlnet_diffusers", "config.json", set())]


def public_config(name: str, file: str) -> dict:
    return config({"sd15": "sd15_diffusers", "sd15_inpainting": "sd15_inpainting_diffusers"}.get(name, name), file)


@layouts
@pytest.mark.parametrize("name, kind, configs, file, ignored", FOLDERS, ids=[f[0] for f in FOLDERS])
def test_each_tensor_of_a_folder_lands_on_one_parameter_of_its_shape(name, kind, configs, file, ignored):
    tensors = layout(name)
    settings = public_config(configs, file)
    module = build_module(kind, settings, under_our_names(tensors), Path(name), "meta", torch.float32)
    assert {our_name(key) for key in tensors} - set(module.state_dict()) <= ignored
    assert len(module.state_dict()) == len(set(tensors) - ignored)


@layouts
def test_each_tensor_of_a_controlnets_single_file_lands_on_one_parameter_of_its_shape():
    parts = split_by_model(layout("controlnet_v11p_sd15_inpaint_single_file"))
    settings = config("controlnet_diffusers", "config.json")
    module = build_module(CategoryGenerator, settings, under_our_names(parts["control"]), Path("c"), "meta", None)
    assert len(parts["control"]) == len(module.state_dict()) == 340


@layouts
@pytest.mark.parametrize("name", ["clip_vit_b32", "clip_vit_l14"])
def test_each_tensor_of_clip_lands_on_one_parameter_of_its_shape(name):
    configs = json.loads((LAYOUTS / f"{name}_configs.json").read_text())
    module = build_module(CLIP, configs["config.json"], under_our_names(layout(name)), Path(name), "meta", None)
    ignored = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    assert len(module.state_dict()) == len(set(layout(name)) - ignored)


@layouts
def test_shapes_imply_the_public_configurations():
    def agrees(ours: dict, name: str, file: str, unknown=()):
        theirs = public_config(name, file)
        assert {k: v for k, v in ours.items() if k in theirs and k not in unknown} == {
            k: theirs[k] for k in ours if k in theirs and k not in unknown}

    for name, folder in (("sd15_single_file", "sd15"), ("sd15_inpainting_single_file", "sd15_inpainting")):
        parts = {part: under_our_names(tensors) for part, tensors in split_by_model(layout(name)).items()}
        agrees(unet_config(parts["unet"]), folder, "unet/config.json")
        agrees(vae_config(parts["vae"]), folder, "vae/config.json")
        agrees(text_config(parts["text_encoder"], "quick_gelu"), folder, "text_encoder/config.json")
    agrees(unet_config(layout("sd21_diffusers_unet")), "sd21_diffusers", "unet/config.json")
    agrees(text_config(layout("sd21_text_encoder"), "gelu"), "sd21_diffusers", "text_encoder/config.json")
    control = under_our_names(split_by_model(layout("controlnet_v11p_sd15_inpaint_single_file"))["control"])
    agrees(unet_config(control), "controlnet_diffusers", "config.json")


@layouts
def test_every_rename_rule_is_needed_by_a_public_file():
    files = [path.stem for path in LAYOUTS.glob("*.json") if path.name.startswith(("sd", "control", "clip"))]
    parts = [part for file in files if "config" not in file for part in split_by_model(layout(file)).values()]
    parts.append(split_by_model(original_text_sd2(wide_text()[1]))["text_encoder"])  # there is no manifest of SD 2.x's
    names = {key for part in parts for key in part}
    names |= {key.removeprefix("text_model.") for key in names}
    unused = [pattern.pattern for pattern, _ in RENAMES if not any(pattern.search(step) for key in names
              for step in steps_of(key))]
    assert not unused


def steps_of(name: str) -> list[str]:
    """A name at each step through the rules."""
    steps = [name]
    for pattern, new in RENAMES:
        steps.append(pattern.sub(new if isinstance(new, str) else lambda m, f=new: f(*map(int, m.groups())), steps[-1]))
    return steps


def test_our_own_names_come_through_the_rules_unchanged(unet, cg, vae, text_encoder):
    for module in (unet, cg, vae, text_encoder):
        assert all(our_name(name) == name for name in module.state_dict())


# ---------------------------------------------------------------- single files in the original names
# Shapes imply a configuration only with the public constants: 32 groups, and 8 heads or heads of 64 channels.

WIDE = {"in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64, 96, 64], "layers_per_block": 2,
        "attention_head_dim": 8, "cross_attention_dim": 64, "norm_num_groups": 32, "use_linear_projection": False,
        "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "sample_size": 16,
        "_class_name": "UNet2DConditionModel", "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
WIDE_SD2 = WIDE | {"block_out_channels": [64, 128, 64, 64], "attention_head_dim": [1, 2, 1, 1],
                   "use_linear_projection": True}
WIDE_VAE = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "act_fn": "silu",
            "block_out_channels": [32, 32, 64, 96], "layers_per_block": 2, "norm_num_groups": 32,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "scaling_factor": 0.18215}


def wide_text(activation: str = "quick_gelu", layers: int = 2) -> tuple[dict, TextEncoder]:
    settings = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 600,
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 1,
                "max_position_embeddings": 77, "hidden_act": activation, "layer_norm_eps": 1e-5, "eos_token_id": 599}
    return settings, randomise(TextEncoder(settings), seed=4)


RESIDUAL = [("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
            ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection.")]


class Mover:
    """Moves weights from our names to the original code's; in the end none may be left."""

    def __init__(self, module, prefix: str):
        self.left, self.prefix, self.moved = dict(public_tensors(module)), prefix, {}

    def move(self, ours: str, theirs: str, inner=()) -> bool:
        names = [name for name in self.left if name.startswith(ours)]
        for name in names:
            rest = name[len(ours) :]
            for a, b in inner:
                rest = rest.replace(a, b)
            self.moved[self.prefix + theirs + rest] = self.left.pop(name).clone()
        return bool(names)


def original_unet(module, prefix: str) -> dict[str, Tensor]:
    """A UNet's or a ControlNet's weights, as openaimodel.py and cldm.py number them."""
    m = Mover(module, prefix)
    m.move("time_embedding.linear_1.", "time_embed.0.")
    m.move("time_embedding.linear_2.", "time_embed.2.")
    m.move("conv_in.", "input_blocks.0.0.")
    blocks = 1
    for level in range(4):
        for layer in range(2):
            m.move(f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{blocks}.0.", RESIDUAL)
            m.move(f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{blocks}.1.")
            blocks += 1
        blocks += m.move(f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{blocks}.0.op.")
    m.move("mid_block.resnets.0.", "middle_block.0.", RESIDUAL)
    m.move("mid_block.attentions.0.", "middle_block.1.")
    m.move("mid_block.resnets.1.", "middle_block.2.", RESIDUAL)
    blocks = 0
    for level in range(4):
        for layer in range(3):
            m.move(f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{blocks}.0.", RESIDUAL)
            attended = m.move(f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{blocks}.1.")
            blocks += 1
        m.move(f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{blocks - 1}.{1 + attended}.conv.")
    m.move("conv_norm_out.", "out.0.")
    m.move("conv_out.", "out.2.")
    for i in range(12):
        m.move(f"controlnet_down_blocks.{i}.", f"zero_convs.{i}.0.")
    m.move("controlnet_mid_block.", "middle_block_out.0.")
    m.move("controlnet_cond_embedding.conv_in.", "input_hint_block.0.")
    for i in range(6):
        m.move(f"controlnet_cond_embedding.blocks.{i}.", f"input_hint_block.{2 * i + 2}.")
    m.move("controlnet_cond_embedding.conv_out.", "input_hint_block.14.")
    assert not m.left
    return m.moved


def original_vae(module) -> dict[str, Tensor]:
    """A VAE's weights, as the original code's Encoder and Decoder name them; its attention is of 1x1 convolutions."""
    m = Mover(module, "first_stage_model.")
    inner = [("conv_shortcut.", "nin_shortcut.")]
    for side, blocks, layers in (("encoder", "down", 2), ("decoder", "up", 3)):
        for level in range(4):
            theirs = f"{side}.{blocks}.{level if side == 'encoder' else 3 - level}"
            for layer in range(layers):
                m.move(f"{side}.{blocks}_blocks.{level}.resnets.{layer}.", f"{theirs}.block.{layer}.", inner)
            m.move(f"{side}.{blocks}_blocks.{level}.{blocks}samplers.0.", f"{theirs}.{blocks}sample.")
        for k in (0, 1):
            m.move(f"{side}.mid_block.resnets.{k}.", f"{side}.mid.block_{k + 1}.", inner)
        for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                             ("to_out.0", "proj_out")):
            m.move(f"{side}.mid_block.attentions.0.{ours}.", f"{side}.mid.attn_1.{theirs}.")
        m.move(f"{side}.conv_norm_out.", f"{side}.norm_out.")
    for rest in list(m.left):  # conv_in, conv_out, quant_conv, post_quant_conv
        m.move(rest, rest)
    return {name: t[:, :, None, None] if "attn_1" in name and t.ndim == 2 else t for name, t in m.moved.items()}


def original_text_sd1(module) -> dict[str, Tensor]:
    moved = {f"cond_stage_model.transformer.{name}": t for name, t in module.state_dict().items()}
    return moved | {POSITIONS: torch.arange(77)[None]}


def original_text_sd2(module) -> dict[str, Tensor]:
    """A text encoder in OpenCLIP's names, also with the layer (its 24th), projection and scale that SD 2.x ignores."""
    m = Mover(module, "cond_stage_model.model.")
    for i in range(len(module.text_model.encoder.layers)):
        ours, theirs = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [m.left.pop(f"{ours}self_attn.{x}_proj.{kind}") for x in "qkv"]
            m.moved[f"{m.prefix}{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
        for a, b in (("self_attn.out_proj.", "attn.out_proj."), ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."),
                     ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj.")):
            m.move(ours + a, theirs + b)
    m.move("text_model.embeddings.token_embedding.", "token_embedding.")
    m.move("text_model.embeddings.position_embedding.weight", "positional_embedding")
    m.move("text_model.final_layer_norm.", "ln_final.")
    assert not m.left
    last = {name.replace("resblocks.0.", "resblocks.23."): t.clone() for name, t in m.moved.items()
            if "resblocks.0." in name}
    return m.moved | last | {f"{m.prefix}text_projection": torch.ones(64, 64), f"{m.prefix}logit_scale": torch.ones(())}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """single(version) -> (file, its modules): a tiny SD 1 or 2 in one file, its tokenizer and schedule beside it."""
    made = {}

    def build(version: int):
        if version not in made:
            folder = tmp_path_factory.mktemp(f"sd{version}")
            unet, vae = randomise(UNet(WIDE if version == 1 else WIDE_SD2)), randomise(VAE(WIDE_VAE), seed=3)
            text = wide_text()[1] if version == 1 else wide_text("gelu")[1]
            tensors = original_unet(unet, "model.diffusion_model.") | original_vae(vae)
            tensors |= original_text_sd1(text) if version == 1 else original_text_sd2(text)
            tensors |= {name: torch.zeros(1000) for name in SCHEDULE_BUFFERS} | {"model_ema.decay": torch.ones(())}
            save_file(tensors, folder / "sd.safetensors")
            train_tokenizer(["a photo of a mug"] * 3, 600, 77, folder / "tokenizer")
            (folder / "tokenizer" / "tokenizer_config.json").unlink()  # single files have none
            write_json({"prediction_type": "v_prediction"}, folder / "scheduler_config.json")
            made[version] = folder / "sd.safetensors", (unet, vae, text), tensors
        return made[version]

    return build


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_a_single_file_holds_the_same_networks_as_folders(single, version):
    file, (unet, vae, text), _ = single(version)
    sd = load_stable_diffusion(file, tokenizer=file.parent / "tokenizer")
    assert equal_weights(sd.unet, unet) and equal_weights(sd.vae, vae) and equal_weights(sd.text_encoder, text)
    z, t, P, ids = random(1, 4, 16, 16), torch.tensor([500]), random(1, 77, 64), torch.arange(77)[None]
    # The configurations inferred from the shapes are the same, too. Sums over mapped memory may be rounded differently
    assert relative_error(sd.unet(z, t, P), unet(z, t, P)) < ROUNDING
    assert relative_error(sd.vae.decode(z), vae.decode(z)) < ROUNDING
    assert relative_error(sd.text_encoder(ids), text(ids)) < ROUNDING
    assert sd.schedule.config["prediction_type"] == ("epsilon" if version == 1 else "v_prediction")
    assert sd.size == (512 if version == 1 else 768)
    pad = sd.tokenizer([""])[0, -1].item()
    assert pad == (sd.tokenizer.end if version == 1 else sd.tokenizer.bpe.token_to_id("!"))


EXTRA = {"cond_stage_model.logit_scale": (), "cond_stage_model.text_projection": (4, 4), "denoiser.sigmas": (1000,),
         "cond_stage_model.transformer.text_projection.weight": (4, 4), "first_stage_model.loss.logvar": (),
         "cond_stage_model.transformer.vision_model.embeddings.class_embedding": (4,),
         "first_stage_model.loss.discriminator.main.0.weight": (4, 4), "embedding_manager.initial_embeddings": (4,)}


@pytest.mark.parametrize("version, front, marker", [(1, "", ""), (1, "state_dict.", ""), (1, "", "v_pred"),
                                                    (2, "", "v_pred")])
def test_what_other_tools_leave_in_single_files_counts_by_its_meaning(single, tmp_path, version, front, marker):
    file, (unet, vae, text), tensors = single(version)
    tensors = {front + name: tensor for name, tensor in tensors.items()}
    tensors |= {front + name: torch.zeros(shape) for name, shape in EXTRA.items()}
    save_file(tensors | ({marker: torch.zeros(0)} if marker else {}), tmp_path / "sd.safetensors")
    sd = load_stable_diffusion(tmp_path / "sd.safetensors", tokenizer=file.parent / "tokenizer")
    assert equal_weights(sd.unet, unet) and equal_weights(sd.vae, vae) and equal_weights(sd.text_encoder, text)
    assert sd.schedule.config["prediction_type"] == ("v_prediction" if marker else "epsilon")
    assert sd.size == (768 if version == 2 else 512)


@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_converts_a_single_file_to_the_same_weights(single, version):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    transformers = pytest.importorskip("transformers")
    _, (unet, vae, text), tensors = single(version)
    pairs = [(utils.convert_ldm_unet_checkpoint(dict(tensors), unet.config), unet, "unet"),
             (utils.convert_ldm_vae_checkpoint(dict(tensors), vae.config), vae, "vae")]
    if version == 2:
        their_text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text.config))
        converted = utils.convert_open_clip_checkpoint(their_text, {k: v for k, v in tensors.items() if "23" not in k})
        pairs.append((converted, text, "text_encoder"))
    for theirs, _, part in pairs:
        ours = under_our_names(split_by_model(tensors)[part])
        for name in ours.keys() & theirs.keys():
            assert torch.equal(ours[name].squeeze(), theirs[name].squeeze()), name
        assert not [name for name in theirs if name not in ours and "projection" not in name]
        assert not [name for name in ours if name not in theirs]


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@torch.no_grad()
def test_a_controlnet_in_one_file_with_and_without_prefix(tmp_path, prefix):
    control = randomise(ControlNet(control_config(WIDE, 8)))
    tensors = original_unet(control, prefix)
    if prefix:  # a whole checkpoint of ControlNet's training, base included
        tensors |= original_unet(randomise(UNet(WIDE)), "model.diffusion_model.")
    save_file(tensors, tmp_path / "control.safetensors")
    loaded = load_control(tmp_path / "control.safetensors")
    given = random(1, 4, 16, 16), torch.tensor([3]), random(1, 77, 64), random(1, 3, 128, 128)
    assert equal_weights(loaded, control)
    assert all(relative_error(a, b) < ROUNDING for a, b in zip(loaded(*given), control(*given), strict=True))
    assert type(load_control(tmp_path / "control.safetensors", "category")) is CategoryGenerator

    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = utils.convert_controlnet_checkpoint(dict(tensors), control.config)
    assert equal_weights(control, theirs)


def test_the_file_of_a_folder_is_read_with_the_folders_configuration(tmp_path, cg):
    """Its shapes would imply 8 heads where the toy has other numbers."""
    save_control(cg, tmp_path / "cg")
    assert load_control(tmp_path / "cg" / UNET_FILE).config == load_control(tmp_path / "cg").config


def test_numbers_at_odd_addresses_are_read(tmp_path, unet):
    """Some public files have headers of odd length."""
    save_module(unet, tmp_path / "unet", UNET_FILE)
    file = tmp_path / "unet" / UNET_FILE
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + 2).to_bytes(8, "little") + raw[8 : 8 + length] + b"  " + raw[8 + length :])
    loaded = load_module(UNet, tmp_path / "unet", UNET_FILE, "cpu", None)
    assert all(p.data_ptr() % 4 == 0 for p in loaded.parameters())
    assert equal_weights(loaded, unet)


# ---------------------------------------------------------------- files that are something else


OTHERS = {
    "SDXL": {"conditioner.embedders.0.x": (2,), "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 4)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (32, 4, 3, 3)},
    "a VAE": {"encoder.conv_in.weight": (3, 3), "decoder.conv_in.weight": (3, 3)},
    "a TextEncoder": {"text_model.final_layer_norm.weight": (3,)},
    "SD 3 or Flux": {"model.diffusion_model.joint_blocks.0.x": (2,)},
    "a textual inversion": {"emb_params": (2, 768)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path, kind):
    save_file({name: torch.zeros(shape) for name, shape in OTHERS[kind].items()}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=f"x.safetensors is not a whole Stable Diffusion.*it looks like {kind}"):
        load_stable_diffusion(tmp_path / "x.safetensors")


def test_a_base_given_as_controlnet_is_named_as_what_it_is(single):
    with pytest.raises(BadInput, match="holds no ControlNet; it looks like a whole Stable Diffusion"):
        load_control(single(1)[0])


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.diffusion_model.out.2.bias"), "does not fit a UNet: conv_out.bias is missing"),
    (lambda t: t.pop("model.diffusion_model.out.2.weight"), "does not hold a whole UNet .*conv_out.weight"),
    (lambda t: t.update({"first_stage_model.extra": torch.ones(1)}), "does not fit a VAE: extra is not part"),
    (lambda t: t.update({"extra": torch.ones(1)}), "extra .*not part of one"),
    (lambda t: t.update({"model.diffusion_model.out.0.bias": torch.ones(1)}), r"conv_norm_out.bias has shape \[1\]"),
    (lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage")], "it holds no vae"),
], ids=["missing", "missing shape", "extra", "extra at the top", "misshapen", "no VAE"])
def test_what_does_not_fit_in_a_single_file_is_named(single, tmp_path, change, words):
    tensors = dict(single(1)[2])
    change(tensors)
    save_file(tensors, tmp_path / "sd.safetensors")
    with pytest.raises(BadInput, match=words) as error:
        load_stable_diffusion(tmp_path / "sd.safetensors")
    assert "sd.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_single_file_without_tokenizer_says_what_to_get(single):
    file, *_ = single(1)
    with pytest.raises(BadInput, match=r"vocab.json and merges.txt there, or name the folder .* by --tokenizer"):
        load_stable_diffusion(file)


def test_a_single_file_of_sd2_wants_its_schedule(single, tmp_path):
    (tmp_path / "sd2.safetensors").write_bytes(single(2)[0].read_bytes())
    with pytest.raises(BadInput, match="scheduler_config.json is missing: an SD 2.x may predict ε or v"):
        load_stable_diffusion(tmp_path / "sd2.safetensors", tokenizer=single(2)[0].parent / "tokenizer")


# ---------------------------------------------------------------- the reference pipelines' pictures

SIZE, STEPS, SEED = 64, 4, 7
MUG = "A photo of mug"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SD 1 folder, the same with a 9-channel UNet, and a ControlNet; as both programs read them."""
    root = tmp_path_factory.mktemp("folders")
    for name, channels in (("sd", 4), ("inpainting", 9)):
        save_module(randomise(UNet(WIDE | {"in_channels": channels})), root / name / "unet", UNET_FILE)
        save_module(randomise(VAE(WIDE_VAE), seed=3), root / name / "vae", UNET_FILE)
        save_module(wide_text()[1], root / name / "text_encoder", TEXT_FILE)
        train_tokenizer([MUG] * 3, 600, 77, root / name / "tokenizer")
        scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                     "beta_end": 0.012, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
        write_json(scheduler, root / name / "scheduler" / "scheduler_config.json")
        write_json({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
                    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
                    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
                    "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None],
                    "feature_extractor": [None, None]}, root / name / "model_index.json")
    save_control(randomise(ControlNet(control_config(WIDE, 8)), seed=1), root / "control")
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 4), dtype=np.uint8), "RGBA")
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[20:48, 24:44] = 255
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(root / "mug.png")
    return root


def pipeline(kind: str, folder: Path, **parts):
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe, **inputs) -> np.ndarray:
    """The pipeline's picture from our noise, (H, W, 3) in [0, 1]."""
    noise = draw_noise((4, SIZE // 8, SIZE // 8), seeded(SEED)[0])
    with torch.inference_mode():
        return pipe(MUG, height=SIZE, width=SIZE, num_inference_steps=STEPS, guidance_scale=2.0, latents=noise,
                    output_type="np", **inputs).images[0]


def run(*options) -> None:
    fixed = ("--steps", STEPS, "--seed", SEED, "--size", SIZE, "--dtype", "float32")
    generate.main([*map(str, (*options, *fixed))])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")) / 255


def product(path: Path) -> tuple[Tensor, Tensor]:
    rgba = torch.from_numpy(np.asarray(Image.open(path)) / 255).float().permute(2, 0, 1)[None]
    return rgba[:, :3], rgba[:, 3:]


def test_prompt_paints_the_text_to_image_pipelines_picture(folders, tmp_path):
    run("--prompt", MUG, "--weights", folders / "sd", "--out", tmp_path)
    expected = call(pipeline("StableDiffusionPipeline", folders / "sd"))
    assert expected.std() > 0.1
    assert np.abs(read(tmp_path / f"prompt_{SEED}.png") - expected).mean() <= 1 / 255


@pytest.mark.parametrize("variant", [None, "fp16"])
@torch.inference_mode()
def test_what_the_pipeline_saves_is_loaded(folders, tmp_path, variant):
    pipe = pipeline("StableDiffusionPipeline", folders / "sd")
    if variant:
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "saved", variant=variant)
    ours, theirs = load_stable_diffusion(folders / "sd"), load_stable_diffusion(tmp_path / "saved")
    for a, b in ((ours.unet, theirs.unet), (ours.vae, theirs.vae), (ours.text_encoder, theirs.text_encoder)):
        weights = public_tensors(b)
        assert all(torch.allclose(t, weights[name], rtol=2e-3 if variant else 0, atol=1e-6 if variant else 0)
                   for name, t in public_tensors(a).items())
    assert torch.equal(ours.tokenizer([MUG]), theirs.tokenizer([MUG]))
    assert torch.equal(ours.schedule.alpha_bar, theirs.schedule.alpha_bar)


@pytest.mark.parametrize("hint, around", [("product", 0.0), ("inpaint", -1.0)])
def test_controlnet_paints_the_controlnet_pipelines_picture(folders, tmp_path, hint, around):
    run("--product", folders / "mug.png", "--category", "mug", "--weights", folders / "sd", "--controlnet",
        folders / "control", "--hint", hint, "--out", tmp_path)
    diffusers = pytest.importorskip("diffusers")
    control = diffusers.ControlNetModel.from_pretrained(folders / "control", torch_dtype=torch.float32)
    rgb, mask = product(folders / "mug.png")
    expected = call(pipeline("StableDiffusionControlNetPipeline", folders / "sd", controlnet=control),
                    image=rgb * mask + around * (1 - mask))
    painted = read(tmp_path / f"mug_{SEED}.png")
    background = mask[0, 0].numpy() == 0
    background[18:50, 22:46] = False  # the product, and the pixel around it over which the scene is continued
    assert expected.std() > 0.1
    assert np.abs(painted - expected)[background].mean() <= 1 / 255


@torch.inference_mode()
def test_an_inpainting_base_paints_the_inpainting_pipelines_picture(folders, monkeypatch):
    sd = load_stable_diffusion(folders / "inpainting")
    rgb, mask = product(folders / "mug.png")
    canvas = Canvas(rgb, mask, [(MUG,) * 3], seeded(SEED))
    ours = paint(sd, canvas, SamplerSettings(steps=STEPS))[0].permute(1, 2, 0).numpy()
    pipe = pipeline("StableDiffusionInpaintPipeline", folders / "inpainting")
    posterior = type(pipe.vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist)
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())  # we take the mean, not a draw
    expected = call(pipe, image=rgb, mask_image=1 - mask, strength=1.0)
    assert expected.std() > 0.1
    assert np.abs(ours - expected).mean() <= 1 / 255


@torch.inference_mode()
def test_branches_trained_beside_an_inpainting_base_read_z_alone(folders):
    sd = load_stable_diffusion(folders / "inpainting")
    branch = CategoryGenerator(control_config(sd.unet.config, 8))
    branch.init_from_unet(sd.unet)
    assert torch.equal(branch.conv_in.weight, sd.unet.conv_in.weight[:, :4])
    rgb, mask = product(folders / "mug.png")
    with_branch, alone = (paint(sd, Canvas(rgb, mask, [(MUG,) * 3], seeded(SEED)), SamplerSettings(steps=2), cg)
                          for cg in (branch, None))
    assert torch.allclose(with_branch, alone)  # zero convolutions


def test_cg_trains_beside_an_inpainting_base_from_a_controlnets_single_file(folders, tmp_path):
    import train  # here: nothing else in this file needs the trainer

    write = "\n".join(json.dumps({"file_name": "mug.png", "category": "mug"}) for _ in range(2))
    (tmp_path / "ads").mkdir()
    shutil.copy(folders / "mug.png", tmp_path / "ads")
    (tmp_path / "ads" / "metadata.jsonl").write_text(write)
    control = load_control(folders / "control")
    save_file(original_unet(control, "control_model."), tmp_path / "control.safetensors")
    train.main([str(x) for x in (
        "cg", "--data", tmp_path / "ads", "--weights", folders / "inpainting", "--size", SIZE, "--batch", 2,
        "--steps", 1, "--init-control", tmp_path / "control.safetensors", "--out", tmp_path / "run")])
    trained = load_file(tmp_path / "run" / "cg" / UNET_FILE)
    assert all((trained[name] - t).abs().max() < 1e-4 for name, t in public_tensors(control).items())  # lr 1e-5


# ---------------------------------------------------------------- full size: python -m pytest -m full_size


@pytest.mark.full_size
@torch.inference_mode()
def test_the_real_sizes_agree_with_the_references_within_a_thousandth(tmp_path):
    """UNet (859.5M), ControlNet, VAE decoder and text encoder in SD 1.5's configurations, random weights, float32."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    z, t, P = random(1, 4, 32, 32), torch.tensor([501]), random(1, 77, 768)
    hint, ids = random(1, 3, 256, 256).sigmoid(), torch.randint(49408, (1, 77))

    def compare(theirs, kind, files, run_ours, run_theirs) -> float:
        """theirs writes its folder, ours reads it, and both compute."""
        theirs.eval().save_pretrained(tmp_path / "model")
        expected = run_theirs(theirs)
        assert all(x.std() > 1e-4 for x in expected)
        del theirs
        ours = run_ours(load_module(kind, tmp_path / "model", files, "cpu", torch.float32))
        return max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))

    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    control = diffusers.ControlNetModel.from_unet(unet)
    for zero in (*control.controlnet_down_blocks, control.controlnet_mid_block,
                 control.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(zero.weight, std=0.05)
    errors = {"UNet": compare(unet, UNet, UNET_FILE, lambda m: [m(z, t, P)], lambda m: [m(z, t, P).sample])}
    del unet
    errors["ControlNet"] = compare(
        control, ControlNet, UNET_FILE, lambda m: m(z, t, P, hint),
        lambda m: [x for part in [m(z, t, P, hint, return_dict=False)] for x in (*part[0], part[1])])
    del control
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    errors["VAE decoder"] = compare(vae, VAE, UNET_FILE, lambda m: [m.decode(z)], lambda m: [m.decode(z).sample])
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    errors["text encoder"] = compare(text, TextEncoder, TEXT_FILE, lambda m: [m(ids)],
                                     lambda m: [m(ids).last_hidden_state])
    print("largest relative errors:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-3
