"""Training: every stage runs, an interrupted run resumes bit for bit, and bad use ends in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
from data import BadInput
from toy.world import write_world


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
        assert (folder / "sheet_000002.png").is_file() and (folder / "checkpoint.safetensors").is_file()
        assert not [p for p in folder.iterdir() if p.name.startswith(".")], "a temporary file is left"


@pytest.mark.parametrize("stage", ["pg", "joint"])
def test_pg_and_joint_train(stage, world, base, cg, tmp_path):
    command(*branch(stage, world, base, tmp_path), "--cg", cg, "--steps", 2)
    assert (tmp_path / "pg" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "cg").exists() == (stage == "joint")


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
    whole, resumed = (load_file(folder / "checkpoint.safetensors") for folder in folders)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [[json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
    assert logs[0] == logs[1]


def test_seeds_decide_everything_random():
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
    path = tmp_path / "training" / "cg" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="checkpoint.safetensors is broken"):
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


def test_diffuse_is_the_forward_process_written_out(world):
    schedule = train.Schedule()
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2)
    z_t, t, eps, z_0 = train.diffuse(schedule, mean, std, torch.Generator().manual_seed(0))
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for i in range(3):
        kept = torch.prod(1 - beta[: t[i] + 1])
        assert torch.allclose(z_t[i].double(), kept.sqrt() * z_0[i].double() + (1 - kept).sqrt() * eps[i].double(), atol=1e-5)
    assert not torch.equal(z_0, mean), "z_0 is a draw from the VAE's posterior"


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


def test_noise_offset_moves_each_pictures_noise_by_a_constant_a_channel():
    mean, std = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    _, _, plain, _ = train.diffuse(train.Schedule(), mean, std, torch.Generator().manual_seed(0))
    _, _, moved, _ = train.diffuse(train.Schedule(), mean, std, torch.Generator().manual_seed(0), noise_offset=0.5)
    offset = moved - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[..., 0, 0].unique()) == 8 and offset.std() > 0.1


@pytest.mark.parametrize("arguments, message", [
    (["cg", "--init", "d"], "--init belongs to the stages vae and unet"),
    (["unet", "--init-control", "d"], "--init-control belongs to the stages cg and pg and joint"),
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
    (["cg", "--batch", "4", "--accumulate", "3"], "--accumulate"),
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
