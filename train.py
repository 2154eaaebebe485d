"""Training: Eq. 1 for CG and PG, and the stages that make the toy's own tiny Stable Diffusion.

    python train.py cg                                  # the toy: its shipped base, its ads
    python train.py pg --cg runs/cg/cg
    python train.py cg --data BG60k --weights SD15      # the paper's settings (section 5.1)
    python train.py cg --resume                         # goes on exactly where it stopped

Stages: vae, clip, unet make a base from pictures with captions; cg, then pg with CG frozen, or joint, train the paper's
branches on a frozen base. One loop serves all; a stage is what is trained, on which samples, and its loss.
Everything random in a step is drawn from the run's seed and the step's number, so that resuming needs no more state
than weights, optimiser and step.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (Ads, BadInput, Parser, canvas_size, categories_of, load_ad, one_line_errors, perturb, product_hint,
                  read_items, save_image, sheet)
from generate import IDENTIFIER, TOY, branch_path, categories_file, encode_prompts, load_branch, paint, prompt_texts, real, whole
from model import (CLIP, VAE, CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, TextEncoder, UNet,
                   predict_noise)
from sampler import Schedule, seeded
from toy.world import write_world
from weights import (TEXT_FILES, UNET_FILES, StableDiffusion, check_folder, control_config, load_module,
                     load_stable_diffusion, load_tokenizer, pick_device, read_json, save_control, save_module,
                     train_tokenizer, write_atomic, write_json)

TOY_DATA = TOY / "data"

# Section 5.1; what it does not say is as in ControlNet: AdamW, no schedule, half of the prompts dropped.
PAPER = dict(lr=1e-5, batch=128, epochs=300, size=512, ema=0.0, warmup=0, decay=0.0, noise_offset=0.0,
             weighting="uniform")
PROMPT_DROPOUT = 0.5
CLIP_GRADIENT = 1.0  # gradients longer than this are shortened to it: ours, neither the paper's nor ControlNet's
# The toy's own settings, found by trying.
TOY_BRANCH = dict(lr=1e-3, batch=16, steps=2600, size=128, ema=0.99, warmup=50, decay=0.3, noise_offset=0.1,
                  weighting="debias")
TOY_SETTINGS = {
    "vae": dict(lr=2e-3, batch=12, steps=4800, size=128, ema=0.995, warmup=50, decay=0.5),
    "clip": dict(lr=1e-3, batch=64, steps=800, size=128, ema=0.0, warmup=100, decay=0.5),
    "unet": dict(lr=1e-3, batch=32, steps=9400, size=128, ema=0.999, warmup=100, decay=0.3, noise_offset=0.1,
                 weighting="min-snr"),
    "cg": TOY_BRANCH | dict(steps=4500), "pg": TOY_BRANCH, "joint": TOY_BRANCH,
}  # fmt: skip
KL = 1e-3  # stage vae: weight of the KL term

# The tiny Stable Diffusion: f = 4, so that 128-px pictures keep their edges; all else is SD 1.5's shape made small.
TOY_VAE = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
           "block_out_channels": [32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "silu",
           "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
TOY_UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "act_fn": "silu",
            "block_out_channels": [48, 64, 96, 112], "layers_per_block": 1, "attention_head_dim": [1, 1, 2, 4],
            "cross_attention_dim": 128, "norm_num_groups": 8, "norm_eps": 1e-5,
            "flip_sin_to_cos": True, "freq_shift": 0,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"]}
TOY_TEXT = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_size": 128,
            "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}
TOY_VISION = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 128, "patch_size": 16, "num_channels": 3,
              "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}
TOY_VOCABULARY = 1024  # 512 for single bytes, the rest grown from the captions


# ---------------------------------------------------------------- the loop


@dataclass
class Task:
    """What a stage trains."""

    modules: dict[str, nn.Module]  # trained, by name
    samples: Dataset  # samples[(index, seed)] -> dict of tensors
    loss: Callable[[dict, torch.Generator], Tensor]  # a batch -> scalar
    draw: Callable  # () -> PIL sheet of what the model does now
    save: Callable[[Path], None]  # writes the public folders


def mixed_precision(args) -> torch.autocast:
    """With --amp, a context in which matrix products and convolutions are computed in bfloat16."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


