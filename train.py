"""Training: Eq. 1 for CG and PG, on one process or many; and the stages that make the toy's own tiny Stable Diffusion.

    python train.py cg                                                      # the toy: its shipped base, its ads
    python train.py pg --cg runs/cg/cg
    python train.py cg --data BG60K --weights SD15                          # the paper's settings (section 5.1)
    python train.py cg --resume                                             # goes on exactly where it stopped
    torchrun --nproc_per_node 8 train.py cg --data BG60K --weights SD15     # on eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # on each of two

Stages: vae, clip, unet (in toy/stages.py) make a base from pictures with captions; cg, then pg with CG frozen, or joint,
train the paper's branches on a frozen base; controlnet an ordinary ControlNet, to compare with. One loop serves all; a
stage is what is trained, on which samples, and its loss. Everything random about a sample is drawn from the run's seed
and the sample's position in the run: where a run was interrupted changes nothing; nor, for the paper's branches, how many
processes share a batch and in how many parts it is computed.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (SIGMA, THETA, Ads, BadInput, Item, Parser, canvas_size, categories_of, load_ad, one_line_errors,
                  perturb, product_hint, read_items, save_image, sheet)
from generate import (IDENTIFIER, TOY, branch_path, categories_file, encode_prompts, load_branch, native_bfloat16, paint,
                      prompt_texts, real, whole)
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet, predict_noise
from sampler import Schedule, seeded
from toy.world import write_world
from weights import (CONTROL_FILES, TEXT_FILES, StableDiffusion, check_folder, control_config, load_stable_diffusion,
                     pick_device, processes, read_json, read_log, read_tensors, save_control, version, write_atomic)

TOY_DATA = TOY / "data"

# Section 5.1; what it does not say is as in ControlNet: AdamW, no schedule, half of the prompts dropped.
PAPER = dict(lr=1e-5, batch=128, epochs=300, size=512, ema=0.0, warmup=0, decay=0.0, clip_gradient=0.0,
             noise_offset=0.0, weighting="uniform", prompt_dropout=0.5)
# The toy's own settings, found by trying. Its CG is to find the scene by the prompt: most are kept.
TOY_BRANCH = dict(lr=1e-3, batch=16, steps=2600, size=128, ema=0.99, warmup=50, decay=0.3, clip_gradient=1.0,
                  noise_offset=0.1, weighting="debias", prompt_dropout=0.5)
TOY_SETTINGS = {
    "vae": dict(lr=2e-3, batch=12, steps=4800, size=128, ema=0.995, warmup=50, decay=0.5, clip_gradient=1.0),
    "clip": dict(lr=1e-3, batch=64, steps=800, size=128, ema=0.0, warmup=100, decay=0.5, clip_gradient=1.0),
    "unet": dict(lr=1e-3, batch=32, steps=10400, size=128, ema=0.999, warmup=100, decay=0.3, clip_gradient=1.0,
                 noise_offset=0.1, weighting="min-snr"),
    "cg": TOY_BRANCH | dict(steps=4500, prompt_dropout=0.1), "pg": TOY_BRANCH,
    "joint": TOY_BRANCH | dict(prompt_dropout=0.1), "controlnet": TOY_BRANCH,
}  # fmt: skip
BRANCHES, TOY_STAGES = ("cg", "pg", "joint", "controlnet"), ("vae", "clip", "unet")
WRITTEN = {"config.json", "categories.json", *CONTROL_FILES, *TEXT_FILES, "vocab.json", "merges.txt",
           "tokenizer_config.json"}  # to a trained model's folder

# ---------------------------------------------------------------- processes


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def seed_of(*parts: object) -> int:
    """A seed that depends on all of `parts`. 32 bits: torch's CPU generator reads no more of a seed."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


class Batches:
    """Sampler: every index once an epoch in random order, each with a seed of its own, from step `start` on.

    Of each batch one process of several gets every `world`-th sample, from its rank on.
    """

    def __init__(self, count: int, batch: int, seed: int, start: int, steps: int, rank: int = 0, world: int = 1):
        self.count, self.batch, self.seed, self.start, self.steps = count, batch, seed, start, steps
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            keys = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    generator = Generator().manual_seed(seed_of(self.seed, "order", epoch))
                    order = torch.randperm(self.count, generator=generator).tolist()
                keys.append((order[position % self.count], seed_of(self.seed, "sample", position)))
            yield keys[self.rank :: self.world]


# ---------------------------------------------------------------- the loop


@dataclass
class Task:
    """What a stage trains."""

    modules: dict[str, nn.Module]  # trained, by name
    samples: Dataset  # samples[(index, seed)] -> dict of tensors
    loss: Callable[[dict, Generator], Tensor]  # a batch -> scalar
    draw: Callable  # () -> PIL sheet of what the model does now
    save: Callable[[Path], None]  # writes the public folders


class Step(nn.Module):
    """A task's loss as a module, whose gradients DistributedDataParallel averages over the processes."""

    def __init__(self, task: Task):
        super().__init__()
        self.trained, self.loss = nn.ModuleDict(task.modules), task.loss

    def forward(self, batch: dict, generator: Generator) -> Tensor:
        return self.loss(batch, generator)


