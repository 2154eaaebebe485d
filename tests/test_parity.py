"""Tests: parity with the reference implementations, diffusers and transformers, through files in both directions.

Each network is tiny, has the real one's shape and random weights. One side writes the public folder, the other reads
it, and both must compute the same, within 1e-4 of the largest value in float32. Skipped if the references are missing.
"""

import inspect
import json
import random as random_module
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLIP_CONFIG, TEXT_CONFIG, UNETS, VAE_CONFIG, inputs, random, randomise, relative_error
from safetensors.torch import load_file, save_file

from clip import CLIP, TextEncoder, load_tokenizer
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet
from sampler import Schedule, ddim
from support.files import BadInput, write_json
from support.layouts import SCHEDULERS, SUPPORTED, check_config
from toy.stages import train_tokenizer
from vae import VAE
from weights import (
    CONTROL_FILE,
    TEXT_FILE,
    UNET_FILE,
    control_config,
    load_control,
    load_module,
    public_tensors,
    save_control,
    save_module,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4


@pytest.fixture(params=["ours to theirs", "theirs to ours"])
def pair(request, tmp_path):
    """pair(kind, config, their class, file name) -> (ours, theirs), where one has loaded what the other has saved."""

    def saved_and_loaded(kind, config, their_kind, file):
        if request.param == "ours to theirs":
            ours = randomise(kind(config), seed=5)
            save_module(ours, tmp_path / "model", file)
            theirs, report = their_kind.from_pretrained(tmp_path / "model", output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        else:
            if hasattr(their_kind, "config_class") and their_kind.config_class:
                theirs = their_kind(their_kind.config_class.from_dict(config))
            else:
                theirs = their_kind.from_config(config)
            randomise(theirs, seed=5).save_pretrained(tmp_path / "model")
            ours = load_module(kind, tmp_path / "model", file, "cpu", torch.float32)
        return ours, theirs.eval()

    return saved_and_loaded


ODD = UNETS["sd1"] | {"block_out_channels": [16, 32, 24], "layers_per_block": 1,
                      "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                      "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]}


@pytest.mark.parametrize("config", [*UNETS.values(), ODD], ids=[*UNETS, "an odd number of levels"])
@torch.no_grad()
def test_unet(pair, config):
    ours, theirs = pair(UNet, config, diffusers.UNet2DConditionModel, UNET_FILE)
    z, P, t = random(2, 4, 8, 16), random(2, 5, 24, seed=1), torch.tensor([7, 999])
    assert relative_error(ours(z, t, P), theirs(z, t, P).sample) < TOLERANCE


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS.keys())
@torch.no_grad()
def test_controlnet_and_the_unet_under_its_residuals(pair, config, unet):
    ours, theirs = pair(ControlNet, control_config(config, 8), diffusers.ControlNetModel, CONTROL_FILE)
    given = inputs()
    down, middle = theirs(given.z, given.t, given.prompts.P, controlnet_cond=given.hint, return_dict=False)
    residuals = ours(given.z, given.t, given.prompts.P, given.hint)
    for residual, expected in zip(residuals, [*down, middle], strict=True):
        assert relative_error(residual, expected) < TOLERANCE

    their_unet = diffusers.UNet2DConditionModel.from_config(UNETS["sd1"])
    their_unet.load_state_dict(public_tensors(unet))
    expected = their_unet.eval()(given.z, given.t, given.prompts.P, down_block_additional_residuals=down,
                                 mid_block_additional_residual=middle).sample
    assert relative_error(unet(given.z, given.t, given.prompts.P, residuals), expected) < TOLERANCE


@pytest.mark.parametrize("kind, name, fields", [
    (CategoryGenerator, "category", {}), (CategoryGenerator, "category", {"attention": "plain"}),
    (PersonalityGenerator, "personality", {})])
@torch.no_grad()
def test_cg_and_pg_open_as_controlnets_and_with_plain_attention_cg_is_one_on_P(kind, name, fields, tmp_path):
    """With equal prompts and an all-background mask, CG and PG are plain ControlNets, which diffusers can check. How CG
    attends is a field of ours, which diffusers ignores.
    """
    guided = kind is CategoryGenerator and not fields
    branch = randomise(kind(control_config(UNETS["sd1"], 8) | fields))
    save_control(branch, tmp_path / "branch", categories={"perfume": "sks 0", "sneaker": "sks 1"})
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "branch").eval()
    given = inputs()
    P = given.prompts.P
    context = branch.context(Prompts(P, P, P) if guided else given.prompts)
    residuals = branch(given.z, given.t, context, given.hint, torch.zeros_like(given.mask))
    down, middle = theirs(given.z, given.t, P, controlnet_cond=given.hint, return_dict=False)
    assert max(relative_error(a, b) for a, b in zip(residuals, [*down, middle], strict=True)) < TOLERANCE
    assert load_control(tmp_path / "branch", name).config.get("attention") == branch.config.get("attention")


