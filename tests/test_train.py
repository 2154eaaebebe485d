"""Tests: training: the loop on a line of two numbers, the stages on tiny networks, and bad use, which ends in one line.

The loop takes care of order, averages, checkpoints, bad numbers and signals, whatever it trains.
"""

import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import equal_weights, write_tiny_toy
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import train
from clip import TextEncoder
from data import caption_texts, load_ad
from model import ControlNet
from programs import latents, settings
from programs.settings import number_categories
from programs.trainer import Stage, Task
from support.datasets import categories_of, read_items
from support.files import BadInput, sweep
from support.images import save_image, sheet
from support.plots import draw_film
from toy.world import write_world
from vae import VAE
from weights import UNET_FILE, StableDiffusion, load_control, load_module, load_stable_diffusion

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments, **stages):
    train.main([str(a) for a in arguments], **stages)


def checkpoints(out, stage="line") -> list[Path]:
    return sorted((out / "training" / stage).glob("checkpoint_*"))


def state(checkpoint) -> dict:
    """The numbers that a checkpoint holds."""
    content = torch.load(checkpoint, weights_only=True)
    del content["settings"], content["identifiers"]
    return content


def identical(one, two) -> None:
    """Raises AssertionError for checkpoints' states or weights by name that differ in a bit."""
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def log_of(out, stage="line") -> list[dict]:
    return [json.loads(line) for line in (out / "training" / stage / "log.jsonl").read_text().splitlines()]


def weights_of(branch) -> dict:
    return load_file(branch / UNET_FILE)


# ---------------------------------------------------------------- the loop, on the smallest of stages


class Line:
    """A stage that fits a line to ten noisy points in batches of four. It notes what the loop gives it."""

    def __init__(self):
        self.keys, self.noise, self.dtypes = [], [], []
        self.faults = {}  # by step, from 1 on: what makes another loss of the right one

    def train(self, out, *options, **preset):
        preset = dict(lr=0.1, batch=4, steps=5, size=32, ema=0.9, warmup=0, decay=0.0) | preset
        run = "line", "--data", out, "--out", out, "--save-every", 2, "--log-every", 1, "--device", "cpu"
        command(*run, *options, stages={"line": Stage(self.task, preset)})

    def task(self, settings):
        torch.manual_seed(settings.seed)
        self.line = nn.Linear(1, 1)
        return Task("a line", {"line": self.line}, self, self.loss, lambda: Image.new("RGB", (8, 8)), self.save,
                    [["python", "paint.py", "two words"]])

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return dict(zip(("index", "seed"), key))

    def loss(self, batch, generator):
        self.keys += zip(batch["index"].tolist(), batch["seed"].tolist())
        self.noise.append(torch.randn(1, generator=generator))
        self.dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        x = batch["index"].view(-1, 1) / 10
        loss = (self.line(x) - x - self.noise[-1]).square().mean()
        return self.faults.get(len(self.noise), lambda loss, line: loss)(loss, self.line)

    def save(self, out):
        (out / "line").mkdir(parents=True, exist_ok=True)
        save_file(self.line.state_dict(), out / "line" / UNET_FILE)


def interrupt(loss, line):
    raise KeyboardInterrupt