def learning_rate(step: int, args) -> float:
    """Linear warm-up, constant, linear decay over the last part of the run. The paper's is constant throughout."""
    up = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    down = min(1.0, (args.steps - step) / (args.decay * args.steps)) if args.decay else 1.0
    return args.lr * up * down


def seed_of(*parts: object) -> int:
    """A seed that depends on all of `parts`. 32 bits: torch's CPU generator reads no more of a seed."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


class Batches:
    """Sampler: every index once an epoch in random order, each with a seed of its own, from step `start` on."""

    def __init__(self, count: int, batch: int, seed: int, start: int, steps: int):
        self.count, self.batch, self.seed, self.start, self.steps = count, batch, seed, start, steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            keys = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                    order = torch.randperm(self.count, generator=generator).tolist()
                keys.append((order[position % self.count], seed_of(self.seed, "sample", position)))
            yield keys


def run(task: Task, args) -> None:
    """Trains a task to args.steps, with log, sheets and checkpoints in args.out/training/<stage>."""
    folder = args.out / "training" / args.stage
    for module in task.modules.values():
        module.to(memory_format=torch.channels_last)  # the order of numbers in memory that convolutions like best
    # On a CPU the fused attention's backward pass is slow: at the toy's size plain matrix products train faster
    small = args.device == "cpu" and args.size <= 128
    attention = partial(sdpa_kernel, SDPBackend.MATH) if small else nullcontext
    parameters = {f"{m}.{n}": p for m, module in task.modules.items() for n, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), args.lr, weight_decay=args.weight_decay)
    ema = {n: p.detach().clone() for n, p in parameters.items()} if args.ema else {}
    start = load_checkpoint(args, parameters, ema, optimizer) if args.resume else 0
    if start >= args.steps:
        raise BadInput(f"{folder} is already at step {start}; to train further give --steps above {start}")
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "log.jsonl"
    kept = log_file.read_text(encoding="utf-8").splitlines(keepends=True) if args.resume and log_file.exists() else []
    log_file.write_text("".join(line for line in kept if json.loads(line)["step"] <= start), encoding="utf-8")

    micro = args.batch // args.accumulate
    loader = DataLoader(task.samples, num_workers=args.workers,
                        batch_sampler=Batches(len(task.samples), args.batch, args.seed, start, args.steps))
    bar = tqdm(loader, initial=start, total=args.steps, unit="step", disable=not sys.stderr.isatty())
    log = open(log_file, "a", encoding="utf-8")
    average, clock, seen = None, time.perf_counter(), 0
    for step, batch in enumerate(bar, start):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = torch.Generator().manual_seed(seed_of(args.seed, "step", step))
        total = 0.0
        for i in range(args.accumulate):
            part = {k: v[i * micro : (i + 1) * micro].to(args.device) for k, v in batch.items()}
            with mixed_precision(args), attention():
                loss = task.loss(part, generator) / args.accumulate
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise BadInput(f"the loss is {total} at step {step}; what {folder} holds of earlier steps is good: "
                           "resume from it, or start again, with a lower --lr")
        nn.utils.clip_grad_norm_(parameters.values(), CLIP_GRADIENT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            rate = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - rate)

        done, seen = step + 1, seen + args.batch
        average = total if average is None else 0.98 * average + 0.02 * total
        if done % args.log_every == 0 or done == args.steps:
            speed = seen / (time.perf_counter() - clock)
            clock, seen = time.perf_counter(), 0
            bar.set_postfix_str(f"loss {average:.4f}, lr {lr:.1e}, {speed:.1f} images/s")
            line = {"step": done, "loss": round(average, 6), "lr": lr, "images_per_second": round(speed, 2)}
            log.write(json.dumps(line | {"time": round(time.time(), 1)}) + "\n")
            log.flush()
        if done % args.sample_every == 0 or done == args.steps:
            with averaged(parameters, ema), torch.no_grad():
                task.save(args.out)
                save_image(task.draw(), folder / f"sheet_{done:06}.png")
            clock, seen = time.perf_counter(), 0
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, done, parameters, ema, optimizer)
    log.close()


class averaged:
    """Within this context the parameters hold their moving averages (EMA)."""

    def __init__(self, parameters: dict[str, Tensor], ema: dict[str, Tensor]):
        self.parameters, self.ema = parameters, ema

    def swap(self, *_):
        for name, average in self.ema.items():
            p = self.parameters[name]
            p.data, self.ema[name] = average, p.data

    __enter__ = __exit__ = swap


def checkpoint_of(args) -> Path:
    return args.out / "training" / args.stage / "checkpoint.safetensors"


def settings_of(args) -> dict:
    """What must stay the same for a resumed run to be the run that was interrupted."""
    names = ("batch", "accumulate", "steps", "size", "lr", "warmup", "decay", "weight_decay", "ema", "noise_offset",
             "weighting", "seed")
    return {name: getattr(args, name) for name in names}


def save_checkpoint(args, step: int, parameters: dict, ema: dict, optimizer) -> None:
    """Weights, averages and Adam's moments in one safetensors file, the step and the settings in its header."""
    tensors = {f"weights.{n}": p.detach() for n, p in parameters.items()} | {f"ema.{n}": p for n, p in ema.items()}
    for name, p in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if p in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    header = {"step": str(step), "settings": json.dumps(settings_of(args))}
    write_atomic(checkpoint_of(args),
                 lambda path: save_file({n: t.contiguous() for n, t in tensors.items()}, path, header))


