"""Tests: weights in and out: what is saved comes back, and what does not fit is refused in one line that says why."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CLIP_CONFIG, SD1, TEXT_CONFIG, UNETS, VAE_CONFIG, equal_weights, random, randomise
from safetensors.torch import load_file, save_file

from clip import CLIP, TextEncoder, load_tokenizer
from model import CategoryGenerator, UNet
from sampler import Schedule
from support.files import BadInput, write_json
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


# ---------------------------------------------------------------- saving and loading


def test_what_is_saved_comes_back_bit_for_bit(folder, unet):
    loaded = load(folder)
    assert equal_weights(loaded, unet)
    assert loaded.config == unet.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_dtype_of_the_file_and_of_the_model_are_independent(tmp_path, unet):
    save_module(unet, tmp_path / "half", UNET_FILE, torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "half" / UNET_FILE).values()} == {torch.float16}
    assert {p.dtype for p in load(tmp_path / "half").parameters()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path / "half", torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_fp16_variant_is_found_and_full_precision_preferred(folder, unet):
    file = folder / UNET_FILE
    file.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(load(folder).conv_in.weight, unet.conv_in.weight)
    save_file({n: t + 1 for n, t in public_tensors(unet).items()}, file)
    assert torch.equal(load(folder).conv_in.weight, unet.conv_in.weight + 1)


def test_a_controls_file_that_is_named_is_the_one_that_is_loaded(tmp_path, cg):
    save_control(cg, tmp_path)
    named = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    save_file({n: t + 1 for n, t in public_tensors(cg).items()}, named)
    assert torch.equal(load_control(named).conv_in.weight, cg.conv_in.weight + 1)
    assert torch.equal(load_control(tmp_path).conv_in.weight, cg.conv_in.weight)


def test_a_bases_fingerprint_changes_with_its_files_and_not_with_what_is_trained_beside_them(tmp_path, unet, cg):
    save_module(unet, tmp_path / "unet", UNET_FILE)
    before = model_fingerprint(tmp_path)
    save_control(cg, tmp_path / "cg")
    assert model_fingerprint(tmp_path) == before
    os.utime(tmp_path / "unet" / "config.json", (0, 0))
    assert model_fingerprint(tmp_path) != before


def test_saving_again_replaces_the_files(tmp_path, cg):
    for categories in ({"perfume": "sks 0", "sneaker": "sks 1"}, {"手机": "sks 0"}):
        save_control(cg, tmp_path / "cg", categories=categories)
        assert json.loads((tmp_path / "cg" / "categories.json").read_text(encoding="utf-8")) == categories
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cg"]


def test_no_weights_are_without_their_configuration_and_categories(tmp_path, cg, monkeypatch):
    written, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (written.append(Path(new).name), rename(old, new)))
    save_control(cg, tmp_path / "cg", categories={"mug": "sks 0"})
    assert written == ["config.json", "categories.json", CONTROL_FILE]


def test_a_branch_loads_as_the_kind_that_is_asked_for(tmp_path, cg):
    save_control(cg, tmp_path / "cg")
    assert type(load_control(tmp_path / "cg", "category")) is CategoryGenerator


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


def change_json(file: Path, fields: dict) -> None:
    write_json(json.loads(file.read_text()) | fields, file)


@torch.no_grad()
def test_a_whole_folder_loads_its_schedule_included(sd_folder):
    sd = load_stable_diffusion(sd_folder)
    assert sd.schedule.T == 500 and sd.schedule.config["prediction_type"] == "v_prediction"
    assert sd.prompts(["a photo", ""]).shape == (2, 77, 24)
    assert sd.multiple == 64 and sd.latent_shape(128, 192) == (4, 16, 24)
    shutil.rmtree(sd_folder / "scheduler")
    assert load_stable_diffusion(sd_folder).schedule.T == 1000
    save_module(randomise(UNet(UNETS["sd2"])), sd_folder / "unet", UNET_FILE)
    with pytest.raises(BadInput, match="scheduler_config.json is missing: an SD 2.x may predict ε or v"):
        load_stable_diffusion(sd_folder)


@torch.no_grad()
def test_encode_and_decode_scale_latents_and_pictures(vae):
    sd = StableDiffusion(None, None, None, vae, Schedule())
    images = random(2, 3, 64, 64).sigmoid()
    mean, _ = vae.encode(2 * images - 1)
    torch.testing.assert_close(sd.encode(images), 0.18215 * mean)
    decoded = sd.decode(0.18215 * mean)
    torch.testing.assert_close(decoded, (vae.decode(mean) / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_the_hint_encoder_halves_as_often_as_the_vae():
    for factor, channels in ((4, 3), (8, 4)):
        config = control_config(SD1, factor)
        assert len(config["conditioning_embedding_out_channels"]) == channels
        with torch.no_grad():
            hint = randomise(CategoryGenerator(config)).controlnet_cond_embedding(random(1, 3, 128, 128))
        assert hint.shape == (1, 16, 128 // factor, 128 // factor)


# ---------------------------------------------------------------- what does not fit


def rewrite(folder, change) -> None:
    tensors = load_file(folder / UNET_FILE)
    change(tensors)
    save_file(tensors, folder / UNET_FILE)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("conv_in.weight"), "conv_in.weight is missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of this model"),
    (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias has shape \[3\], expected \[16\]"),
    (lambda t: [t.pop(n) for n in list(t)[:9]], "and 6 more"),
], ids=["missing", "extra", "shape", "many"])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(BadInput, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value) and UNET_FILE in str(error.value)


def test_two_names_for_one_tensor_are_an_error(vae, tmp_path):
    save_module(vae, tmp_path / "vae", UNET_FILE)
    new = "decoder.mid_block.attentions.0.to_q.weight"
    rewrite(tmp_path / "vae", lambda t: t.update({new.replace("to_q", "query"): t[new] + 1}))
    with pytest.raises(BadInput, match="a second decoder.mid_block.attentions.0.to_q.weight is not part"):
        load_module(VAE, tmp_path / "vae", UNET_FILE, "cpu", torch.float32)


def truncate(folder):
    data = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage, words", [
    (truncate, "not a whole safetensors file"),
    (lambda f: (f / UNET_FILE).write_bytes(b""), "not a whole safetensors file"),
    (lambda f: (f / UNET_FILE).write_text("<html>404</html>" * 9), "not a whole safetensors file"),
    (lambda f: (f / UNET_FILE).rename(f / "diffusion_pytorch_model.bin"),
     "python weights.py convert .*model.bin .*diffusion_pytorch_model.safetensors"),
    (lambda f: (f / UNET_FILE).unlink(), "holds no diffusion_pytorch_model.safetensors"),
    (lambda f: shutil.rmtree(f), "holds no"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "config.json").write_text("{"), "can't be read as JSON"),
    (lambda f: (f / "config.json").write_text("{}"), "not the configuration"),
    (lambda f: (f / "config.json").write_text("[1]"), "does not hold a JSON object"),
], ids=["truncated", "empty", "garbage", "pickle", "no weights", "no folder", "no config", "broken config",
        "empty config", "a list"])  # fmt: skip
def test_broken_folders_are_refused_in_one_line_that_names_them(folder, damage, words):
    damage(folder)
    with pytest.raises(BadInput, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".bin"])
def test_pickles_are_never_opened(tmp_path, suffix):
    torch.save({"a": torch.zeros(1)}, tmp_path / f"model{suffix}")
    for read in (read_tensors, load_stable_diffusion):
        with pytest.raises(BadInput, match=rf"python weights.py convert \S+model\{suffix} \S+model.safetensors"):
            read(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("contents", [{}, {"vocab.json": "{", "merges.txt": ""}, {"tokenizer.json": "[]"}])
def test_a_missing_or_broken_tokenizer(tmp_path, contents):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=str(tmp_path)) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a photo of a red sneaker", "in the background of a beach"] * 2, 600, 12, folder)
    return load_tokenizer(folder)


def test_tokens_are_start_words_end_and_padding(tokenizer):
    row = tokenizer(["red"])[0].tolist()
    assert row[0] == tokenizer.start and row[-1] == tokenizer.end
    assert row.index(tokenizer.end) == len(set(row)) - 1  # padding is the end token
    assert len(row) == 12


def test_what_is_too_long_keeps_its_end_token_and_is_reported_once(tokenizer, capsys):
    for _ in range(2):
        row = tokenizer(["red " * 13, "red " * 10, "red\n" * 40])[0].tolist()
    assert row[-1] == tokenizer.end and row.count(tokenizer.end) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"'{'red ' * 13}' has 13 tokens; the text encoder reads 10, the last 3 are cut",
        "'" + r"red\n" * 15 + "...' has 40 tokens; the text encoder reads 10, the last 30 are cut"]


@pytest.mark.parametrize("category, kept", [
    ("red sneaker", "red sneaker"), ("red sneaker " * 9, "red sneaker red sneaker red"), ("red\nzebra zebra", "red"),
    ("redred" * 40, "redred"), ("鞋" * 30, "鞋")], ids=["short", "words", "a broken word", "one word", "no spaces"])
def test_a_category_that_is_too_long_loses_its_end_and_the_identifier_nothing(category, kept, tokenizer, capsys):
    before, after = "a photo of ", " background of"
    short = tokenizer.shorten(category, before, after)
    assert short == kept and tokenizer.count(before + short + after) <= tokenizer.room
    row, end = tokenizer([before + short + after])[0].tolist(), tokenizer([after])[0].tolist()[1:3]
    assert any(row[i : i + 2] == end for i in range(len(row)))  # ' background of' is whole
    err = capsys.readouterr().err
    assert err.count("\n") == (short != category) and repr(short) in err + repr(category)


def test_case_and_white_space_do_not_matter_and_any_text_can_be_spelt(tokenizer):
    assert torch.equal(*(tokenizer([text]) for text in ("A  Red\n\tsneaker ", "a red sneaker")))
    assert tokenizer.bpe.decode(tokenizer.bpe.encode("包 é 🔥", add_special_tokens=False).ids) != ""
    assert not torch.equal(tokenizer(["包"]), tokenizer(["é"]))


def test_padding_is_what_tokenizer_config_says(tmp_path):
    train_tokenizer(["a photo"], 560, 8, tmp_path / "t")
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    for pad in ("!", {"content": "!"}):  # SD 2 pads with '!'; either spelling occurs
        write_json(settings | {"pad_token": pad}, tmp_path / "t" / "tokenizer_config.json")
        tokenizer = load_tokenizer(tmp_path / "t")
        assert tokenizer([""])[0].tolist() == [tokenizer.start, tokenizer.end] + [tokenizer.bpe.token_to_id("!")] * 6


def test_the_papers_prompt_keeps_its_identifier_beside_a_category_of_24_words(capsys):
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "toy" / "base" / "tokenizer")
    category, before, after = "wireless watch " * 12, "A photo of ", ", in the background of sks 3"
    kept = tokenizer.shorten(category, before, after)
    row, n = tokenizer([before + kept + after])[0].tolist(), tokenizer.count(after)
    assert category.startswith(kept) and len(kept.split()) > 2
    assert row[row.index(tokenizer.end) - n : row.index(tokenizer.end)] == tokenizer([after])[0, 1 : 1 + n].tolist()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_a_trained_token_is_one_token_with_the_id_of_its_embedding(tmp_path, place):
    train_tokenizer(["a photo"], 560, 12, tmp_path / "t")
    plain = load_tokenizer(tmp_path / "t")
    id = plain.bpe.get_vocab_size()
    if place == "added_tokens.json":
        write_json({"<cat-toy>": id, "Sks-Dog": id + 1}, tmp_path / "t" / place)
    else:
        tokens = {str(plain.end): {"content": "<|endoftext|>", "special": True}, str(id + 1): {"content": "Sks-Dog"},
                  str(id): {"content": "<cat-toy>", "normalized": True}}
        change_json(tmp_path / "t" / place, {"added_tokens_decoder": tokens})
    assert load_tokenizer(tmp_path / "t")(["A<cat-toy>a sks-dog"])[0].tolist()[1:5] == [
        *plain(["a"])[0].tolist()[1:2], id, *plain(["a"])[0].tolist()[1:2], id + 1]


@pytest.mark.parametrize("file, content, words", [
    ("added_tokens.json", {"<cat>": 9999}, "'<cat>' has the id 9999, and would get"),
    ("added_tokens.json", {"<cat>": "x"}, "added tokens can't be read|has the id x"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9": {}}}, "added tokens can't be read"),
    ("tokenizer_config.json", {"eos_token": "</s>"}, "eos_token '</s>' is not supported"),
    ("tokenizer_config.json", {"padding_side": "left"}, "padding_side 'left' is not supported"),
    ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length '77' is no number"),
    ("tokenizer_config.json", {"model_max_length": float("nan")}, "model_max_length nan is no number"),
    ("special_tokens_map.json", {"pad_token": "<pad>"}, "expected")])
def test_what_a_tokenizer_can_not_do_is_refused(file, content, words, tmp_path):
    train_tokenizer(["a photo"], 560, 12, tmp_path / "t")
    write_json(content, tmp_path / "t" / file)
    if words == "expected":  # a padding token that is new gets an id behind the vocabulary, as in transformers
        assert load_tokenizer(tmp_path / "t").pad == load_tokenizer(tmp_path / "t").bpe.token_to_id("<pad>")
        return
    with pytest.raises(BadInput, match=words) as error:
        load_tokenizer(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- what the folders hold


def test_control_files_are_ordinary_controlnet_folders(tmp_path, cg):
    save_control(cg, tmp_path / "cg")
    assert CONTROL_FILE in {p.name for p in (tmp_path / "cg").iterdir()}
    assert json.loads((tmp_path / "cg" / "config.json").read_text())["_class_name"] == "ControlNetModel"


def test_vae_config_holds_its_scale():
    assert VAE(VAE_CONFIG | {"scaling_factor": 0.3}).scaling_factor == 0.3
    assert VAE({k: v for k, v in VAE_CONFIG.items() if k != "scaling_factor"}).scaling_factor == 0.18215


@pytest.mark.parametrize("key, value, words", [("attention_head_dim", [8], "is not the configuration of such a model"),
                                               ("in_channels", 8, "its UNet reads 8 channels and writes 4; choose"),
                                               ("out_channels", 8, "its UNet reads 4 channels and writes 8; choose"),
                                               ("cross_attention_dim", 8, "prompts of width 24, its UNet reads 8")])
def test_a_unet_that_is_none_of_stable_diffusions_is_refused(key, value, words, sd_folder, unet):
    if key == "attention_head_dim":
        change_json(sd_folder / "unet" / "config.json", {key: value})
    else:
        save_module(UNet(unet.config | {key: value}), sd_folder / "unet", UNET_FILE)
    with pytest.raises(BadInput, match=words):
        load_stable_diffusion(sd_folder)


def test_another_bases_tokenizer_is_refused(sd_folder, tmp_path):
    train_tokenizer(["a mug"] * 9, 520, 99, tmp_path / "tokenizer")  # longer than the text encoder's 77 positions
    with pytest.raises(BadInput, match="is not the tokenizer of"):
        load_stable_diffusion(sd_folder, tokenizer=tmp_path / "tokenizer")


def test_a_token_that_the_text_encoder_does_not_know_is_refused(sd_folder):
    change_json(sd_folder / "tokenizer" / "vocab.json", {"!": 2**31})
    with pytest.raises(BadInput, match="a vocabulary of 2,147,483,649, the text encoder reads 77 from"):
        load_stable_diffusion(sd_folder)


def test_an_infinite_pixel_is_not_taken_for_white(sd_folder):
    sd = load_stable_diffusion(sd_folder)
    sd.vae.decoder.conv_out.bias[0] = float("inf")
    painted = sd.decode(torch.zeros(1, 4, 4, 4))
    assert painted[:, 0].isnan().all() and painted[:, 1:].isfinite().all()


def test_weights_that_are_not_finite_or_do_not_fit_the_type_are_not_saved(tmp_path, cg):
    save_control(cg, tmp_path / "cg")
    for number, dtype, words in ((float("nan"), None, "train with a lower --lr$"),
                                 (1e6, torch.float16, "or save it in float32")):
        broken = load_control(tmp_path / "cg")
        broken.conv_in.bias[0] = number
        with pytest.raises(BadInput, match=f"cg: conv_in.bias is not finite, and is not saved; .*{words}"):
            save_control(broken, tmp_path / "cg", dtype)
    assert load_control(tmp_path / "cg").conv_in.bias.isfinite().all()


def test_written_files_have_the_users_usual_mode(tmp_path, cg):
    (tmp_path / "usual").write_text("")
    save_control(cg, tmp_path / "cg")
    for file in (tmp_path / "cg").iterdir():
        assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode


# ---------------------------------------------------------------- configurations

REFUSED = dict(
    act_fn="gelu", attention="other", beta_schedule="linear", center_input_sample=True, class_embed_type="timestep",
    clip_sample=True, controlnet_conditioning_channel_order="bgr", downsample_padding=0, flip_sin_to_cos=False,
    freq_shift=1, global_pool_conditions=True, hidden_act="gelu_new", latents_mean=[0.1], latents_std=[1],
    mid_block_only_cross_attention=True, mid_block_scale_factor=2, model_type="t5", norm_eps=None,
    only_cross_attention=[True, False], prediction_type="sample", rescale_betas_zero_snr=True, sample_size="64",
    scaling_factor=None, shift_factor=0.1, steps_offset=0.5, thresholding=True, timestep_spacing="other",
    timestep_type="continuous", trained_betas=[0.1] * 1000, use_karras_sigmas=True)
HARMLESS = dict(
    act_fn="swish", another="x", attention="plain", attention_head_dim=[2, 2, 2, 2], class_embed_type=None,
    dropout=0.1, id2label={"0": "x"}, lambda_min_clipped=float("-inf"), latents_mean=None,
    mid_block_only_cross_attention=None, num_attention_heads=None, only_cross_attention=[False] * 4,
    resnet_out_scale_factor=1.0, sample_size=[64, 64], shift_factor=None, solver_order=3, steps_offset=0,
    text_config={"hidden_size": 24, "hidden_act": "gelu"}, thresholding=False, torch_dtype="float16",
    upcast_attention=True)


@pytest.mark.parametrize("field", REFUSED)
def test_each_field_that_asks_for_another_computation_is_refused_by_name(field, tmp_path):
    for config in ({field: REFUSED[field]}, {"text_config": {field: REFUSED[field]}}):  # or in a CLIP's tower
        with pytest.raises(BadInput, match=f"c.json: {field} .* is not supported") as error:
            check_config(config, tmp_path / "c.json")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("field, value", [
    ("attention_head_dim", "x"), ("beta_start", -0.1), ("block_out_channels", [8] * 1000),
    ("block_out_channels", [-8, 8]), ("layers_per_block", 2**40), ("norm_eps", float("nan")), ("norm_num_groups", 0),
    ("num_hidden_layers", 10**9), ("num_train_timesteps", 2**40), ("sample_size", 2**40), ("scaling_factor", 10**400)])
def test_numbers_that_no_model_has_are_refused_before_it_is_built(field, value, tmp_path):
    with pytest.raises(BadInput, match=f"c.json: {field} .* is not supported"):
        check_config({field: value}, tmp_path / "c.json")


def test_fields_that_change_nothing_are_let_pass(tmp_path):
    check_config(HARMLESS, tmp_path / "c.json")


def test_a_schedulers_null_is_the_default(tmp_path):
    write_json({"thresholding": None, "beta_end": None, "steps_offset": 0}, tmp_path / "c.json")
    assert read_scheduler_config(tmp_path / "c.json") == {"steps_offset": 0}


def test_a_schedulers_class_must_be_for_models_of_this_kind(tmp_path):
    write_json({"_class_name": "LCMScheduler"}, tmp_path / "c.json")
    with pytest.raises(BadInput, match="c.json: _class_name \"LCMScheduler\" is not supported"):
        read_scheduler_config(tmp_path / "c.json")


@pytest.mark.parametrize("part, fields", [
    ("unet", {"center_input_sample": True}), ("vae", {"latents_mean": [0.1]}),
    ("text_encoder", {"hidden_act": "relu"}), ("scheduler", {"thresholding": True})])
def test_a_folder_whose_configuration_is_not_ours_is_refused(part, fields, sd_folder):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change_json(sd_folder / part / name, fields)
    with pytest.raises(BadInput, match=f"{part}/{name}: {[*fields][0]} .* is not supported"):
        load_stable_diffusion(sd_folder)


def test_a_branch_with_a_field_of_another_kind_of_controlnet_is_refused(tmp_path, cg):
    save_control(cg, tmp_path / "cg")
    change_json(tmp_path / "cg" / "config.json", {"global_pool_conditions": True})
    for path in (tmp_path / "cg", tmp_path / "cg" / CONTROL_FILE):
        with pytest.raises(BadInput, match="global_pool_conditions true is not supported"):
            load_control(path, "category")


@pytest.mark.parametrize("sample_size, size", [(24, 192), ([16, 32], 256), (None, 512)])
def test_the_size_a_base_was_trained_on(sample_size, size, unet, vae):
    config = unet.config | {"sample_size": sample_size}
    assert StableDiffusion(None, None, SimpleNamespace(config=config), vae, Schedule()).size == size


def test_json_files_are_read_with_the_mark_that_editors_put_in_front(folder):
    text = (folder / "config.json").read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / "config.json").write_text(text, encoding=encoding)
        assert load(folder).config == json.loads(text)


# ---------------------------------------------------------------- shards, wrappers, what lies beside the weights


def shard(folder: Path, names: tuple[str, str], index: str) -> dict[str, str]:
    """Cuts a folder's weights into two files and writes their index -> which tensor is in which file."""
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    places = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    write_json({"metadata": {"total_size": 1}, "weight_map": places}, folder / index)
    return places


