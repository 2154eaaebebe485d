"""Support: what makes the training loop robust: processes, guards, averages, logs, memory; not needed to understand the paper."""

import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import Ads
from support.cache import cached, digest, stamp
from support.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from support.datasets import Item
from support.files import BadInput, read_log, write_atomic
from support.images import save_image
from support.machine import barrier, processes
from weights import StableDiffusion


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
                       f"{'give a smaller one, or ' if args.micro_batch > 1 else ''}add --amp" + " or --checkpointing" * (args.stage not in ("vae", "clip", "unet")))
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