def test_an_epoch_has_each_sample_once_in_an_order_and_with_noise_that_the_runs_seed_decides(tmp_path):
    """The ten samples make two and a half batches, and five batches two epochs."""
    runs = {seed: Line() for seed in (0, 1)}
    for seed, run in runs.items():
        run.train(tmp_path / str(seed), "--seed", seed)
    first, second = ([index for index, _ in runs[0].keys[k : k + 10]] for k in (0, 10))
    assert sorted(first) == sorted(second) == [*range(10)] and first != second
    assert len({seed for run in runs.values() for _, seed in run.keys}) == 40, "every sample has noise of its own"
    assert len({x.item() for run in runs.values() for x in run.noise}) == 10, "and so has every step"
    assert [index for index, _ in runs[1].keys[:10]] != first


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path):
    """Steps after the newest checkpoint are done again, and an unfinished line of the log goes."""
    whole, broken, resumed = Line(), Line(), Line()
    whole.train(tmp_path / "whole", "--steps", 7)
    broken.faults[6] = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train(tmp_path / "broken", "--steps", 7)
    with open(tmp_path / "broken" / "training" / "line" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    resumed.train(tmp_path / "broken", "--steps", 7, "--resume")
    assert whole.keys == broken.keys[:16] + resumed.keys
    identical(*(state(checkpoints(tmp_path / run)[-1]) for run in ("whole", "broken")))
    for run in ("whole", "broken"):
        assert [line["step"] for line in log_of(tmp_path / run)] == [1, 2, 3, 4, 5, 6, 7]
        assert [path.stem for path in checkpoints(tmp_path / run)] == ["checkpoint_00000006", "checkpoint_00000007"]


@pytest.mark.parametrize("ema", [0.9, 0])
def test_the_saved_model_holds_the_moving_averages_if_there_are_any(ema, tmp_path):
    Line().train(tmp_path, ema=ema)
    saved, checkpoint = weights_of(tmp_path / "line"), state(checkpoints(tmp_path)[-1])
    assert len(checkpoint["averages"]) == (2 if ema else 0)
    identical([saved["weight"], saved["bias"]], checkpoint["averages"] or [*checkpoint["weights"].values()])


def test_the_learning_rate_rises_stays_and_falls(tmp_path):
    Line().train(tmp_path, lr=1.0, steps=10, warmup=2, decay=0.4)
    assert [line["lr"] for line in log_of(tmp_path)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_run_says_what_it_trains_on_what_it_wrote_and_what_is_next(tmp_path, capsys):
    Line().train(tmp_path)
    out, err = capsys.readouterr()
    assert f"training a line, 2 parameters, on 10 pictures from {tmp_path}: from step 0 to 5, 4 pictures each" in err
    assert "\nstep 1 of 5: loss " in err and "\nstep 5 of 5: loss " in err, "without a terminal, plain lines"
    folder = tmp_path / "training" / "line"
    assert out.splitlines() == [
        f"trained a line: {tmp_path / 'line'}; {folder} holds the loss as a curve, sheets and the log",
        "next: python paint.py 'two words'"]
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint_00000004.pt", "checkpoint_00000005.pt", "log.jsonl", "loss.png", "sheet_000000.png",
            "sheet_000005.png"}
    assert log_of(tmp_path)[-1].keys() == {"step", "loss", "lr", "images_per_second"}


def test_a_run_is_not_overwritten_and_a_resumed_one_names_other_settings_and_a_broken_checkpoint(tmp_path, capsys):
    Line().train(tmp_path)
    with pytest.raises(BadInput, match="add --resume"):
        Line().train(tmp_path)
    Line().train(tmp_path, "--steps", 6, "--lr", 0.01, "--resume")
    assert "resumed with changed settings: lr 0.1 -> 0.01, steps 5 -> 6\n" in capsys.readouterr().err
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(BadInput, match="checkpoint_00000006.pt is broken"):
        Line().train(tmp_path, "--steps", 7, "--resume")


def test_a_finished_run_that_is_resumed_says_that_it_is_done_and_changes_nothing(tmp_path, capsys):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    Line().train(tmp_path)
    said, before = capsys.readouterr().out, files()
    Line().train(tmp_path, "--resume")
    out, err = capsys.readouterr()
    assert out == said and f"{tmp_path / 'training' / 'line'} is done" in err
    assert before == files()


def test_resume_without_a_checkpoint_starts_the_run_and_says_so_also_over_what_a_killed_one_has_left(tmp_path, capsys):
    """So that a batch system can give one command again and again."""
    line = Line()
    line.faults[2] = interrupt
    with pytest.raises(KeyboardInterrupt):
        line.train(tmp_path, "--resume")
    Line().train(tmp_path, "--resume")
    said = f"--resume: --out {tmp_path} holds no run to go on with; a new one starts\n"
    assert capsys.readouterr().err.count(said) == 2
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]
    for file in tmp_path.rglob("checkpoint_*"):
        file.rename(file.with_name("film.png"))
    with pytest.raises(BadInput, match="a finished run whose checkpoints are gone"):
        Line().train(tmp_path, "--resume")