def mixed_precision(args) -> torch.autocast:
    """With --amp, a context in which matrix products and convolutions are computed in half precision.

    It keeps the weights' half-precision copies until it is left, except with --checkpointing, where memory counts more.
    """
    return torch.autocast(torch.device(args.device).type, args.amp, enabled=args.amp is not None,
                          cache_enabled=not args.checkpointing)


def memory_format(args) -> torch.memory_format:
    """The order of a picture's numbers in memory that convolutions like best: float32 of full size is the exception."""
    return torch.channels_last if args.amp or args.size <= 128 else torch.contiguous_format


def learning_rate(step: int, args) -> float:
    """Linear warm-up, constant, linear decay over the last part of the run. The paper's is constant throughout."""
    up = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    down = min(1.0, (args.steps - step) / (args.decay * args.steps)) if args.decay else 1.0
    return args.lr * up * down


def run(task: Task, args) -> None:
    """Trains a task to args.steps, with log, sheets and checkpoints in args.out/training/<stage>.

    On SIGTERM the step is finished, a checkpoint written, and the program left with status 143.
    """
    (rank, world), folder = processes(), args.out / "training" / args.stage
    for module in task.modules.values():
        module.to(memory_format=memory_format(args))
    # On a CPU the fused attention's backward pass is slow: at the toy's size plain matrix products train faster
    small = args.device == "cpu" and args.size <= 128
    attention = partial(sdpa_kernel, SDPBackend.MATH) if small else nullcontext
    parameters = {f"{m}.{n}": p for m, module in task.modules.items() for n, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), args.lr, weight_decay=args.weight_decay, fused=True)
    # Half-precision gradients would vanish below 6e-8: in float16 the loss is scaled up, and the gradients back down
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == torch.float16)
    ema = {n: p.detach().clone() for n, p in parameters.items()} if args.ema else {}
    start = load_checkpoint(args, parameters, ema, optimizer, scaler) if args.resume else 0
    if start >= args.steps:
        raise BadInput(f"{folder} is already at step {start}; to train further give --steps above {start}")
    model = Step(task)
    if world > 1:
        model = DistributedDataParallel(model)
    log = open_log(folder / "log.jsonl", start) if rank == 0 else None

    loader = DataLoader(task.samples, num_workers=args.workers, pin_memory=args.device != "cpu", worker_init_fn=outlive,
                        batch_sampler=Batches(len(task.samples), args.batch, args.seed, start, args.steps, rank, world))
    bar = tqdm(loader, initial=start, total=args.steps, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    stopped = []
    handler = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    average, clock, seen = None, time.perf_counter(), 0
    for step, batch in enumerate(bar, start):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros(2, device=args.device)  # the loss, and whether to stop; NCCL sums on GPUs only
        while True:
            try:
                total[0] = accumulate(model, batch, step, scaler, attention, args)
                break
            except torch.OutOfMemoryError:
                fit_memory(args)
            optimizer.zero_grad(set_to_none=True)
        total[1] = len(stopped)
        if world > 1:
            dist.all_reduce(total)
        total, stop = total[0].item() / world, bool(total[1])
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters.values(), args.clip_gradient or math.inf).item()
        # a scaler skips steps whose gradients overflow, and scales the next loss less
        if not math.isfinite(total) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise BadInput(f"the loss is {total}, its gradient's length {norm} at step {step}; what {folder} holds of "
                           "earlier steps is good: resume from it, or start again, with a lower --lr")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            rate = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - rate)

        done, seen = step + 1, seen + args.batch
        average = total if average is None else 0.98 * average + 0.02 * total
        if rank == 0:
            if done % args.log_every == 0 or done == args.steps:
                speed = seen / (time.perf_counter() - clock)
                clock, seen = time.perf_counter(), 0
                bar.set_postfix_str(f"loss {average:.4f}, lr {lr:.1e}, {speed:.1f} images/s")
                line = {"step": done, "loss": round(average, 6), "lr": lr, "images_per_second": round(speed, 2)}
                log.write(json.dumps(line | {"time": round(time.time(), 1)}) + "\n")
                log.flush()
            shown = done % args.sample_every == 0 or done == args.steps
            try:
                if shown:
                    with averaged(parameters, ema), torch.no_grad(), mixed_precision(args):
                        task.save(args.out)
                if done % args.save_every == 0 or done == args.steps or stop:
                    save_checkpoint(args, done, parameters, ema, optimizer, scaler)
                if shown:  # last: it may not fit the memory
                    try:
                        with averaged(parameters, ema), torch.no_grad(), mixed_precision(args):
                            save_image(task.draw(), folder / f"sheet_{done:06}.png")
                    except torch.OutOfMemoryError:
                        print("no sheet: painting it does not fit the GPU's memory", file=sys.stderr)
                    clock, seen = time.perf_counter(), 0
            except (OSError, SafetensorError) as error:
                left = [f": {old.name} is whole" for old in checkpoints(args)[-1:]]
                raise BadInput(f"{args.out} can't be written ({error}); make room and add --resume{''.join(left)}") from None
        if stop and done < args.steps:
            barrier()
            print(f"stopped at step {done}; --resume goes on from there", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)
    if log:
        log.close()
    barrier()  # what the first process saves is there when any goes on


