"""Tests: weights in and out: what is saved comes back, and what does not fit is refused in one line that says why."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLIP_CONFIG, TEXT_CONFIG, UNETS, VAE_CONFIG, equal_weights, random, randomise, refused
from safetensors.torch import load_file, save_file

from clip import CLIP, TextEncoder, load_tokenizer
from model import CategoryGenerator, UNet
from sampler import Schedule
from support.files import write_json
from support.layouts import check_config, read_scheduler_config
from support.tensors import model_fingerprint, read_tensors
from toy.stages import train_tokenizer
from vae import VAE
from weights import (
    CLIP_FILE,
    CONTROL_FILE,
    TEXT_FILE,
    UNET_FILE,
    StableDiffusion,
    control_config,
    load_clip,
    load_control,
    load_module,
    load_stable_diffusion,
    public_tensors,
    save_control,
    save_module,
)


@pytest.fixture
def folder(tmp_path, unet):
    save_module(unet, tmp_path / "unet", UNET_FILE)
    return tmp_path / "unet"


def load(folder, dtype=torch.float32) -> UNet:
    return load_module(UNet, folder, UNET_FILE, "cpu", dtype)


def rewrite(file: Path, change) -> None:
    """Changes a file's tensors, or a JSON file's fields."""
    if file.suffix == ".json":
        write_json(json.loads(file.read_text()) | change, file)
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


# ---------------------------------------------------------------- saving and loading


def test_what_is_saved_comes_back_bit_for_bit(folder, unet):
    loaded = load(folder)
    assert equal_weights(loaded, unet)
    assert loaded.config == unet.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_dtype_of_the_file_and_of_the_model_are_independent(tmp_path, unet):
    save_module(unet, tmp_path, UNET_FILE, torch.float16)
    loaded = load(tmp_path, torch.bfloat16)
    assert equal_weights(loaded, {name: tensor.half().bfloat16() for name, tensor in public_tensors(unet).items()})


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_half_precision_variant_is_found_and_full_precision_preferred(folder, unet, variant):
    (folder / UNET_FILE).rename(folder / f"diffusion_pytorch_model.{variant}.safetensors")
    assert torch.equal(load(folder).conv_in.bias, unet.conv_in.bias)
    save_file({n: t + 1 for n, t in public_tensors(unet).items()}, folder / UNET_FILE)
    assert torch.equal(load(folder).conv_in.bias, unet.conv_in.bias + 1)


def test_a_controls_file_that_is_named_is_read_with_its_folders_configuration(tmp_path, cg):
    """Its shapes alone would imply 8 heads."""
    save_control(cg, tmp_path)
    named = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    save_file({n: t + 1 for n, t in public_tensors(cg).items()}, named)
    loaded = load_control(named, "category")
    assert torch.equal(loaded.conv_in.bias, cg.conv_in.bias + 1)
    assert type(loaded) is CategoryGenerator and loaded.config == cg.config
    rewrite(tmp_path / "config.json", {"global_pool_conditions": True})
    with refused("global_pool_conditions true is not supported"):
        load_control(named, "category")


def test_a_models_fingerprint_changes_with_each_part_and_not_with_what_is_trained_beside_them(tmp_path):
    before = []
    for part in ("unet", "vae", "text_encoder", "image_encoder", "tokenizer", "scheduler"):
        write_json({}, tmp_path / part / "config.json")
        assert model_fingerprint(tmp_path) != before
        before = model_fingerprint(tmp_path)
    os.utime(tmp_path / "unet" / "config.json", (0, 0))
    assert model_fingerprint(tmp_path) != before
    write_json({}, tmp_path / "cg" / "config.json")
    assert len(model_fingerprint(tmp_path)) == 6


def test_a_branch_is_a_controlnets_folder_and_its_weights_are_written_last(tmp_path, cg, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (written.append(Path(new).name), replace(old, new)))
    save_control(cg, tmp_path, categories={"手机": "sks 0"})
    assert json.loads((tmp_path / "categories.json").read_text(encoding="utf-8")) == {"手机": "sks 0"}
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ControlNetModel"
    assert written == ["config.json", "categories.json", CONTROL_FILE]


def test_a_branch_beside_an_inpainting_base_reads_z_alone():
    unet = UNet(UNETS["sd1"] | {"in_channels": 9})
    branch = CategoryGenerator(control_config(unet.config, factor=8))
    branch.init_from_unet(unet)
    assert torch.equal(branch.conv_in.weight, unet.conv_in.weight[:, :4])


@pytest.fixture
def sd_folder(tmp_path, unet, vae):
    """A complete Stable Diffusion folder with a tiny vocabulary of its own."""
    train_tokenizer(["a photo of a red sneaker"], 600, 77, tmp_path / "sd" / "tokenizer")
    config = TEXT_CONFIG | {"vocab_size": load_tokenizer(tmp_path / "sd" / "tokenizer").bpe.get_vocab_size()}
    save_module(randomise(TextEncoder(config)), tmp_path / "sd" / "text_encoder", TEXT_FILE)
    save_module(unet, tmp_path / "sd" / "unet", UNET_FILE)
    save_module(vae, tmp_path / "sd" / "vae", UNET_FILE)
    schedule = {"prediction_type": "v_prediction", "num_train_timesteps": 500}
    write_json(schedule, tmp_path / "sd" / "scheduler" / "scheduler_config.json")
    return tmp_path / "sd"


@torch.no_grad()
def test_a_whole_folder_loads_its_schedule_included_and_what_its_text_encoder_was_cut_from_is_let_lie(sd_folder):
    rewrite(sd_folder / "text_encoder" / TEXT_FILE, lambda t: t.update({name: torch.zeros(2) for name in (
        "text_projection.weight", "logit_scale", "vision_model.encoder.x", "visual_projection.weight", "position_ids",
        "text_model.embeddings.position_ids", "x.num_batches_tracked")}))
    sd = load_stable_diffusion(sd_folder)
    assert sd.schedule.T == 500 and sd.schedule.config["prediction_type"] == "v_prediction"
    assert sd.prompts(["a photo", ""]).shape == (2, 77, 24)
    assert (sd.size, sd.multiple) == (128, 64) and sd.latent_shape(128, 192) == (4, 16, 24)
    shutil.rmtree(sd_folder / "scheduler")
    assert load_stable_diffusion(sd_folder).schedule.T == 1000
    save_module(randomise(UNet(UNETS["sd2"])), sd_folder / "unet", UNET_FILE)
    with refused("scheduler_config.json is missing: an SD 2.x may predict ε or v"):
        load_stable_diffusion(sd_folder)


@torch.no_grad()
def test_an_infinite_pixel_is_not_taken_for_white():
    vae = randomise(VAE(VAE_CONFIG))
    vae.decoder.conv_out.bias[0] = float("inf")
    painted = StableDiffusion(None, None, None, vae, Schedule()).decode(random(1, 4, 4, 4))
    assert painted[:, 0].isnan().all() and painted[:, 1:].isfinite().all()


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("conv_in.weight"), "conv_in.weight is missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of this model"),
    (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias has shape \[3\], expected \[16\]"),
    (lambda t: [t.pop(n) for n in list(t)[:9]], "and 6 more"),
    (lambda t: t.update({"module.conv_in.bias": torch.zeros(1)}), "holds tensors twice"),
    (lambda t: t.update({"time_embed.0.bias": torch.zeros(1)}), "a second time_embedding.linear_1.bias is not part"),
    (lambda t: t.update(ztsnr=torch.zeros(0)), "holds the marker ztsnr: .*zero terminal SNR"),
], ids=["missing", "extra", "shape", "many", "twice", "two names", "a marker"])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, change, words):
    rewrite(folder / UNET_FILE, change)
    with refused(words, UNET_FILE):
        load(folder)


@pytest.mark.parametrize("change, words", [
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "not a whole safetensors file"),
    (lambda file: file.rename(file.with_suffix(".bin")),
     "python weights.py convert .*model.bin .*diffusion_pytorch_model.safetensors"),
    (lambda file: file.unlink(), "holds no diffusion_pytorch_model.safetensors"),
    (lambda file: shutil.rmtree(file.parent), "holds no"),
    (lambda file: (file.parent / "config.json").unlink(), "config.json is missing"),
    (lambda file: (file.parent / "config.json").write_text("{}"), "not the configuration"),
    (lambda file: rewrite(file.parent / "config.json", {"attention_head_dim": [8]}), "not the configuration"),
], ids=["truncated", "pickle", "no weights", "no folder", "no config", "empty config", "a level's heads"])
def test_broken_folders_are_refused_in_one_line_that_names_them(folder, change, words):
    change(folder / UNET_FILE)
    with refused(words, folder):
        load(folder)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".bin"])
@pytest.mark.parametrize("read", [read_tensors, load_stable_diffusion, load_control])
def test_pickles_are_never_opened(tmp_path, suffix, read):
    with refused(rf"python weights.py convert \S+model\{suffix} \S+model.safetensors"):
        read(tmp_path / f"model{suffix}")


# ---------------------------------------------------------------- tokenizer


@pytest.fixture
def words(tmp_path) -> Path:
    """The folder of a tokenizer that reads 12 tokens."""
    train_tokenizer(["a photo of a red sneaker", "in the background of a beach"] * 2, 600, 12, tmp_path / "words")
    return tmp_path / "words"


def test_what_is_too_long_keeps_its_end_token_and_is_reported_once(words, capsys):
    tokenizer = load_tokenizer(words)
    for _ in range(2):
        row = tokenizer(["red " * 13, "red " * 10, "red\n" * 40])[0].tolist()
    assert row[-1] == tokenizer.end and row.count(tokenizer.end) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"'{'red ' * 13}' has 13 tokens; the text encoder reads 10, the last 3 are cut",
        "'" + r"red\n" * 15 + "...' has 40 tokens; the text encoder reads 10, the last 30 are cut"]


@pytest.mark.parametrize("category, kept", [
    ("red sneaker", "red sneaker"), ("red sneaker " * 9, "red sneaker red sneaker red"), ("red\nzebra zebra", "red"),
    ("redred" * 40, "redred"), ("鞋" * 30, "鞋")], ids=["short", "words", "a broken word", "one word", "no spaces"])
def test_a_category_that_is_too_long_loses_its_end_and_the_identifier_nothing(category, kept, words, capsys):
    tokenizer, before, after = load_tokenizer(words), "a photo of ", " background of"
    assert tokenizer.shorten(category, before, after) == kept
    assert capsys.readouterr().err.count("\n") == (kept != category)
    assert tokenizer.count(before + kept + after) <= tokenizer.room  # so that nothing else is cut


@pytest.mark.parametrize("file, content", [
    ("added_tokens.json", lambda id: {"<cat-toy>": id, "Sks-Dog": id + 1}),
    ("tokenizer_config.json", lambda id: {"added_tokens_decoder": {
        str(id + 1): {"content": "Sks-Dog"}, str(id): {"content": "<cat-toy>", "normalized": True}}})])
def test_a_trained_token_is_one_token_with_the_id_of_its_embedding(words, file, content):
    plain = load_tokenizer(words)
    id, a = plain.bpe.get_vocab_size(), plain(["a"])[0, 1].item()
    write_json(content(id), words / file)
    assert load_tokenizer(words)(["A<cat-toy>a sks-dog"])[0].tolist()[1:5] == [a, id, a, id + 1]


@pytest.mark.parametrize("pad", ["!", {"content": "!"}, "<new>"])
def test_padding_is_what_tokenizer_config_says(words, pad):
    """SD 2 pads with '!'; either spelling occurs. A token that is new gets an id behind the vocabulary."""
    rewrite(words / "tokenizer_config.json", {"pad_token": pad})
    tokenizer = load_tokenizer(words)
    padding = tokenizer.bpe.token_to_id("<new>" if pad == "<new>" else "!")
    assert tokenizer([""])[0].tolist() == [tokenizer.start, tokenizer.end] + [padding] * 10


@pytest.mark.parametrize("file, content, message", [
    ("added_tokens.json", {"<cat>": 9999}, "'<cat>' has the id 9999, and would get"),
    ("added_tokens.json", {"<cat>": "x"}, "added tokens can't be read|has the id x"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": {}}}, "added tokens can't be read"),
    ("tokenizer_config.json", {"eos_token": "</s>"}, "eos_token '</s>' is not supported"),
    ("tokenizer_config.json", {"padding_side": "left"}, "padding_side 'left' is not supported"),
    ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length '77' is no number"),
    ("tokenizer_config.json", {"model_max_length": float("nan")}, "model_max_length nan is no number"),
    ("vocab.json", {"!": "x"}, "the tokenizer can't be read"),
    ("vocab.json", None, "holds no tokenizer; put CLIP's vocab.json and merges.txt there")])
def test_what_a_tokenizer_can_not_do_is_refused(file, content, message, words):
    (words / file).unlink(missing_ok=True)
    if content:
        write_json(content, words / file)
    with refused(message, words):
        load_tokenizer(words)


# ---------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize("fields, message", [
    ({"in_channels": 8}, "its UNet reads 8 channels and writes 4; choose"),
    ({"out_channels": 8}, "its UNet reads 4 channels and writes 8; choose"),
    ({"cross_attention_dim": 8}, "prompts of width 24, its UNet reads 8")])
def test_a_unet_that_is_none_of_stable_diffusions_is_refused(fields, message, sd_folder, unet):
    save_module(UNet(unet.config | fields), sd_folder / "unet", UNET_FILE)
    with refused(message):
        load_stable_diffusion(sd_folder)


def test_another_bases_tokenizer_is_refused(sd_folder, tmp_path):
    train_tokenizer(["a mug"] * 9, 520, 99, tmp_path / "long")  # longer than the text encoder's 77 positions
    with refused("long is not the tokenizer of"):
        load_stable_diffusion(sd_folder, tokenizer=tmp_path / "long")
    rewrite(sd_folder / "tokenizer" / "vocab.json", {"!": 2**31})
    with refused("a vocabulary of 2,147,483,649, the text encoder reads 77 from"):
        load_stable_diffusion(sd_folder)


@pytest.mark.parametrize("number, dtype, words", [(float("nan"), None, "train with a lower --lr$"),
                                                  (1e6, torch.float16, "or save it in float32")])
def test_weights_that_are_not_finite_or_do_not_fit_the_type_are_not_saved(tmp_path, cg, number, dtype, words):
    save_control(cg, tmp_path / "cg")
    broken = load_control(tmp_path / "cg")
    broken.conv_in.bias[0] = number
    with refused(f"cg: conv_in.bias is not finite, and is not saved; .*{words}"):
        save_control(broken, tmp_path / "cg", dtype)
    assert load_control(tmp_path / "cg").conv_in.bias.isfinite().all()


# ---------------------------------------------------------------- configurations

REFUSED = dict(
    act_fn="gelu", attention="other", attention_head_dim="x", beta_schedule="linear", beta_start=-0.1,
    block_out_channels=[-8, 8], center_input_sample=True, class_embed_type="timestep", clip_sample=True,
    controlnet_conditioning_channel_order="bgr", downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    global_pool_conditions=True, hidden_act="gelu_new", latents_mean=[0.1], latents_std=[1], layers_per_block=2**40,
    mid_block_only_cross_attention=True, mid_block_scale_factor=2, model_type="t5", norm_eps=float("nan"),
    norm_num_groups=0, num_hidden_layers=10**9, num_train_timesteps=2**40, only_cross_attention=[True, False],
    prediction_type="sample", rescale_betas_zero_snr=True, sample_size="64", scaling_factor=10**400, shift_factor=0.1,
    steps_offset=0.5, thresholding=True, timestep_spacing="other", timestep_type="continuous",
    trained_betas=[0.1] * 1000, use_karras_sigmas=True)
HARMLESS = dict(
    act_fn="swish", another="x", attention="plain", class_embed_type=None, dropout=0.1,
    lambda_min_clipped=float("-inf"), num_attention_heads=None, only_cross_attention=[False] * 4,
    resnet_out_scale_factor=1.0, sample_size=[64, 64], text_config={"hidden_act": "gelu"}, thresholding=False)


@pytest.mark.parametrize("field", REFUSED)
def test_each_field_that_asks_for_another_computation_is_refused_by_name(field):
    """Or for numbers that no model has, before it is built; in a CLIP's tower, too."""
    check_config(HARMLESS, Path("c.json"))
    for config in ({field: REFUSED[field]}, {"text_config": {field: REFUSED[field]}}):
        with refused(f"c.json: {field} .* is not supported"):
            check_config(HARMLESS | config, Path("c.json"))