@pytest.mark.parametrize("faster", [True, False])
def test_amp_alone_means_bfloat16_where_it_is_faster_and_a_resumed_run_keeps_its_choice(faster, tmp_path, monkeypatch,
                                                                                        capsys):
    first, resumed = Line(), Line()
    monkeypatch.setattr(settings, "bfloat16_is_faster", lambda: faster)
    first.train(tmp_path, "--amp")
    says = "trains in bfloat16" if faster else "trains in float32: bfloat16 is not faster here"
    assert f"--amp: {says}" in capsys.readouterr().err
    monkeypatch.setattr(settings, "bfloat16_is_faster", lambda: not faster)
    resumed.train(tmp_path, "--amp", "--steps", 6, "--resume")
    assert "resumed with changed settings: steps 5 -> 6\n" in capsys.readouterr().err
    assert {*first.dtypes, *resumed.dtypes} == {torch.bfloat16 if faster else None}


# ---------------------------------------------------------------- the loop under faults


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 768 vs 662")])
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(error, tmp_path, monkeypatch):
    """torch.save raises RuntimeError."""
    save = torch.save

    def full(content, path):
        if content["step"] == 4:
            raise error
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="checkpoint_00000002.pt is whole: --resume goes on from it"):
        Line().train(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_00000002.pt"]


def undefine(loss, line):
    return loss * math.nan


def steepen(loss, line):
    """The loss stays finite, and its gradient is infinite: the slope of a root at 0."""
    return loss + (line.weight - line.weight.detach()).sqrt().sum()


def spoil(loss, line):
    line.bias.data.fill_(math.inf)
    return loss


@pytest.mark.parametrize("fault, message", [
    (undefine, "the loss is nan, its gradient's length nan at step 4; give a lower --lr"),
    (steepen, "the loss is [0-9.]+, its gradient's length (inf|nan) at step 4; give a lower --lr"),
    (spoil, "line.bias is not finite at step 4; give a lower --lr")])
def test_a_number_that_is_not_finite_stops_the_run_in_one_line_and_is_not_saved(fault, message, tmp_path):
    line, kept = Line(), tmp_path / "training" / "line" / "checkpoint_00000002.pt"
    line.faults[4] = fault
    with pytest.raises(BadInput, match=f"^{message}.*; {re.escape(str(kept))} is whole: --resume goes on from it$"):
        line.train(tmp_path)
    assert checkpoints(tmp_path) == [kept] and not (tmp_path / "line").exists()


def test_gradients_that_overflow_float16_for_ever_stop_the_run(tmp_path):
    """A scaler skips these steps and halves its scale, 65,536, until the scale can't be the reason."""
    line = Line()
    line.faults = dict.fromkeys(range(1, 40), steepen)
    with pytest.raises(BadInput, match="its gradient's length (inf|nan) at step 18; .*lower --lr"):
        line.train(tmp_path, "--steps", 40, "--amp", "float16")


def test_sigterm_saves_and_leaves_and_the_run_goes_on(tmp_path, capsys):
    """torchrun and batch systems send it to all processes of the group, also to the loader's workers."""
    line, resumed = Line(), Line()

    def terminate(loss, line):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.2)  # in which a worker would die
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    line.faults[3] = terminate
    with pytest.raises(SystemExit) as stop:
        line.train(tmp_path, "--save-every", 100, "--workers", 1)
    assert stop.value.code == 128 + signal.SIGTERM and "stopped at step 3; --resume" in capsys.readouterr().err
    resumed.train(tmp_path, "--resume")
    assert len(resumed.noise) == 2


class Unreadable(Line):
    def __getitem__(self, key):
        raise BadInput("a.png is broken")


def test_no_worker_outlives_an_error_whose_traceback_is_kept(tmp_path):
    """Python waits for them at its exit, and they ignore SIGTERM."""
    with pytest.raises(BadInput, match="a.png is broken"):
        Unreadable().train(tmp_path, "--workers", 1)  # pytest keeps the traceback
    assert multiprocessing.active_children() == []


