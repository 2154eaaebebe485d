"""Training: every stage runs, an interrupted run resumes bit for bit, and bad use ends in one line."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train
from clip import TextEncoder
from data import load_ad
from model import ControlNet, UNet
from support.datasets import read_items
from support.files import BadInput
from toy.world import write_world
from vae import VAE
from weights import StableDiffusion, load_control, load_stable_diffusion

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, size=64, base=24, ads=24, bg1k=8, pairs=8, workers=1)
    return root


@pytest.fixture(scope="session")
def base(world, tmp_path_factory):
    """A Stable Diffusion folder made by two steps of each of the base's stages, through the real command line."""
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
        assert (folder / "sheet_000002.png").is_file() and (folder / "checkpoint_00000002.safetensors").is_file()
        assert not [p for p in folder.iterdir() if p.name.startswith(".")], "a temporary file is left"


@pytest.mark.parametrize("stage", ["pg", "joint"])
def test_pg_and_joint_train(stage, world, base, cg, tmp_path):
    command(*branch(stage, world, base, tmp_path), *(("--cg", cg) if stage == "pg" else ()), "--steps", 2)
    assert (tmp_path / "pg" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "cg").exists() == (stage == "joint")


@pytest.mark.parametrize("data, words", [("base", ", in the background of a "), ("ads", ", in the background of sks ")])
def test_a_controlnet_trains_on_captions_where_there_are_and_else_on_cgs_prompts(data, words, world, base, tmp_path,
                                                                                 monkeypatch):
    """An ordinary ControlNet reads P and no mask; its folder opens as one."""
    texts, reads = [], []
    encode, forward = StableDiffusion.prompts, ControlNet.forward
    monkeypatch.setattr(StableDiffusion, "prompts", lambda self, t: texts.extend(t) or encode(self, t))
    monkeypatch.setattr(ControlNet, "forward", lambda self, *inputs: reads.append(len(inputs)) or forward(self, *inputs))
    command("controlnet", "--data", world / data, "--weights", base, "--out", tmp_path, "--batch", 4, "--size", 64,
            "--steps", 2, "--prompt-dropout", 0, "--sample-every", 9)
    assert any(words in text for text in texts) and set(reads) == {4}  # z_t, t, P, hint
    assert type(load_control(tmp_path / "controlnet")) is ControlNet


