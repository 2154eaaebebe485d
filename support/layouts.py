"""Support: what public files of weights look like; not needed to understand the paper.

In this order: names in public files and ours; the kinds of files, by the names in them; configurations that shapes
imply; and the fields of public configurations that change a result, with the values that we support.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from support.files import BadInput, read_json

# The prefix of each model's names in a single file. A file of a ControlNet alone may have none.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",  # CLIP, as transformers names it: SD 1.x
    "cond_stage_model.model.": "text_encoder",  # OpenCLIP: SD 2.x
    "control_model.": "controlnet",
}

# Tensors in public files that are not read. A tensor that the network does have is never left out.
IGNORED = re.compile("|".join((
    r"(.*\.)?position_ids",  # counts 0, 1, 2, …
    r".*\.num_batches_tracked",  # counts training steps
    r"model_ema\..*",  # moving averages of the weights, in files that are not pruned
    r"(sqrt_|sqrt_recip_|sqrt_recipm1_|(sqrt|log)_one_minus_)?alphas_cumprod(_prev)?|betas|logvar|lvlb_weights",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor",  # the noise schedule: see sampler.py
    r"denoiser\.sigmas",
    r"(first_stage_model\.)?loss\..*|embedding_manager\..*",  # what only training needs
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..*",  # SD 2.x does without OpenCLIP's last layer
    r"(cond_stage_model\.)?(model\.|transformer\.)?(logit_scale|text_projection(\.weight)?|attn_mask)",
)))
IMAGE_TOWER = re.compile(r"(vision_model|visual|visual_projection)\..*")  # in the CLIP that a text encoder comes from

# From the names in public files, without prefix, to ours. A pattern's number is the function's argument, and {}
# stands for q, k and v, which share one matrix. Our own names stay unchanged.
RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^time_embed\.([02])\.", lambda i: f"time_embedding.linear_{i // 2 + 1}."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    # The UNet's and ControlNet's levels: three input_blocks each, two layers and the downsampling
    (r"^input_blocks\.(\d+)\.", lambda i: f"down_blocks.{(i - 1) // 3}.{(i - 1) % 3}."),
    # and three output_blocks, the last one with the upsampling
    (r"^output_blocks\.(\d+)\.", lambda i: f"up_blocks.{i // 3}.{i % 3}."),
    (r"^(down_blocks\.\d)\.2\.0\.op\.", r"\1.downsamplers.0.conv."),
    (r"^(up_blocks\.\d)\.2\.[12]\.conv\.", r"\1.upsamplers.0.conv."),
    (r"^((?:down|up)_blocks\.\d)\.(\d)\.0\.", r"\1.resnets.\2."),
    (r"^((?:down|up)_blocks\.\d)\.(\d)\.1\.", r"\1.attentions.\2."),
    (r"^middle_block\.([02])\.", lambda i: f"mid_block.resnets.{i // 2}."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    # within a residual block
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.(skip_connection|nin_shortcut)\.", ".conv_shortcut."),
    # ControlNet: zero convolutions, and the hint encoder, whose odd layers are activations
    (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out."),
    (r"^input_hint_block\.(\d+)\.", lambda i: f"controlnet_cond_embedding.blocks.{i // 2 - 1}."),
    # VAE: the original counts the decoder's levels from the fine end
    (r"^encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d)\.block\.", lambda i: f"decoder.up_blocks.{3 - i}.resnets."),
    (r"^decoder\.up\.(\d)\.upsample\.", lambda i: f"decoder.up_blocks.{3 - i}.upsamplers.0."),
    (r"\.mid\.block_([12])\.", lambda i: f".mid_block.resnets.{i - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^((?:en|de)coder)\.norm_out\.", r"\1.conv_norm_out."),
    # within its attention, by the original names or those of public folders before 2023
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.([qkv])(?:uery|ey|alue)?\.", r"\1.to_\2."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
    # CLIP's text encoder: recent folders leave out the first part of the name
    (r"^(?=(?:embeddings|encoder\.layers|final_layer_norm)\.)", "text_model."),
    # OpenCLIP's
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.in_proj_(?=weight$|bias$)", ".{}_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)]


def under_our_names(tensors: dict[str, Tensor], renames: list[tuple] = RENAMES) -> dict[str, Tensor]:
    """Tensors of a public file under our names. A matrix of queries, keys and values is split into three.

    A tensor that is there by an older and a newer name keeps the second under a name that no network has.
    """
    named = {}
    for name, tensor in tensors.items():
        for pattern, new in renames:
            name = pattern.sub(new if isinstance(new, str) else lambda match, f=new: f(int(match[1])), name)
        for letter, part in zip("qkv", tensor.chunk(3) if "{}" in name else [tensor]):
            new = name.replace("{}", letter)
            named[f"a second {new}" if new in named else new] = part
    return named


def split_by_model(tensors: dict[str, Tensor], prefixes: dict[str, str] = PREFIXES) -> dict[str, dict[str, Tensor]]:
    """A single file's tensors by model, without prefixes and ignored tensors; "" holds those without a prefix."""
    parts = {part: {} for part in ("", *prefixes.values())}
    for name, tensor in tensors.items():
        if not IGNORED.fullmatch(name):
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            parts[prefixes.get(prefix, "")][name[len(prefix) :]] = tensor
    return parts