KILLED = """
import os, signal, sys, torch
sys.path[:0] = ["tests", "."]
from pathlib import Path
from test_train import Line

def half(content, path, save=torch.save):
    save(content, path)
    if content["step"] == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
Line().train(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before_and_leaves_nothing_over(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["checkpoint_00000002.pt"]
    sweep.cache_clear()
    Line().train(tmp_path / "killed", "--resume")
    Line().train(tmp_path / "whole")
    identical(*(state(checkpoints(tmp_path / run)[-1]) for run in ("killed", "whole")))
    names = [sorted(path.name for path in (tmp_path / run).rglob("*")) for run in ("killed", "whole")]
    assert names[0] == names[1]


# ---------------------------------------------------------------- the paper's branches, on a tiny base


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, size=64, base=24, ads=24, bg1k=8, pairs=8, workers=1)
    return root


@pytest.fixture(scope="session")
def toy(world, tmp_path_factory):
    """A base, CG and PG with random weights, and identifiers for the ads' categories."""
    folder = tmp_path_factory.mktemp("toy")
    names = categories_of(read_items(world / "ads")[0])
    write_tiny_toy(folder, {name: f"sks {i}" for i, name in enumerate(names)})
    return folder


@pytest.fixture
def branch(world, toy, monkeypatch):
    """Trains a stage on the toy's ads for a step, beside the tiny CG if it is pg; later options win.

    The sheets, which would take most of the time, are blank.
    """
    monkeypatch.setattr("programs.latents.draw_branches", lambda *_: Image.new("RGB", (600, 300)))

    def run(stage, out, *options):
        cg = ("--cg", toy / "cg") if stage == "pg" else ()
        command(stage, "--data", world / "ads", "--weights", toy / "base", *cg, "--out", out, "--batch", 4, "--size",
                64, "--lr", 1e-3, "--steps", 1, "--device", "cpu", *options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("options, folders", [
    (("cg",), {"cg": "mask-guided"}), (("pg",), {"pg": None}), (("joint",), {"cg": "mask-guided", "pg": None}),
    (("joint", "--attention", "plain"), {"cg": "plain", "pg": None})])
def test_a_stage_trains_the_branches_that_it_names(branch, toy, tmp_path, options, folders, capsys):
    """config.json says which attention CG uses."""
    stage, *options = options
    branch(stage, tmp_path, *options)
    assert f"training {' and '.join(name.upper() for name in folders)}, " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {*folders, "training", "best"}
    identifiers = (toy / "cg" / "categories.json").read_text()
    for name, attention in folders.items():
        assert json.loads((tmp_path / name / "config.json").read_text()).get("attention") == attention
        assert (tmp_path / name / "categories.json").read_text() == identifiers


@pytest.mark.slow
def test_stage_controlnet_trains_on_captions_what_opens_as_an_ordinary_controlnet(branch, world, tmp_path, monkeypatch):
    texts, encode = [], StableDiffusion.prompts
    monkeypatch.setattr(StableDiffusion, "prompts", lambda self, t: texts.extend(t) or encode(self, t))
    branch("controlnet", tmp_path, "--data", world / "base", "--prompt-dropout", 0)
    captions = {caption_texts(item)[0] for item in read_items(world / "base")[0]}
    assert len(texts) >= 4 and captions.issuperset(texts[:4])
    assert type(load_control(tmp_path / "controlnet")) is ControlNet
    assert not (tmp_path / "controlnet" / "categories.json").exists(), "captions name no identifiers"


@pytest.mark.slow
def test_a_pg_that_is_resumed_is_the_same_to_the_bit(branch, tmp_path):
    """PG has the most randomness: mixup partners, masks, dropout, noise."""
    branch("pg", tmp_path / "whole", "--steps", 4, "--ema", 0.9)
    for options in (("--steps", 2), ("--steps", 4, "--resume")):
        branch("pg", tmp_path / "resumed", "--ema", 0.9, *options)
    identical(*(state(checkpoints(tmp_path / run, "pg")[-1]) for run in ("whole", "resumed")))


@pytest.mark.slow
def test_parts_workers_and_checkpointing_change_nothing(branch, tmp_path):
    others = {"parts": ("--micro-batch", 1), "workers": ("--workers", 2), "checkpointing": ("--checkpointing",)}
    for name, options in {"whole": (), **others}.items():
        branch("pg", tmp_path / name, "--steps", 2, *options)
    for name in others:
        assert_close_runs(tmp_path / "whole", tmp_path / name, "pg")


def assert_close_runs(one, two, stage):
    """Raises AssertionError for runs that differ by more than rounding. AdamW enlarges that where gradients are near 0,
    so weights may differ by a tenth of a step in a few places.
    """
    last, others = ([line["loss"] for line in log_of(out, stage) if "loss" in line][-1] for out in (one, two))
    assert last == pytest.approx(others, rel=1e-4)
    a, b = (torch.cat([w.flatten() for w in weights_of(out / stage).values()]) for out in (one, two))
    assert (a - b).abs().max() < 1e-4 and (a - b).abs().mean() < 1e-6


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(branch, world, toy, tmp_path):
    """A batch of 4 is computed by one process at once, or by two processes in two parts each."""
    branch("cg", tmp_path / "one", "--steps", 4)
    subprocess.run([sys.executable, *"-m torch.distributed.run --nproc_per_node 2 train.py cg --batch 4".split(),
                    *"--micro-batch 1 --size 64 --lr 1e-3 --steps 4 --device cpu --data".split(), world / "ads",
                    "--weights", toy / "base", "--out", tmp_path / "two"], cwd=ROOT, check=True)
    assert_close_runs(tmp_path / "one", tmp_path / "two", "cg")
    assert sum("loss" in line for line in log_of(tmp_path / "two", "cg")) == 1  # one process writes it
    assert (tmp_path / "two" / "training" / "cg" / "sheet_000004.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage, amp", [("cg", "float16"), ("pg", "bfloat16")])
def test_mixed_precision_trains_float32_weights(stage, amp, branch, tmp_path):
    run = tmp_path, "--amp", amp, "--checkpointing"
    branch(stage, *run)
    branch(stage, *run, "--steps", 2, "--resume")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights_of(tmp_path / stage).values())
    assert ("scale" in state(checkpoints(tmp_path, stage)[-1])["scaler"]) == (amp == "float16")


