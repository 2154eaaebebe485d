"""Figures for the README. Each is one measurement on this machine; nothing else may run meanwhile.

    python tests/bench.py                    # the toy: generate.py from start to end, imports
    python tests/bench.py --all              # and what takes minutes: training, the tests
    python tests/bench.py sd15               # SD 1.5's size, random weights, beside diffusers: load, memory, steps
    python tests/bench.py sd15 --steps 50    # the same with pictures of 50 steps instead of 4
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """The processor's name and what we may use of it."""
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {cores} cores, Python {platform.python_version()}"


def process(*arguments: str, repeat: int = 3) -> float:
    """Best wall-clock seconds of a whole process, start-up included."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def peak(*arguments: str) -> float:
    """Peak resident memory of a process in MB, measured in a child of its own."""
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
              "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512,
              "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}


def write_sd15(folder: Path) -> None:
    """Stable Diffusion 1.5, CG and PG in their public layout and full size, random weights, float32 (7.1 GB)."""
    import torch

    from model import VAE, CategoryGenerator, PersonalityGenerator, TextEncoder, UNet
    from weights import TEXT_FILES, UNET_FILES, control_config, save_control, save_module, train_tokenizer, write_json

    torch.manual_seed(0)
    unet = UNet(UNET)
    for name, kind in (("cg", CategoryGenerator), ("pg", PersonalityGenerator)):
        branch = kind(control_config(UNET, 8))
        branch.init_from_unet(unet)
        for layer in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.01)
        save_control(branch, folder / name, categories=["mug"])
    save_module(unet, folder / "unet", UNET_FILES[0])
    save_module(VAE(VAE_CONFIG), folder / "vae", UNET_FILES[0])
    save_module(TextEncoder(TEXT), folder / "text_encoder", TEXT_FILES[0])
    train_tokenizer(["a photo of a mug"] * 3, 600, 77, folder / "tokenizer")
    write_json({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
               folder / "scheduler" / "scheduler_config.json")
    write_json({"_class_name": "StableDiffusionControlNetPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                "controlnet": ["diffusers", "ControlNetModel"], "safety_checker": [None, None],
                "feature_extractor": [None, None]}, folder / "model_index.json")


# Each runs in a process of its own: folder, dtype and steps in, seconds and bytes out. 0 steps: only load.
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
    from generate import paint
    from sampler import seeded
    marks, picture, mask = [], torch.rand(1, 3, 512, 512), torch.zeros(1, 1, 512, 512)
    mask[..., 128:384, 128:384] = 1
    begin = time.perf_counter()
    paint(sd, picture, mask, [("a photo of mug", "mug", "sks 0")], seeded(0), cg, pg, picture, mask, False, steps=steps,
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
controls = MultiControlNetModel([ControlNetModel.from_pretrained(f"{folder}/{n}", torch_dtype=dtype) for n in ("cg", "pg")])
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


def flops_of_a_step() -> float:
    """Of one guided step with both branches at 512 px, by torch's own counter (multiplications and additions)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model import CategoryGenerator, PersonalityGenerator, Prompts, UNet, predict_noise
    from weights import control_config

    with torch.device("meta"):
        branches = [(kind(control_config(UNET, 8)), torch.empty(2, 3, 512, 512))
                    for kind in (CategoryGenerator, PersonalityGenerator)]
        arguments = (UNet(UNET), torch.empty(2, 4, 64, 64), torch.empty(1),
                     Prompts(*(torch.empty(2, 77, 768) for _ in range(3))), branches, torch.empty(2, 1, 512, 512))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predict_noise(*arguments)
    return counter.get_total_flops()