def test_a_schedulers_null_is_the_default_and_its_class_one_for_models_of_this_kind(tmp_path):
    write_json({"thresholding": None, "beta_end": None, "steps_offset": 0}, tmp_path / "c.json")
    assert read_scheduler_config(tmp_path / "c.json") == {"steps_offset": 0}
    write_json({"_class_name": "LCMScheduler"}, tmp_path / "c.json")
    with refused("c.json: _class_name \"LCMScheduler\" is not supported"):
        read_scheduler_config(tmp_path / "c.json")


@pytest.mark.parametrize("file, field", [
    ("unet/config.json", "center_input_sample"), ("vae/config.json", "latents_mean"),
    ("text_encoder/config.json", "hidden_act"), ("scheduler/scheduler_config.json", "thresholding")])
def test_a_folder_whose_configuration_is_not_ours_is_refused(file, field, sd_folder):
    rewrite(sd_folder / file, {field: REFUSED[field]})
    with refused(f"{file}: {field} .* is not supported"):
        load_stable_diffusion(sd_folder)


# ---------------------------------------------------------------- shards


def shard(folder: Path, file: str = "{}.safetensors", index: str = f"{UNET_FILE}.index.json") -> None:
    """Cuts a folder's weights into two files, a and b, and writes their index -> which tensor is in which file."""
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    places = {name: file.format("ab"[i % 2]) for i, name in enumerate(tensors)}
    for place in {*places.values()}:
        save_file({n: t for n, t in tensors.items() if places[n] == place}, folder / place)
    write_json({"metadata": {"total_size": 1}, "weight_map": places}, folder / index)