def test_training_holds_neither_vae_nor_text_encoder_and_the_base_is_frozen(branch, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def networks():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in (VAE, TextEncoder)}

    def look(eq1, batch):
        assert networks() <= before
        assert not any(p.requires_grad for p in eq1.unet.parameters())
        raise Seen

    before = networks()
    monkeypatch.setattr(train.Eq1, "__call__", look)
    with pytest.raises(Seen):
        branch("cg", tmp_path)


# ---------------------------------------------------------------- held-out ads


@pytest.fixture
def own_ads(world, tmp_path):
    """The toy's ads in a folder with metadata.jsonl -> a function that holds every fifth one out, or drops it."""
    items = read_items(world / "ads")[0]
    for name in ("bg60k_imgs_0", "bg60k_masks_0"):
        (tmp_path / name).symlink_to(world / "ads" / name)

    def write(held_out):
        lines = [{"file_name": f"bg60k_imgs_0/{item.image.name}", "mask": f"bg60k_masks_0/{item.mask.name}",
                  "category": item.category, "split": "train" if i % 5 else "test"} for i, item in enumerate(items)]
        lines = [line for line in lines if held_out or line["split"] == "train"]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return write


def test_held_out_ads_change_no_bit_of_a_training_and_their_loss_is_eq1_on_the_same_noise(
        own_ads, branch, tmp_path, capsys, monkeypatch):
    labels, draw = [], lambda *given: labels.append(given[-2]) or Image.new("RGB", (600, 300))
    monkeypatch.setattr(latents, "draw_branches", draw)
    for held_out in (False, True):
        branch("cg", tmp_path / str(held_out), "--steps", 2, "--data", own_ads(held_out), "--sample-every", 1)
        assert ("no ads are held out to check the training with" in capsys.readouterr().err) != held_out
    assert labels == ["training ads"] * 3 + ["held-out ads"] * 3
    without, beside = (state(checkpoints(tmp_path / run, "cg")[-1]) for run in ("False", "True"))
    identical(without, beside)
    assert not any("held_out_loss" in line for line in log_of(tmp_path / "False", "cg"))
    curve = {line["step"]: line["held_out_loss"] for line in log_of(tmp_path / "True", "cg") if "held_out_loss" in line}
    assert [*curve] == [0, 1, 2] and curve[0] != curve[1] != curve[2]
    branch("cg", tmp_path / "still", "--lr", 1e-9, "--data", own_ads(True))
    first, *_, last = log_of(tmp_path / "still", "cg")
    assert first["held_out_loss"] == pytest.approx(last["held_out_loss"], rel=1e-5) == pytest.approx(curve[0])


