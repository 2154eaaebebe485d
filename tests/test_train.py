"""Tests: training: every stage runs, an interrupted run resumes bit for bit, and bad use ends in one line."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_weights, inputs, random, randomise
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import train
from clip import TextEncoder
from data import TrainingSamples, diffuse, load_ad, product_hint
from model import CategoryGenerator, ControlNet, Prompts, UNet, predict_noise
from programs import latents, settings
from programs.latents import category_prompts, encode_items, prompt_table
from programs.models import check_identifiers
from programs.settings import number_categories
from programs.trainer import Trainer, batches_of_keys, learning_rate, seed_of
from sampler import Schedule
from support import tensors as cache
from support.datasets import read_items
from support.files import BadInput, sweep
from support.solvers import timestep_weights
from toy import stages
from toy.world import write_world
from vae import VAE
from weights import UNET_FILE, StableDiffusion, control_config, load_control, load_module, load_stable_diffusion

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, size=64, base=24, ads=24, bg1k=8, pairs=8, workers=1)
    return root


@pytest.fixture(scope="session")
def base(world, tmp_path_factory):
    """A Stable Diffusion folder from two steps of each of the base's stages, through the real command line."""
    out = tmp_path_factory.mktemp("base")
    common = ["--data", world / "base", "--out", out, "--steps", 2, "--batch", 4]
    command("vae", *common, "--size", 64)
    command("clip", *common)
    command("unet", *common, "--weights", out, "--size", 64)
    return out


