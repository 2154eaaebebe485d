"""Tests: measures times and memory for the README, once each on this machine. Nothing else may run meanwhile.

    python tests/bench.py                    # the toy: generate.py from start to end, imports
    python tests/bench.py --all              # also what takes minutes: training, the tests
    python tests/bench.py sd15               # SD 1.5's size, random weights, beside diffusers: load, memory, steps
    python tests/bench.py sd15 --steps 50    # the same with pictures of 50 steps instead of 4
    python tests/bench.py train              # training steps of that size beside diffusers, memory, the loader
    python tests/bench.py batch              # the toy: pictures per second by batch size, or with a process for each
    python tests/bench.py rivals             # LaMa and Paint by Example at full size, beside reference implementations
    python tests/bench.py photo              # a photo of 49 megapixels on one core: time and memory beside the painting
    python tests/bench.py samplers           # the toy: how far DDIM and DPM-Solver++ are from 250 steps, by steps
    python tests/bench.py refine             # SD 1.5's size: the second pass, 512 -> 1024 px: time and peak memory
    python tests/bench.py vae                # SD 1.5's VAE alone at 1024 px: peak memory
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """The processor's name, and how many of its cores we may use."""
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = (names or [platform.processor() or platform.machine()])[0]
    return f"{name}, {cores} cores, Python {platform.python_version()}"


def process(*arguments: str, repeat: int = 3) -> float:
    """The best wall-clock seconds of a whole process, including its start."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def peak(*arguments: str) -> float:
    """The peak resident memory of a process in MB, measured in a child of its own."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    out = subprocess.run([sys.executable, "-c", code, sys.executable, *arguments], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
    return int(out) / (1024 if sys.platform != "darwin" else 1024**2)


# ---------------------------------------------------------------- SD 1.5's size, beside diffusers

UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
        "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
VAE_CONFIG = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
              "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
              "sample_size": 512,
              "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}


