"""Weights in and out: what is saved comes back, and what does not fit is refused in one line that says why."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SD1, TEXT_CONFIG, VAE_CONFIG, random, randomise
from safetensors.torch import load_file, save_file

from clip import TextEncoder, load_tokenizer
from model import CategoryGenerator, UNet
from sampler import Schedule
from support.files import BadInput, pick_device, read_log, read_tensors, write_atomic, write_json
from support.tensors import fingerprint
from toy.stages import train_tokenizer
from vae import VAE
from weights import (
    CONTROL_FILE,
    TEXT_FILE,
    UNET_FILE,
    StableDiffusion,
    control_config,
    load_control,
    load_module,
    load_stable_diffusion,
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
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))
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
    save_file({n: t + 1 for n, t in unet.state_dict().items()}, file)
    assert torch.equal(load(folder).conv_in.weight, unet.conv_in.weight + 1)


def test_a_controls_file_that_is_named_is_the_one_that_is_loaded(tmp_path, cg):
    save_control(cg, tmp_path)
    named = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    save_file({n: t + 1 for n, t in cg.state_dict().items()}, named)
    assert torch.equal(load_control(named).conv_in.weight, cg.conv_in.weight + 1)
    assert torch.equal(load_control(tmp_path).conv_in.weight, cg.conv_in.weight)


def test_a_bases_version_changes_with_its_files_and_not_with_what_is_trained_beside_them(tmp_path, unet, cg):
    save_module(unet, tmp_path / "unet", UNET_FILE)
    before = fingerprint(tmp_path)
    save_control(cg, tmp_path / "cg")
    assert fingerprint(tmp_path) == before
    os.utime(tmp_path / "unet" / "config.json", (0, 0))
    assert fingerprint(tmp_path) != before


def test_saving_again_replaces_the_whole_folder(tmp_path, cg):
    for categories in ({"perfume": "sks 0", "sneaker": "sks 1"}, {"手机": "sks 0"}):
        save_control(cg, tmp_path / "cg", categories=categories)
        assert json.loads((tmp_path / "cg" / "categories.json").read_text(encoding="utf-8")) == categories
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cg"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")

    def fails(path):
        path.write_text("half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomic(tmp_path / "file", fails)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_holds_other_things_is_not_replaced(tmp_path, cg):
    save_control(cg, tmp_path / "cg")
    save_control(cg, tmp_path / "cg")
    (tmp_path / "cg" / "training").mkdir()  # as where a run of its own lies in runs/cg
    with pytest.raises(BadInput, match="cg would be replaced, and holds training too"):
        save_control(cg, tmp_path / "cg")
    assert len(list(tmp_path.rglob("*"))) == 4


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
    write_json({"prediction_type": "v_prediction", "num_train_timesteps": 500}, tmp_path / "sd/scheduler/scheduler_config.json")
    return tmp_path / "sd"


@torch.no_grad()
def test_a_whole_folder_loads_its_schedule_included(sd_folder):
    sd = load_stable_diffusion(sd_folder)
    assert sd.schedule.T == 500 and sd.schedule.config["prediction_type"] == "v_prediction"
    assert sd.prompts(["a photo", ""]).shape == (2, 77, 24)
    assert sd.multiple == 64 and sd.latent_shape(128, 192) == (4, 16, 24)
    shutil.rmtree(sd_folder / "scheduler")
    assert load_stable_diffusion(sd_folder).schedule.T == 1000


@torch.no_grad()
def test_encode_and_decode_scale_latents_and_pictures(vae):
    sd = StableDiffusion(None, None, None, vae, Schedule())
    images, noise = random(2, 3, 64, 64).sigmoid(), random(2, 4, 8, 8)
    mean, logvar = vae.encode(2 * images - 1)
    torch.testing.assert_close(sd.encode(images), 0.18215 * mean)
    torch.testing.assert_close(sd.encode(images, noise), 0.18215 * (mean + (logvar / 2).exp() * noise))
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
    with pytest.raises(BadInput, match="twice"):
        load_module(VAE, tmp_path / "vae", UNET_FILE, "cpu", torch.float32)


def truncate(folder):
    data = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage, words", [
    (truncate, "not a whole safetensors file"),
    (lambda f: (f / UNET_FILE).write_bytes(b""), "not a whole safetensors file"),
    (lambda f: (f / UNET_FILE).write_text("<html>404</html>" * 9), "not a whole safetensors file"),
    (lambda f: (f / UNET_FILE).rename(f / "diffusion_pytorch_model.bin"), "pickle"),
    (lambda f: (f / UNET_FILE).unlink(), "holds no diffusion_pytorch_model.safetensors"),
    (lambda f: shutil.rmtree(f), "is missing"),
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
        with pytest.raises(BadInput, match="pickle"):
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


def test_what_is_too_long_keeps_its_end_token(tokenizer):
    row = tokenizer(["red sneaker " * 40])[0].tolist()
    assert row[-1] == tokenizer.end and row.count(tokenizer.end) == 1


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


# ---------------------------------------------------------------- what the folders hold


def test_control_files_are_ordinary_controlnet_folders(tmp_path, cg):
    save_control(cg, tmp_path / "cg")
    assert CONTROL_FILE in {p.name for p in (tmp_path / "cg").iterdir()}
    assert json.loads((tmp_path / "cg" / "config.json").read_text())["_class_name"] == "ControlNetModel"


def test_vae_config_holds_its_scale():
    assert VAE(VAE_CONFIG | {"scaling_factor": 0.3}).scaling_factor == 0.3
    assert VAE({k: v for k, v in VAE_CONFIG.items() if k != "scaling_factor"}).scaling_factor == 0.18215


def test_an_interrupt_between_two_renames_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "cg").mkdir()
    (tmp_path / "cg" / "old").write_text("")
    rename = os.replace

    def new_folder(path):
        path.mkdir()
        (path / "old").touch()

    def interrupted(source, target):
        if Path(target) == tmp_path / "cg" and Path(source).name == "cg":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "cg", new_folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["cg", "old"]


def test_a_log_loses_only_the_line_that_was_cut_even_within_a_letter(tmp_path):
    (tmp_path / "log").write_bytes('{"a": "杯\u2028"}\n{"a": "杯'.encode()[:-1])
    assert read_log(tmp_path / "log") == [{"a": "杯\u2028"}] and (tmp_path / "log").read_bytes().endswith(b"}\n")
    assert read_log(tmp_path / "none") == []


@pytest.mark.parametrize("key, value, words", [("attention_head_dim", [8], "is not the configuration of such a model"),
                                               ("in_channels", 8, "its UNet reads 8 channels, neither 4 .* nor 9")])
def test_a_unet_that_is_none_of_stable_diffusions_is_refused(key, value, words, sd_folder, unet):
    if key == "in_channels":
        unet = UNet(unet.config | {key: value})
        save_module(unet, sd_folder / "unet", UNET_FILE)
    else:
        file = sd_folder / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=words):
        load_stable_diffusion(sd_folder)


@pytest.mark.parametrize("field, value", [("beta_schedule", "linear"), ("prediction_type", "sample"),
                                          ("rescale_betas_zero_snr", True), ("trained_betas", [0.1])])
def test_another_noise_schedule_is_refused(field, value, sd_folder):
    file = sd_folder / "scheduler" / "scheduler_config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {field: value}))
    with pytest.raises(BadInput, match=f"scheduler_config.json: {field} .* is not supported"):
        load_stable_diffusion(sd_folder)


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # as if every device were here
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [pick_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


def test_another_bases_tokenizer_is_refused(sd_folder, tmp_path):
    train_tokenizer(["a mug"] * 9, 520, 99, tmp_path / "tokenizer")  # longer than the text encoder's 77 positions
    with pytest.raises(BadInput, match="is not the tokenizer of"):
        load_stable_diffusion(sd_folder, tokenizer=tmp_path / "tokenizer")


def test_written_files_have_the_users_usual_mode(tmp_path, cg):
    (tmp_path / "usual").write_text("")
    save_control(cg, tmp_path / "cg")
    for file in (tmp_path / "cg").iterdir():
        assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode
