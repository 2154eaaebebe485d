"""Tests: measures times and memory for the README, once each on this machine. Nothing else may run meanwhile.

    python tests/bench.py                # the toy: generate.py from start to end
    python tests/bench.py sd15           # SD 1.5's size, random weights, beside diffusers: load, memory, steps
    python tests/bench.py train          # training steps of that size, beside diffusers: time, memory
    python tests/bench.py rivals         # LaMa and Paint by Example at full size, beside reference implementations
    python tests/bench.py photo          # a photo of 49 megapixels on one core: time and memory beside the painting
    python tests/bench.py samplers       # the toy: how far DDIM and DPM-Solver++ are from 250 steps, by steps

All work on large things is done by programs of three pieces of code, for imports, load and work, in processes of their
own: on Linux a process inherits the peak memory of the one that starts it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ---------------------------------------------------------------- processes

PROGRAM = """
import json, resource, sys, time
sys.path[:0] = [".", "tests"]
start, marks, out = time.perf_counter(), [], {}
import torch
folder, *arguments = json.loads(sys.argv[1])
cuda = torch.cuda.is_available()
device = "cuda" if cuda else "cpu"

def gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e9 / 1024)

def mark(*_):
    if cuda:
        torch.cuda.synchronize()
    marks.append(time.perf_counter())

%s
imported, before = time.perf_counter(), gigabytes()
%s
begin = time.perf_counter()
out |= {"from start to ready, s": begin - start, "of this the load, s": begin - imported,
        "peak when ready, GB": gigabytes(), "of this the load, GB": gigabytes() - before}
%s
if marks:
    out |= {"a step, s": min(b - a for a, b in zip(marks, marks[1:])), "picture, s": time.perf_counter() - begin}
out["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else gigabytes()
print(json.dumps(out))
"""


def launch(program: tuple[str, str, str], *arguments, core: int | None = None) -> subprocess.Popen:
    """Starts a program, on one core only if that is given."""
    pinned = "" if core is None else f"import os; os.sched_setaffinity(0, [{core}])\n"
    return subprocess.Popen([sys.executable, "-c", pinned + PROGRAM % program, json.dumps(arguments, default=str)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def measured(run: subprocess.Popen) -> dict[str, float]:
    """What a program has measured; NaN if it failed, as where the memory is too small."""
    said, errors = run.communicate()
    if run.returncode:
        print(errors[-1000:], file=sys.stderr)
    return defaultdict(lambda: math.nan, {} if run.returncode else json.loads(said.splitlines()[-1]))


def compare(title: str, ours: dict, theirs: dict) -> None:
    print(f"\n| {title} | ours | reference | ratio |\n| --- | --- | --- | --- |")
    for name in ours:
        print(f"| {name} | {ours[name]:.2f} | {theirs[name]:.2f} | {ours[name] / (theirs[name] or math.nan):.2f} |")


# ---------------------------------------------------------------- SD 1.5's size

SIZES = """
from conftest import SD1, TEXT_CONFIG, VAE_CONFIG, VISION_CONFIG
UNET = SD1 | {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
              "cross_attention_dim": 768, "norm_num_groups": 32}
VAE = VAE_CONFIG | {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "sample_size": 512}
TEXT = TEXT_CONFIG | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                      "num_attention_heads": 12, "vocab_size": 49408}
VISION = VISION_CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768}
LAMA = {"width": 64, "levels": 3, "blocks": 18, "global_channels": 384}
"""
# Writes Stable Diffusion 1.5, CG and PG in their public layout: full size, random weights, float32 (7.2 GB)
WRITE_SD15 = (SIZES + """
from pathlib import Path
from clip import TextEncoder
from model import CategoryGenerator, PersonalityGenerator, UNet
from sampler import Schedule
from support.files import write_json
from toy.stages import train_tokenizer
from vae import VAE as Autoencoder
from weights import TEXT_FILE, UNET_FILE, VAE_FILE, control_config, save_control, save_module
folder = Path(folder)
""", """
unet = UNet(UNET)
save_module(unet, folder / "unet", UNET_FILE)
for name, build in (("cg", CategoryGenerator), ("pg", PersonalityGenerator)):
    branch = build(control_config(unet.config, 8))
    branch.init_from_unet(unet)
    save_control(branch, folder / name, categories={"mug": "sks 0"})
save_module(Autoencoder(VAE), folder / "vae", VAE_FILE)
save_module(TextEncoder(TEXT), folder / "text_encoder", TEXT_FILE)
train_tokenizer(["a photo of a mug"] * 3, 600, 77, folder / "tokenizer")
write_json(Schedule().config | {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False},
           folder / "scheduler" / "scheduler_config.json")
write_json({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
            "safety_checker": [None, None], "feature_extractor": [None, None]}, folder / "model_index.json")