@pytest.mark.parametrize("names, index", [
    ("diffusion_pytorch_model-{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("diffusion_pytorch_model.fp16-{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ("diffusion_pytorch_model-{}-of-00002.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors.index.json")])
def test_weights_in_shards_are_read_by_their_index(names, index, folder, unet):
    shard(folder, (names.format("00001"), names.format("00002")), index)
    assert equal_weights(load(folder), unet)


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "b.safetensors").unlink(), "b.safetensors is missing"),
    (lambda f: save_file({"x": torch.zeros(1)}, f / "b.safetensors"), r"not an index of the files beside it \(Key"),
    (lambda f: write_json({"weight_map": ["a"]}, f / f"{UNET_FILE}.index.json"), "is not an index of the files"),
    (lambda f: write_json({"weight_map": {"x": "../a.safetensors"}}, f / f"{UNET_FILE}.index.json"), "is not an index"),
    (lambda f: (f / f"{UNET_FILE}.index.json").unlink(), "holds no .* and no .*index.json")])
def test_what_is_missing_from_shards_is_named(damage, words, folder):
    shard(folder, ("a.safetensors", "b.safetensors"), f"{UNET_FILE}.index.json")
    damage(folder)
    with pytest.raises(BadInput, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_names_are_read_without_what_training_put_in_front(folder, unet):
    rewrite(folder, lambda t: [t.update({f"state_dict.module.{n}": t.pop(n)}) for n in list(t)])
    assert torch.equal(load(folder).conv_in.weight, unet.conv_in.weight)
    rewrite(folder, lambda t: t.update({"conv_in.weight": torch.zeros(1)}))
    with pytest.raises(BadInput, match="holds tensors twice"):
        load(folder)


def test_what_a_text_encoder_was_cut_from_is_let_lie(tmp_path, text_encoder):
    save_module(text_encoder, tmp_path / "t", TEXT_FILE)
    extra = {name: torch.zeros(2) for name in (
        "text_projection.weight", "logit_scale", "vision_model.encoder.x", "visual_projection.weight", "position_ids",
        "text_model.embeddings.position_ids", "x.num_batches_tracked")}
    save_file(load_file(tmp_path / "t" / TEXT_FILE) | extra, tmp_path / "t" / TEXT_FILE)
    assert equal_weights(load_module(TextEncoder, tmp_path / "t", TEXT_FILE, "cpu", torch.float32), text_encoder)


def test_an_image_tower_with_more_than_its_configuration_says_is_refused(tmp_path):
    save_module(randomise(CLIP(CLIP_CONFIG)), tmp_path / "clip", CLIP_FILE)
    change_json(tmp_path / "clip" / "config.json",
                {"vision_config": CLIP_CONFIG["vision_config"] | {"num_hidden_layers": 1}})
    with pytest.raises(BadInput, match=r"vision_model.encoder.layers.1.\S+ is not part of this model"):
        load_clip(tmp_path / "clip")


@pytest.mark.parametrize("marker, words", [("ztsnr", "zero terminal SNR"), ("difference", "differences from a base")])
def test_markers_that_change_what_the_numbers_mean_are_refused(marker, words, folder):
    rewrite(folder, lambda t: t.update({marker: torch.zeros(0)}))
    with pytest.raises(BadInput, match=f"holds the marker {marker}: .*{words}"):
        load(folder)