def write_sd15(folder: Path) -> None:
    """Writes Stable Diffusion 1.5, CG and PG in their public layout: full size, random weights, float32 (7.2 GB)."""
    import torch

    from clip import TextEncoder
    from model import CategoryGenerator, PersonalityGenerator, UNet
    from support.files import write_json
    from toy.stages import train_tokenizer
    from vae import VAE
    from weights import TEXT_FILE, UNET_FILE, control_config, save_control, save_module

    torch.manual_seed(0)
    unet = UNet(UNET)
    for name, kind in (("cg", CategoryGenerator), ("pg", PersonalityGenerator)):
        branch = kind(control_config(UNET, 8))
        branch.init_from_unet(unet)
        for layer in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.01)
        save_control(branch, folder / name, categories={"mug": "sks 0"})
    save_module(unet, folder / "unet", UNET_FILE)
    save_module(VAE(VAE_CONFIG), folder / "vae", UNET_FILE)
    save_module(TextEncoder(TEXT), folder / "text_encoder", TEXT_FILE)
    train_tokenizer(["a photo of a mug"] * 3, 600, 77, folder / "tokenizer")
    write_json({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "beta_end": 0.012,
                "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
               folder / "scheduler" / "scheduler_config.json")
    write_json({"_class_name": "StableDiffusionControlNetPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                "controlnet": ["diffusers", "ControlNetModel"], "safety_checker": [None, None],
                "feature_extractor": [None, None]}, folder / "model_index.json")


def make_sd15(folder: Path) -> None:
    """Writes them if they are missing, in a process of its own: Linux lets a process's peak memory start at that of
    the process that started it.
    """
    if not (folder / "model_index.json").exists():
        code = ("import sys; sys.path[:0] = ['.', 'tests']; from bench import Path, write_sd15; "
                "write_sd15(Path(sys.argv[1]))")
        subprocess.run([sys.executable, "-c", code, str(folder.absolute())], cwd=ROOT, check=True)


# Each runs in a process of its own. In: folder, dtype, steps (0: only load). Out: seconds and bytes.
OURS = """
import json, resource, sys, time
start = time.perf_counter()
sys.path.insert(0, ".")
import torch
from weights import load_control, load_stable_diffusion
folder, dtype, steps = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() and steps else "cpu"
sd = load_stable_diffusion(folder, device, dtype)
cg, pg = (load_control(f"{folder}/{n}", k, device, dtype) for n, k in (("cg", "category"), ("pg", "personality")))
out = {"load": time.perf_counter() - start}
if steps:
    from generate import Canvas, paint
    from sampler import Painting, seeded
    marks, picture, mask = [], torch.rand(1, 3, 512, 512), torch.zeros(1, 1, 512, 512)
    mask[..., 128:384, 128:384] = 1
    begin = time.perf_counter()
    canvas = Canvas(picture, mask, [("a photo of mug", "mug", "sks 0")], seeded(0), picture, mask)
    paint(sd, canvas, Painting(steps, from_reference=False), cg, pg,
          on_step=lambda *_: (device == "cuda" and torch.cuda.synchronize(), marks.append(time.perf_counter()))).cpu()
    out |= {"picture": time.perf_counter() - begin, "step": min(b - a for a, b in zip(marks, marks[1:]))}
"""
THEIRS = """
import json, resource, sys, time
start = time.perf_counter()
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline
folder, dtype, steps = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() and steps else "cpu"
controls = [ControlNetModel.from_pretrained(f"{folder}/{n}", torch_dtype=dtype) for n in ("cg", "pg")]
controls = MultiControlNetModel(controls)
pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=controls, torch_dtype=dtype).to(device)
out = {"load": time.perf_counter() - start}
if steps:
    pipe.set_progress_bar_config(disable=True)
    marks, picture = [], torch.rand(1, 3, 512, 512)
    begin = time.perf_counter()
    pipe("a photo of mug", image=[picture, picture], num_inference_steps=steps, guidance_scale=2.0, output_type="pt",
         callback_on_step_end=lambda p, i, t, k: (device == "cuda" and torch.cuda.synchronize(),
                                                  marks.append(time.perf_counter()), k)[-1])
    out |= {"picture": time.perf_counter() - begin, "step": min(b - a for a, b in zip(marks, marks[1:]))}
"""
REPORT = """
out["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
out["cuda peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps(out))
"""


def measured(code: str, folder: Path, dtype: str, steps: int, repeat: int = 1) -> dict:
    """The best of each figure over `repeat` processes."""
    runs = [json.loads(subprocess.run([sys.executable, "-c", code + REPORT, str(folder), dtype, str(steps)], cwd=ROOT,
                                      check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(repeat)]
    return {key: min(run[key] for run in runs) for key in runs[0]}


def side_by_side(folder: Path, steps: int) -> tuple[float, float]:
    """Seconds per step in float32, ours and diffusers', as means of two rounds.

    Both run at the same time, each on a core of its own, and then swap cores: a machine whose speed drifts favours
    neither.
    """
    cores, seconds = sorted(os.sched_getaffinity(0))[:2], {OURS: [], THEIRS: []}
    for order in (cores, cores[::-1]):
        runs = {}
        for code, core in zip(seconds, order):
            pinned = f"import os\nos.sched_setaffinity(0, [{core}])\n{code}{REPORT}"
            runs[code] = subprocess.Popen([sys.executable, "-c", pinned, str(folder), "float32", str(steps)], cwd=ROOT,
                                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for code, run in runs.items():
            seconds[code].append(json.loads(run.communicate()[0].splitlines()[-1])["step"])
    return sum(seconds[OURS]) / 2, sum(seconds[THEIRS]) / 2


def flops_of_a_step() -> float:
    """The multiplications and additions in one guided step with both branches at 512 px, by torch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model import CategoryGenerator, PersonalityGenerator, Prompts, UNet, predict_noise
    from weights import control_config

    with torch.device("meta"):
        branches = [(kind(control_config(UNET, 8)), torch.empty(2, 320, 64, 64))
                    for kind in (CategoryGenerator, PersonalityGenerator)]
        arguments = (UNet(UNET), torch.empty(2, 4, 64, 64), torch.empty(1),
                     Prompts(*(torch.empty(2, 77, 768) for _ in range(3))), branches, torch.empty(2, 1, 512, 512))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predict_noise(*arguments)
    return counter.get_total_flops()


def rate_of_products(dtype: str) -> float:
    """The floating-point operations per second that this machine reaches in products of 4096 x 4096 matrices."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.rand(4096, 4096, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(times)


def sd15(folder: Path, steps: int) -> None:
    import torch

    sys.path.insert(0, str(ROOT))
    make_sd15(folder)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    cuda = torch.cuda.is_available()
    print(f"SD 1.5 + CG + PG, random weights, float32: {size / 1e9:.2f} GB; {torch.get_num_threads()} threads; "
          f"{torch.cuda.get_device_name() if cuda else 'no GPU'}")

    ours, theirs = (measured(code, folder, "float32", 0, repeat=2) for code in (OURS, THEIRS))
    print(f"load from a fresh process        {ours['load']:8.1f} s    diffusers {theirs['load']:8.1f} s    "
          f"ratio {ours['load'] / theirs['load']:.2f} (aim 0.5)")
    print(f"peak memory of the load          {ours['peak'] / 1e9:8.2f} GB   diffusers {theirs['peak'] / 1e9:8.2f} GB   "
          f"{ours['peak'] / size:.2f} of the weights (aim 1.1)")

    from support.machine import bfloat16_speedup, pick_dtype

    flops, best = flops_of_a_step(), str(pick_dtype("auto", "cuda" if cuda else "cpu")).removeprefix("torch.")
    if not cuda:
        print(f"--dtype auto chooses {best}: bfloat16 products of small matrices are {bfloat16_speedup():.2f} x as "
              "fast as float32's")
    ours, theirs = (measured(code, folder, best if cuda else "float32", steps) for code in (OURS, THEIRS))
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1 and not cuda:
        one, other = side_by_side(folder, 3)
        print(f"guided step, float32, a core each{one:8.2f} s    diffusers {other:8.2f} s    ratio {one / other:.2f} "
              "(aim 0.95)")
    for what, aim in (("step", 0.95), ("picture", 0.6)):
        of = f"guided {what}, {best if cuda else 'float32'}" + (f", {steps} steps" if what == "picture" else "")
        aimed = f" (aim {aim})" if what == "step" or cuda else ""
        print(f"{of:32} {ours[what]:8.2f} s    diffusers {theirs[what]:8.2f} s    "
              f"ratio {ours[what] / theirs[what]:.2f}{aimed}")
    chosen = ours if cuda or best == "float32" else measured(OURS, folder, best, steps)
    for dtype, run in {"float32": ours, best: chosen}.items():
        rate = rate_of_products(best if cuda else dtype)
        reached = flops / run["step"]
        print(f"a step is {flops / 1e12:.2f} TFLOP; {best if cuda else dtype}: {reached / 1e12:.2f} TFLOP/s, "
              f"{reached / rate:.0%} of the {rate / 1e12:.2f} that products of matrices reach")
        if cuda:
            print(f"peak memory on the GPU           {ours['cuda peak'] / 1e9:8.2f} GB   diffusers "
                  f"{theirs['cuda peak'] / 1e9:8.2f} GB")
            break
    else:
        print(f"picture, --dtype auto, {steps} steps  {run['picture']:8.2f} s    float32 {ours['picture']:8.2f} s    "
              f"ratio {run['picture'] / ours['picture']:.2f} (aim 1)")
        print(f"                                 diffusers, float32 {theirs['picture']:8.2f} s    ratio "
              f"{run['picture'] / theirs['picture']:.2f} (aim 0.7 with native bfloat16)")
        print(f"peak memory, {best}          {run['peak'] / 1e9:8.2f} GB   float32 {ours['peak'] / 1e9:8.2f} GB   "
              f"diffusers, float32 {theirs['peak'] / 1e9:8.2f} GB")


# ---------------------------------------------------------------- training at SD 1.5's size


# Steps of Eq. 1 on random latents and prompts. In: folder, stage, pixels, dtype, checkpointing. Out: seconds and bytes.
TRAIN = """
import json, resource, sys, time
sys.path.insert(0, ".")
import torch
folder, stage, size, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), getattr(torch, sys.argv[4])
recompute = sys.argv[5] == "1"
device, half = "cuda" if torch.cuda.is_available() else "cpu", dtype != torch.float32
z, eps, t = torch.randn(1, 4, size // 8, size // 8), torch.randn(1, 4, size // 8, size // 8), torch.tensor([500])
P, hint, mask = torch.randn(1, 77, 768), torch.rand(1, 3, size, size), torch.rand(1, 1, size, size)
z, eps, t, P, hint, mask = (x.to(device) for x in (z, eps, t, P, hint, mask))
{setup}
trained = [p for p in branch.parameters()]
optimizer = torch.optim.AdamW(trained, 1e-5, {fused})
times = []
for _ in range(int(sys.argv[6])):
    start = time.perf_counter()
    with torch.autocast(device, dtype, enabled=half, cache_enabled=not recompute):
        output = forward()
    (output.float() - eps).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
out = dict(step=min(times[1:]))
"""
OURS_TRAIN = TRAIN.replace("{fused}", "fused=True").replace("{setup}", """
from model import CategoryGenerator, PersonalityGenerator, Prompts, predict_noise
from weights import control_config, load_control, load_stable_diffusion
unet = load_stable_diffusion(folder).unet
branch = (CategoryGenerator if stage == "cg" else PersonalityGenerator)(control_config(unet.config, 8)).to(device)
branch.init_from_unet(unet)
if half:
    branch.to(memory_format=torch.channels_last)
frozen = [unet] + ([load_control(f"{folder}/cg", "category")] if stage == "pg" else [])
for network in frozen:
    network.to(device, dtype, memory_format=torch.channels_last if half else torch.preserve_format)
for network in (unet, branch) if recompute else ():
    network.recompute_activations()
prompts = Prompts(P, P, P)
def forward():
    branches = [(network, network.hint_features(hint)) for network in [*frozen[1:], branch]]
    return predict_noise(unet, z, t, prompts, branches, mask)
""")
THEIRS_TRAIN = TRAIN.replace("{fused}", "").replace("{setup}", """
from diffusers import ControlNetModel, UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=dtype).requires_grad_(False).to(device)
branch = ControlNetModel.from_unet(unet).float().to(device)
branch.train()
if recompute:
    unet.enable_gradient_checkpointing()
    branch.enable_gradient_checkpointing()
def forward():
    down, middle = branch(z, t, P, controlnet_cond=hint, return_dict=False)
    return unet(z, t, P, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
""")


def train_step(code: str, folder: Path, stage: str, size: int, dtype: str, recompute: bool, steps: int = 3) -> dict:
    arguments = [str(folder), stage, str(size), dtype, str(int(recompute)), str(steps)]
    done = subprocess.run([sys.executable, "-c", code + REPORT, *arguments], cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else defaultdict(lambda: math.nan)


def training(folder: Path) -> None:
    import torch

    sys.path.insert(0, str(ROOT))
    make_sd15(folder)
    cuda = torch.cuda.is_available()
    memory = "cuda peak" if cuda else "peak"
    size, dtype = (512, "bfloat16") if cuda else (256, "float32")
    ours, theirs, less, half, fused = (
        train_step(code, folder, "cg", size, dtype, recompute, steps=6) for code, dtype, recompute in (
            (OURS_TRAIN, dtype, False), (THEIRS_TRAIN, dtype, False), (OURS_TRAIN, dtype, True),
            (OURS_TRAIN, "bfloat16", True), (THEIRS_TRAIN.replace("1e-5, )", "1e-5, fused=True)"), dtype, False)))
    print(f"a step of CG, {size} px, micro-batch 1, {dtype}")
    print("| | seconds | GB | of diffusers' seconds | of its memory |")
    print("| --- | --- | --- | --- | --- |")
    for name, run in {"diffusers": theirs, "diffusers, our fused AdamW": fused,
                      f"ours (aims {0.8 if cuda else 1}, 1)": ours,
                      "ours, --checkpointing (aim of memory 0.8)": less, "ours, --checkpointing --amp": half}.items():
        print(f"| {name} | {run['step']:.2f} | {run[memory] / 1e9:.2f} | {run['step'] / theirs['step']:.2f} | "
              f"{run[memory] / theirs[memory]:.2f} |")
    print("| 512 px, micro-batch 1 | float32 | float32, --checkpointing | --amp | --amp --checkpointing |")
    print("| --- | --- | --- | --- | --- |")
    for stage in ("cg", "pg"):
        runs = [train_step(OURS_TRAIN, folder, stage, 512, dtype, recompute)
                for dtype in ("float32", "bfloat16") for recompute in (False, True)]
        cells = [f"{run[memory] / 1e9:.1f} GB, {run['step']:.1f} s" for run in runs]
        print(f"| {stage.upper()} | {' | '.join(cells)} |", flush=True)


def loader() -> None:
    """The images per second that two workers perturb at 512 px."""
    import torch
    from torch.utils.data import DataLoader

    sys.path.insert(0, str(ROOT))
    from data import Samples
    from programs.trainer import batches_of_keys
    from support.datasets import read_items
    from toy.world import write_world

    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), size=512, ads=64, bg1k=8, pairs=8, parts=("ads",))
        samples = Samples(read_items(Path(folder) / "ads")[0], 512, perturbed=True)
        batches = DataLoader(samples, num_workers=2, batch_sampler=batches_of_keys(len(samples), 4, 0, 0, 60))
        torch.set_num_threads(1)
        for i, _ in enumerate(batches):
            if i == 10:  # the workers have started
                start = time.perf_counter()
        print(f"PG's samples at 512 px (mask, dilation, mixup), two workers: "
              f"{4 * (i - 10) / (time.perf_counter() - start):.1f} images/s")


def batch() -> None:
    """Pictures per second by batch size: the toy's BG1k, CG alone, 50 steps."""
    import torch

    sys.path.insert(0, str(ROOT))
    import generate

    data = ROOT / "toy" / "data" / "ads"
    if not data.is_dir():
        subprocess.run([sys.executable, "toy/world.py", "--out", "toy/data"], cwd=ROOT, check=True)
    rates = {}
    for size, count in ((1, 16), (4, 32), (16, 64)):
        with tempfile.TemporaryDirectory() as out:
            options = ["--data", str(data), "--out", out, "--batch", str(size), "--limit"]
            generate.main([*options, str(size)])  # reads and warms up
            start = time.perf_counter()
            generate.main([*options, str(size + count)])
            rates[size] = count / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as out:
        sample = str(ROOT / "toy" / "samples" / "perfume.png")
        rates["process"] = 1 / process("generate.py", "--product", sample, "--category", "perfume", "--out", out)
    print(f"pictures a second, {torch.get_num_threads()} threads: " + ", ".join(
        f"batch {k} {v:.2f}" if k != "process" else f"one process each {v:.2f}" for k, v in rates.items()))
    best = max(rates.values())
    print(f"the best is {best / rates[1]:.2f} x batch 1 (aim 1.5), {best / rates['process']:.1f} x a process each "
          "(aim 5)")


# ---------------------------------------------------------------- samplers


def samplers() -> None:
    """The distance to the picture of 250 DDIM steps from the same noise, in levels of 255, before the second pass.

    It is the root mean square over four held-out products by the toy's CG. With steps spaced as SD 1.5's config says
    ("leading"), walks of different lengths also begin at different timesteps: 20 steps at 951, 250 at 997. With
    "trailing" all begin at 999.
    """
    from dataclasses import replace

    import torch

    sys.path.insert(0, str(ROOT))
    from generate import Canvas, paint, prompts_by_category
    from programs.models import ModelChoice, load_models
    from sampler import Painting, Schedule, seeded
    from support.images import fit, load_cutout

    names = ["perfume", "laptop", "sneaker", "watch"]
    models = load_models(ModelChoice(dtype="float32"), None, {*names})
    texts = prompts_by_category(models.identifiers, models.sd.tokenizer)
    rgb, mask = zip(*(load_cutout(ROOT / "toy" / "samples" / f"{name}.png") for name in names))
    rgb, mask = (torch.stack([fit(x, models.size, models.size, "contain")[0] for x in xs]) for xs in (rgb, mask))

    def pictures(steps: int, sampler: str, spacing: str) -> torch.Tensor:
        canvas = Canvas(rgb, mask, [texts[name] for name in names], seeded(0, len(names)))
        sd = replace(models.sd, schedule=Schedule(models.sd.schedule.config | {"timestep_spacing": spacing}))
        return paint(sd, canvas, Painting(steps, sampler=sampler), models.cg)

    spacings = ("leading", "trailing")
    exact = {spacing: pictures(250, "ddim", spacing) for spacing in spacings}
    print("| steps | DDIM, leading | DPM-Solver++ (2M), leading | DDIM, trailing | DPM-Solver++ (2M), trailing |")
    print("| --- | --- | --- | --- | --- |")
    for steps in (5, 10, 15, 20, 25, 50):
        far = [255 * (pictures(steps, sampler, spacing) - exact[spacing]).square().mean().sqrt()
               for spacing in spacings for sampler in ("ddim", "dpm++")]
        print(f"| {steps} | " + " | ".join(f"{x:.1f}" for x in far) + " |", flush=True)


# ---------------------------------------------------------------- the second pass at SD 1.5's size

REFINE = """
import json, resource, sys, time
sys.path.insert(0, ".")
import torch
from generate import Canvas, paint
from sampler import Painting, Schedule, seeded
from weights import load_control, load_stable_diffusion
folder, dtype, steps = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
sd = load_stable_diffusion(folder, device, dtype)
cg, pg = (load_control(f"{folder}/{n}", k, device, dtype) for n, k in (("cg", "category"), ("pg", "personality")))
how, texts = Painting(steps, refine=2, refine_from=999), [("a photo of mug", "mug", "sks 0")]  # all steps, both times
out, painted, generators = {}, None, seeded(0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
out["peak of the load"] = peak()
for size in (512, 1024):
    marks, picture, mask = [], torch.rand(1, 3, size, size), torch.zeros(1, 1, size, size)
    mask[..., size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    begin = time.perf_counter()
    canvas = Canvas(picture, mask, texts, generators, picture, mask)
    painted = paint(sd, canvas, how, cg, pg, first=painted, on_step=lambda *_: (
        device == "cuda" and torch.cuda.synchronize(), marks.append(time.perf_counter()))).cpu()
    step = min(b - a for a, b in zip(marks, marks[1:]))
    out |= {f"step {size}": step, f"rest {size}": time.perf_counter() - begin - steps * step, f"peak {size}": peak()}
schedule = Schedule()
out["steps"] = [len(schedule.timesteps(50)), len(schedule.timesteps(50, Painting.refine_from))]
"""


def refine(folder: Path, steps: int) -> None:
    """Works out the time of 50 steps, and of the second pass's share of them, from a few steps' time."""
    import torch

    sys.path.insert(0, str(ROOT))
    from support.machine import pick_dtype

    make_sd15(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in dict.fromkeys((["float32"] if device == "cpu" else []) + [str(pick_dtype("auto", device))[6:]]):
        run = measured(REFINE, folder, dtype, steps)
        seconds = [run[f"rest {size}"] + n * run[f"step {size}"] for size, n in zip((512, 1024), run["steps"])]
        print(f"{dtype}: a step {run['step 512']:.1f} s at 512 px, {run['step 1024']:.1f} s at 1024 px; all "
              f"{run['steps'][0]} steps {seconds[0]:.0f} s, the second's {run['steps'][1]} {seconds[1]:.0f} s more")
        peaks = [f"{run[f'peak {when}'] / 1e9:.2f} GB" for when in ("of the load", 512, 1024)]
        print(f"{dtype}: peak memory {peaks[0]} after the load, {peaks[1]} after the first pass, {peaks[2]} after the "
              f"second; on the GPU {run['cuda peak'] / 1e9:.2f} GB")


VAE = """
import json, resource, sys
sys.path[:0] = [".", "tests"]
import torch
from bench import VAE_CONFIG
from vae import VAE
part, dtype = sys.argv[1], getattr(torch, sys.argv[2])
network = VAE(VAE_CONFIG).to(dtype).eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.inference_mode():
    if part == "decode":
        network.decode(torch.randn(1, 4, 128, 128, dtype=dtype))
    else:
        network.encode(torch.randn(1, 3, 1024, 1024, dtype=dtype))
out = {"grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}
"""


def vae() -> None:
    """The memory, beside the weights, for decoding and encoding a picture of 1024 px in float32."""
    for part in ("decode", "encode"):
        grown = measured(VAE, Path(part), "float32", 0)["grown"]
        print(f"{part} 1024 px, float32: {grown / 1e9:.2f} GB (aim for decode: 3.8)")


# ---------------------------------------------------------------- rivals at full size

BIG_LAMA = {"width": 64, "levels": 3, "blocks": 18, "global_channels": 384}
# Arguments and results are those of OURS and THEIRS, but per picture. "grown": the memory added since the imports
LAMA = """
import json, resource, sys, time
sys.path[:0] = [".", "tests"]
import torch
from rivals.lama import load_lama
from safetensors.torch import load_file
from test_lama import specified
folder, steps = sys.argv[1], int(sys.argv[3])
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = memory(), time.perf_counter()
{load}
out = {"load": time.perf_counter() - start, "grown": memory() - before}
rgb, mask, times = torch.rand(1, 3, 512, 512), torch.zeros(1, 1, 512, 512), []
mask[..., 128:384, 128:384] = 1
with torch.inference_mode():
    for _ in range(steps):
        start = time.perf_counter()
        {paint}
        times.append(time.perf_counter() - start)
out |= {"step": min(times, default=0)}
"""
OURS_LAMA = LAMA.replace("{load}", 'lama = load_lama(f"{folder}/lama.safetensors")').replace(
    "{paint}", "lama(rgb, mask)")
THEIRS_LAMA = LAMA.replace("{load}", 'weights = load_file(f"{folder}/lama.safetensors")').replace(
    "{paint}", "(1 - mask) * specified(weights, 3, 18, torch.cat([rgb * mask, 1 - mask], dim=1)) + mask * rgb")


def write_lama(folder: Path) -> float:
    """Writes big-lama's generator with random weights -> its bytes."""
    import torch
    from safetensors.torch import save_file

    from rivals.lama import LaMa

    torch.manual_seed(0)
    save_file({name: tensor.detach() for name, tensor in LaMa(BIG_LAMA).state_dict().items()},
              folder / "lama.safetensors")
    return (folder / "lama.safetensors").stat().st_size


# The same for Paint by Example, with a guided step
EXAMPLE = """
import json, resource, sys, time
sys.path.insert(0, ".")
import torch
{imports}
folder, steps, marks = sys.argv[1], int(sys.argv[3]), []
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = memory(), time.perf_counter()
{load}
out = {"load": time.perf_counter() - start, "grown": memory() - before}
rgb, mask, exemplar = torch.rand(1, 3, 512, 512), torch.zeros(1, 1, 512, 512), torch.rand(1, 3, 224, 224)
mask[..., 128:384, 128:384] = 1
start = time.perf_counter()
if steps:
    {paint}
    out |= {"picture": time.perf_counter() - start, "step": min(b - a for a, b in zip(marks, marks[1:]))}
"""
OURS_EXAMPLE = EXAMPLE.replace("{imports}", """
from generate import Canvas
from rivals.paint_by_example import load_paint_by_example
from sampler import Painting, seeded
""").replace("{load}", "pbe = load_paint_by_example(folder)").replace("{paint}", """
    pbe.paint(Canvas(rgb, mask, [], seeded(0), exemplar), Painting(steps, 5.0),
              on_step=lambda *_: marks.append(time.perf_counter()))
""")
THEIRS_EXAMPLE = EXAMPLE.replace("{imports}", """
from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from safetensors.torch import load_file
from transformers import CLIPVisionConfig
""").replace("{load}", """
encoder = PaintByExampleImageEncoder(CLIPVisionConfig.from_pretrained(f"{folder}/image_encoder"))
new = "model.embeddings.class_embedding" in encoder.state_dict()  # transformers 5 leaves out a part of the names
encoder.load_state_dict({name.replace("model.vision_model.", "model.") if new else name: tensor for name, tensor in
                         load_file(f"{folder}/image_encoder/model.safetensors").items()})
pipe = PaintByExamplePipeline(
    AutoencoderKL.from_pretrained(f"{folder}/vae"), encoder, UNet2DConditionModel.from_pretrained(f"{folder}/unet"),
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                  set_alpha_to_one=False, steps_offset=1), None, None)
""").replace("{paint}", """
    pipe.set_progress_bar_config(disable=True)
    pipe(exemplar, 2 * rgb - 1, 1 - mask, num_inference_steps=steps, guidance_scale=5.0, output_type="np",
         callback=lambda *_: marks.append(time.perf_counter()))
""")
EXAMPLE_ENCODER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                   "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
                   "num_channels": 3, "hidden_act": "quick_gelu", "projection_dim": 768}


def write_example(folder: Path) -> None:
    """Writes Paint by Example's public folder with random weights, float32 (5.2 GB)."""
    import torch

    from model import UNet
    from rivals.paint_by_example import PaintByExampleEncoder
    from vae import VAE
    from weights import CLIP_FILE, UNET_FILE, save_module

    torch.manual_seed(0)
    save_module(UNet(UNET | {"in_channels": 9}), folder / "unet", UNET_FILE)
    save_module(VAE(VAE_CONFIG), folder / "vae", UNET_FILE)
    save_module(PaintByExampleEncoder(EXAMPLE_ENCODER), folder / "image_encoder", CLIP_FILE)


def in_turn(ours: str, theirs: str, folder: Path, steps: int) -> list[dict]:
    """Each one's best numbers, from processes in the order ours, theirs, theirs, ours."""
    runs = {code: [] for code in (ours, theirs)}
    for code in (ours, theirs, theirs, ours):
        runs[code].append(measured(code, folder, "float32", steps))
    return [{key: min(run[key] for run in of) for key in of[0]} for of in runs.values()]


def paint_by_example(folder: Path, steps: int) -> None:
    """Paint by Example beside diffusers' pipeline."""
    if not (folder / "image_encoder").exists():
        code = ("import sys; sys.path[:0] = ['.', 'tests']; from bench import Path, write_example; "
                "write_example(Path(sys.argv[1]))")  # in a process of its own, see make_sd15
        subprocess.run([sys.executable, "-c", code, str(folder.absolute())], cwd=ROOT, check=True)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    ours, theirs = in_turn(OURS_EXAMPLE, THEIRS_EXAMPLE, folder, steps)
    print(f"Paint by Example, 512 px, random weights, float32: {size / 1e9:.2f} GB")
    for what in ("load", "step", "picture"):
        if what in ours:
            of = {"step": "guided step", "picture": f"picture, {steps} steps"}.get(what, what)
            print(f"{of:32} {ours[what]:8.2f} s    diffusers {theirs[what]:8.2f} s    "
                  f"ratio {ours[what] / theirs[what]:.2f} (aim 1)")
    print(f"memory of the load               {ours['grown'] / 1e9:8.2f} GB   diffusers {theirs['grown'] / 1e9:8.2f} GB"
          f"   {ours['grown'] / size:.2f} of the weights (aim 1.1)")
    print(f"peak memory                      {ours['peak'] / 1e9:8.2f} GB   diffusers {theirs['peak'] / 1e9:8.2f} GB")


def lama() -> None:
    """LaMa beside its specification, which is written out in the tests."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        size = write_lama(Path(folder))
        ours, theirs = in_turn(OURS_LAMA, THEIRS_LAMA, Path(folder), 2)
    print(f"LaMa, 512 px, random weights, {size / 1e6:.0f} MB")
    print(f"picture                          {ours['step']:8.2f} s    specification {theirs['step']:8.2f} s    "
          f"ratio {ours['step'] / theirs['step']:.2f} (aim 1)")
    print(f"memory of the load               {ours['grown'] / 1e6:8.0f} MB   {ours['grown'] / size:.2f} of the weights "
          "(aim 1.1)")
    print(f"peak memory                      {ours['peak'] / 1e9:8.2f} GB   specification {theirs['peak'] / 1e9:8.2f}"
          " GB")


# ---------------------------------------------------------------- a large photo

MAKE_PHOTO = """
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

size, numbers = (8192, 6000), np.random.default_rng(0)
scene = Image.fromarray(numbers.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
grain = Image.fromarray(numbers.integers(0, 256, (6000, 8192, 3), dtype=np.uint8))
Image.blend(scene, grain, 0.03).save("photo.jpg", quality=92)
mask = Image.new("L", size)
ImageDraw.Draw(mask).ellipse([1500, 800, 6700, 5300], fill=255)
mask.filter(ImageFilter.GaussianBlur(4)).save("mask.png")
"""
USE_PHOTO = """
import os, resource, sys, time
from generate import paste_back
from support.images import fit, load_cutout, save_image

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before, start = memory(), time.process_time()
rgb, mask = load_cutout("photo.jpg", "mask.png")
(canvas, box), small = fit(rgb, 384, 512, "contain"), fit(mask, 384, 512, "contain")[0]
save_image(paste_back(canvas.flip(1), small, box, rgb, mask), "result.png")
seconds, grown = time.process_time() - start, memory() - before
print(f"a photo of 8192 x 6000 on one core: {seconds:.1f} s (aim: 25), {grown / 1e6:,.0f} MB (aim: 3,000)")
"""


def photo() -> None:
    """Opens, cuts out, fits, pastes back and saves a photo of 49 megapixels.

    Another process makes the photo, because a process inherits the peak memory of the one that started it.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        for code in MAKE_PHOTO, USE_PHOTO:
            subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)


# ---------------------------------------------------------------- the toy


FAST = "--sampler", "dpm++", "--steps", "20"


def toy(everything: bool) -> None:
    with tempfile.TemporaryDirectory() as out:
        default = ("generate.py", "--out", out)
        print(f"python generate.py, 50 steps, whole process   {process(*default):6.1f} s   (aim: 15)")
        print(f"    --sampler dpm++ --steps 20                {process(*default, *FAST):6.1f} s   (aim: 8)")
        print(f"                    peak memory               {peak(*default):6.0f} MB  (aim: 1000)")
    bare = process("-c", "import torch")
    print(f"import torch                                  {bare:6.2f} s")
    print(f"import generate (torch included)              {process('-c', 'import generate'):6.2f} s")
    print(f"import train (torch included)                 {process('-c', 'import train'):6.2f} s")
    print(f"python generate.py --help                     {process('generate.py', '--help'):6.2f} s")
    if everything:
        with tempfile.TemporaryDirectory() as out:
            seconds = process("train.py", "cg", "--steps", "500", "--out", f"{out}/run", repeat=1)
            print(f"python train.py cg, to its first sheet        {seconds:6.0f} s   (aim: 600)")
        seconds = process("-m", "pytest", "-q", repeat=1)
        print(f"python -m pytest                              {seconds:6.0f} s   (aim: 600)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="toy", choices=[
        "toy", "sd15", "train", "batch", "rivals", "photo", "samplers", "refine", "vae"])
    parser.add_argument("--all", action="store_true", help="toy: also what takes minutes")
    parser.add_argument("--steps", type=int, default=4, help="sd15, refine, rivals: steps of the pictures [4]")
    parser.add_argument("--folder", type=Path,
                        help="sd15, train, refine, rivals: keep the random weights here, 5 to 7 GB [not kept]")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed alone")
    print(machine())
    alone = {"toy": partial(toy, args.all), "batch": batch, "photo": photo, "samplers": samplers, "vae": vae}
    if args.what in alone:
        alone[args.what]()
        return
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        if args.what in ("sd15", "refine"):
            {"sd15": sd15, "refine": refine}[args.what](Path(folder), args.steps)
        elif args.what == "rivals":
            lama()
            paint_by_example(Path(folder), args.steps)
        else:
            loader()
            training(Path(folder))


if __name__ == "__main__":
    main()