@pytest.fixture(scope="session")
def cg(world, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("cg")
    command(*branch("cg", world, base, out), "--steps", 2)
    return out / "cg"


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the painting of sheets, which takes most of a short run's time."""
    for module, name in ((train, "draw_branches"), (stages, "draw_captions")):
        monkeypatch.setattr(module, name, lambda *_: Image.new("RGB", (8, 8)))


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*"))


def content(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=True)


def flat(value, name: str = "") -> dict[str, object]:
    """What a checkpoint holds, by path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {name: value}
    return {k: x for key, child in pairs for k, x in flat(child, f"{name}/{key}").items()}


def equal_checkpoints(one: Path, two: Path) -> bool:
    a, b = (flat(content(path)) for path in (one, two))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
                                        for name, x in a.items() if "/settings/" not in name)


def command(*arguments):
    train.main([str(a) for a in arguments])


def branch(stage, world, base, out):
    return stage, "--data", world / "ads", "--weights", base, "--out", out, "--batch", 4, "--size", 64, "--lr", 1e-3


def test_base_stages_write_a_folder_in_the_public_layout(base):
    for file in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                 "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json",
                 "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        assert (base / file).is_file(), file
    assert 0 < json.loads((base / "vae" / "config.json").read_text())["scaling_factor"] < 10


def test_every_stage_leaves_a_log_a_sheet_and_a_checkpoint(base, cg):
    for folder in [base / "training" / stage for stage in ("vae", "clip", "unet")] + [cg.parent / "training" / "cg"]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 2 and {"loss", "lr", "images_per_second"} <= lines[-1].keys()
        assert (folder / "sheet_000002.png").is_file() and (folder / "checkpoint_00000002.pt").is_file()
        assert (folder / "loss.png").is_file()
        assert not [p for p in folder.iterdir() if p.name.startswith(".")], "a temporary file is left"


def test_decoder_only_leaves_the_encoder_and_the_scaling_factor_as_they_are(world, base, tmp_path):
    command("vae", "--decoder-only", "--init", base / "vae", "--data", world / "ads", "--size", 64, "--steps", 3,
            "--batch", 4, "--out", tmp_path)
    before, after = (load_module(VAE, folder / "vae", UNET_FILE, "cpu", torch.float32) for folder in (base, tmp_path))
    assert after.config == before.config
    assert equal_weights(before.encoder, after.encoder) and equal_weights(before.quant_conv, after.quant_conv)
    assert not equal_weights(before.decoder, after.decoder)


def test_decoder_only_asks_for_the_vae_to_start_from(world, tmp_path):
    with pytest.raises(BadInput, match="--decoder-only goes with --init"):
        command("vae", "--decoder-only", "--data", world / "ads", "--size", 64, "--out", tmp_path)


def test_stage_unet_learns_both_passes_through_the_command_line(world, base, tmp_path, quick):
    command("unet", "--refine", 2, "--init", base / "unet", "--weights", base, "--data", world / "base", "--size", 32,
            "--steps", 2, "--batch", 4, "--out", tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["pg", "joint"])
def test_pg_and_joint_train(stage, world, base, cg, tmp_path):
    command(*branch(stage, world, base, tmp_path), *(("--cg", cg) if stage == "pg" else ()), "--steps", 2)
    assert (tmp_path / "pg" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "cg").exists() == (stage == "joint")


def test_stage_controlnet_trains_on_captions(world, base, tmp_path, monkeypatch):
    """It trains a general ControlNet, whose folder opens as one."""
    texts, encode = [], StableDiffusion.prompts
    monkeypatch.setattr(StableDiffusion, "prompts", lambda self, t: texts.extend(t) or encode(self, t))
    run = "controlnet", "--weights", base, "--out", tmp_path, "--batch", 4, "--size", 64, "--steps", 2
    command(*run, "--data", world / "base", "--prompt-dropout", 0)
    assert texts[:8] != [""] * 8 and all(", in the background of " in text for text in texts[:8])
    assert type(load_control(tmp_path / "controlnet")) is ControlNet
    assert not (tmp_path / "controlnet" / "categories.json").exists(), "captions name no identifiers"
    with pytest.raises(BadInput, match="captions, which this data set lacks; .* train.py cg --attention plain"):
        command(*run, "--data", world / "ads", "--out", tmp_path / "ads")


@pytest.fixture(scope="session")
def plain(world, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    command(*branch("cg", world, base, out), "--steps", 2, "--attention", "plain")
    return out / "cg"


def test_cg_with_plain_attention_is_an_ordinary_controlnet_that_loads_as_cg(plain, cg):
    """It has CG's parameters, but uses Eq. 2 on P and no mask. config.json says which attention it uses."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, cg)]
    assert configs[0] == configs[1] | {"attention": "plain"} and configs[1]["attention"] == "mask-guided"
    assert (plain / "categories.json").read_text() == (cg / "categories.json").read_text()
    as_cg, ordinary = load_control(plain, "category"), load_control(plain)
    assert isinstance(as_cg, CategoryGenerator)
    given = Prompts("P", "P_fg", "P_bg")
    assert as_cg.context(given) == "P" and load_control(cg, "category").context(given) == ("P_fg", "P_bg")
    z, t, P = random(2, 4, 16, 16), torch.tensor([981, 21]), random(2, 32, 128, seed=1)
    hint, mask = random(2, 3, 64, 64, seed=2).sigmoid(), torch.ones(2, 1, 64, 64)
    for ours, theirs in zip(as_cg(z, t, P, hint, mask), ordinary(z, t, P, hint), strict=True):
        assert torch.equal(ours, theirs)


def test_diffusers_opens_cg_with_plain_attention(plain):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.ControlNetModel.from_pretrained(plain).state_dict()
    assert equal_weights(load_control(plain), theirs)


def test_pg_trains_beside_cg_with_plain_attention_and_joint_with_it(world, base, plain, tmp_path, quick, capsys):
    command(*branch("pg", world, base, tmp_path / "pg"), "--cg", plain, "--steps", 1)
    command(*branch("joint", world, base, tmp_path / "joint"), "--attention", "plain", "--steps", 1)
    assert "training CG and PG" in capsys.readouterr().err
    assert load_control(tmp_path / "joint" / "cg", "category").config["attention"] == "plain"
    assert "attention" not in load_control(tmp_path / "joint" / "pg", "personality").config
    item = read_items(world / "ads", "bg1k")[0][0]
    generate.main([str(x) for x in ("--product", item.image, "--mask", item.mask, "--category", "laptop", "--steps", 1,
                                    "--weights", base, "--cg", plain, "--out", tmp_path / "out")])
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".png"]