# ---------------------------------------------------------------- configurations

# The other fields. A new one in diffusers or transformers must be put here or, if it changes a result but neither a
# name nor a shape of a tensor, into SUPPORTED
SHOWS_IN_TENSORS = set("""
    addition_embed_type addition_embed_type_num_heads addition_time_embed_dim attention_type class_embeddings_concat
    conditioning_channels conditioning_embedding_out_channels conv_in_kernel conv_out_kernel cross_attention_dim
    cross_attention_norm down_block_types dual_cross_attention encoder_hid_dim encoder_hid_dim_type image_size
    in_channels intermediate_size hidden_size latent_channels max_position_embeddings mid_block_add_attention
    mid_block_type num_channels num_class_embeds out_channels patch_size projection_class_embeddings_input_dim
    projection_dim resnet_time_scale_shift reverse_transformer_layers_per_block time_cond_proj_dim time_embedding_dim
    time_embedding_type transformer_layers_per_block up_block_types use_linear_projection use_post_quant_conv
    use_quant_conv vocab_size""".split())
HARMLESS = set("""
    algorithm_type attention_dropout bos_token_id clip_sample_range denoise_final disable_corrector dropout
    dynamic_thresholding_ratio eos_token_id euler_at_final final_sigmas_type flow_shift force_upcast initializer_factor
    initializer_range lambda_min_clipped logit_scale_init_value lower_order_final pad_token_id predict_x0
    sample_max_value set_alpha_to_one shift_terminal sigma_max sigma_min skip_prk_steps solver_order solver_p
    solver_type text_config time_shift_type upcast_attention use_dynamic_shifting variance_type
    vision_config""".split())


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "ControlNetModel", "AutoencoderKL", *SCHEDULERS])
def test_every_field_in_diffusers_is_supported_or_shows_or_is_harmless(name):
    fields = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}
    assert fields and not fields - set(SUPPORTED) - SHOWS_IN_TENSORS - HARMLESS


@pytest.mark.parametrize("name", ["CLIPTextConfig", "CLIPVisionConfig", "CLIPConfig"])
def test_every_field_in_transformers_is_supported_or_shows_or_is_harmless(name, tmp_path):
    config = json.loads(getattr(transformers, name)().to_json_string(use_diff=False))
    every = json.loads(transformers.PretrainedConfig().to_json_string(use_diff=False))  # how texts are generated
    assert not set(config) - set(every) - set(SUPPORTED) - SHOWS_IN_TENSORS - HARMLESS
    check_config(config, tmp_path / "config.json")


# ---------------------------------------------------------------- VAE


@torch.no_grad()
def check_vae(ours, theirs):
    x, z = random(2, 3, 64, 48), random(2, 4, 8, 6)
    distribution = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    assert relative_error(mean, distribution.mean) < TOLERANCE
    assert relative_error(logvar, distribution.logvar) < TOLERANCE
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < TOLERANCE


def test_vae(pair):
    ours, theirs = pair(VAE, VAE_CONFIG | {"scaling_factor": 0.3}, diffusers.AutoencoderKL, UNET_FILE)
    check_vae(ours, theirs)
    assert ours.scaling_factor == theirs.config.scaling_factor == 0.3


def test_vae_with_the_attention_names_of_before_2023(vae, tmp_path):
    save_module(vae, tmp_path / "vae", UNET_FILE)
    file = tmp_path / "vae" / UNET_FILE
    old, tensors = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}, load_file(file)
    for new_part, old_part in old.items():
        tensors = {name.replace(new_part, old_part): tensor for name, tensor in tensors.items()}
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, file)
    check_vae(load_module(VAE, tmp_path / "vae", UNET_FILE, "cpu", torch.float32),
              diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval())


# ---------------------------------------------------------------- CLIP