def rate_of_products(dtype: str) -> float:
    """Floating-point operations a second that this machine reaches in products of 4096 x 4096 matrices."""
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
    if not (folder / "model_index.json").exists():
        write_sd15(folder)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    cuda = torch.cuda.is_available()
    print(f"SD 1.5 + CG + PG, random weights, float32: {size / 1e9:.2f} GB; {torch.get_num_threads()} threads; "
          f"{torch.cuda.get_device_name() if cuda else 'no GPU'}")

    ours, theirs = (measured(code, folder, "float32", 0, repeat=2) for code in (OURS, THEIRS))
    print(f"load from a fresh process        {ours['load']:8.1f} s    diffusers {theirs['load']:8.1f} s    "
          f"ratio {ours['load'] / theirs['load']:.2f} (aim 0.5)")
    print(f"peak memory of the load          {ours['peak'] / 1e9:8.2f} GB   diffusers {theirs['peak'] / 1e9:8.2f} GB   "
          f"{ours['peak'] / size:.2f} of the weights (aim 1.1)")

    flops, best = flops_of_a_step(), "float16" if cuda else "bfloat16"
    ours, theirs = (measured(code, folder, best if cuda else "float32", steps) for code in (OURS, THEIRS))
    for what, aim in (("step", 0.95), ("picture", 0.6)):
        of = f"guided {what}, {best if cuda else 'float32'}" + (f", {steps} steps" if what == "picture" else "")
        aimed = f" (aim {aim})" if what == "step" or cuda else ""
        print(f"{of:32} {ours[what]:8.2f} s    diffusers {theirs[what]:8.2f} s    "
              f"ratio {ours[what] / theirs[what]:.2f}{aimed}")
    for dtype, run in {"float32": ours, "bfloat16": ours if cuda else measured(OURS, folder, best, steps)}.items():
        rate = rate_of_products(best if cuda else dtype)
        print(f"a step is {flops / 1e12:.2f} TFLOP; {best if cuda else dtype}: {flops / run['step'] / 1e12:.2f} TFLOP/s, "
              f"{flops / run['step'] / rate:.0%} of the {rate / 1e12:.2f} that products of matrices reach")
        if cuda:
            print(f"peak memory on the GPU           {ours['cuda peak'] / 1e9:8.2f} GB   diffusers "
                  f"{theirs['cuda peak'] / 1e9:8.2f} GB")
            break
    else:
        print(f"picture, {best}, {steps} steps     {run['picture']:8.2f} s    diffusers, float32 "
              f"{theirs['picture']:8.2f} s    ratio {run['picture'] / theirs['picture']:.2f} (aim 0.7)")
        print(f"peak memory, {best}          {run['peak'] / 1e9:8.2f} GB   float32 {ours['peak'] / 1e9:8.2f} GB   "
              f"diffusers, float32 {theirs['peak'] / 1e9:8.2f} GB")


# ---------------------------------------------------------------- the toy


def toy(everything: bool) -> None:
    with tempfile.TemporaryDirectory() as out:
        default = ("generate.py", "--out", out)
        print(f"python generate.py, 50 steps, whole process   {process(*default):6.1f} s   (aim: 12)")
        print(f"                    peak memory               {peak(*default):6.0f} MB  (aim: 1000)")
    bare = process("-c", "import torch")
    print(f"import torch                                  {bare:6.2f} s")
    print(f"import generate (torch included)              {process('-c', 'import generate'):6.2f} s")
    print(f"import train (torch included)                 {process('-c', 'import train'):6.2f} s")
    print(f"python generate.py --help                     {process('generate.py', '--help'):6.2f} s")
    if everything:
        with tempfile.TemporaryDirectory() as out:
            seconds = process("train.py", "cg", "--steps", "500", "--out", out, repeat=1)
            print(f"python train.py cg, to its first sheet        {seconds:6.0f} s   (aim: 600)")
        seconds = process("-m", "pytest", "-q", repeat=1)
        print(f"python -m pytest                              {seconds:6.0f} s   (aim: 600)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["toy", "sd15"], default="toy")
    parser.add_argument("--all", action="store_true", help="toy: also what takes minutes")
    parser.add_argument("--steps", type=int, default=4, help="sd15: denoising steps of the pictures [4]")
    parser.add_argument("--folder", type=Path, help="sd15: keep the 7.1 GB of random weights here [not kept]")
    args = parser.parse_args()
    print(machine())
    if args.what == "toy":
        toy(args.all)
    elif args.folder:
        sd15(args.folder, args.steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sd15(Path(folder), args.steps)


if __name__ == "__main__":
    main()
