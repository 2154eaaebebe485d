"""Support: which fields and values in public config.json files are accepted; not needed to understand the paper.

Ignoring a field that changes what a model computes would silently give wrong pictures. So each field is listed
with the values for which our networks compute the same as diffusers'; any other value is refused by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from support.files import BadInput, read_json

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