def ids(vocabulary: int = 600) -> torch.Tensor:
    """Prompts of two lengths: start, words, end, padding."""
    rows = torch.full((2, 77), vocabulary - 1)
    rows[:, 0] = vocabulary - 2
    rows[0, 1:6] = torch.tensor([5, 9, 200, 3, 77])
    rows[1, 1:76] = torch.arange(1, 76)
    return rows


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_text_encoder(pair, activation):
    ours, theirs = pair(TextEncoder, TEXT_CONFIG | {"hidden_act": activation}, transformers.CLIPTextModel, TEXT_FILE)
    assert relative_error(ours(ids()), theirs(ids()).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@torch.no_grad()
def test_text_encoder_file_with_and_without_its_prefix(text_encoder, tmp_path, prefix):
    """SD 1.5's own file has position_ids, and text_model. before every name; files saved lately have neither."""
    save_module(text_encoder, tmp_path / "t", TEXT_FILE)
    tensors = {n.replace("text_model.", prefix): t for n, t in load_file(tmp_path / "t" / TEXT_FILE).items()}
    if prefix:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "t" / TEXT_FILE)
    ours = load_module(TextEncoder, tmp_path / "t", TEXT_FILE, "cpu", torch.float32)
    assert torch.equal(ours(ids()), text_encoder(ids()))


@torch.no_grad()
def test_clip_image_and_text_encoders(pair):
    ours, theirs = pair(CLIP, CLIP_CONFIG, transformers.CLIPModel, TEXT_FILE)
    images = random(2, 3, 32, 32, seed=6)
    expected = theirs(input_ids=ids(), pixel_values=((images - MEAN) / STD))
    text, image = (torch.nn.functional.normalize(e, dim=-1) for e in (ours.encode_text(ids()),
                                                                      ours.encode_image(images)))
    assert relative_error(text, expected.text_embeds) < TOLERANCE
    assert relative_error(image, expected.image_embeds) < TOLERANCE


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's normalisation, as it is published
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.mark.parametrize("margin", range(8))
def test_clip_cuts_out_the_square_that_openai_does(margin):
    """torchvision's CenterCrop, which OpenAI's preprocessing uses, begins at int(round(margin / 2.0))."""
    model, begin = CLIP(CLIP_CONFIG), int(round(margin / 2.0))
    wide = random(1, 3, 32, 32 + margin).sigmoid()
    assert torch.equal(model.preprocess(wide), wide[:, :, :, begin : begin + 32])
    assert torch.equal(model.preprocess(wide.mT), wide.mT[:, :, begin : begin + 32])
    if margin == 3:  # transformers rounds down: another pixel column
        assert begin == 2 and not torch.equal(model.preprocess(wide), wide[:, :, :, 1:33])


# ---------------------------------------------------------------- DDIM

SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
               "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


SPACINGS = ["leading", "trailing", "linspace"]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [1000, 500])
def test_timesteps_are_those_of_ddim_scheduler(spacing, T):
    config = SD_SCHEDULE | {"timestep_spacing": spacing, "num_train_timesteps": T}
    theirs, schedule = diffusers.DDIMScheduler.from_config(config), Schedule(config)
    for steps in (1, 2, 3, 4, 7, 20, 27, 30, 48, 50, 61, 100, 400, 499, 999, 1000):
        if steps > T or spacing == "leading" and steps == T:
            with pytest.raises(BadInput, match=f"--steps {steps}: too many for this model's schedule of {T} timesteps"):
                schedule.timesteps(steps)
            continue
        theirs.set_timesteps(steps)
        # The reference adds one at t = −1 where T / steps is rounded down, as trailing for 61
        assert schedule.timesteps(steps) == theirs.timesteps.tolist()[:steps], steps
    assert Schedule({"timestep_spacing": "trailing"}).timesteps(1) == [999]  # as SD-Turbo is painted


@pytest.mark.parametrize("spacing, steps, to_one, prediction", [
    ("leading", 50, False, "epsilon"), ("leading", 7, True, "v_prediction"), ("trailing", 1, False, "epsilon"),
    ("trailing", 30, False, "v_prediction"), ("linspace", 20, True, "epsilon"),
    ("linspace", 7, False, "v_prediction")])
def test_ddim_goes_the_same_way_as_ddim_scheduler(spacing, steps, to_one, prediction):
    config = SD_SCHEDULE | {"prediction_type": prediction, "timestep_spacing": spacing, "set_alpha_to_one": to_one}
    theirs = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(steps)
    schedule = Schedule(config)

    def model(z, t):
        return torch.tanh(z) * (1 + t / 1000)

    z = z_T = random(2, 4, 8, 8)
    for t in theirs.timesteps.tolist():
        z = theirs.step(model(z, t), t, z).prev_sample
    walk = list(ddim(lambda z, t: schedule.eps_from(model(z, t), z, t), z_T, schedule, steps))
    assert relative_error(walk[-1][1], z) < TOLERANCE