@pytest.mark.parametrize("file, index", [
    ("diffusion_pytorch_model-{}.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("diffusion_pytorch_model.fp16-{}.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ("diffusion_pytorch_model-{}.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors.index.json")])
def test_weights_in_shards_are_read_by_their_index(file, index, folder, unet):
    shard(folder, file, index)
    assert equal_weights(load(folder), unet)


@pytest.mark.parametrize("change, words", [
    (lambda f, index: (f / "b.safetensors").unlink(), "b.safetensors is missing"),
    (lambda f, index: save_file({"x": torch.zeros(1)}, f / "b.safetensors"), r"not an index of the files .* \(Key"),
    (lambda f, index: write_json({"weight_map": ["a"]}, index), "is not an index of the files"),
    (lambda f, index: write_json({"weight_map": {"x": "../a.safetensors"}}, index), "is not an index")])
def test_what_is_missing_from_shards_is_named(change, words, folder):
    shard(folder)
    change(folder, folder / f"{UNET_FILE}.index.json")
    with refused(words):
        load(folder)


def test_an_image_tower_with_more_than_its_configuration_says_is_refused(tmp_path):
    save_module(randomise(CLIP(CLIP_CONFIG)), tmp_path, CLIP_FILE)
    rewrite(tmp_path / "config.json", {"vision_config": CLIP_CONFIG["vision_config"] | {"num_hidden_layers": 1}})
    with refused(r"vision_model.encoder.layers.1.\S+ is not part of this model"):
        load_clip(tmp_path)