""", "")
INPUTS = """
rgb, mask = torch.rand(1, 3, 512, 512), torch.zeros(1, 1, 512, 512)
mask[..., 128:384, 128:384] = 1
texts = [("a photo of a mug", "mug", "sks 0")]
"""
OURS = ("""
from data import Canvas
from generate import paint
from sampler import SamplerSettings, Schedule, seeded
from weights import load_control, load_stable_diffusion
dtype, steps = getattr(torch, arguments[0]), arguments[1]
""", """
sd = load_stable_diffusion(folder, device, dtype)
cg = load_control(f"{folder}/cg", "category", device, dtype)
pg = load_control(f"{folder}/pg", "personality", device, dtype)
""", INPUTS + """
canvas = Canvas(rgb, mask, texts, seeded(0), rgb, mask)
paint(sd, canvas, SamplerSettings(steps, from_reference=False), cg, pg, on_step=mark).cpu()
""")
THEIRS = ("""
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline
dtype, steps = getattr(torch, arguments[0]), arguments[1]
""", """
controls = [ControlNetModel.from_pretrained(f"{folder}/{name}", torch_dtype=dtype) for name in ("cg", "pg")]
pipe = StableDiffusionControlNetPipeline.from_pretrained(
    folder, controlnet=MultiControlNetModel(controls), torch_dtype=dtype).to(device)
pipe.set_progress_bar_config(disable=True)
""", INPUTS + """
pipe(texts[0][0], image=[rgb, rgb], num_inference_steps=steps, guidance_scale=2.0,
     callback_on_step_end=lambda pipe, step, t, tensors: (mark(), tensors)[1])
""")


def sd15(folder: Path, steps: int) -> None:
    """Beside diffusers; the steps first at the same time, each on a core of its own, with the cores swapped once: a
    machine whose speed drifts favours neither.
    """
    import torch

    from support.machine import bfloat16_speedup, pick_dtype

    cuda = torch.cuda.is_available()
    auto = str(pick_dtype("auto", "cuda" if cuda else "cpu")).removeprefix("torch.")
    print(f"--dtype auto is {auto}; bfloat16 is {bfloat16_speedup():.2f} times as fast in products of small matrices")
    measured(launch(WRITE_SD15, folder))
    if not cuda:
        one, other = sorted(os.sched_getaffinity(0))[:2]
        seconds = {OURS: 0, THEIRS: 0}
        for pinned in ({OURS: one, THEIRS: other}, {OURS: other, THEIRS: one}):
            runs = {program: launch(program, folder, "float32", 3, core=core) for program, core in pinned.items()}
            for program, run in runs.items():
                seconds[program] += measured(run)["a step, s"] / 2
        compare("float32, a core each (aim 0.95)", *({"a guided step, s": mean} for mean in seconds.values()))
    default = auto if cuda else "float32"  # diffusers'
    theirs = measured(launch(THEIRS, folder, default, steps))
    for dtype in {default: 0, auto: 0}:
        ours = measured(launch(OURS, folder, dtype, steps))
        compare(f"{dtype} beside {default}, {steps} steps; aims 0.5 for the load, 0.7 for bfloat16", ours, theirs)


# ---------------------------------------------------------------- training at SD 1.5's size

# Steps of Eq. 1 on random latents and prompts
TRAIN = """
z, eps = torch.randn(2, 1, 4, size // 8, size // 8, device=device)
t, P = torch.tensor([500], device=device), torch.randn(1, 77, 768, device=device)
hint, mask = torch.rand(1, 3, size, size, device=device), torch.rand(1, 1, size, size, device=device)
optimizer = torch.optim.AdamW(branch.parameters(), 1e-5, fused=fused)
for _ in range(4):
    with torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=not recompute):
        output = forward()
    (output.float() - eps).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mark()
"""
TRAIN_ARGUMENTS = """
stage, size, dtype, recompute, fused = arguments
dtype = getattr(torch, dtype)
"""
OURS_TRAIN = (TRAIN_ARGUMENTS + """
from model import CategoryGenerator, PersonalityGenerator, Prompts, predict_noise
from programs.trainer import recompute_activations
from weights import control_config, load_control, load_stable_diffusion
""", """
layout = torch.preserve_format if dtype == torch.float32 else torch.channels_last
unet = load_stable_diffusion(folder).unet
branch = (CategoryGenerator if stage == "cg" else PersonalityGenerator)(control_config(unet.config, 8))
branch.init_from_unet(unet)
branch.to(device, memory_format=layout)
frozen = [load_control(f"{folder}/cg", "category")] if stage == "pg" else []
for network in (unet, *frozen):
    network.to(device, dtype, memory_format=layout)
for network in (unet, branch) if recompute else ():
    recompute_activations(network)

