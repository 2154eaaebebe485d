"""Support: public weights' names, kinds of files, configurations from shapes; not needed to understand the paper."""


import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from support.files import BadInput, read_json

# The prefix of each model's names in a single file. A file of a ControlNet or LaMa alone may have none.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",  # CLIP, as transformers names it: SD 1.x
    "cond_stage_model.model.": "text_encoder",  # OpenCLIP: SD 2.x
    "control_model.": "control",
    "generator.": "lama",
    "model.generator.": "lama",
}

# The same for Paint by Example, whose CLIP reads pictures; its last layers and learnable_vector have no prefix.
EXAMPLE_PREFIXES = {"model.diffusion_model.": "unet", "first_stage_model.": "vae", "cond_stage_model.": "image_encoder"}

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

# From the names in public files, without prefix, to ours. A pattern's numbers are the function's arguments, and {}
# stands for q, k and v, which share one matrix. Our own names stay unchanged.
RENAMES = [(re.compile(pattern), name) for pattern, name in (
    # The UNet's and ControlNet's levels: three input_blocks each, two layers and the downsampling
    (r"^time_embed\.([02])\.", lambda i: f"time_embedding.linear_{i // 2 + 1}."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda i: f"down_blocks.{(i - 1) // 3}.downsamplers.0.conv."),
    (r"^input_blocks\.(\d+)\.0\.", lambda i: f"down_blocks.{(i - 1) // 3}.resnets.{(i - 1) % 3}."),
    (r"^input_blocks\.(\d+)\.1\.", lambda i: f"down_blocks.{(i - 1) // 3}.attentions.{(i - 1) % 3}."),
    (r"^middle_block\.([02])\.", lambda i: f"mid_block.resnets.{i // 2}."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    # three output_blocks a level, the last one with the upsampling
    (r"^output_blocks\.(\d+)\.[12]\.conv\.", lambda i: f"up_blocks.{i // 3}.upsamplers.0.conv."),
    (r"^output_blocks\.(\d+)\.0\.", lambda i: f"up_blocks.{i // 3}.resnets.{i % 3}."),
    (r"^output_blocks\.(\d+)\.1\.", lambda i: f"up_blocks.{i // 3}.attentions.{i % 3}."),
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
    (r"^zero_convs\.(\d+)\.0\.", lambda i: f"controlnet_down_blocks.{i}."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out."),
    (r"^input_hint_block\.(\d+)\.", lambda i: f"controlnet_cond_embedding.blocks.{i // 2 - 1}."),
    # VAE: the original counts the decoder's levels from the fine end
    (r"^encoder\.down\.(\d)\.block\.", lambda i: f"encoder.down_blocks.{i}.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", lambda i: f"encoder.down_blocks.{i}.downsamplers.0."),
    (r"^decoder\.up\.(\d)\.block\.", lambda i: f"decoder.up_blocks.{3 - i}.resnets."),
    (r"^decoder\.up\.(\d)\.upsample\.", lambda i: f"decoder.up_blocks.{3 - i}.upsamplers.0."),
    (r"\.mid\.block_([12])\.", lambda i: f".mid_block.resnets.{i - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^((?:en|de)coder)\.norm_out\.", r"\1.conv_norm_out."),
    # within its attention, by the original names or those of public folders before 2023
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
    # CLIP's text encoder: recent folders leave out the first part of the name
    (r"^(?=(?:embeddings|encoder\.layers|final_layer_norm)\.)", "text_model."),
    # OpenCLIP's
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", lambda i: f".layer_norm{i}."),
    (r"\.attn\.", ".self_attn."),
    (r"\.in_proj_(?=weight$|bias$)", ".{}_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)]
# The same for Paint by Example's image encoder: elsewhere its names mean other layers
EXAMPLE_RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^transformer\.", "model."),
    (r"^model\.(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "model.vision_model."),  # recent folders
    (r"^mapper\.resblocks\.", "mapper.blocks."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.attn\.c_qkv\.", ".attn1.to_{}."),
    (r"\.attn\.c_proj\.", ".attn1.to_out.0."),
    (r"\.ln_2\.", ".norm3."),
    (r"\.mlp\.c_fc\.", ".ff.net.0.proj."),
    (r"\.mlp\.c_proj\.", ".ff.net.2."),
    (r"^final_ln\.", "final_layer_norm."),
    (r"^learnable_vector$", "uncond_vector"),
)]


def our_name(name: str, renames: list[tuple] = RENAMES) -> str:
    """Our name for a tensor, from its name in a public file (without the prefix of a single file)."""
    for pattern, new in renames:
        name = pattern.sub(new if isinstance(new, str) else lambda match, f=new: f(*map(int, match.groups())), name)
    return name


def under_our_names(tensors: dict[str, Tensor], kind: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors under our names. A matrix of queries, keys and values is split into three.

    kind: the network that they belong to, where it matters; see weights.file_kind.
    """
    for name, tensor in tensors.items():
        name = our_name(name, EXAMPLE_RENAMES if kind == EXAMPLE_ENCODER else RENAMES)
        if "{}" in name:
            yield from ((name.replace("{}", letter), part) for letter, part in zip("qkv", tensor.chunk(3)))
        else:
            yield name, tensor


def split_by_model(tensors: dict[str, Tensor], prefixes: dict[str, str] = PREFIXES) -> dict[str, dict[str, Tensor]]:
    """A single file's tensors by model, without prefixes and ignored tensors; "" holds those without a prefix."""
    parts = {part: {} for part in ("", *prefixes.values())}
    for name, tensor in tensors.items():
        if not IGNORED.fullmatch(name):
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            parts[prefixes.get(prefix, "")][name[len(prefix) :]] = tensor
    return parts


SINGLE_FILE = "a whole Stable Diffusion"
EXAMPLE_FILE, EXAMPLE_ENCODER = "a whole Paint by Example", "a PaintByExampleEncoder"

# The kind of a file: that of the first pattern that one of its names matches.
KINDS = [(re.compile(pattern), kind) for pattern, kind in (
    (r"conditioner\.|add_embedding\.|label_emb\.", "SDXL"),
    (r"(joint|double)_blocks\.|add_[qkv]_proj", "SD 3 or Flux"),
    (r"lora_|\.lora[._]|_lora\.", "a LoRA"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion"),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter"),
    (r"\.ffc\.", "a LaMa"),
    (r"control_model\.|input_hint_block\.|controlnet_|zero_convs\.", "a ControlNet"),
    (r"^learnable_vector$", EXAMPLE_FILE),
    (r"^uncond_vector$", EXAMPLE_ENCODER),
    (r"^model\.diffusion_model\.", SINGLE_FILE),
    (r"vision_model\.|visual\.", "a CLIP model"),
    (r"text_model\.|resblocks\.", "a text encoder"),
    (r"^(down_blocks|input_blocks)\.", "a UNet"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.", "a VAE"),
)]


def looks_like(names: Iterable[str], expected: str) -> str:
    """The end of a message: the kind of file that has these tensors, or "" if it is the expected kind."""
    kind = next((kind for pattern, kind in KINDS if any(map(pattern.search, names))), expected)
    return "" if kind == expected else f"; it looks like {kind}"


# What shapes don't show is the same in all public Stable Diffusions.
UNET_CONSTANTS = {"norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}


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
              "layers_per_block": modules_under("down_blocks.0.resnets.", tensors), **UNET_CONSTANTS,
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
            "act_fn": "silu", "latent_channels": tensors["post_quant_conv.weight"].shape[0], "scaling_factor": 0.18215,
            "block_out_channels": [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels],
            "layers_per_block": modules_under("encoder.down_blocks.0.resnets.", tensors),
            "down_block_types": ["DownEncoderBlock2D" for _ in levels],
            "up_block_types": ["UpDecoderBlock2D" for _ in levels]}


def text_config(tensors: dict[str, Tensor], activation: str) -> dict:
    """The config.json of a text encoder, from its tensors' shapes. Raises KeyError for other tensors."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": vocabulary,
            "hidden_size": width, "num_attention_heads": width // 64, "hidden_act": activation, "layer_norm_eps": 1e-5,
            "num_hidden_layers": modules_under("text_model.encoder.layers.", tensors),
            "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0]}


def example_config(tensors: dict[str, Tensor]) -> dict:
    """The config.json of Paint by Example's image encoder, from its shapes. Raises KeyError for other tensors."""
    tower = "model.vision_model."
    width, _, patch, _ = tensors[f"{tower}embeddings.patch_embedding.weight"].shape
    patches = len(tensors[f"{tower}embeddings.position_embedding.weight"]) - 1
    return {"model_type": "clip_vision_model", "architectures": ["PaintByExampleImageEncoder"], "hidden_size": width,
            "num_attention_heads": width // 64, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            "num_hidden_layers": modules_under(f"{tower}encoder.layers.", tensors),
            "intermediate_size": tensors[f"{tower}encoder.layers.0.mlp.fc1.weight"].shape[0],
            "image_size": math.isqrt(patches) * patch, "patch_size": patch, "num_channels": 3,
            "projection_dim": tensors["proj_out.weight"].shape[0],
            "mapper_blocks": modules_under("mapper.blocks.", tensors)}


def lama_config(tensors: dict[str, Tensor]) -> dict:
    """The configuration of a LaMa, from its tensors' shapes. Raises KeyError for other tensors."""
    layers = [name for name in tensors if name.endswith(".ffc.convl2l.weight")]
    blocks = sum(".conv1." in name for name in layers)
    levels = len(layers) - 2 * blocks - 1
    return {"_class_name": "LaMa", "width": tensors["model.1.ffc.convl2l.weight"].shape[0], "levels": levels,
            "blocks": blocks, "global_channels": tensors[f"model.{levels + 1}.bn_g.weight"].shape[0]}


# What a field may be: a value, a type, a range of whole numbers, a list (for a JSON list of these), or a tuple of
# alternatives. Ranges end far above any real model, but before building a network takes minutes or all memory.
ANYTHING = object()  # for a field that changes nothing that we compute
NO = (False, None)
WIDTH, SIDE = range(1, 2**24), range(1, 2**14)  # channels or tokens; pixels, latent cells or timesteps
LEVELS, LAYERS, BLOCKS = 16, range(1, 17), range(1, 129)  # of a UNet or VAE; layers per level; blocks in a transformer


def harmless(names: str) -> dict[str, object]:
    """Fields, separated by white space, that may have any value."""
    return dict.fromkeys(names.split(), ANYTHING)


# UNet and ControlNet: first the fields that model.py reads, then those for which it supports one value.
ENCODER = {
    "in_channels": WIDTH, "block_out_channels": [WIDTH], "layers_per_block": LAYERS,
    "attention_head_dim": (WIDTH, [WIDTH]), "cross_attention_dim": WIDTH, "norm_num_groups": WIDTH,
    "norm_eps": float, "use_linear_projection": bool,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "act_fn": ("silu", "swish"), "addition_embed_type": None, "addition_time_embed_dim": None, "class_embed_type": None,
    "downsample_padding": 1, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
    "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": (*NO, [False]),
    "projection_class_embeddings_input_dim": None, "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": (1, [1]),
    **harmless("addition_embed_type_num_heads dropout gradient_checkpointing sample_size upcast_attention"),
    # how the weights were averaged over the training
    **harmless("decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup"),
}
UNET = ENCODER | {
    "_class_name": "UNet2DConditionModel", "out_channels": WIDTH, "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "sample_size": (None, SIDE, [SIDE]),
    "attention_type": "default", "center_input_sample": False, "class_embeddings_concat": False, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "cross_attention_norm": None, "dual_cross_attention": False,
    "mid_block_only_cross_attention": NO, "resnet_out_scale_factor": 1, "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
}
CONTROLNET = ENCODER | {
    "_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [WIDTH],
    "attention": ("mask-guided", "plain"),  # our own field, which train.py writes
    "conditioning_channels": 3, "controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False,
}
VAE = {
    "block_out_channels": [WIDTH], "latent_channels": WIDTH, "layers_per_block": LAYERS, "norm_num_groups": WIDTH,
    "scaling_factor": float,
    "_class_name": "AutoencoderKL", "act_fn": ("silu", "swish"), "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3, "latents_mean": None, "latents_std": None, "mid_block_add_attention": True, "out_channels": 3,
    "shift_factor": (None, 0), "up_block_types": ["UpDecoderBlock2D"], "use_post_quant_conv": True,
    "use_quant_conv": True,
    **harmless("force_upcast sample_size"),
}
# Our own configuration, which train.py writes for a LaMa; big-lama's is inferred from shapes
LAMA = {"_class_name": "LaMa", "width": WIDTH, "levels": BLOCKS, "blocks": BLOCKS, "global_channels": WIDTH,
        "sample_size": SIDE}

# Every config.json of transformers also says how it would initialise, train and generate texts
TRANSFORMERS = {
    "add_cross_attention": NO, "is_decoder": NO, "is_encoder_decoder": NO, "pruned_heads": (None, {}),
    **harmless("""architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
               chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
               do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
               exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
               gradient_checkpointing id2label initializer_factor initializer_range label2id length_penalty
               max_length min_length model_max_length no_repeat_ngram_size num_beam_groups num_beams
               num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
               problem_type projection_dim remove_invalid_values repetition_penalty return_dict
               return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
               tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
               transformers_version typical_p use_bfloat16 use_cache"""),
}
TOWER = TRANSFORMERS | {
    "hidden_size": WIDTH, "intermediate_size": WIDTH, "layer_norm_eps": float, "num_attention_heads": WIDTH,
    "num_hidden_layers": BLOCKS, "hidden_act": ("quick_gelu", "gelu"),
}
TEXT = TOWER | {"vocab_size": WIDTH, "max_position_embeddings": WIDTH, "model_type": "clip_text_model"}
VISION = TOWER | {"image_size": SIDE, "patch_size": SIDE, "num_channels": 3, "model_type": "clip_vision_model"}
EXAMPLE = VISION | {"projection_dim": WIDTH, "mapper_blocks": BLOCKS}  # the latter is our own field
CLIP = TRANSFORMERS | {
    "model_type": "clip", "projection_dim": WIDTH, "logit_scale_init_value": float, "text_config": dict,
    "vision_config": dict, "text_config_dict": (None, dict), "vision_config_dict": (None, dict),  # repeat these two
}

# The schedule that the model was trained with, and the spacing of the timesteps. Our sampler decides how to step.
SCHEDULER = {
    "beta_start": float, "beta_end": float, "num_train_timesteps": SIDE, "steps_offset": range(2**14),
    "set_alpha_to_one": bool,
    "prediction_type": ("epsilon", "v_prediction"), "timestep_spacing": ("leading", "linspace", "trailing"),
    "_class_name": ("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
                    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
                    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
                    "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    "beta_schedule": "scaled_linear", "clip_sample": False, "interpolation_type": "linear", "predict_epsilon": True,
    "rescale_betas_zero_snr": False, "shift_terminal": None, "sigma_max": None, "sigma_min": None,
    "thresholding": False, "timestep_type": "discrete", "trained_betas": None, "use_beta_sigmas": False,
    "use_dynamic_shifting": False, "use_exponential_sigmas": False, "use_flow_sigmas": False,
    "use_karras_sigmas": False, "use_lu_lambdas": False,
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    **harmless("""algorithm_type clip_sample_range denoise_final disable_corrector dynamic_thresholding_ratio
               euler_at_final final_sigmas_type flow_shift lambda_min_clipped lower_order_final predict_x0
               sample_max_value skip_prk_steps solver_order solver_p solver_type tensor_format time_shift_type"""),
}

FIELDS = {"a UNet": UNET, "a ControlNet": CONTROLNET, "a VAE": VAE, "a text encoder": TEXT, "a CLIP model": CLIP,
          "a LaMa": LAMA, "a PaintByExampleEncoder": EXAMPLE, "a scheduler": SCHEDULER}


def allows(allowed: object, value: object) -> bool:
    """Whether a field's value is among those that the table allows."""
    if isinstance(allowed, tuple):
        return any(allows(one, value) for one in allowed)
    if isinstance(allowed, list):
        return isinstance(value, list) and len(value) <= LEVELS and all(allows(tuple(allowed), one) for one in value)
    if isinstance(allowed, range):
        return type(value) is int and value in allowed
    if allowed is float:
        return type(value) in (int, float) and abs(value) < 1e9  # no NaN either
    if isinstance(allowed, type):
        return isinstance(value, allowed)
    return allowed is ANYTHING or value == allowed


def in_words(allowed: object) -> str:
    """What is allowed, in the words of a message."""
    if isinstance(allowed, tuple):
        return " or ".join([*map(in_words, allowed[:3]), *["..."] * (len(allowed) > 3)])
    if isinstance(allowed, list):
        return f"a list of at most {LEVELS}, each {in_words(tuple(allowed))}"
    if isinstance(allowed, range):
        return f"a whole number from {allowed[0]} to {allowed[-1]}"
    types = {float: "a number", bool: "true or false", dict: "an object"}
    return types[allowed] if isinstance(allowed, type) else json.dumps(allowed)


def faults_in(config: dict, fields: dict[str, object], inside: str = "") -> Iterator[str]:
    """What is wrong with a configuration, field by field."""
    for name, value in config.items():
        shown = json.dumps(value, ensure_ascii=False)
        shown = f"{inside}{name} {shown if len(shown) < 60 else shown[:60] + '...'}"
        if name in fields:
            if not allows(fields[name], value):
                yield f"{shown} is not supported ({in_words(fields[name])} is)"
        elif value and not name.startswith("_"):  # diffusers keeps records under such names
            yield f"{shown} is not supported (the field is unknown here; if it changes nothing, remove it)"


def faults_in_clip(config: dict) -> Iterator[str]:
    """The same for the two towers' configurations within a CLIP model's."""
    for part, fields in (("text_config", TEXT), ("vision_config", VISION)):
        own, repeated = config.get(part) or {}, config.get(f"{part}_dict") or {}
        yield from faults_in(own, fields, f"{part}.")
        for name, value in repeated.items():  # where the two differ, transformers follows this one
            if fields.get(name) is not ANYTHING and value != own.get(name):
                yield f"{part}_dict.{name} {json.dumps(value)} differs from {part}'s"


def check_config(kind: str, config: dict, file: Path) -> None:
    """Raises BadInput for a configuration that our networks don't support. `kind` is a key of FIELDS."""
    faults = [*faults_in(config, FIELDS[kind])]
    if kind == "a CLIP model" and not faults:
        faults = [*faults_in_clip(config)]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        remedy = " or scheduler_config.json" if kind == "a scheduler" else ""
        raise BadInput(f"{file}: {faults[0]}{more}; this differs from Stable Diffusion: choose another model{remedy}")


def read_scheduler_config(file: Path) -> dict:
    """The fields of a scheduler_config.json, without null ones, which mean the default. Raises BadInput."""
    config = {name: value for name, value in read_json(file).items() if value is not None}
    check_config("a scheduler", config, file)
    for name in ("beta_start", "beta_end"):
        if not 0 < config.get(name, 0.5) < 1:
            raise BadInput(f"{file}: {name} {config[name]} must lie between 0 and 1; download it again")
    return config