@pytest.mark.parametrize("stage", ["pg", "unet"])
def test_an_interrupted_run_resumes_bit_for_bit(stage, world, base, cg, tmp_path, monkeypatch, quick):
    """pg has the most randomness (mixup partners, masks, dropout, noise), unet the moving average."""
    def arguments(out):
        data = ("--data", world / "base") if stage == "unet" else ("--cg", cg)
        return (*branch(stage, world, base, out), *data, "--steps", 8, "--save-every", 2, "--sample-every", 3,
                "--ema", 0.9, "--device", "cpu")

    command(*arguments(tmp_path / "whole"))
    save = Trainer.save_checkpoint

    def save_and_die(self, step):
        save(self, step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save_checkpoint", save_and_die)
        command(*arguments(tmp_path / "broken"))
    command(*arguments(tmp_path / "broken"), "--resume")

    folders = [tmp_path / run / "training" / stage for run in ("whole", "broken")]
    assert equal_checkpoints(*(folder / "checkpoint_00000008.pt" for folder in folders))
    assert steps_logged(folders[0]) == steps_logged(folders[1])


# ---------------------------------------------------------------- processes, parts, workers: the same run


def steps_logged(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder) -> dict:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


QUICK = """
import sys
sys.path.insert(0, {root!r})
from PIL import Image
import torch
import train
train.draw_branches = lambda *_: Image.new("RGB", (8, 8))
{code}
with train.one_line_errors():
    train.main()
"""


def launch(script, *arguments, processes: int = 1, code: str = "") -> subprocess.Popen:
    """Runs train.py without sheets, after `code`, in a process of its own or in several under torchrun."""
    script.write_text(QUICK.format(root=str(ROOT), code=code))
    program = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.Popen([sys.executable, *program, script, *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("options", [("--micro-batch", 1), ("--workers", 2)], ids=["parts", "workers"])
def test_parts_and_workers_change_nothing(options, world, base, cg, tmp_path, quick):
    run = "--cg", cg, "--steps", 2
    command(*branch("pg", world, base, tmp_path / "whole"), *run)
    command(*branch("pg", world, base, tmp_path / "other"), *run, *options)
    assert distance(weights_of(tmp_path / "whole" / "pg"), weights_of(tmp_path / "other" / "pg")) < 1e-6


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(world, base, tmp_path, quick):
    """A batch of 4 is computed by one process at once, or by two processes in two parts each."""
    run = "--steps", 4, "--device", "cpu"
    command(*branch("cg", world, base, tmp_path / "one"), *run)
    process = launch(tmp_path / "quick.py", *branch("cg", world, base, tmp_path / "two"), *run, "--micro-batch", 1,
                     processes=2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    one, two = weights_of(tmp_path / "one" / "cg"), weights_of(tmp_path / "two" / "cg")
    assert max(t.abs().max() for n, t in one.items() if "controlnet_down_blocks" in n) > 1e-3, "they were zero"
    assert distance(one, two) < 1e-6
    one, two = (steps_logged(tmp_path / n / "training" / "cg") for n in ("one", "two"))
    assert one == two, "one process of the two writes the log"


# ---------------------------------------------------------------- faults


KILL = """
import os, signal
save = torch.save

def half(content, path):
    save(content, path)
    if content["step"] == 6:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_ends_with_the_same_weights(world, base, tmp_path, quick):
    run = "--steps", 8, "--save-every", 2, "--device", "cpu"
    command(*branch("cg", world, base, tmp_path / "whole"), *run)
    killed = launch(tmp_path / "quick.py", *branch("cg", world, base, tmp_path / "killed"), *run, code=KILL)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    folder = tmp_path / "killed" / "training" / "cg"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_00000002.pt", "checkpoint_00000004.pt"]
    command(*branch("cg", world, base, tmp_path / "killed"), *run, "--resume")
    assert distance(weights_of(tmp_path / "whole" / "cg"), weights_of(tmp_path / "killed" / "cg")) == 0
    assert [path.name for path in sorted(folder.iterdir()) if path.name.startswith((".", "checkpoint"))] == [
        "checkpoint_00000006.pt", "checkpoint_00000008.pt"], "the newest two stay, and no part of one"


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and_the_run_goes_on(world, base, tmp_path, quick):
    """torchrun and batch systems send it to all processes of the group, also to the loader's workers."""
    run = (*branch("cg", world, base, tmp_path), "--save-every", 100000, "--device", "cpu", "--log-every", 1)
    process = launch(tmp_path / "quick.py", *run, "--steps", 100000, "--workers", 2)
    log = tmp_path / "training" / "cg" / "log.jsonl"
    while not (log.is_file() and log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "--resume goes on from there" in errors, errors
    step = int(checkpoints(log.parent)[-1].stem.split("_")[1])
    command(*run, "--steps", step + 1, "--resume")


def test_a_run_of_an_earlier_version_is_named_with_the_commit_that_finishes_it(world, base, tmp_path):
    folder = tmp_path / "training" / "cg"
    folder.mkdir(parents=True)
    (folder / "checkpoint_00000002.safetensors").touch()
    for options in ((), ("--resume",)):
        with pytest.raises(BadInput, match="training/cg holds a run of an earlier version: .*git checkout 09b292d"):
            command(*branch("cg", world, base, tmp_path), "--steps", 4, *options)


def test_a_run_keeps_its_own_identifiers(world, base, tmp_path, quick):
    run = branch("cg", world, base, tmp_path)
    command(*run, "--steps", 1, "--identifier", "style {}")
    command(*run, "--steps", 2, "--resume")
    command(*run, "--steps", 3, "--resume", "--identifier", "sks {}")
    saved = json.loads((tmp_path / "cg" / "categories.json").read_text())
    assert list(saved.items())[:2] == [("laptop", "style 0"), ("perfume", "style 1")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 768 vs 662")])
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(error, world, base, tmp_path, monkeypatch,
                                                                       quick):
    """torch.save raises RuntimeError."""
    save = torch.save

    def full(content, path):
        if content["step"] == 4:
            raise error
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="checkpoint_00000002.pt is whole"):
        command(*branch("cg", world, base, tmp_path), "--steps", 8, "--save-every", 2)
    assert [path.name for path in checkpoints(tmp_path / "training" / "cg")] == ["checkpoint_00000002.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(world, base, tmp_path, monkeypatch, quick):
    backward, wrong = Trainer.backward, []
    monkeypatch.setattr(Trainer, "backward", lambda self, step, batch: backward(self, step, batch)
                        + (float("nan") if step in wrong else 0))
    run = *branch("cg", world, base, tmp_path), "--steps", 4, "--save-every", 1
    saved = str(tmp_path / "training" / "cg" / "checkpoint_00000002.pt")
    for step, options, remedy in ((0, (), "give a lower --lr, or whole weights to start from"),
                                  (2, (), f"give a lower --lr, .*; {re.escape(saved)} is whole: --resume goes on")):
        wrong[:] = [step]
        with pytest.raises(BadInput, match=f"the loss is nan, .* at step {step + 1}; {remedy}"):
            command(*run, *options)
    assert str(checkpoints(tmp_path / "training" / "cg")[-1]) == saved


def test_weights_that_are_not_finite_are_not_saved(world, base, tmp_path, monkeypatch, quick):
    update = Trainer.update

    def diverge(self, step, loss):
        update(self, step, loss)
        if step == 3:
            self.parameters[0].data[0] = float("inf")

    monkeypatch.setattr(Trainer, "update", diverge)
    run = *branch("cg", world, base, tmp_path), "--steps", 5, "--save-every", 2
    for options in ((), ("--sample-every", 2, "--resume")):  # found by the checkpoint, and by the saved model
        with pytest.raises(BadInput, match="cg.* is not finite"):
            command(*run, *options)
    assert [path.name for path in checkpoints(tmp_path / "training" / "cg")] == ["checkpoint_00000002.pt"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("amp", [None, "float16"])
def test_a_base_whose_vae_is_broken_is_named_before_training(number, amp, world, base, tmp_path, quick):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"][0] = number
    save_file(tensors, file)
    with pytest.raises(BadInput, match="the VAE's latents are not finite; its weights are broken"):
        command(*branch("cg", world, tmp_path / "base", tmp_path / "out"), "--steps", 1,
                *(("--amp", amp) if amp else ()), "--device", "cpu")


def test_gradients_that_overflow_float16_for_ever_stop_the_run(world, base, tmp_path, monkeypatch, quick):
    """A scaler skips these steps and halves its scale, 65,536, until the scale can't be the reason."""
    steps, backward = [], Trainer.backward

    def overflow(self, step, batch):
        steps.append(step)
        loss = backward(self, step, batch) if step == 0 else 1.0
        for p in self.parameters:
            p.grad = torch.full_like(p, float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "backward", overflow)
    with pytest.raises(BadInput, match="its gradient's length (inf|nan) at step 18; .*lower --lr"):
        command(*branch("cg", world, base, tmp_path), "--steps", 40, "--amp", "float16", "--device", "cpu")
    assert steps == [*range(18)]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_changes_a_weight(world, base, tmp_path, monkeypatch,
                                                                                quick):
    folder = tmp_path / "training" / "cg"
    command(*branch("cg", world, base, tmp_path), "--steps", 2)
    before = (folder / "checkpoint_00000002.pt").read_bytes()

    def backward(self, *rest, original=Trainer.backward):
        loss = original(self, *rest)
        self.parameters[0].grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "backward", backward)
    with pytest.raises(BadInput, match="its gradient's length (inf|nan) at step 3"):
        command(*branch("cg", world, base, tmp_path), "--steps", 3, "--resume")
    assert checkpoints(folder)[-1].read_bytes() == before


def test_a_pg_does_not_go_on_beside_a_cg_with_other_identifiers(world, base, cg, tmp_path, quick):
    other = shutil.copytree(cg, tmp_path / "other")
    file = other / "categories.json"
    file.write_text(file.read_text().replace("sks", "style"))
    run = branch("pg", world, base, tmp_path / "run")
    command(*run, "--cg", cg, "--steps", 1)
    with pytest.raises(BadInput, match="are not those that the run began with"):
        command(*run, "--cg", other, "--steps", 2, "--resume")


# ---------------------------------------------------------------- identifiers: once given, they stay


def test_a_category_that_is_added_gets_the_next_identifier_and_the_others_keep_theirs(world, base, tmp_path, quick):
    """This holds for --init-control and --resume. A PG trained before still fits the extended CG."""
    def identifiers(name):
        return json.loads((tmp_path / name / "categories.json").read_text())

    data = shutil.copytree(world / "ads", tmp_path / "ads")
    info = data / "bg60k_info.txt"
    run = "--data", data, *branch("cg", world, base, "")[3:5], "--batch", 4, "--size", 64
    command("cg", *run, "--out", tmp_path / "a", "--steps", 1)
    command("pg", *run, "--out", tmp_path / "a", "--steps", 1, "--cg", tmp_path / "a/cg")
    first = identifiers("a/cg")
    assert list(first.items())[:2] == [("laptop", "sks 0"), ("perfume", "sks 1")] and len(first) == 8
    info.write_text(info.read_text().replace("laptop", "anvil", 1))  # sorted, it would be the first

    with pytest.raises(BadInput, match="category anvil was not in CG's training set; train CG on this data first"):
        command("pg", *run, "--out", tmp_path / "b", "--steps", 1, "--cg", tmp_path / "a/cg")
    command("cg", *run, "--out", tmp_path / "b", "--steps", 1, "--init-control", tmp_path / "a/cg")
    command("cg", *run, "--out", tmp_path / "a", "--steps", 2, "--resume")
    for name in ("a/cg", "b/cg"):
        assert list(identifiers(name).items()) == [*first.items(), ("anvil", "sks 8")]
        check_identifiers(tmp_path / name, tmp_path / "a/pg")
    command("pg", *run, "--out", tmp_path / "b", "--steps", 1, "--cg", tmp_path / "b/cg")
    assert identifiers("b/pg") == identifiers("b/cg")


def test_numbers_go_on_where_they_stopped():
    known = number_categories(["pear", "apple"], "v1 kind {}", {})
    assert known == {"pear": "v1 kind 0", "apple": "v1 kind 1"}
    longer = number_categories(["fig", "apple"], "v1 kind {}", known)
    assert list(longer.items()) == [*known.items(), ("fig", "v1 kind 2")]
    edited = {"pear": "sks 0", "apple": "sks 2"}
    assert number_categories(["fig"], "sks {}", edited)["fig"] == "sks 3", "no number is given twice"


def test_a_log_that_a_killed_process_left_in_the_middle_of_a_line_goes_on(world, base, tmp_path, quick):
    command(*branch("cg", world, base, tmp_path), "--steps", 2, "--log-every", 1)
    log = tmp_path / "training" / "cg" / "log.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 3, "lo')
    command(*branch("cg", world, base, tmp_path), "--steps", 3, "--log-every", 1, "--resume")
    assert steps_logged(log.parent) == [1, 2, 3]


def test_clip_needs_its_whole_batch_at_once(world, tmp_path):
    with pytest.raises(BadInput, match="one process, and no --micro-batch"):
        command("clip", "--data", world / "base", "--out", tmp_path, "--batch", 4, "--micro-batch", 2)


# ---------------------------------------------------------------- cached latents and prompts, memory


def latents_of(world, base, cache, size=64) -> tuple:
    """Latents of the toy's ads -> them, the base, and how many images the VAE encoded for them."""
    sd = load_stable_diffusion(base)
    counts, encode = [], sd.vae.encode
    sd.vae.encode = lambda x: counts.append(len(x)) or encode(x)
    return encode_items(sd, read_items(world)[0], size, cache, batch=4), sd, sum(counts)


def test_latents_are_encoded_once_and_again_where_something_changed(world, base, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PART", 8)
    ads = shutil.copytree(world / "ads", tmp_path / "ads")
    parts, sd, count = latents_of(ads, base, tmp_path / "cache")
    items = read_items(ads)[0]
    assert count == 24
    for i in (0, 9, 23):
        mean, logvar = sd.vae.encode(2 * load_ad(items[i], 64)[0][None] - 1)
        got = {name: x[i % 8].float() for name, x in parts[i // 8].items()}
        assert torch.allclose(got["mean"], mean[0], rtol=2e-3, atol=2e-3), "kept in float16"
        assert torch.allclose(got["logvar"], logvar[0], rtol=2e-3, atol=2e-3)
    assert latents_of(ads, base, tmp_path / "cache")[2] == 0, "all is there"
    before = {*(tmp_path / "cache").glob("*.safetensors")}
    shutil.copy(items[0].image, items[9].image)
    again, _, count = latents_of(ads, base, tmp_path / "cache")
    (part,) = {*(tmp_path / "cache").glob("*.safetensors")} - before
    assert count == 8, "the part of eight with the changed picture"
    assert latents_of(ads, base, tmp_path / "cache", size=32)[2] == 24, "another size"
    part.unlink()
    assert latents_of(ads, base, tmp_path / "cache")[2] == 8, "a part that is missing is made again, and no other"


def test_an_interrupted_encoding_goes_on_where_it_was(world, base, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PART", 8)
    save, calls = cache.save_file, []

    def interrupted(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(cache, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        latents_of(world / "ads", base, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one whole part and nothing else"
    assert latents_of(world / "ads", base, tmp_path / "cache")[2] == 16


def test_training_holds_neither_vae_nor_text_encoder_and_nothing_frozen_has_gradients(world, base, tmp_path,
                                                                                      monkeypatch):
    def look(task, settings):
        assert [type(o) for o in networks() if id(o) not in before] == [UNet]
        trained = {id(p) for m in task.modules.values() for p in m.parameters()}
        task.loss(torch.utils.data.default_collate([task.samples[(i, i)] for i in range(2)]), None).backward()
        held = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and o.grad is not None]
        assert trained == {id(p) for p in held}
        raise Done

    class Done(Exception):
        pass

    def networks():
        gc.collect()
        return [o for o in gc.get_objects() if type(o) in (VAE, TextEncoder, UNet)]

    before = set(map(id, networks()))
    monkeypatch.setattr(train, "fit", look)
    with pytest.raises(Done):
        command(*branch("cg", world, base, tmp_path), "--steps", 2)


@pytest.mark.parametrize("stage, amp", [("cg", "float16"), ("pg", "bfloat16")])
def test_mixed_precision_trains_float32_weights(stage, amp, world, base, cg, tmp_path, quick):
    run = (*branch(stage, world, base, tmp_path), "--amp", amp, "--device", "cpu", "--checkpointing",
           *(("--cg", cg) if stage == "pg" else ()))
    command(*run, "--steps", 2)
    command(*run, "--steps", 3, "--resume")
    weights = weights_of(tmp_path / stage)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values())
    saved = content(tmp_path / "training" / stage / "checkpoint_00000003.pt")
    assert ("scale" in saved["scaler"]) == (amp == "float16")


# ---------------------------------------------------------------- the parts


def test_the_runs_seed_decides_the_noise_and_the_order():
    """The 32 bits that torch's CPU generator reads from a seed differ between runs' seeds, and between steps."""
    draws = [torch.randn(4, generator=torch.Generator().manual_seed(seed_of(seed, "step", step)))
             for seed in (0, 1, 2**32 - 1) for step in (0, 1)]
    assert len({tuple(d.tolist()) for d in draws}) == 6
    assert list(batches_of_keys(10, 4, 0, 0, 5)) != list(batches_of_keys(10, 4, 1, 0, 5))


def test_a_run_is_not_overwritten_and_other_settings_are_named(world, base, tmp_path, capsys, quick):
    run = (*branch("cg", world, base, tmp_path), "--steps", 1)
    command(*run)
    with pytest.raises(BadInput, match="add --resume"):
        command(*run)
    capsys.readouterr()
    command(*run, "--steps", 2, "--lr", 1e-4, "--resume")
    assert "resumed with changed settings: lr 0.001 -> 0.0001, steps 1 -> 2\n" in capsys.readouterr().err
    path = tmp_path / "training" / "cg" / "checkpoint_00000002.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="checkpoint_00000002.pt is broken"):
        command(*run, "--steps", 3, "--resume")


def test_a_finished_run_that_is_resumed_says_that_it_is_done_and_changes_nothing(world, base, tmp_path, capsys, quick):
    run = (*branch("cg", world, base, tmp_path), "--steps", 2)
    command(*run)
    said, folder = capsys.readouterr().out, tmp_path / "training" / "cg"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (folder / ".scratch-abc").mkdir()
    sweep.cache_clear()
    command(*run, "--resume")
    out, err = capsys.readouterr()
    assert out == said and f"{folder} is done" in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_branch_starts_from_another_of_its_layout(world, base, cg, tmp_path, quick):
    command(*branch("pg", world, base, tmp_path), "--cg", cg, "--init-control", cg, "--steps", 1, "--lr", 1e-9)
    start, end = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (cg, tmp_path / "pg"))
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)


def test_batches_hold_each_index_once_an_epoch_and_can_be_entered_anywhere():
    batches = list(batches_of_keys(count=10, batch=4, seed=0, start=0, steps=5))
    assert sorted(i for keys in batches for i, _ in keys) == sorted(2 * list(range(10))), "each index once an epoch"
    assert len({seed for keys in batches for _, seed in keys}) == 20, "every sample has a seed of its own"
    assert list(batches_of_keys(10, 4, 0, start=3, steps=5)) == batches[3:], "starting later is the same walk"
    shares = [list(batches_of_keys(10, 4, 0, 0, 5, rank, 2)) for rank in (0, 1)]
    for whole, first, second in zip(batches, *shares, strict=True):
        assert sorted(whole) == sorted(first + second) and len(first) == len(second) == 2, "shared without repeats"


def test_learning_rate_warms_up_stays_and_decays_and_the_papers_is_constant():
    rates = [learning_rate(step, lr=1.0, steps=100, warmup=10, decay=0.5) for step in (0, 9, 49, 75)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5])
    paper = {name: train.PAPER[name] for name in ("lr", "warmup", "decay")}
    assert {learning_rate(step, steps=100, **paper) for step in range(100)} == {1e-5}


def test_diffuse_draws_from_the_posterior_and_add_noise_is_the_forward_process_written_out():
    schedule, mean, std = Schedule(), torch.randn(4, 64, 64), torch.rand(4, 1, 1)
    z_0, eps, t = diffuse(mean, std, torch.Generator().manual_seed(0), 1000)
    for noise in ((z_0 - mean) / std, eps):
        assert noise.std().item() == pytest.approx(1, abs=0.05)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.prod(1 - beta[: t + 1])
    z_t = schedule.add_noise(z_0[None], eps[None], t[None])[0]
    assert torch.allclose(z_t.double(), kept.sqrt() * z_0.double() + (1 - kept).sqrt() * eps.double(), atol=1e-5)


def test_timestep_weights_are_1_or_the_papers_of_min_snr_and_debias_written_out():
    assert timestep_weights(Schedule(), "uniform").eq(1).all()
    for prediction in ("epsilon", "v_prediction"):
        schedule = Schedule({"prediction_type": prediction})
        for t in (0, 100, 500, 999):
            snr = float(schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t]))
            in_eps = 1 if prediction == "epsilon" else snr / (snr + 1)  # an error in v is this much larger
            min_snr, debias = (timestep_weights(schedule, kind)[t].item() for kind in ("min-snr", "debias"))
            assert min_snr == pytest.approx(min(snr, 5) / snr * in_eps, rel=1e-4)
            assert debias == pytest.approx(snr**-0.5 * in_eps, rel=1e-4)


def test_noise_offset_moves_the_noise_by_a_constant_a_channel():
    mean = std = torch.zeros(4, 8, 8)
    plain, moved = (diffuse(mean, std, torch.Generator().manual_seed(0), 1000, offset)[1] for offset in (0.0, 0.5))
    offset = moved - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[..., 0, 0].unique()) == 4 and offset.std() > 0.1


@pytest.mark.parametrize("arguments, message", [
    (["cg", "--init", "d"], "--init belongs to stage vae and unet"),
    (["unet", "--init-control", "d"], "--init-control belongs to stage cg and pg and joint"),
    (["paint"], "stage paint does not exist; the stages are vae, clip, unet, cg, pg, joint"),
    (["cg", "--resume", "--out", "{tmp}/none"], "nothing to resume"),
    (["clip", "--resume", "--out", "{tmp}/none"], "nothing to resume"),
    (["vae", "--size", "100"], "--size 100: must be a multiple of 8"),
    (["pg", "--weights", "{tmp}/none"], "--cg is missing"),
    (["cg", "--data", "{tmp}/none"], "no such data set"),
    (["cg", "--weights", "{tmp}/none"], "missing"),
    (["cg", "--batch", "0"], "--batch"),
    (["cg", "--steps", "-1"], "--steps"),
    (["cg", "--size", "100"], "--size"),
    (["cg", "--batch", "4", "--micro-batch", "3"], "--micro-batch 3: must divide --batch 4"),
    (["cg", "--theta", "0"], "--theta belongs to stage pg and joint"),
    (["pg", "--attention", "plain"], "--attention belongs to stage cg and joint"),
    (["vae", "--noise-offset", "0"], "--noise-offset belongs to stage unet and cg"),
    (["cg", "--device", "gpu"], "--device"),
    (["cg", "--noise-offset", "-1"], "--noise-offset"),
    (["cg", "--out", "{tmp}/file"], "file"),
])
def test_bad_use_ends_in_one_line(arguments, message, world, base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if arguments[0] in ("vae", "clip"):
        arguments += ["--data", str(world / "base"), "--out", str(tmp_path / "none")]
    if arguments[0] == "cg":
        arguments += [] if "--data" in arguments else ["--data", str(world / "ads")]
        arguments += [] if "--weights" in arguments else ["--weights", str(base)]
        arguments += [] if "--size" in arguments else ["--size", "64"]
        arguments += [] if "--steps" in arguments else ["--steps", "2"]
    with pytest.raises(BadInput, match=message) as error:
        train.main(arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- Eq. 1, written out


def test_eq1_equals_the_equation_written_out(unet, pg):
    """The weighted mean square of ε minus its prediction from z_t; the prompts of a dropped ad are those of ''."""
    x, schedule, cg = inputs(2), Schedule(), randomise(CategoryGenerator(pg.config), seed=1)
    table = random(3, 3, 7, 24, seed=5)  # two categories and '', for P, P_fg, P_bg
    prompts = category_prompts(table, [1, 0, 1], "cpu")
    eq1 = train.Eq1(unet, schedule, [(cg, "product"), (pg, "background")], prompts, 0.5,
                    timestep_weights(schedule, "min-snr"))
    image, eps = random(2, 3, 128, 128, seed=6).sigmoid(), random(2, 4, 16, 16, seed=7)
    loss = eq1({"z_0": x.z, "eps": eps, "t": x.t, "image": image, "mask": x.mask, "background": x.hint_ref,
                "index": torch.tensor([2, 1]), "drop": torch.tensor([0.6, 0.4])})

    kept = schedule.alpha_bar[x.t].view(2, 1, 1, 1)
    prompts = Prompts(*(table[[1, 2], k] for k in range(3)))
    branches = [(cg, cg.hint_features(image * x.mask)), (pg, pg.hint_features(x.hint_ref))]
    predicted = predict_noise(unet, kept.sqrt() * x.z + (1 - kept).sqrt() * eps, x.t, prompts, branches, x.mask)
    snr = kept / (1 - kept)
    assert torch.allclose(loss, ((eps - predicted).square() * snr.clamp(max=5) / snr).mean(), rtol=1e-4)


def test_a_training_loop_can_be_written_in_a_cell(world, base, tmp_path):
    """It uses only public functions and classes, and it learns: the loss on one batch falls."""
    torch.manual_seed(0)
    sd, (items, _) = load_stable_diffusion(base), read_items(world / "ads")
    cg = CategoryGenerator(control_config(sd.unet.config, sd.vae.factor))
    cg.init_from_unet(sd.unet)
    samples = TrainingSamples(items, 64, encode_items(sd, items, 64, tmp_path), sd.vae.scaling_factor)
    texts = sorted({item.category for item in items})
    settings = train.settle({"stage": "cg", "out": tmp_path / "run"}, train.STAGES["cg"].settings, world / "ads")
    table = prompt_table(sd, [generate.prompt_texts(name, "sks 0") for name in texts], settings)
    batch = torch.utils.data.default_collate([samples[i, i] for i in range(4)])
    prompts = Prompts(*table[[texts.index(items[i].category) for i in batch["index"]]].unbind(1))
    optimizer, losses = torch.optim.AdamW(cg.parameters(), 1e-3), []
    for _ in range(4):
        z_t = sd.schedule.add_noise(batch["z_0"], batch["eps"], batch["t"])
        branches = [(cg, cg.hint_features(product_hint(batch["image"], batch["mask"])))]
        output = predict_noise(sd.unet, z_t, batch["t"], prompts, branches, batch["mask"])
        loss = F.mse_loss(output, sd.schedule.target(batch["z_0"], batch["eps"], batch["t"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- what a run says


def test_a_run_says_what_it_trains_on_what_it_wrote_and_what_is_next(world, base, cg, tmp_path, capsys, quick):
    run = "--data", world / "ads", "--weights", base, "--batch", 4, "--size", 64, "--steps", 2, "--log-every", 1
    command("cg", *run, "--out", tmp_path / "a b")
    out, err = capsys.readouterr()
    assert f" parameters, on 24 pictures from {world / 'ads'}: from step 0 to 2, 4 pictures each" in err
    assert "\nstep 1 of 2: loss " in err and "\nstep 2 of 2: loss " in err, "without a terminal, plain lines"
    model, folder = tmp_path / "a b" / "cg", tmp_path / "a b" / "training" / "cg"
    assert out.splitlines() == [
        f"trained CG: {model}; {folder} holds the loss as a curve, sheets and the log",
        f"next: python train.py pg --weights {base} --cg '{model}' --data {world / 'ads'}",
        f"next: python generate.py --weights {base} --cg '{model}' --product PHOTO.png --category NAME"]
    command("pg", *run, "--out", tmp_path / "pg", "--cg", cg)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"next: python generate.py --weights {base} --cg {cg} --pg {tmp_path / 'pg' / 'pg'} "
        "--product PHOTO.png --category NAME")


@pytest.mark.parametrize("faster", [True, False])
def test_amp_alone_means_bfloat16_where_it_is_faster_and_a_resumed_run_keeps_its_choice(faster, world, base, tmp_path,
                                                                                       monkeypatch, capsys, quick):
    amps, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda task, given: amps.append(given.amp) or fit(task, given))
    run = (*branch("cg", world, base, tmp_path), "--device", "cpu", "--amp")
    monkeypatch.setattr(settings, "bfloat16_is_faster", lambda: faster)
    command(*run, "--steps", 1)
    says = "trains in bfloat16" if faster else "trains in float32: bfloat16 is not faster here"
    assert f"--amp: {says}" in capsys.readouterr().err
    monkeypatch.setattr(settings, "bfloat16_is_faster", lambda: not faster)
    command(*run, "--steps", 2, "--resume")
    assert "amp" not in capsys.readouterr().err.split("resumed with changed settings")[1].splitlines()[0]
    assert amps == [torch.bfloat16 if faster else None] * 2