def forward():
    branches = [(network, network.hint_features(hint)) for network in (*frozen, branch)]
    return predict_noise(unet, z, t, Prompts(P, P, P), branches, mask)
""", TRAIN)
THEIRS_TRAIN = (TRAIN_ARGUMENTS + """
from diffusers import ControlNetModel, UNet2DConditionModel
""", """
unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet", torch_dtype=dtype).requires_grad_(False).to(device)
branch = ControlNetModel.from_unet(unet).float().to(device).train()

def forward():
    down, middle = branch(z, t, P, controlnet_cond=hint, return_dict=False)
    return unet(z, t, P, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
""", TRAIN)


def train(folder: Path, steps: int) -> None:
    """A step with a micro-batch of 1, beside diffusers' ControlNet at 256 px, and with our options at 512 px."""
    measured(launch(WRITE_SD15, folder))
    for fused in (False, True):
        compare(f"CG, 256 px, float32; the reference's AdamW is {'fused' if fused else 'the default'}", *(
            measured(launch(program, folder, "cg", 256, "float32", False, by_one_kernel)) for program, by_one_kernel in
            ((OURS_TRAIN, True), (THEIRS_TRAIN, fused))))
    for stage in ("cg", "pg"):
        for dtype in ("float32", "bfloat16"):
            for recompute in (False, True):
                run = measured(launch(OURS_TRAIN, folder, stage, 512, dtype, recompute, True))
                print(f"{stage}, 512 px, {dtype}{', --checkpointing' if recompute else ''}: "
                      f"{run['peak, GB']:.1f} GB, {run['a step, s']:.1f} s", flush=True)


# ---------------------------------------------------------------- rivals at full size

# Writes big-lama's generator (0.2 GB) and Paint by Example's public folder (5.2 GB), with random weights
WRITE_RIVALS = (SIZES + """
from pathlib import Path
from model import UNet
from rivals.lama import LaMa
from rivals.paint_by_example import PaintByExampleEncoder
from safetensors.torch import save_file
from vae import VAE as Autoencoder
from weights import CLIP_FILE, UNET_FILE, VAE_FILE, save_module
folder = Path(folder)
""", """
save_file(LaMa(LAMA).state_dict(), folder / "lama.safetensors")
save_module(UNet(UNET | {"in_channels": 9}), folder / "unet", UNET_FILE)
save_module(Autoencoder(VAE), folder / "vae", VAE_FILE)
save_module(PaintByExampleEncoder(VISION), folder / "image_encoder", CLIP_FILE)
""", "")
OURS_LAMA = ("from rivals.lama import load_lama", 'lama = load_lama(f"{folder}/lama.safetensors")', INPUTS + """
with torch.inference_mode():
    for _ in range(3):
        lama(rgb, mask)
        mark()
""")
THEIRS_LAMA = ("""
from safetensors.torch import load_file
from test_lama import specified
""", 'weights = load_file(f"{folder}/lama.safetensors")', INPUTS + """
with torch.inference_mode():
    for _ in range(3):
        (1 - mask) * specified(weights, 3, 18, torch.cat([rgb * mask, 1 - mask], dim=1)) + mask * rgb
        mark()
""")
OURS_EXAMPLE = ("""
from data import Canvas
from rivals.paint_by_example import load_paint_by_example
from sampler import SamplerSettings, seeded
""", "rival = load_paint_by_example(folder)", INPUTS + """
canvas = Canvas(rgb, mask, [], seeded(0), torch.rand(1, 3, 224, 224))
rival.paint(canvas, SamplerSettings(arguments[0], 5.0), on_step=mark)
""")
THEIRS_EXAMPLE = ("""
from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from safetensors.torch import load_file
from transformers import CLIPVisionConfig
""", """
encoder = PaintByExampleImageEncoder(CLIPVisionConfig.from_pretrained(f"{folder}/image_encoder"))
new = "model.embeddings.class_embedding" in encoder.state_dict()  # transformers 5 leaves out a part of the names
encoder.load_state_dict({name.replace("model.vision_model.", "model.") if new else name: tensor for name, tensor in
                         load_file(f"{folder}/image_encoder/model.safetensors").items()})
pipe = PaintByExamplePipeline(
    AutoencoderKL.from_pretrained(f"{folder}/vae"), encoder, UNet2DConditionModel.from_pretrained(f"{folder}/unet"),
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                  set_alpha_to_one=False, steps_offset=1), None, None)
pipe.set_progress_bar_config(disable=True)
""", INPUTS + """
pipe(torch.rand(1, 3, 224, 224), 2 * rgb - 1, 1 - mask, num_inference_steps=arguments[0], guidance_scale=5.0,
     output_type="np", callback=mark)
""")


def rivals(folder: Path, steps: int) -> None:
    """LaMa beside its specification, which is written out in the tests; Paint by Example beside diffusers' pipeline."""
    measured(launch(WRITE_RIVALS, folder))
    for title, ours, theirs in (("LaMa, 512 px, 3 pictures", OURS_LAMA, THEIRS_LAMA),
                                (f"Paint by Example, 512 px, {steps} steps", OURS_EXAMPLE, THEIRS_EXAMPLE)):
        compare(title, measured(launch(ours, folder, steps)), measured(launch(theirs, folder, steps)))


# ---------------------------------------------------------------- a large photo

PHOTO = ("""
from generate import paste_back
from support.images import fit, load_cutout, save_image
""", """
rgb, mask = load_cutout(f"{folder}/photo.jpg", f"{folder}/mask.png")
(canvas, box), small = fit(rgb, 384, 512, "contain"), fit(mask, 384, 512, "contain")[0]
save_image(paste_back(canvas.flip(1), small, box, rgb, mask), f"{folder}/result.png")
""", "")


WRITE_PHOTO = ("from PIL import Image, ImageDraw, ImageFilter", """
size = 8192, 6000
scene, grain = (Image.merge("RGB", [Image.effect_noise(size_then, 90).resize(size) for _ in range(3)])
                for size_then in ((80, 60), size))
Image.blend(scene, grain, 0.03).save(f"{folder}/photo.jpg", quality=92)
mask = Image.new("L", size)
ImageDraw.Draw(mask).ellipse([1500, 800, 6700, 5300], fill=255)
mask.filter(ImageFilter.GaussianBlur(4)).save(f"{folder}/mask.png")
""", "")


def photo(folder: Path, steps: int) -> None:
    """Opens, cuts out, fits, pastes back and saves a photo of 49 megapixels."""
    measured(launch(WRITE_PHOTO, folder))
    run = measured(launch(PHOTO, folder, core=min(os.sched_getaffinity(0))))
    print(f"a photo of 8192 x 6000 on one core: {run['of this the load, s']:.1f} s (aim: 25), "
          f"{run['of this the load, GB']:.2f} GB (aim: 3)")


# ---------------------------------------------------------------- the toy


def process(*arguments) -> tuple[float, float]:
    """The best wall-clock seconds of a process, including its start, and its peak memory in MB."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            sys.exit(f"{arguments} failed")
        best = min(best, time.perf_counter() - start)
    return best, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def toy(out: Path, steps: int) -> None:
    for name, arguments in {
        "generate.py, 50 steps (aims 15 s, 1000 MB)": ("generate.py", "--out", out),
        "    --sampler dpm++ --steps 20 (aim 8 s)": ("generate.py", "--out", out, "--sampler", "dpm++", "--steps", 20),
    }.items():
        seconds, memory = process(*arguments)
        print(f"{name:45} {seconds:6.2f} s {memory:6.0f} MB")


def samplers(_: Path, steps: int) -> None:
    """The root mean square distance to the pictures of 250 DDIM steps from the same noise and with the same spacing, in
    levels of 255, over four held-out products by the toy's CG.
    """
    import torch

    from data import Canvas, prompts_by_category
    from generate import paint
    from programs.models import ModelChoice, load_models
    from sampler import SamplerSettings, seeded
    from support.images import fit, load_cutout

    names = ["perfume", "laptop", "sneaker", "watch"]
    models = load_models(ModelChoice(dtype="float32"), None, {*names})
    texts = prompts_by_category(models.identifiers, models.sd.tokenizer)
    products = zip(*(load_cutout(ROOT / "toy" / "samples" / f"{name}.png") for name in names))
    rgb, mask = (torch.stack([fit(x, models.size, models.size, "contain")[0] for x in xs]) for xs in products)

    def pictures(count: int, sampler: str = "ddim") -> torch.Tensor:
        canvas = Canvas(rgb, mask, [texts[name] for name in names], seeded(0, len(names)))
        return paint(models.sd, canvas, SamplerSettings(count, sampler=sampler), models.cg)

    for spacing in ("leading", "trailing"):
        models.sd.schedule.config["timestep_spacing"] = spacing
        exact = pictures(250)
        for sampler in ("ddim", "dpm++"):
            for count in (5, 10, 20, 50):
                far = 255 * (pictures(count, sampler) - exact).square().mean().sqrt()
                print(f"{spacing:9} {sampler:6} {count:3} steps {far:5.1f}", flush=True)


WHAT = {measure.__name__: measure for measure in (toy, sd15, train, rivals, photo, samplers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="toy", choices=WHAT)
    parser.add_argument("--steps", type=int, default=4, help="sd15, rivals: steps of the pictures [4]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        WHAT[args.what](Path(folder), args.steps)


if __name__ == "__main__":
    main()