def load_checkpoint(args, parameters: dict, ema: dict, optimizer) -> int:
    """Fills everything from the run's checkpoint -> its step. Says on stderr which settings are not the run's own.

    Raises BadInput where the checkpoint is broken or of another model.
    """
    path = checkpoint_of(args)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            step, settings = int(file.metadata()["step"]), json.loads(file.metadata()["settings"])
            names = set(file.keys())
            for name, p in parameters.items():
                p.copy_(file.get_tensor(f"weights.{name}"))
                if name in ema:
                    ema[name].copy_(file.get_tensor(f"ema.{name}"))
                if f"exp_avg.{name}" in names:
                    moments = {m: torch.empty_like(p).copy_(file.get_tensor(f"{m}.{name}"))  # in p's memory format
                               for m in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    except (RuntimeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise BadInput(f"{path} is broken, or of another model or other settings ({str(error).splitlines()[0]}); "
                       "give the options of the run, or start anew with another --out") from None
    changed = [f"{name} {settings.get(name)} -> {value}" for name, value in settings_of(args).items()
               if settings.get(name) != value]
    if changed:
        print(f"resumed with other settings than the run's: {', '.join(changed)}", file=sys.stderr)
    return step


# ---------------------------------------------------------------- samples


class Samples(Dataset):
    """Ads by (index, seed); all randomness of a sample comes from its seed. `perturbed` adds PG's hint (Eq. 5, 6)."""

    def __init__(self, items: list, size: int, perturbed: bool = False):
        self.ads, self.perturbed = Ads(items, size), perturbed

    def __len__(self) -> int:
        return len(self.ads)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        sample = self.ads[index]
        if self.perturbed:
            generator = torch.Generator().manual_seed(seed)
            other = self.ads[int(torch.randint(len(self), (), generator=generator))]["image"]
            sample["background"] = perturb(sample["image"], sample["mask"], other, generator)
        return sample


class Indices(Dataset):
    """Nothing but the index, for a stage that trains on cached latents alone."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"index": key[0]}


@torch.no_grad()
def encode_latents(sd: StableDiffusion, items: list, args) -> tuple[Tensor, Tensor]:
    """The frozen VAE, once over the data set -> mean and standard deviation of every latent, (N, 4, h, w), scaled."""
    count, shape = len(items), sd.latent_shape(args.size, args.size)
    mean, std = torch.empty(count, *shape), torch.empty(count, *shape)
    loader = DataLoader(Ads(items, args.size), batch_size=args.batch // args.accumulate, num_workers=args.workers)
    start = 0
    for images in tqdm(loader, desc="encoding", unit="batch", disable=not sys.stderr.isatty()):
        with mixed_precision(args):
            m, logvar = sd.vae.encode(2 * images["image"].to(args.device) - 1)
        mean[start : start + len(m)] = m * sd.vae.scaling_factor
        std[start : start + len(m)] = (logvar / 2).exp() * sd.vae.scaling_factor
        start += len(m)
    return mean, std


def diffuse(schedule: Schedule, mean: Tensor, std: Tensor, generator,
            noise_offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A draw of z_0, a timestep each, and noise -> z_t, t, ε, z_0. Drawn on the CPU: no device changes a run.

    SD's noisiest z_t still tells the picture's mean, which the pure noise that sampling starts from does not: dark
    scenes come out grey. With noise_offset > 0 the mean of ε varies too (Guttenberg 2023), and the model relies on the
    prompt for the brightness.
    """
    draw = torch.randn(2, *mean.shape, generator=generator).to(mean)
    z_0, eps = mean + std * draw[0], draw[1]
    if noise_offset:
        eps = eps + noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=generator).to(mean)
    t = torch.randint(schedule.T, (len(mean),), generator=generator).to(mean.device)
    return schedule.add_noise(z_0, eps, t), t, eps, z_0


def timestep_weights(schedule: Schedule, kind: str) -> Tensor:
    """The weight of each timestep's error, (T,): 1 ('uniform', Eq. 1), or by its signal-to-noise ratio.

    Nearly clean z_t make most of the error of ε, little of which can be learnt; the noisiest, where the scene is
    decided, make almost none. 'min-snr' (Hang et al. 2023, γ = 5) weights the former down, 'debias' (Yu et al. 2023)
    the former down and the latter up.
    """
    if kind == "uniform":
        return torch.ones(schedule.T)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    weight = snr.clamp(max=5) / snr if kind == "min-snr" else snr.rsqrt()
    return weight if schedule.config["prediction_type"] == "epsilon" else weight * snr / (snr + 1)


# ---------------------------------------------------------------- the paper's branches


def branch_task(args) -> Task:
    """Stages cg, pg and joint: Eq. 1 over the parameters of CG, of PG beside a frozen CG, or of both."""
    sd = load_stable_diffusion(args.weights, args.device, tokenizer=args.tokenizer)
    canvas_size(1, 1, args.size, sd.multiple)  # says so where the size does not fit the base
    items, notes = read_items(args.data)
    print(*notes, sep="\n", file=sys.stderr)
    cg = load_branch("category", args.cg, sd, args) if args.stage == "pg" else None
    categories = read_json(categories_file(args.cg)) if cg else categories_of(items)
    unknown = sorted({item.category for item in items} - set(categories))
    if unknown:
        raise BadInput(f"{args.data}: category {unknown[0]} was not in CG's training set; train CG on this data first")
    texts = [prompt_texts(item.category, IDENTIFIER.format(categories.index(item.category))) for item in items]

    config = control_config(sd.unet.config, sd.vae.factor)
    modules: dict[str, ControlNet] = {}
    torch.manual_seed(args.seed)
    if args.stage in ("cg", "joint"):
        modules["cg"] = cg = CategoryGenerator(config).to(args.device)
    if args.stage in ("pg", "joint"):
        modules["pg"] = PersonalityGenerator(config).to(args.device)
    pg = modules.get("pg")
    for name, module in modules.items():
        module.init_from_unet(sd.unet)
        if args.init_control:
            module.load_state_dict(load_branch("controlnet", args.init_control, sd, args).state_dict())
    for frozen in {sd.unet, cg} - {*modules.values()}:
        frozen.to(memory_format=torch.channels_last)  # as `run` does with what is trained

    weight = timestep_weights(sd.schedule, args.weighting).to(args.device)
    shown = load_shown(items, categories, args)
    mean, std = encode_latents(sd, items, args)
    encoded: dict[tuple, Prompts] = {}

    def prompts(indices: list[int], dropped: list[bool]) -> Prompts:
        wanted = [("", "", "") if drop else texts[i] for i, drop in zip(indices, dropped)]
        for triple in set(wanted) - set(encoded):
            encoded[triple] = encode_prompts(sd, [triple])
        return Prompts(*(torch.cat(parts) for parts in zip(*(encoded[triple] for triple in wanted))))

    def loss(batch: dict, generator) -> Tensor:
        indices, image, mask = batch["index"].tolist(), batch["image"], batch["mask"]
        z_t, t, eps, z_0 = diffuse(sd.schedule, mean[indices].to(args.device), std[indices].to(args.device), generator,
                                   args.noise_offset)
        dropped = (torch.rand(len(indices), generator=generator) < PROMPT_DROPOUT).tolist()
        branches = [(cg, product_hint(image, mask))] + ([(pg, batch["background"])] if pg else [])
        output = predict_noise(sd.unet, z_t, t, prompts(indices, dropped), branches, mask, sd.kept(image, mask))
        error = (output - sd.schedule.target(z_0, eps, t)).square().mean(dim=(1, 2, 3))  # Eq. 1
        return (error * weight[t]).mean()

    return Task(modules, Samples(items, args.size, perturbed=pg is not None), loss,
                lambda: draw_branches(sd, cg, pg, shown, args),
                lambda out: [save_control(m, out / n, args.save_dtype, categories) for n, m in modules.items()])


def load_shown(items: list, categories: list[str], args, count: int = 8) -> list[tuple]:
    """For the sheets: (texts, image, mask, reference, its mask) of the first ads of the test split, where the data set
    has one, then of the last ones of the training set. An ad without a reference is its own.
    """
    split = "bg1k" if args.stage == "cg" else "bgpair"
    test = read_items(args.data, split)[0] if (args.data / f"{split}_info.txt").is_file() else []
    shown = []
    for item in [i for i in (*test, *items[::-1]) if i.category in categories]:
        reference = replace(item, image=item.reference, mask=item.reference_mask) if item.reference else item
        try:
            pictures = *load_ad(item, args.size), *load_ad(reference, args.size)
        except BadInput:
            continue  # named when it is read as part of the data set
        shown.append((prompt_texts(item.category, IDENTIFIER.format(categories.index(item.category))), *pictures))
        if len(shown) == count:
            break
    return shown


def draw_branches(sd: StableDiffusion, cg, pg, shown: list[tuple], args):
    """A column each: product, with PG the reference, the picture painted, and the ad that the product is from."""
    texts, *pictures = zip(*shown)
    rgb, mask, reference, reference_mask = (torch.stack(parts).to(args.device) for parts in pictures)
    references = (reference, reference_mask) if pg else (None, None)
    painted = paint(sd, rgb, mask, list(texts), seeded(args.seed, len(texts)), cg, pg, *references, steps=25)
    rows = {"product": product_hint(rgb, mask)} | ({"reference": reference} if pg else {})
    rows |= {"painted": painted, "ad": rgb}
    return sheet([list(row) for row in rows.values()], row_labels=list(rows))


# ---------------------------------------------------------------- the toy base


def captions_of(items: list) -> list[tuple[str, str]]:
    """The two halves of each picture's caption, in the form of the paper's prompt."""
    if any(item.product is None or item.scene is None for item in items):
        raise BadInput("this stage trains on captions: metadata.jsonl with 'product' and 'scene' on each line")
    return [(f"A photo of {item.product}", f"in the background of {item.scene}") for item in items]


def initial(args, kind: type, config: dict) -> nn.Module:
    """A module to train: random, or with the weights of the folder --init."""
    if args.init:
        return load_module(kind, args.init, UNET_FILES, args.device, torch.float32).train().requires_grad_(True)
    return kind(config).to(args.device)


def vae_task(args) -> Task:
    """Stage vae: reconstruction through a 4-channel latent."""
    items = read_items(args.data)[0]
    torch.manual_seed(args.seed)
    vae = initial(args, VAE, dict(TOY_VAE))
    if args.size % 8:
        raise BadInput(f"--size {args.size}: must be a multiple of 8: the VAE is trained on crops of half the side")
    ads = Ads(items, args.size)
    some = torch.stack([ads[i]["image"] for i in range(0, len(items), max(1, len(items) // 256))])
    # Errors are measured along the colours' principal axes, each scaled by its spread: in plain RGB the brightness
    # outweighs the hues, which then wash out.
    values, axes = torch.linalg.eigh(torch.cov(2 * some.transpose(0, 1).flatten(1)[:, ::16]))
    whiten = (axes / values.sqrt()).T.to(args.device)  # (3, 3)
    crop = args.size // 2

    def loss(batch: dict, generator) -> Tensor:
        x = 2 * batch["image"] - 1
        y0, x0 = torch.randint(args.size - crop + 1, (2,), generator=generator).tolist()
        x = x[:, :, y0 : y0 + crop, x0 : x0 + crop]
        mean, logvar = vae.encode(x)
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        error = vae.decode(z) - x
        white = torch.einsum("ij,bjhw->bihw", whiten, error)
        colour = F.avg_pool2d(white, 4).square().mean() + 0.2 * white.abs().mean()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return colour + KL * kl

    def draw():
        x = some[:8].to(args.device)
        decoded = vae.decode(vae.encode(2 * x - 1)[0]) / 2 + 0.5
        return sheet([list(x), list(decoded)], row_labels=["original", "decoded"])

    def save(out: Path) -> None:
        # the UNet wants latents of unit variance
        z = torch.cat([vae.encode(2 * x.to(args.device) - 1)[0] for x in some.split(32)])
        vae.scaling_factor = vae.config["scaling_factor"] = round(1 / z.std().item(), 5)
        vae.config["sample_size"] = args.size
        save_module(vae, out / "vae", UNET_FILES[0], args.save_dtype)

    return Task({"vae": vae}, Samples(items, args.size), loss, draw, save)


def clip_task(args) -> Task:
    """Stage clip: pictures and their captions into one space (contrastive). The text tower becomes SD's encoder."""
    items = read_items(args.data)[0]
    captions = [", ".join(pair) for pair in captions_of(items)]
    if args.size % TOY_VISION["patch_size"]:
        raise BadInput(f"--size {args.size}: must be a multiple of {TOY_VISION['patch_size']}")
    if args.resume:
        tokenizer = load_tokenizer(args.out / "tokenizer")
    else:  # the identifiers' words belong to the vocabulary, though no caption holds them
        words = [IDENTIFIER.format(" ".join("0123456789"))] * len(captions)
        train_tokenizer(captions + words, TOY_VOCABULARY, TOY_TEXT["max_position_embeddings"], args.out / "tokenizer")
        tokenizer = load_tokenizer(args.out / "tokenizer")
    text = TOY_TEXT | {"vocab_size": tokenizer.bpe.get_vocab_size(), "eos_token_id": tokenizer.end}
    torch.manual_seed(args.seed)
    clip = CLIP({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": TOY_TEXT["projection_dim"],
                 "text_config": text, "vision_config": TOY_VISION | {"image_size": args.size}}).to(args.device)
    # Tokens that no caption holds, the identifiers among them, keep these values: wide enough to be told apart.
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.3)
    for embedding in (clip.text_model.embeddings.position_embedding, clip.vision_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.02)
    ids = tokenizer(captions)
    parts = [tokenizer([pair[k] for pair in captions_of(items)]) for k in (0, 1)]

    def loss(batch: dict, generator) -> Tensor:
        indices = batch["index"].cpu()
        # Half of the texts are one half of a caption: mask-guided attention will read either half alone.
        which = torch.randint(4, (len(indices),), generator=generator)
        tokens = torch.stack([(ids, ids, parts[0], parts[1])[w][i] for w, i in zip(which.tolist(), indices.tolist())])
        image = F.normalize(clip.encode_image(batch["image"]), dim=-1)
        text = F.normalize(clip.encode_text(tokens.to(args.device)), dim=-1)
        logits = clip.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    ads = Ads(items, args.size)

    def draw():
        """The pictures of sixteen captions; below each the one, of those sixteen, that its caption finds."""
        images = torch.stack([ads[i]["image"] for i in range(min(16, len(items)))]).to(args.device)
        text = clip.encode_text(ids[: len(images)].to(args.device))
        image = F.normalize(clip.encode_image(images), dim=-1)
        return sheet([list(images), list(images[(text @ image.T).argmax(dim=1)])], row_labels=["captioned", "found"])

    def save(out: Path) -> None:
        save_module(clip, out / "clip", TEXT_FILES[0], args.save_dtype)
        encoder = TextEncoder(text)
        encoder.text_model = clip.text_model
        save_module(encoder, out / "text_encoder", TEXT_FILES[0], args.save_dtype)

    return Task({"clip": clip}, Samples(items, args.size), loss, draw, save)


def unet_task(args) -> Task:
    """Stage unet: text to image on the base set, where product and scene are independent."""
    items = read_items(args.data)[0]
    base = args.weights
    torch.manual_seed(args.seed)
    config = TOY_UNET | {"sample_size": args.size // 4}
    unet = initial(args, UNet, config)
    if not args.init:
        for name, parameter in unet.named_parameters():  # each residual branch starts at nothing
            if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
                nn.init.zeros_(parameter)
    text_encoder = load_module(TextEncoder, base / "text_encoder", TEXT_FILES, args.device, torch.float32)
    vae = load_module(VAE, base / "vae", UNET_FILES, args.device, torch.float32)
    sd = StableDiffusion(load_tokenizer(base / "tokenizer"), text_encoder, unet, vae, Schedule())
    canvas_size(1, 1, args.size, sd.multiple)
    captions = captions_of(items)
    mean, std = encode_latents(sd, items, args)
    weight = timestep_weights(sd.schedule, args.weighting).to(args.device)

    def loss(batch: dict, generator) -> Tensor:
        indices = batch["index"].tolist()
        z_t, t, eps, z_0 = diffuse(sd.schedule, mean[indices].to(args.device), std[indices].to(args.device), generator,
                                   args.noise_offset)
        # Whole captions, either half alone as mask-guided attention will ask for, and none for the guidance.
        kinds = torch.multinomial(torch.tensor([0.60, 0.12, 0.18, 0.10]), len(indices), True, generator=generator)
        texts = [(", ".join(captions[i]), *captions[i], "")[k] for i, k in zip(indices, kinds.tolist())]
        with torch.no_grad():
            P = sd.prompts(texts)
        error = (unet(z_t, t, P) - eps).square().mean(dim=(1, 2, 3))
        return (error * weight[t]).mean()

    def draw():
        count, ads = min(16, len(items)), Ads(items, args.size)
        blank = torch.zeros(count, 3, args.size, args.size, device=args.device)
        painted = paint(sd, blank, blank[:, :1], [(", ".join(pair),) * 3 for pair in captions[:count]],
                        seeded(0, count), steps=25)
        rows = []
        for start in range(0, count, 8):
            rows += [list(painted[start : start + 8]), [ads[i]["image"] for i in range(start, min(start + 8, count))]]
        return sheet(rows, row_labels=["painted", "captioned"] * (len(rows) // 2))

    def save(out: Path) -> None:
        save_module(unet, out / "unet", UNET_FILES[0], args.save_dtype)
        # what makes the folder a Stable Diffusion for other tools
        index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
                 "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                 "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                 "safety_checker": [None, None], "feature_extractor": [None, None]}
        scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
        write_json(index, out / "model_index.json")
        write_json(scheduler | sd.schedule.config, out / "scheduler" / "scheduler_config.json")

    return Task({"unet": unet}, Indices(len(items)), loss, draw, save)


STAGES = {"vae": vae_task, "clip": clip_task, "unet": unet_task,
          "cg": branch_task, "pg": branch_task, "joint": branch_task}


def toy_data(wanted: Path) -> None:
    """Draws the part of the toy ad world that a stage needs, on first use (up to minutes)."""
    if wanted.parent == TOY_DATA and not wanted.exists():
        print(f"drawing the toy's pictures to {wanted}, once", file=sys.stderr)
        write_world(TOY_DATA, parts=(wanted.name,))


def parse(arguments: list[str] | None = None):
    parser = Parser(description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
        prog, max_help_position=24, width=120))
    parser.add_argument("stage", help="vae, clip, unet, cg, pg or joint")
    add = parser.add_argument_group("what is trained, on what").add_argument
    add("--data", metavar="DIR", type=Path, help="BG60k as released, or with metadata.jsonl [the toy's]")
    add("--weights", metavar="PATH", type=Path,
        help="frozen Stable Diffusion, folder or single file [toy/base; the paper's: SD 1.5]")
    add("--tokenizer", metavar="DIR", type=Path, help="its vocab.json and merges.txt [in --weights; beside a file]")
    add("--cg", metavar="PATH", type=Path, help="stage pg: the trained CG [toy/cg]")
    add("--init", metavar="DIR", type=Path, help="stages vae and unet: start from these weights [random]")
    add("--init-control", metavar="PATH", type=Path,
        help="stages cg to joint: start from a ControlNet, CG or PG, folder or file [SD's encoder, zero convolutions]")
    add("--out", metavar="DIR", type=Path, help="where models, log, sheets and checkpoints go [runs/STAGE]")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add = parser.add_argument_group("settings [without --data the toy's, else the paper's]").add_argument
    add("--size", metavar="N", type=whole(32, 4096), help="side of the training pictures, pixels [toy 128; paper 512]")
    add("--batch", metavar="N", type=whole(1, 65536), help="pictures a step [toy 12 to 64; paper 128]")
    add("--accumulate", metavar="N", type=whole(1, 65536), default=1,
        help="parts in which a batch is computed, to save memory [1]")
    add("--epochs", metavar="N", type=whole(1, 10**6), help="passes over the data, unless --steps is given [paper 300]")
    add("--steps", metavar="N", type=whole(1, 10**9), help="steps in all [toy 800 to 9400; else from --epochs]")
    add("--lr", metavar="X", type=real(1e-9, 10), help="learning rate of AdamW [toy 7e-4 to 2e-3; paper 1e-5]")
    add("--warmup", metavar="N", type=whole(0, 10**9), help="steps in which it rises [toy 50 or 100; paper 0]")
    add("--decay", metavar="X", type=real(0, 1),
        help="last part of the run in which it falls to 0 [toy 0.3 or 0.5; paper 0]")
    add("--weight-decay", metavar="X", type=real(0, 10), default=1e-2, help="of AdamW [0.01, as ControlNet]")
    add("--ema", metavar="X", type=real(0, 0.99999),
        help="decay of the weights' moving average [toy 0 to 0.999; paper 0]")
    add("--noise-offset", metavar="X", type=real(0, 10),
        help="spread of the noise's mean, stages unet to joint [toy 0.1; paper 0]")
    add("--weighting", choices=["uniform", "min-snr", "debias"],
        help="of the error at each timestep, stages unet to joint [toy min-snr or debias; paper uniform]")
    add("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="decides everything random [0]")
    add = parser.add_argument_group("machine and records").add_argument
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--amp", action="store_true", help="mixed precision: bfloat16 matrix products, float32 weights")
    add("--workers", metavar="N", type=whole(0, 256), default=0,
        help="processes that load samples beside the computation [0]")
    add("--log-every", metavar="N", type=whole(1, 10**9), default=20, help="steps between lines of the log [20]")
    add("--save-every", metavar="N", type=whole(1, 10**9), default=250, help="steps between checkpoints [250]")
    add("--sample-every", metavar="N", type=whole(1, 10**9), default=500,
        help="steps between sheets and saved models [500]")
    add("--save-dtype", metavar="NAME", choices=["float32", "float16"], default="float32",
        help="float32 or float16, of the saved models [float32]")
    return parser.parse_args(arguments)


def check(args) -> None:
    """Raises BadInput for what can be told to be wrong before anything is loaded."""
    if args.batch % args.accumulate:
        raise BadInput(f"--accumulate {args.accumulate}: must divide --batch {args.batch}")
    for option, stages in (("init", ("vae", "unet")), ("init_control", ("cg", "pg", "joint"))):
        if getattr(args, option) and args.stage not in stages:
            raise BadInput(f"--{option.replace('_', '-')} belongs to the stages {' and '.join(stages)}; leave it out")
    check_folder(args.out)
    path = checkpoint_of(args)
    if args.resume and not path.is_file():
        raise BadInput(f"nothing to resume: {path} does not exist; leave out --resume, or give the run's --out")
    if path.is_file() and not args.resume:
        raise BadInput(f"--out {args.out} holds a run of this stage; add --resume to go on, or name another folder")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.stage not in STAGES:
        raise BadInput(f"stage {args.stage} does not exist; the stages are {', '.join(STAGES)}")
    toy = args.data is None or args.stage in ("vae", "clip", "unet")
    args.out = args.out or Path("runs") / args.stage
    for name, value in (TOY_SETTINGS[args.stage] if toy else PAPER).items():
        if getattr(args, name, None) is None and not (name == "steps" and args.epochs):
            setattr(args, name, value)
    args.data = args.data or TOY_DATA / ("base" if args.stage in ("vae", "clip", "unet") else "ads")
    if args.stage == "pg":
        args.cg = branch_path("cg", args)
    args.weights = args.weights or TOY / "base"
    check(args)
    args.device, args.dtype = pick_device(args.device), torch.float32
    toy_data(args.data)
    args.save_dtype = getattr(torch, args.save_dtype)
    if args.steps is None:
        args.steps = math.ceil(args.epochs * len(read_items(args.data)[0]) / args.batch)
    run(STAGES[args.stage](args), args)


if __name__ == "__main__":
    with one_line_errors():
        main()