def outlive(worker: int) -> None:
    """A loader's worker leaves SIGTERM, which torchrun and batch systems send to all processes, to the one it serves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def accumulate(model: nn.Module, batch: dict, step: int, scaler, attention: Callable, args) -> float:
    """Adds up the gradients of a process's share of a batch, in parts of args.micro_batch samples -> its mean loss."""
    rank, world = processes()
    generator = Generator().manual_seed(seed_of(args.seed, "step", step, *([rank] if rank else [])))
    parts, total = args.batch // world // args.micro_batch, 0.0
    for i in range(parts):
        micro = slice(i * args.micro_batch, (i + 1) * args.micro_batch)
        part = {k: v[micro].to(args.device, non_blocking=True) for k, v in batch.items()}
        last = nullcontext() if world == 1 or i == parts - 1 else model.no_sync()
        with last, mixed_precision(args), attention():
            loss = model(part, generator) / parts
            scaler.scale(loss).backward()
        total += loss.item()
    return total


def divisor(n: int, at_most: int) -> int:
    """The largest divisor of n up to a limit."""
    return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)


def fit_memory(args) -> None:
    """After a step that did not fit the memory: the next smaller micro-batch. Raises BadInput where there is none, and
    where other processes are in the middle of the step.
    """
    if processes()[1] > 1 or args.micro_batch == 1 or args.stage == "clip":
        raise BadInput(f"--micro-batch {args.micro_batch} does not fit the memory of {args.device}: "
                       f"{'give a smaller one, or ' if args.micro_batch > 1 else ''}add --amp"
                       f"{' or --checkpointing' if args.stage in BRANCHES else ''}")
    smaller = divisor(args.batch, args.micro_batch - 1)
    print(f"--micro-batch {args.micro_batch} does not fit the memory of {args.device}, goes on with {smaller}",
          file=sys.stderr)
    args.micro_batch = smaller
    if args.device != "cpu":
        torch.cuda.empty_cache()


def open_log(file: Path, start: int):
    """A log to append to, without the lines of steps after `start` that an interrupted run has left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in (read_log(file) if start else []) if line["step"] <= start]
    write_atomic(file, lambda new: new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"))
    return open(file, "a", encoding="utf-8")


class averaged:
    """Within this context the parameters hold their moving averages (EMA)."""

    def __init__(self, parameters: dict[str, Tensor], ema: dict[str, Tensor]):
        self.parameters, self.ema = parameters, ema

    def swap(self, *_):
        for name, average in self.ema.items():
            p = self.parameters[name]
            p.data, self.ema[name] = average, p.data

    __enter__ = __exit__ = swap


# ---------------------------------------------------------------- checkpoints


def checkpoints(args) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((args.out / "training" / args.stage).glob("checkpoint_*.safetensors"))


def settings_of(args) -> dict:
    """What must stay the same for a resumed run to be the run that was interrupted."""
    names = ("data", "weights", "tokenizer", "cg", "init_control", "batch", "steps", "size", "lr", "warmup", "decay",
             "weight_decay", "clip_gradient", "ema", "noise_offset", "weighting", "prompt_dropout", "theta", "sigma", "seed",
             "amp")
    values = {name: getattr(args, name) for name in names}
    return {name: value if isinstance(value, (int, float, list)) else str(value)
            for name, value in values.items()} | {"identifiers": hashed(args.identifiers), "frozen weights": args.frozen}


def save_checkpoint(args, step: int, parameters: dict, ema: dict, optimizer, scaler) -> None:
    """Weights, averages and Adam's moments in one safetensors file, the step and the settings in its header.

    The newest --keep stay. Random states need no saving: they follow from seed and step.
    """
    tensors = {f"weights.{n}": p.detach() for n, p in parameters.items()} | {f"ema.{n}": p for n, p in ema.items()}
    for name, p in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if p in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    # Adam counts fewer steps than the run where a scaler skipped some
    counts = [int(state["step"]) for state in optimizer.state.values()]
    header = {"step": str(step), "adam": str(max(counts, default=0)), "settings": json.dumps(settings_of(args)),
              "scaler": json.dumps(scaler.state_dict())}
    path = args.out / "training" / args.stage / f"checkpoint_{step:08}.safetensors"
    write_atomic(path, lambda new: save_file({n: t.contiguous() for n, t in tensors.items()}, new, header))
    for old in checkpoints(args)[: -args.keep]:
        old.unlink()
    for left in path.parent.glob(".checkpoint_*"):  # by a process killed while it wrote
        shutil.rmtree(left)


def load_checkpoint(args, parameters: dict, ema: dict, optimizer, scaler) -> int:
    """Fills everything from the run's newest checkpoint -> its step. Tells on stderr which settings are not the run's.

    Raises BadInput where the checkpoint is broken or of another model.
    """
    path = checkpoints(args)[-1]
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            header = file.metadata()
            step, settings = int(header["step"]), json.loads(header["settings"])
            adam = float(header.get("adam", step))
            for name, p in parameters.items():
                p.copy_(file.get_tensor(f"weights.{name}"))
                if ema:
                    ema[name].copy_(file.get_tensor(f"ema.{name}"))
                if f"exp_avg.{name}" in file.keys():
                    moments = {m: torch.empty_like(p).copy_(file.get_tensor(f"{m}.{name}"))
                               for m in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[p] = {"step": torch.tensor(adam, device=p.device), **moments}
            if scaler.is_enabled():
                scaler.load_state_dict(json.loads(header["scaler"]))
    except (RuntimeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise BadInput(f"{path} is broken, or of another model or other settings ({str(error).splitlines()[0]}); "
                       "give the options of the run, or remove it to go on from the one before") from None
    now = json.loads(json.dumps(settings_of(args)))
    if settings.get("identifiers") != now["identifiers"]:
        raise BadInput(f"the categories of {args.data}, or their identifiers, are not those that the run began with; "
                       "give the run's --data and --identifier, or train anew to another --out")
    changed = [f"{name} {settings.get(name)} -> {now[name]}" for name in now if settings.get(name) != now[name]]
    if changed and processes()[0] == 0:
        print(f"resumed with other settings than the run's: {', '.join(changed)}", file=sys.stderr)
    return step


# ---------------------------------------------------------------- what frozen networks make of the data, once


def cached(folder: Path, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors computed once and kept in a file named by a hash of all they depend on; memory-mapped.

    Nothing stale is read: what has changed has another name. An interrupted computation leaves nothing.
    """
    path = folder / f"{hashed(key)}.safetensors"
    if not path.exists():
        write_atomic(path, lambda new: save_file({n: t.contiguous() for n, t in compute().items()}, new))
    return read_tensors(path)