# ---------------------------------------------------------------- tokenizer

PARTS = ["a photo of", "Perfume", "in the background of sks 17", "don't", "it's", "WE'LL", "they'd've",
         "l'été", "crème brûlée", "naïve e\u0301", "Straße", "İstanbul", "Ωmega", "ﬁne", "护肤品",
         "的背景", "冰箱 sks 3", "東京タワー", "서울", "صورة", "हिन्दी", "👟🔥", "👩‍🔬", "1234",
         "567.89€", "3x", "²", "½", "Ⅷ", "--", "!!!", "<|endoftext|>", "</w>", "a_b", "foo@bar.com",
         "\t", "\n ", "\u00a0", "\u3000", "\u200b", " ", "   ", "x" * 40, "'", "’s", "&amp;"]


def many_prompts(count: int = 400) -> list[str]:
    """Texts of every kind that users type, from nothing to far more than 77 tokens."""
    draw = random_module.Random(0)
    texts = ["", " ", "x" * 300, "word " * 120, "护" * 100]
    while len(texts) < count:
        words = draw.choices(PARTS, k=draw.choice([1, 2, 3, 5, 8, 40]))
        texts.append(draw.choice(["", " ", ", "]).join(words))
    return texts


def equal_ids(ours, theirs, prompts: list[str] | None = None) -> None:
    prompts = prompts or many_prompts()
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    for prompt, row, wanted in zip(prompts, ours(prompts).tolist(), expected.tolist(), strict=True):
        assert row == wanted, repr(prompt)


CLIP_VOCABULARY = Path(__file__).resolve().parents[2] / "shared" / "clip_tokenizer"


def test_a_grown_vocabulary_reads_the_same_in_transformers(tmp_path):
    texts = ["A photo of a red sneaker, in the background of a sunny beach", "sks D0123456789"] * 4
    train_tokenizer(texts, 640, 77, tmp_path / "tokenizer")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    equal_ids(load_tokenizer(tmp_path / "tokenizer"), theirs)


vocabulary = pytest.mark.skipif(not CLIP_VOCABULARY.is_dir(), reason=f"needs CLIP's vocabulary in {CLIP_VOCABULARY}")


def copy_vocabulary(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(CLIP_VOCABULARY / name, folder)


@vocabulary
@pytest.mark.parametrize("version, pad", [("none", 49407), ("sd15", 49407), ("sd21", 0)])
def test_clips_own_vocabulary_with_the_settings_of_public_folders_gives_the_token_ids_of_transformers(
        tmp_path, version, pad):
    """SD 2.x pads with '!': its special_tokens_map.json says so, its tokenizer_config.json does not."""
    copy_vocabulary(tmp_path)
    if version != "none":
        configs = CLIP_VOCABULARY.parent / "layouts" / f"{version}_diffusers_configs.json"
        for name, content in json.loads(configs.read_text()).items():
            if name.startswith("tokenizer/"):
                write_json(content, tmp_path / name.removeprefix("tokenizer/"))
    ours = load_tokenizer(tmp_path)
    assert ours.pad == pad
    equal_ids(ours, transformers.CLIPTokenizer.from_pretrained(tmp_path))


TRAINED = ["<cat-toy>", "Sks-Dog", "<s>*"]


@vocabulary
@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_trained_tokens_give_the_ids_of_transformers(tmp_path, where):
    theirs = transformers.CLIPTokenizer.from_pretrained(CLIP_VOCABULARY)
    if where == "tokenizer.json":
        theirs.add_tokens(TRAINED)
        theirs.save_pretrained(tmp_path)
        for name in ("vocab.json", "merges.txt"):  # it holds these too
            (tmp_path / name).unlink(missing_ok=True)
    else:
        copy_vocabulary(tmp_path)
        ids = {token: 49408 + i for i, token in enumerate(TRAINED)}
        decoder = {"49407": {"content": "<|endoftext|>", "special": True},
                   **{str(id): {"content": token, "normalized": True, "special": False} for token, id in ids.items()}}
        if where == "added_tokens.json":
            write_json(ids, tmp_path / where)
        else:
            write_json({"tokenizer_class": "CLIPTokenizer", where: decoder}, tmp_path / "tokenizer_config.json")
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    equal_ids(ours, theirs, ["a photo of <cat-toy>", "<cat-toy><Cat-Toy>, sks-dog", "x<cat-toy>y Sks-Dog <s>*<s> ",
                             "a cat-toy", *many_prompts()])
    assert ours(["<cat-toy>"])[0, 1] == 49408