SINGLE_FILE = "a whole Stable Diffusion"

# The kind of a file: that of the first pattern that one of its names matches.
KINDS = [(re.compile(pattern), kind) for pattern, kind in (
    (r"conditioner\.|add_embedding\.|label_emb\.", "SDXL"),
    (r"(joint|double)_blocks\.|add_[qkv]_proj", "SD 3 or Flux"),
    (r"lora_|\.lora[._]|_lora\.", "a LoRA"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion"),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter"),
    (r"control_model\.|input_hint_block\.|controlnet_|zero_convs\.", "a ControlNet"),
    (r"^model\.diffusion_model\.", SINGLE_FILE),
    (r"vision_model\.|visual\.", "a CLIP"),
    (r"text_model\.|resblocks\.", "a TextEncoder"),
    (r"^(down_blocks|input_blocks)\.", "a UNet"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.", "a VAE"),
)]


def looks_like(names: Iterable[str], expected: str = "") -> str:
    """The end of a message: the kind of file that has these tensors, or "" if it is the expected kind."""
    kind = next((kind for pattern, kind in KINDS if any(map(pattern.search, names))), expected)
    return "" if kind == expected else f"; it looks like {kind}"


def modules_under(prefix: str, tensors: dict[str, Tensor]) -> int:
    """How many numbered modules there are under a prefix, such as "down_blocks."."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def unet_config(tensors: dict[str, Tensor]) -> dict:
    """The config.json of a UNet or a ControlNet, from its tensors' shapes. Raises KeyError for other tensors."""
    levels = range(modules_under("down_blocks.", tensors))
    channels = [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels]
    first = f"down_blocks.{attention.index(True) if True in attention else 0}.attentions.0"
    linear = tensors[f"{first}.proj_in.weight"].ndim == 2
    config = {"in_channels": tensors["conv_in.weight"].shape[1], "block_out_channels": channels,
              "layers_per_block": modules_under("down_blocks.0.resnets.", tensors),
              "norm_num_groups": 32, "norm_eps": 1e-5,  # as in all public Stable Diffusions
              "cross_attention_dim": tensors[f"{first}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
              # SD 1.x has 8 heads, SD 2.x heads of 64 channels
              "attention_head_dim": [c // 64 for c in channels] if linear else 8, "use_linear_projection": linear,
              "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]}
    if "controlnet_mid_block.weight" in tensors:
        hint = "controlnet_cond_embedding."
        blocks = modules_under(f"{hint}blocks.", tensors)
        strided = [tensors[f"{hint}blocks.{i}.weight"].shape[0] for i in range(1, blocks, 2)]
        return config | {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels":
                         [tensors[f"{hint}conv_in.weight"].shape[0], *strided]}
    return config | {"_class_name": "UNet2DConditionModel", "out_channels": tensors["conv_out.weight"].shape[0],
                     "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]}


def vae_config(tensors: dict[str, Tensor]) -> dict:
    """The config.json of a VAE, from its tensors' shapes. Raises KeyError for other tensors."""
    levels = range(modules_under("encoder.down_blocks.", tensors))
    return {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "norm_num_groups": 32,
            "latent_channels": tensors["post_quant_conv.weight"].shape[0], "scaling_factor": 0.18215,
            "block_out_channels": [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels],
            "layers_per_block": modules_under("encoder.down_blocks.0.resnets.", tensors)}


def text_config(tensors: dict[str, Tensor], activation: str) -> dict:
    """The config.json of a text encoder, from its tensors' shapes. Raises KeyError for other tensors."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return {"model_type": "clip_text_model", "vocab_size": vocabulary, "hidden_size": width,
            "num_attention_heads": width // 64, "hidden_act": activation, "layer_norm_eps": 1e-5,
            "num_hidden_layers": modules_under("text_model.encoder.layers.", tensors),
            "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0]}


# The fields of public configurations, of all networks and of the noise schedule, that change what is computed, but no
# tensor's name or shape; and the values with which our networks compute the same as diffusers' and transformers'. A
# tuple lists values. A list stands for a JSON list, with one entry for each level. `float` is a positive number, not
# huge. A range of whole numbers ends far above any real model's, but before building it takes minutes or all memory.
OFF = """center_input_sample class_embed_type clip_sample global_pool_conditions latents_mean latents_std
    mid_block_only_cross_attention rescale_betas_zero_snr resnet_skip_time_act shift_factor thresholding
    time_embedding_act_fn timestep_post_act trained_betas use_beta_sigmas use_exponential_sigmas use_flow_sigmas
    use_karras_sigmas use_lu_lambdas"""
COUNT, SIDE = range(1, 2**16), range(1, 2**14)
SUPPORTED = dict.fromkeys(OFF.split(), (None, False)) | {  # 0 is False, too
    # UNet, ControlNet and VAE
    "act_fn": ("silu", "swish"), "attention": ("mask-guided", "plain"),  # the latter is our own field, of train.py
    "attention_head_dim": (COUNT, [COUNT]), "block_out_channels": [COUNT],
    "controlnet_conditioning_channel_order": "rgb", "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "layers_per_block": range(1, 17), "mid_block_scale_factor": 1, "norm_eps": float, "norm_num_groups": COUNT,
    "num_attention_heads": (None, COUNT), "only_cross_attention": (None, False, [False]),
    "resnet_out_scale_factor": 1, "sample_size": (None, SIDE, [SIDE]), "scaling_factor": float,
    # CLIP
    "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": float, "num_hidden_layers": range(1, 129),
    "model_type": ("clip_text_model", "clip_vision_model", "clip"),
    # the schedule that a model was trained with; our samplers decide how to step
    "beta_end": float, "beta_schedule": "scaled_linear", "beta_start": float, "interpolation_type": "linear",
    "num_train_timesteps": SIDE, "predict_epsilon": True, "prediction_type": ("epsilon", "v_prediction"),
    "steps_offset": range(2**14), "timestep_spacing": ("leading", "linspace", "trailing"),
    "timestep_type": "discrete",
}
SCHEDULERS = tuple("""DDIMScheduler DDPMScheduler DEISMultistepScheduler DPMSolverMultistepScheduler
    DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler
    KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LMSDiscreteScheduler PNDMScheduler
    UniPCMultistepScheduler""".split())


def allows(allowed: object, value: object) -> bool:
    """Whether a value is among those that the table allows."""
    if isinstance(allowed, tuple):
        return any(allows(one, value) for one in allowed)
    if isinstance(allowed, list):
        return isinstance(value, list) and len(value) <= 16 and all(allows(allowed[0], one) for one in value)
    if isinstance(allowed, range):
        return type(value) is int and value in allowed
    return type(value) in (int, float) and 0 < value < 100 if allowed is float else value == allowed


def check_config(config: dict, file: Path, supported: dict[str, object] = SUPPORTED) -> None:
    """Raises BadInput for a configuration that our networks don't support."""
    for name, value in config.items():
        if isinstance(value, dict):  # a tower in a CLIP's configuration
            check_config(value, file, supported)
        if name in supported and not allows(supported[name], value):
            raise BadInput(f"{file}: {name} {json.dumps(value)[:60]} is not supported: it differs from Stable "
                           "Diffusion's; choose another model or configuration")


def read_scheduler_config(file: Path) -> dict:
    """The fields of a scheduler_config.json, without null ones, which mean the default. Raises BadInput."""
    config = {name: value for name, value in read_json(file).items() if value is not None}
    check_config(config, file, SUPPORTED | {"_class_name": SCHEDULERS})
    return config