def hashed(key: object) -> str:
    """A hash of what JSON can hold."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def digest(module: nn.Module) -> str:
    """A hash of a module's weights."""
    h = hashlib.blake2b(digest_size=16)
    for p in module.state_dict().values():
        h.update(p.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return h.hexdigest()


def stamp(path: Path | None) -> list:
    """What changes when a file does."""
    return [str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] if path else []


class Latents:
    """The frozen VAE, once over a data set: mean and log-variance of every latent, in files of `PART` items each.

    latents[i] -> mean, standard deviation, both (4, h, w) float32, scaled as the UNet's; and for an inpainting UNet
    what it reads beside z_t, (5, h, w), else None. Processes share the work; files that are there are not made again.
    """

    PART = 1024

    def __init__(self, sd: StableDiffusion, items: list[Item], args):
        rank, world = processes()
        self.scale, self.T, ads = sd.vae.scaling_factor, sd.schedule.T, Ads(items, args.size)
        weights = [digest(sd.vae), args.size, str(args.amp), sd.unet.config["in_channels"]]
        starts = range(0, len(items), self.PART)
        stamps = [[stamp(item.image), stamp(item.mask), item.inverted] for item in items]
        keys = [weights + stamps[start : start + self.PART] for start in starts]
        bar = tqdm(total=len(items), desc="encoding", unit="image", disable=rank > 0 or not sys.stderr.isatty())

        def encode(start: int) -> dict[str, Tensor]:
            rows = {}
            indices = range(start, min(start + self.PART, len(items)))
            loader = DataLoader(torch.utils.data.Subset(ads, indices), min(8, args.micro_batch),
                                num_workers=args.workers)
            for batch in loader:
                image, mask = batch["image"].to(args.device), batch["mask"].to(args.device)
                with torch.no_grad(), mixed_precision(args):
                    mean, logvar = sd.vae.encode(2 * image.to(sd.vae.quant_conv.weight) - 1)
                    made = {"mean": mean, "logvar": logvar, "inpainting": sd.inpainting(image.to(mean), mask)}
                for name, x in made.items():
                    if x is not None:
                        rows.setdefault(name, []).append(x.to("cpu", torch.float16))
                bar.update(len(image) * world)
            return {name: torch.cat(x) for name, x in rows.items()}

        for start, key in list(zip(starts, keys))[rank::world]:
            cached(args.cache, key, partial(encode, start))
        bar.close()
        barrier()
        self.parts = [cached(args.cache, key, partial(encode, start)) for start, key in zip(starts, keys)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        part, row = self.parts[index // self.PART], index % self.PART
        mean, std = part["mean"][row].float(), (part["logvar"][row].float() / 2).exp()
        return mean * self.scale, std * self.scale, part["inpainting"][row].float() if "inpainting" in part else None


# ---------------------------------------------------------------- samples


class Samples(Dataset):
    """Training samples by (index, seed); all randomness of one comes from its seed, on whichever worker makes it.

    {"index"} and, of `pictures`, {"image", "mask"}; `perturbed` adds PG's hint "background" (Eq. 5, 6); with `latents`
    what one step of Eq. 1 draws: "z_0", "eps", "t", and a number "drop" in [0, 1): is the prompt dropped?
    """

    def __init__(self, items: list[Item], args, latents: Latents | None = None, pictures: bool = True,
                 perturbed: bool = False):
        self.ads, self.args, self.latents = Ads(items, args.size), args, latents
        self.pictures, self.perturbed = pictures, perturbed

    def __len__(self) -> int:
        return len(self.ads)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        args, generator = self.args, Generator().manual_seed(seed)
        sample = self.ads[index] if self.pictures else {"index": index}
        if self.perturbed:
            step = int(torch.randint(1, max(2, len(self)), (), generator=generator))  # to another ad
            other = self.ads[(sample["index"] + step) % len(self)]["image"]
            sample["background"] = perturb(sample["image"], sample["mask"], other, generator, args.theta, args.sigma)
        if self.latents:
            mean, std, inpainting = self.latents[sample["index"]]
            z_0, eps, t = diffuse(mean, std, generator, self.latents.T, args.noise_offset)
            sample |= {"z_0": z_0, "eps": eps, "t": t}
            sample["drop"] = torch.rand((), generator=generator)
            if inpainting is not None:
                sample["inpainting"] = inpainting
        return sample


def diffuse(mean: Tensor, std: Tensor, generator: Generator, T: int,
            noise_offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """A draw of z_0 (4, h, w) from the VAE's posterior, noise ε of its shape, and a timestep t () of T.

    SD's noisiest z_t still tells the picture's mean, which the pure noise that sampling starts from does not: dark
    scenes come out grey. With noise_offset > 0 the mean of ε varies too (Guttenberg 2023), and the model relies on the
    prompt for the brightness.
    """
    draw = torch.randn(2, *mean.shape, generator=generator)
    z_0, eps = mean + std * draw[0], draw[1]
    if noise_offset:
        eps = eps + noise_offset * torch.randn(len(mean), 1, 1, generator=generator)
    return z_0, eps, torch.randint(T, (), generator=generator)


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
    """Stages cg, pg and joint: Eq. 1 over the parameters of CG, of PG beside a frozen CG, or of both; and controlnet, a
    plain ControlNet in CG's place, which reads P: a picture's caption, where the data set has captions.
    """
    sd = load_stable_diffusion(args.weights, args.device, tokenizer=args.tokenizer)
    canvas_size(1, 1, args.size, sd.multiple)  # says so where the size does not fit the base
    items, notes = read_items(args.data)
    if processes()[0] == 0:
        print(*notes, sep="\n", file=sys.stderr)
    cg = load_branch("category", args.cg, sd, args) if args.stage == "pg" else None
    identifiers = (read_json(categories_file(args.cg)) if cg else
                   {name: args.identifier.replace("{}", str(i)) for i, name in enumerate(categories_of(items))})
    args.identifiers, categories = identifiers, [*identifiers]
    args.frozen = hashed([version(path) for path in (args.weights, args.cg) if path])
    unknown = sorted({item.category for item in items} - set(categories))
    if unknown:
        raise BadInput(f"{args.data}: category {unknown[0]} was not in CG's training set; train CG on this data first")

    config = control_config(sd.unet.config, sd.vae.factor)
    modules: dict[str, ControlNet] = {}
    torch.manual_seed(args.seed)
    if args.stage in ("cg", "joint"):
        modules["cg"] = cg = CategoryGenerator(config).to(args.device)
    if args.stage in ("pg", "joint"):
        modules["pg"] = PersonalityGenerator(config).to(args.device)
    if args.stage == "controlnet":
        modules["controlnet"] = cg = ControlNet(config).to(args.device)
    pg = modules.get("pg")
    for module in modules.values():
        module.init_from_unet(sd.unet)
        if args.init_control:
            given = load_branch("controlnet", args.init_control, sd, args)
            if given.config["conditioning_embedding_out_channels"] != config["conditioning_embedding_out_channels"]:
                raise BadInput(f"--init-control {args.init_control}: its hint encoder has other channels than ours")
            module.load_state_dict(given.state_dict())
    for frozen in {sd.unet, sd.vae, sd.text_encoder, cg} - {*modules.values(), None}:
        frozen.to(args.amp or torch.float32, memory_format=memory_format(args))  # as `run` orders what is trained
    for network in (sd.unet, *modules.values()) if args.checkpointing else ():
        network.recompute_activations()

    weight = timestep_weights(sd.schedule, args.weighting).to(args.device)
    captions = args.stage == "controlnet" and all(item.caption for item in items)
    shown = load_shown(items, identifiers, captions, args)
    latents = Latents(sd, items, args)
    table = prompt_table(sd, identifiers, args)
    row = [categories.index(item.category) for item in items]
    # training needs the VAE no more, and the text encoder for captions alone
    sd = replace(sd, vae=None, text_encoder=sd.text_encoder if captions else None)

    def prompts_of(batch: dict) -> Prompts:
        indices, dropped = batch["index"].tolist(), (batch["drop"] < args.prompt_dropout).tolist()
        if captions:  # as many as pictures: encoded when they are needed
            with torch.no_grad():
                P = sd.prompts(["" if d else ", ".join(items[i].caption) for i, d in zip(indices, dropped)])
            return Prompts(P, P, P)
        rows = [len(categories) if d else row[i] for i, d in zip(indices, dropped)]
        return Prompts(*table[rows].to(args.device).unbind(1))

    def loss(batch: dict, generator) -> Tensor:
        z_0, eps, t, image, mask = (batch[name] for name in ("z_0", "eps", "t", "image", "mask"))
        prompts = prompts_of(batch)
        branches = [(cg, product_hint(image, mask))] + ([(pg, batch["background"])] if pg else [])
        z_t = sd.schedule.add_noise(z_0, eps, t)
        output = predict_noise(sd.unet, z_t, t, prompts, branches, mask, batch.get("inpainting")).float()
        error = (output - sd.schedule.target(z_0, eps, t)).square().mean(dim=(1, 2, 3))  # Eq. 1
        return (error * weight[t]).mean()

    return Task(modules, Samples(items, args, latents, perturbed=pg is not None), loss,
                lambda: draw_branches(sd.unet, cg, pg, shown, args),
                lambda out: [save_control(m, out / n, args.save_dtype, identifiers) for n, m in modules.items()])


def prompt_table(sd: StableDiffusion, identifiers: dict[str, str], args) -> Tensor:
    """The encodings of P, P_fg and P_bg of every category, and of '' last: (C + 1, 3, L, D), memory-mapped."""
    texts = [prompt_texts(*pair) for pair in identifiers.items()] + [("", "", "")]

    def encode() -> dict[str, Tensor]:
        with torch.no_grad(), mixed_precision(args):
            triples = [torch.stack([*encode_prompts(sd, [triple])], dim=1) for triple in texts]  # (1, 3, L, D) each
        return {"prompts": torch.cat(triples).cpu()}

    key = [digest(sd.text_encoder), sd.tokenizer.bpe.to_str(), texts, str(args.amp)]
    if processes()[0] == 0:
        cached(args.cache, key, encode)
    barrier()
    return cached(args.cache, key, encode)["prompts"]


def load_shown(items: list, identifiers: dict[str, str], captions: bool, args, count: int = 8) -> list[tuple]:
    """For the sheets: (texts, image, mask, reference, its mask) of the first ads of the test split, where the data set
    has one, then of the last ones of the training set. An ad without a reference is its own.
    """
    split = "bgpair" if args.stage in ("pg", "joint") else "bg1k"
    try:
        test = read_items(args.data, split)[0] if (args.data / f"{split}_info.txt").is_file() else []
    except BadInput:
        test = []  # its folders may not be there
    shown = []
    for item in [i for i in (*test, *items[::-1]) if i.category in identifiers]:
        reference = replace(item, image=item.reference, mask=item.reference_mask) if item.reference else item
        try:
            pictures = *load_ad(item, args.size), *load_ad(reference, args.size)
        except BadInput:
            continue  # named when it is read as part of the data set
        texts = prompt_texts(item.category, identifiers[item.category])
        shown.append(((", ".join(item.caption),) * 3 if captions else texts, *pictures))
        if len(shown) == count:
            break
    return shown


def draw_branches(unet: UNet, cg, pg, shown: list[tuple], args):
    """A column each: product, with PG the reference, the picture painted, and the ad that the product is from."""
    fresh = load_stable_diffusion(args.weights, "cpu", tokenizer=args.tokenizer)  # VAE and text encoder, for a moment
    sd = replace(fresh, unet=unet, vae=fresh.vae.to(args.device), text_encoder=fresh.text_encoder.to(args.device))
    texts, *pictures = zip(*shown)
    rgb, mask, reference, reference_mask = (torch.stack(parts).to(args.device) for parts in pictures)
    references = (reference, reference_mask) if pg else (None, None)
    painted = paint(sd, rgb, mask, list(texts), seeded(args.seed, len(texts)), cg, pg, *references, steps=25)
    rows = {"product": product_hint(rgb, mask)} | ({"reference": reference} if pg else {})
    rows |= {"painted": painted, "ad": rgb}
    return sheet([list(row) for row in rows.values()], row_labels=list(rows))


# ---------------------------------------------------------------- the command line


def toy_data(wanted: Path) -> None:
    """Draws the part of the toy ad world that a stage needs, on first use (up to minutes)."""
    if wanted in (TOY_DATA / "base", TOY_DATA / "ads") and not wanted.exists() and processes()[0] == 0:
        print(f"drawing the toy's pictures to {wanted}, once", file=sys.stderr)
        write_world(TOY_DATA, parts=(wanted.name,))
    barrier()


def parse(arguments: list[str] | None = None):
    parser = Parser(description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
        prog, max_help_position=24, width=120))
    parser.add_argument("stage", help=", ".join((*TOY_STAGES, *BRANCHES)))
    add = parser.add_argument_group("what is trained, on what").add_argument
    add("--data", metavar="DIR", type=Path, help="BG60k as released, or with metadata.jsonl [the toy's]")
    add("--weights", metavar="PATH", type=Path,
        help="frozen Stable Diffusion, folder or single file [toy/base; the paper's: SD 1.5]")
    add("--tokenizer", metavar="DIR", type=Path, help="its vocab.json and merges.txt [in --weights; beside a file]")
    add("--cg", metavar="PATH", type=Path, help="stage pg: the trained CG [toy/cg]")
    add("--init", metavar="DIR", type=Path, help="stages vae and unet: start from these weights [random]")
    add("--init-control", metavar="PATH", type=Path,
        help="the branches' stages: start from a ControlNet, CG or PG, folder or file [SD's encoder, zero convolutions]")
    add("--out", metavar="DIR", type=Path, help="where models, log, sheets and checkpoints go [runs/STAGE]")
    add("--cache", metavar="DIR", type=Path,
        help="where latents and prompts are kept, encoded once; may be deleted [cache/ beside --out]")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add = parser.add_argument_group("the method's settings [on the toy's data the toy's, else the paper's]").add_argument
    add("--size", metavar="N", type=whole(32, 4096),
        help="side of the training pictures, pixels [toy 128; paper 512, section 5.1]")
    add("--prompt-dropout", metavar="X", type=real(0, 1),
        help="part of the prompts replaced by '', stages cg to controlnet [0.5, as ControlNet; toy's CG 0.1]")
    add("--theta", metavar="N", type=whole(0, 512),
        help=f"PG's dilation in pixels of a 512-px image; 0: masks stay as they are [{THETA}, Eq. 5, section 5.1]")
    add("--sigma", metavar=("LOW", "HIGH"), type=real(0, 1), nargs=2,
        help=f"PG's mixup, range of the image's part; 1 1: none [{SIGMA[0]} {SIGMA[1]}, Eq. 6, section 5.1]")
    add("--noise-offset", metavar="X", type=real(0, 10),
        help="spread of the noise's mean, stages unet to controlnet [toy 0.1; paper 0]")
    add("--weighting", choices=["uniform", "min-snr", "debias"],
        help="of the error at each timestep, stages unet to controlnet [toy min-snr or debias; paper uniform, Eq. 1]")
    add("--identifier", metavar="TEXT",
        help=f"[D] of a category, with {{}} for its number, stages cg, joint and controlnet [{IDENTIFIER!r}, section 5.1]")
    add = parser.add_argument_group("the optimiser's settings [likewise]").add_argument
    add("--lr", metavar="X", type=real(1e-9, 10),
        help="learning rate of AdamW [toy 1e-3 or 2e-3; paper 1e-5, section 5.1]")
    add("--batch", metavar="N", type=whole(1, 65536),
        help="pictures a step, over all processes [toy 12 to 64; paper 128, section 5.1]")
    add("--micro-batch", metavar="N", type=whole(1, 65536),
        help="of these, how many a process computes at once: less needs less memory "
             "[toy all; else 4, on one GPU 16, or as many of them as fit]")
    add("--epochs", metavar="N", type=whole(1, 10**6),
        help="passes over the data, unless --steps is given [paper 300, section 5.1]")
    add("--steps", metavar="N", type=whole(1, 10**9), help="steps in all [toy 800 to 10400; else from --epochs]")
    add("--warmup", metavar="N", type=whole(0, 10**9), help="steps in which the rate rises [toy 50 or 100; paper 0]")
    add("--decay", metavar="X", type=real(0, 1),
        help="last part of the run in which it falls to 0 [toy 0.3 or 0.5; paper 0]")
    add("--weight-decay", metavar="X", type=real(0, 10), default=1e-2, help="of AdamW [0.01, as ControlNet]")
    add("--clip-gradient", metavar="X", type=real(0, 1e6),
        help="gradients longer than this are shortened to it; 0: none are [toy 1; paper 0]")
    add("--ema", metavar="X", type=real(0, 0.99999),
        help="decay of the weights' moving average [toy 0 to 0.999; paper 0: none]")
    add("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="decides everything random [0]")
    add = parser.add_argument_group("machine and records").add_argument
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--amp", nargs="?", const="bfloat16", choices=["bfloat16", "float16"],
        help="mixed precision: products in bfloat16, or in float16 with a gradient scaler; trained weights stay float32")
    add("--checkpointing", action="store_true",
        help="compute activations again for the backward pass instead of keeping them: less memory, more time")
    add("--workers", metavar="N", type=whole(0, 256),
        help="processes that load samples beside the computation [0 up to 128 px; else one a core, at most 8]")
    add("--log-every", metavar="N", type=whole(1, 10**9), default=20, help="steps between lines of the log [20]")
    add("--save-every", metavar="N", type=whole(1, 10**9), default=250, help="steps between checkpoints [250]")
    add("--keep", metavar="N", type=whole(1, 10**6), default=2, help="so many of the newest checkpoints stay [2]")
    add("--sample-every", metavar="N", type=whole(1, 10**9), default=500,
        help="steps between sheets and saved models [500]")
    add("--save-dtype", metavar="NAME", choices=["float32", "float16"], default="float32",
        help="float32 or float16, of the saved models [float32]")
    return parser.parse_args(arguments)


def check(args, at_most: int) -> None:
    """Raises BadInput for what can be told to be wrong before anything is loaded. Settles args.micro_batch: where it was
    not given, the largest part of a process's share with `at_most` samples.
    """
    world = processes()[1]
    if args.batch % world:
        raise BadInput(f"--batch {args.batch}: must be a multiple of the {world} processes")
    share = args.batch // world
    args.micro_batch = min(args.micro_batch, share) if args.micro_batch else divisor(share, at_most)
    if share % args.micro_batch:
        raise BadInput(f"--micro-batch {args.micro_batch}: must divide --batch {args.batch}"
                       f"{f' over {world} processes' if world > 1 else ''}")
    if args.stage == "clip" and args.micro_batch < args.batch:
        raise BadInput("stage clip tells the pictures of a batch apart, and needs all at once: one process, and no "
                       "--micro-batch")
    if args.sigma and args.sigma[0] > args.sigma[1]:
        raise BadInput("--sigma: give the lower number first")
    for options, stages in ((("init",), ("vae", "unet")), (("cg",), ("pg",)), (("theta", "sigma"), ("pg", "joint")),
                            (("identifier",), ("cg", "joint", "controlnet")),
                            (("init_control", "checkpointing", "prompt_dropout", "tokenizer"), BRANCHES),
                            (("weights", "weighting", "noise_offset"), ("unet", *BRANCHES))):
        for option in options:
            value = getattr(args, option)
            if value is not None and value is not False and args.stage not in stages:
                raise BadInput(f"--{option.replace('_', '-')} belongs to stage {' and '.join(stages)}; leave it out")
    if args.identifier and "{}" not in args.identifier:
        raise BadInput(f"--identifier {args.identifier}: needs {{}} where the category's number is to stand")
    check_folder(args.out)
    for name in {"joint": ("cg", "pg"), "clip": ("clip", "text_encoder", "tokenizer")}.get(args.stage, (args.stage,)):
        if others := sorted({f.name for f in (args.out / name).glob("*")} - WRITTEN):
            raise BadInput(f"--out {args.out}: the trained model would replace {args.out / name}, which holds {others[0]}; "
                           "choose another folder")
    found = checkpoints(args)
    if args.resume and not found:
        raise BadInput(f"nothing to resume: {args.out / 'training' / args.stage} holds no checkpoint; leave out "
                       "--resume, or give the run's --out")
    if found and not args.resume:
        raise BadInput(f"--out {args.out} holds a run of this stage; add --resume to go on, or name another folder")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.stage not in (*TOY_STAGES, *BRANCHES):
        raise BadInput(f"stage {args.stage} does not exist; the stages are {', '.join((*TOY_STAGES, *BRANCHES))}")
    args.data, args.identifiers, args.frozen = args.data and args.data.absolute(), None, None  # see branch_task
    toy = args.data is None or args.data.parent == TOY_DATA or args.stage in TOY_STAGES
    args.out = args.out or Path("runs") / args.stage
    args.cache = args.cache or args.out.parent / "cache"
    for name, value in (TOY_SETTINGS[args.stage] if toy else PAPER).items():
        if getattr(args, name, None) is None and not (name == "steps" and args.epochs):
            setattr(args, name, value)
    args.data = args.data or TOY_DATA / ("base" if args.stage in TOY_STAGES else "ads")
    if args.stage == "pg":
        args.cg = branch_path("cg", args)
    rank, world = processes()
    args.device, args.dtype = pick_device(args.device), torch.float32
    check(args, args.batch if toy else 16 if args.device.startswith("cuda") and world == 1 else 4)
    args.weights, args.identifier = args.weights or TOY / "base", args.identifier or IDENTIFIER
    args.theta, args.sigma = THETA if args.theta is None else args.theta, args.sigma or list(SIGMA)
    if args.workers is None:
        args.workers = 0 if args.size <= 128 else min(8, os.cpu_count())
    args.amp, args.save_dtype = args.amp and getattr(torch, args.amp), getattr(torch, args.save_dtype)
    if args.amp and args.device == "cpu" and not native_bfloat16() and rank == 0:
        print("--amp: this processor is not known to multiply bfloat16 in hardware, and may train faster without",
              file=sys.stderr)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    toy_data(args.data)
    if args.steps is None:
        args.steps = math.ceil(args.epochs * len(read_items(args.data)[0]) / args.batch)
    if args.stage in TOY_STAGES:
        from toy.stages import STAGES  # which needs this module

        run(STAGES[args.stage](args), args)
    else:
        run(branch_task(args), args)


if __name__ == "__main__":
    import train  # this file once more, as the module that toy/stages.py imports: there must be one of it

    with one_line_errors():
        train.main()