@pytest.mark.parametrize("losses, best", [([3, 2, 1, 5], 2), ([3, 2, 4, 1], 3)])
def test_the_models_of_the_lowest_loss_of_held_out_ads_are_kept(losses, best, tmp_path, capsys):
    """The ten held-out samples are seen in parts of 4, 4 and 2, which count by their number."""
    held_out = line = Line()
    task, parts = line.task, iter([loss for loss in losses for _ in range(3)])

    def with_held_out(settings):
        loss = lambda batch: next(parts) + batch["index"].float().mean()  # noqa: E731
        return replace(task(settings), held_out=held_out, held_out_loss=loss)

    line.task = with_held_out
    line.train(tmp_path, "--sample-every", 1, steps=3, ema=0)
    weights = {step: state(path)["weights"] for step, path in enumerate(checkpoints(tmp_path), 2)}
    saved = weights_of(tmp_path / "best" / "line")
    identical([saved["weight"], saved["bias"]], [*weights[best].values()])
    assert [entry["held_out_loss"] for entry in log_of(tmp_path) if "loss" not in entry] == [x + 4.5 for x in losses]
    assert f"{tmp_path / 'best'} holds the models at the lowest loss of held-out ads" in capsys.readouterr().out
    assert Image.open(tmp_path / "training" / "line" / "loss.png").size == (900, 450)
    held_out, parts = type("Others", (Line,), {"__len__": lambda self: 6})(), iter([9, 9])
    line.train(tmp_path, "--sample-every", 1, "--resume", steps=4, ema=0)
    best, last = (weights_of(tmp_path / name)["weight"] for name in ("best/line", "line"))
    assert best == last, "of other held-out ads the lowest loss is looked for anew"


def test_a_test_split_that_cannot_be_read_is_named_and_does_not_stop_a_training(world, tmp_path, capsys):
    """As where only the training set was downloaded."""
    shutil.copy(world / "ads" / "bg1k_info.txt", tmp_path)
    assert latents.held_out_ads(SimpleNamespace(data=tmp_path, stage="cg"), "bg1k", [], {}) == []
    assert "note: no held-out ads: " in capsys.readouterr().err


def test_what_a_run_left_that_was_killed_before_its_first_checkpoint_is_cleared(tmp_path):
    for name in ("training/line/log.jsonl", "training/line/sheet_000009.png", "best/line/old", "best/pg/another"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"step": 0, "loss": 7}\n')
    Line().train(tmp_path, "--resume")
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert not [path for path in tmp_path.rglob("*") if path.name in ("sheet_000009.png", "old")]
    assert (tmp_path / "best" / "pg" / "another").exists(), "another stage's"