@pytest.mark.parametrize("stage", ["pg", "unet"])
def test_an_interrupted_run_resumes_bit_for_bit(stage, world, base, cg, tmp_path, monkeypatch):
    """pg has the most randomness (mixup partners, masks, dropout, noise), unet the moving average."""
    def arguments(out):
        data = ("--data", world / "base") if stage == "unet" else ("--cg", cg)
        return (*branch(stage, world, base, out), *data, "--steps", 8, "--save-every", 2, "--sample-every", 3,
                "--ema", 0.9, "--device", "cpu")

    command(*arguments(tmp_path / "whole"))
    save = train.save_checkpoint

    def save_and_die(args, step, *rest):
        save(args, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        command(*arguments(tmp_path / "broken"))
    monkeypatch.undo()
    command(*arguments(tmp_path / "broken"), "--resume")

    folders = [tmp_path / run / "training" / stage for run in ("whole", "broken")]
    whole, resumed = (load_file(folder / "checkpoint_00000008.safetensors") for folder in folders)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [[json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
    assert logs[0] == logs[1]


# ---------------------------------------------------------------- processes, parts, workers: the same run


def weights_of(folder) -> dict:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def launch(*arguments, processes: int = 1, code: str | None = None) -> subprocess.Popen:
    """train.py in a process of its own, or in several under torchrun; or code that ends by calling train.main()."""
    program = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    program += ["-c", code] if code else [str(ROOT / "train.py")]
    return subprocess.Popen([sys.executable, *program, *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("options", [("--micro-batch", 1), ("--workers", 2)], ids=["parts", "workers"])
def test_parts_and_workers_change_nothing(options, world, base, cg, tmp_path):
    run = "--cg", cg, "--steps", 2
    command(*branch("pg", world, base, tmp_path / "whole"), *run)
    command(*branch("pg", world, base, tmp_path / "other"), *run, *options)
    assert distance(weights_of(tmp_path / "whole" / "pg"), weights_of(tmp_path / "other" / "pg")) < 1e-6


def test_a_micro_batch_that_does_not_fit_is_made_smaller(world, base, tmp_path, monkeypatch, capsys):
    """With a memory that holds two samples, the weights are those of a run in parts of two; the step begins again."""
    command(*branch("cg", world, base, tmp_path / "two"), "--steps", 2, "--micro-batch", 2)
    forward = train.Step.forward

    def small(self, batch, generator):
        loss = forward(self, batch, generator)
        if len(batch["index"]) > 2:
            loss.backward()  # part of the step is done when the memory ends
            raise torch.OutOfMemoryError
        return loss

    monkeypatch.setattr(train.Step, "forward", small)
    command(*branch("cg", world, base, tmp_path / "found"), "--steps", 2, "--micro-batch", 4)
    assert "--micro-batch 4 does not fit the memory of cpu, goes on with 2" in capsys.readouterr().err
    assert distance(weights_of(tmp_path / "two" / "cg"), weights_of(tmp_path / "found" / "cg")) == 0


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(world, base, tmp_path):
    """Batch 4: by one process at once, or by two in two parts each."""
    run = "--steps", 4, "--device", "cpu"
    command(*branch("cg", world, base, tmp_path / "one"), *run)
    process = launch(*branch("cg", world, base, tmp_path / "two"), *run, "--micro-batch", 1, processes=2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    one, two = weights_of(tmp_path / "one" / "cg"), weights_of(tmp_path / "two" / "cg")
    assert max(t.abs().max() for n, t in one.items() if "controlnet_down_blocks" in n) > 1e-3, "they were zero"
    assert distance(one, two) < 1e-6
    steps = [[json.loads(line)["step"] for line in (tmp_path / n / "training/cg/log.jsonl").read_text().splitlines()]
             for n in ("one", "two")]
    assert steps[0] == steps[1], "one process of the two writes the log"


# ---------------------------------------------------------------- faults


KILL = """
import os, signal, sys
import train
save = train.save_file

def half(tensors, path, header=None):
    save(tensors, path, header)
    if "checkpoint_00000006" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

train.save_file = half
train.main()
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_ends_with_the_same_weights(world, base, tmp_path):
    run = "--steps", 8, "--save-every", 2, "--device", "cpu"
    command(*branch("cg", world, base, tmp_path / "whole"), *run)
    killed = launch(*branch("cg", world, base, tmp_path / "killed"), *run, code=KILL)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    folder = tmp_path / "killed" / "training" / "cg"
    assert [path.name for path in sorted(folder.glob("checkpoint*"))] == ["checkpoint_00000002.safetensors",
                                                                        "checkpoint_00000004.safetensors"]
    command(*branch("cg", world, base, tmp_path / "killed"), *run, "--resume")
    assert distance(weights_of(tmp_path / "whole" / "cg"), weights_of(tmp_path / "killed" / "cg")) == 0
    assert [path.name for path in sorted(folder.iterdir()) if "checkpoint" in path.name] == [
        "checkpoint_00000006.safetensors", "checkpoint_00000008.safetensors"], "the newest two stay, and no part of one"


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and_the_run_goes_on(world, base, tmp_path):
    """As torchrun and batch systems send it: to all processes of the group, the loader's workers too."""
    run = (*branch("cg", world, base, tmp_path), "--save-every", 100000, "--device", "cpu", "--log-every", 1)
    process = launch(*run, "--steps", 100000, "--workers", 2)
    log = tmp_path / "training" / "cg" / "log.jsonl"
    while not (log.is_file() and log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "--resume goes on from there" in errors, errors
    step = int(train.checkpoints(train.argparse.Namespace(out=tmp_path, stage="cg"))[-1].stem.split("_")[1])
    command(*run, "--steps", step + 1, "--resume")


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(world, base, tmp_path, monkeypatch):
    save = train.save_file

    def full(tensors, path, header=None):
        if "checkpoint_00000004" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, header)

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(BadInput, match="No space left.*add --resume: checkpoint_00000002.safetensors is whole"):
        command(*branch("cg", world, base, tmp_path), "--steps", 8, "--save-every", 2)
    assert [path.name for path in (tmp_path / "training" / "cg").glob("*checkpoint*")] == ["checkpoint_00000002.safetensors"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(world, base, tmp_path, monkeypatch):
    command(*branch("cg", world, base, tmp_path), "--steps", 2)
    monkeypatch.setattr(train, "timestep_weights", lambda schedule, kind: torch.full((schedule.T,), float("nan")))
    with pytest.raises(BadInput, match="the loss is nan, its gradient's length nan at step 2; .* earlier steps is good"):
        command(*branch("cg", world, base, tmp_path), "--steps", 4, "--resume")
    assert [path.name for path in (tmp_path / "training" / "cg").glob("*checkpoint*")] == ["checkpoint_00000002.safetensors"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_changes_a_weight(world, base, tmp_path, monkeypatch):
    command(*branch("cg", world, base, tmp_path), "--steps", 2)
    before = load_file(tmp_path / "training" / "cg" / "checkpoint_00000002.safetensors")

    def accumulate(model, *rest, original=train.accumulate):
        loss = original(model, *rest)
        next(model.parameters()).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(train, "accumulate", accumulate)
    with pytest.raises(BadInput, match="its gradient's length (inf|nan) at step 2"):
        command(*branch("cg", world, base, tmp_path), "--steps", 3, "--resume")
    after = load_file(train.checkpoints(train.argparse.Namespace(out=tmp_path, stage="cg"))[-1])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_knows_the_steps_that_a_gradient_scaler_skipped(tmp_path):
    """Adam's bias correction counts the steps that were taken, of which there are fewer than the run has."""
    args = train.parse(["cg", "--out", str(tmp_path)])
    args.identifiers = args.frozen = None

    def trained(gradients, p, optimizer, scaler):
        for gradient in gradients:
            scaler.scale((p * gradient).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return p.detach()

    def fresh():
        p = torch.nn.Parameter(torch.ones(2))
        return p, torch.optim.AdamW([p], 0.1, fused=True), torch.amp.GradScaler("cpu", init_scale=8.0)

    whole = trained([math.inf, 1.0, -0.5, 2.0], *fresh())
    p, optimizer, scaler = fresh()
    trained([math.inf, 1.0, -0.5], p, optimizer, scaler)
    train.save_checkpoint(args, 3, {"p": p}, {}, optimizer, scaler)
    p, optimizer, scaler = fresh()
    assert train.load_checkpoint(args, {"p": p}, {}, optimizer, scaler) == 3
    assert int(optimizer.state[p]["step"]) == 2
    assert torch.equal(trained([2.0], p, optimizer, scaler), whole)


def test_a_run_is_not_resumed_with_other_categories(world, base, tmp_path):
    """A category's identifier is its place among all: with one more, others would move."""
    data = shutil.copytree(world / "ads", tmp_path / "ads")
    run = "cg", "--data", data, *branch("cg", world, base, tmp_path / "run")[3:]
    command(*run, "--steps", 1, "--identifier", "style {}")
    saved = json.loads((tmp_path / "run" / "cg" / "categories.json").read_text())
    assert list(saved.items())[:2] == [("laptop", "style 0"), ("perfume", "style 1")]
    with pytest.raises(BadInput, match="are not those that the run began with"):
        command(*run, "--steps", 2, "--resume")
    info = data / "bg60k_info.txt"
    info.write_text(info.read_text().replace("laptop", "anvil", 1))
    with pytest.raises(BadInput, match="are not those that the run began with"):
        command(*run, "--steps", 2, "--identifier", "style {}", "--resume")


def test_a_log_that_a_killed_process_left_in_the_middle_of_a_line_goes_on(world, base, tmp_path):
    command(*branch("cg", world, base, tmp_path), "--steps", 2, "--log-every", 1)
    log = tmp_path / "training" / "cg" / "log.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 3, "lo')
    command(*branch("cg", world, base, tmp_path), "--steps", 3, "--log-every", 1, "--resume")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_clip_needs_its_whole_batch_at_once(world, tmp_path):
    with pytest.raises(BadInput, match="one process, and no --micro-batch"):
        command("clip", "--data", world / "base", "--out", tmp_path, "--batch", 4, "--micro-batch", 2)


# ---------------------------------------------------------------- cached latents and prompts, memory


def latents_of(world, base, cache, **other) -> tuple:
    """Latents of the toy's ads -> them, the base, and how many images the VAE encoded for them."""
    sd = load_stable_diffusion(base)
    encoded, encode = [], sd.vae.encode
    sd.vae.encode = lambda x: encoded.append(len(x)) or encode(x)
    args = train.argparse.Namespace(**{"size": 64, "amp": None, "micro_batch": 4, "workers": 0, "device": "cpu",
                                       "checkpointing": False, "cache": cache} | other)
    return train.Latents(sd, read_items(world)[0], args), sd, sum(encoded)


def test_latents_are_encoded_once_and_again_where_something_changed(world, base, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Latents, "PART", 8)
    ads = shutil.copytree(world / "ads", tmp_path / "ads")
    latents, sd, count = latents_of(ads, base, tmp_path / "cache")
    items = read_items(ads)[0]
    assert count == 24
    for i in (0, 9, 23):
        mean, logvar = sd.vae.encode(2 * load_ad(items[i], 64)[0][None] - 1)
        got = latents[i]
        assert torch.allclose(got[0], mean[0] * sd.vae.scaling_factor, rtol=2e-3, atol=2e-3), "kept in float16"
        assert torch.allclose(got[1], (logvar[0] / 2).exp() * sd.vae.scaling_factor, rtol=4e-3, atol=1e-4)
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
    monkeypatch.setattr(train.Latents, "PART", 8)
    save, calls = train.save_file, []

    def interrupted(tensors, path, header=None):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(tensors, path, header)

    monkeypatch.setattr(train, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        latents_of(world / "ads", base, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one whole part and nothing else"
    assert latents_of(world / "ads", base, tmp_path / "cache")[2] == 16


def test_training_holds_neither_vae_nor_text_encoder_and_nothing_frozen_has_gradients(world, base, tmp_path, monkeypatch):
    def look(task, args):
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
    monkeypatch.setattr(train, "run", look)
    with pytest.raises(Done):
        command(*branch("cg", world, base, tmp_path), "--steps", 2)


@pytest.mark.parametrize("stage, amp", [("cg", "float16"), ("pg", "bfloat16")])
def test_mixed_precision_trains_float32_weights(stage, amp, world, base, cg, tmp_path):
    run = (*branch(stage, world, base, tmp_path), "--amp", amp, "--device", "cpu", "--checkpointing",
           *(("--cg", cg) if stage == "pg" else ()))
    command(*run, "--steps", 2)
    command(*run, "--steps", 3, "--resume")
    weights = weights_of(tmp_path / stage)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values())
    with safe_open(tmp_path / "training" / stage / "checkpoint_00000003.safetensors", "pt") as file:
        assert ("scale" in json.loads(file.metadata()["scaler"])) == (amp == "float16")


# ---------------------------------------------------------------- the parts


def test_the_runs_seed_decides_the_noise_and_the_order():
    """All 32 bits that torch's CPU generator reads of a seed differ with the run's seed, and with the step."""
    draws = [torch.randn(4, generator=torch.Generator().manual_seed(train.seed_of(seed, "step", step)))
             for seed in (0, 1, 2**32 - 1) for step in (0, 1)]
    assert len({tuple(d.tolist()) for d in draws}) == 6
    assert list(train.Batches(10, 4, 0, 0, 5)) != list(train.Batches(10, 4, 1, 0, 5))


def test_a_run_is_not_overwritten_and_other_settings_are_told(world, base, tmp_path, capsys):
    run = (*branch("cg", world, base, tmp_path), "--steps", 1)
    command(*run)
    with pytest.raises(BadInput, match="add --resume"):
        command(*run)
    with pytest.raises(BadInput, match="already at step 1"):
        command(*run, "--resume")
    command(*run, "--steps", 2, "--lr", 1e-4, "--resume")
    assert "steps 1 -> 2, lr 0.001 -> 0.0001" in capsys.readouterr().err
    path = tmp_path / "training" / "cg" / "checkpoint_00000002.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="checkpoint_00000002.safetensors is broken"):
        command(*run, "--steps", 3, "--resume")


def test_a_branch_starts_from_another_of_its_layout(world, base, cg, tmp_path):
    command(*branch("pg", world, base, tmp_path), "--cg", cg, "--init-control", cg, "--steps", 1, "--lr", 1e-9)
    start, end = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (cg, tmp_path / "pg"))
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)


def test_batches_hold_each_index_once_an_epoch_and_can_be_entered_anywhere():
    batches = list(train.Batches(count=10, batch=4, seed=0, start=0, steps=5))
    assert sorted(i for keys in batches for i, _ in keys) == sorted(2 * list(range(10))), "each index once an epoch"
    assert len({seed for keys in batches for _, seed in keys}) == 20, "every sample has a seed of its own"
    assert list(train.Batches(10, 4, 0, start=3, steps=5)) == batches[3:], "starting later is the same walk"
    shares = [list(train.Batches(10, 4, 0, 0, 5, rank, 2)) for rank in (0, 1)]
    for whole, first, second in zip(batches, *shares, strict=True):
        assert sorted(whole) == sorted(first + second) and len(first) == len(second) == 2, "shared without repeats"


def test_learning_rate_warms_up_stays_and_decays_and_the_papers_is_constant():
    args = train.argparse.Namespace(lr=1.0, warmup=10, decay=0.5, steps=100)
    assert [train.learning_rate(s, args) for s in (0, 9, 49, 75)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    paper = train.argparse.Namespace(**train.PAPER, steps=100)
    assert {train.learning_rate(s, paper) for s in range(100)} == {1e-5}


def test_moving_average_is_swapped_in_and_out():
    p = torch.nn.Parameter(torch.ones(2))
    ema = {"p": torch.zeros(2)}
    with train.averaged({"p": p}, ema):
        assert p.eq(0).all()
    assert p.eq(1).all() and ema["p"].eq(0).all()


def test_diffuse_draws_from_the_posterior_and_add_noise_is_the_forward_process_written_out():
    schedule, mean, std = train.Schedule(), torch.randn(4, 64, 64), torch.rand(4, 1, 1)
    z_0, eps, t = train.diffuse(mean, std, torch.Generator().manual_seed(0), 1000)
    assert ((z_0 - mean) / std).std().item() == pytest.approx(1, abs=0.05) and eps.std().item() == pytest.approx(1, abs=0.05)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.prod(1 - beta[: t + 1])
    z_t = schedule.add_noise(z_0[None], eps[None], t[None])[0]
    assert torch.allclose(z_t.double(), kept.sqrt() * z_0.double() + (1 - kept).sqrt() * eps.double(), atol=1e-5)


def test_timestep_weights_are_1_or_the_papers_of_min_snr_and_debias_written_out():
    assert train.timestep_weights(train.Schedule(), "uniform").eq(1).all()
    for prediction in ("epsilon", "v_prediction"):
        schedule = train.Schedule({"prediction_type": prediction})
        for t in (0, 100, 500, 999):
            snr = float(schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t]))
            in_eps = 1 if prediction == "epsilon" else snr / (snr + 1)  # an error in v is this much larger than one in ε
            min_snr, debias = (train.timestep_weights(schedule, kind)[t].item() for kind in ("min-snr", "debias"))
            assert min_snr == pytest.approx(min(snr, 5) / snr * in_eps, rel=1e-4)
            assert debias == pytest.approx(snr**-0.5 * in_eps, rel=1e-4)


def test_noise_offset_moves_the_noise_by_a_constant_a_channel():
    mean = std = torch.zeros(4, 8, 8)
    plain, moved = (train.diffuse(mean, std, torch.Generator().manual_seed(0), 1000, offset)[1] for offset in (0.0, 0.5))
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
    (["pg", "--cg", "d", "--sigma", "0.9", "0.8"], "--sigma: give the lower number first"),
    (["cg", "--theta", "0"], "--theta belongs to stage pg and joint"),
    (["vae", "--noise-offset", "0"], "--noise-offset belongs to stage unet and cg"),
    (["cg", "--identifier", "sks"], "--identifier sks: needs {} where"),
    (["cg", "--device", "gpu"], "--device"),
    (["cg", "--noise-offset", "-1"], "--noise-offset"),
    (["cg", "--out", "{tmp}/file"], "file"),
    (["cg", "--out", "{tmp}/runs"], "runs/cg, which holds training; choose another folder"),
    (["joint", "--out", "{tmp}/runs"], "runs/cg, which holds training; choose another folder"),
])
def test_bad_use_ends_in_one_line(arguments, message, world, base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "runs" / "cg" / "training").mkdir(parents=True)
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