def test_a_film_has_a_column_for_the_first_the_last_and_steps_between(tmp_path):
    """Four products in rows, cut from the row above the last; each column skips half of the sheets before the next."""
    for step in range(0, 4501, 250):
        cells = [[Image.new("RGB", (64, 64), (step // 18, column, row)) for column in range(8)] for row in range(3)]
        save_image(sheet(cells, row_labels=["product", "painted", "held-out ads"]), tmp_path / f"sheet_{step:06}.png")
    Image.new("RGB", (900, 450)).save(tmp_path / "loss.png")
    film = draw_film(sorted(tmp_path.glob("sheet_*.png")), 64, tmp_path / "loss.png")
    top, pitch = film.height - film.width // 2 - 4 * 68, 68  # the strips end where the loss begins
    seen = [[film.getpixel((4 + pitch * x + 32, top + pitch * y + 32)) for x in range(6)] for y in range(4)]
    assert seen == [[(step // 18, column, 1) for step in (0, 250, 500, 1000, 2250, 4500)] for column in (7, 6, 5, 4)]


# ---------------------------------------------------------------- identifiers: once given, they stay


def test_numbers_go_on_where_they_stopped():
    known = {"pear": "v1 kind 0", "apple": "v1 kind 1"}
    assert number_categories([*known], "v1 kind {}", {}) == known
    longer = number_categories(["fig", "apple"], "v1 kind {}", known)
    assert list(longer.items()) == [*known.items(), ("fig", "v1 kind 2")]
    edited = {"pear": "sks 0", "apple": "sks 2"}
    assert number_categories(["fig"], "sks {}", edited)["fig"] == "sks 3", "no number is given twice"


@pytest.mark.slow
def test_a_category_that_is_added_gets_the_next_identifier_and_the_others_keep_theirs(branch, world, tmp_path):
    """This holds for --resume, whatever --identifier now is, and for --init-control, which the weights start from."""
    data, a, b = shutil.copytree(world / "ads", tmp_path / "ads"), tmp_path / "a", tmp_path / "b"
    branch("cg", a, "--data", data, "--identifier", "style {}")
    first = json.loads((a / "cg" / "categories.json").read_text())
    assert list(first.items())[:2] == [("laptop", "style 0"), ("perfume", "style 1")] and len(first) == 8
    info = data / "bg60k_info.txt"
    info.write_text(info.read_text().replace("laptop", "anvil", 1))  # sorted, it would be the first

    with pytest.raises(BadInput, match="category anvil was not in CG's training set; train CG on this data first"):
        branch("pg", b, "--data", data, "--cg", a / "cg")
    branch("cg", b, "--data", data, "--init-control", a / "cg", "--lr", 1e-9, "--resume")  # which starts a run
    torch.testing.assert_close(weights_of(a / "cg"), weights_of(b / "cg"), rtol=0, atol=1e-6)
    branch("cg", a, "--data", data, "--steps", 2, "--resume", "--identifier", "sks {}")
    for out in (a, b):
        longer = json.loads((out / "cg" / "categories.json").read_text())
        assert list(longer.items()) == [*first.items(), ("anvil", "sks 8")]


@pytest.mark.slow
def test_a_pg_does_not_go_on_beside_a_cg_with_other_identifiers(branch, toy, tmp_path):
    file = shutil.copytree(toy / "cg", tmp_path / "other") / "categories.json"
    file.write_text(file.read_text().replace("sks", "style"))
    branch("pg", tmp_path / "run")
    with pytest.raises(BadInput, match="are not those that the run began with"):
        branch("pg", tmp_path / "run", "--cg", tmp_path / "other", "--steps", 2, "--resume")


# ---------------------------------------------------------------- the base's stages


@pytest.fixture(scope="session")
def base(world, tmp_path_factory):
    """A Stable Diffusion folder from two steps of each of the base's stages, the second pass included."""
    out = tmp_path_factory.mktemp("base")
    common = "--data", world / "base", "--out", out, "--steps", 2, "--batch", 4, "--size", 32
    for stage, *options in (("vae",), ("clip",), ("unet", "--weights", out, "--refine", 2)):
        command(stage, *common, *options)
    return out


@pytest.mark.slow
def test_the_bases_stages_write_a_folder_in_the_public_layout_and_their_logs_sheets_and_checkpoints(base):
    for file in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                 "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json",
                 "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        assert (base / file).is_file(), file
    assert 0 < load_stable_diffusion(base).vae.scaling_factor < 10
    for stage in ("vae", "clip", "unet"):
        assert log_of(base, stage)[-1]["step"] == 2
        assert {path.name for path in (base / "training" / stage).iterdir()} == {
            "log.jsonl", "loss.png", "sheet_000000.png", "sheet_000002.png", "checkpoint_00000002.pt"}


@pytest.mark.slow
def test_decoder_only_leaves_the_encoder_and_the_scaling_factor_as_they_are(world, base, tmp_path):
    command("vae", "--decoder-only", "--init", base / "vae", "--data", world / "ads", "--size", 32, "--steps", 3,
            "--batch", 4, "--out", tmp_path)
    before, after = (load_module(VAE, folder / "vae", UNET_FILE, "cpu", torch.float32) for folder in (base, tmp_path))
    assert after.config == before.config
    assert equal_weights(before.encoder, after.encoder) and equal_weights(before.quant_conv, after.quant_conv)
    assert not equal_weights(before.decoder, after.decoder)


@pytest.mark.slow
def test_after_cg_come_pg_and_paintings_by_commands_that_can_be_pasted(branch, world, toy, tmp_path, capsys):
    branch("cg", tmp_path / "a b")
    model, base = f"'{tmp_path / 'a b' / 'cg'}'", toy / "base"
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"next: python train.py pg --weights {base} --cg {model} --data {world / 'ads'}",
        f"next: python generate.py --weights {base} --cg {model} --product PHOTO.png --category NAME"]
    branch("pg", tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"next: python generate.py --weights {base} --cg {toy / 'cg'} --pg {tmp_path / 'pg'} "
        "--product PHOTO.png --category NAME"]


# ---------------------------------------------------------------- latents, encoded once


def test_latents_are_encoded_once_and_again_where_something_changed(world, toy, tmp_path, monkeypatch):
    ads, cache = shutil.copytree(world / "ads", tmp_path / "ads"), tmp_path / "cache"
    run = settings.Settings("cg", device="cpu", out=tmp_path / "out", micro_batch=4, workers=0)
    sd = load_stable_diffusion(toy / "base")
    counts, encode = [], VAE.encode
    monkeypatch.setattr(latents, "PART", 8)
    monkeypatch.setattr(VAE, "encode", lambda self, x: counts.append(len(x)) or encode(self, x))

    def encoded(size=64):
        """The latents of the 24 ads, in parts of eight, and how many pictures the VAE encoded for them."""
        counts.clear()
        return latents.encode_items(sd, read_items(ads)[0], size, run), sum(counts)

    parts, count = encoded()
    assert count == 24 and encoded()[1] == 0
    items = read_items(ads)[0]
    mean, logvar = sd.vae.encode(2 * load_ad(items[9], 64)[0][None] - 1)
    for name, expected in (("mean", mean[0]), ("logvar", logvar[0])):
        torch.testing.assert_close(parts[1][name][1].float(), expected, rtol=2e-3, atol=2e-3)  # kept in float16
    next(cache.iterdir()).unlink()
    assert encoded()[1] == 8, "the part that is missing, as after an interruption"
    shutil.copy(items[0].image, items[9].image)
    assert encoded()[1] == 8, "the part with the changed picture"
    assert encoded(size=32)[1] == 24, "another size"


def test_a_base_whose_vae_is_broken_is_named_before_training_and_another_can_be_given(branch, toy, tmp_path):
    file = shutil.copytree(toy / "base", tmp_path / "base") / "vae" / UNET_FILE
    tensors = load_file(file)
    tensors["quant_conv.bias"][0] = math.inf
    save_file(tensors, file)
    with pytest.raises(BadInput, match="the VAE's latents are not finite; its weights are broken"):
        branch("cg", tmp_path / "out", "--weights", tmp_path / "base")
    branch("cg", tmp_path / "out", "--weights", tmp_path / "base", "--vae", toy / "base" / "vae")


# ---------------------------------------------------------------- bad use


@pytest.mark.parametrize("options, message", {
    "cg --init d": "--init belongs to stage vae and unet",
    "cg --theta 0": "--theta belongs to stage pg and joint",
    "pg --attention plain": "--attention belongs to stage cg and joint",
    "paint": "argument stage: invalid choice: 'paint' .*vae",
    "vae --decoder-only": "--decoder-only goes with --init",
    "vae --size 100": "--size 100: must be a multiple of 8",
    "cg --size 100": "--size 100",
    "clip --batch 4 --micro-batch 2": "one process, and no --micro-batch",
    "cg --batch 4 --micro-batch 3": "--micro-batch 3: must divide --batch 4",
    "pg --weights gone": "--cg is missing",
    "cg --weights gone": "gone is missing",
    "cg --data gone": "gone: no such data set",
    "controlnet": "captions, which this data set lacks; .* train.py cg --attention plain",
    "cg --batch 0": "--batch",
    "cg --device gpu": "--device",
    "cg --identifier sks": "--identifier sks: needs {}",
    "cg --out file": "file",
}.items())
def test_bad_use_ends_in_one_line_and_writes_nothing(options, message, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    Path("old/training/cg").mkdir(parents=True)
    Path("old/training/cg/checkpoint_00000002.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    stage, *options = options.split()
    data = world / ("base" if stage in ("vae", "clip", "unet") else "ads")
    with pytest.raises(BadInput, match=message) as error:
        command(stage, "--data", data, "--out", "none", *options)
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
