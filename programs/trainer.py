"""Programs: the steps of the training loop; not needed to understand the paper.

`train.fit` is the loop; a Trainer does its steps, and takes care of processes, checks, averages, logs and memory.
Everything random in a step follows from the run's seed and the step's number, so a run can be resumed bit for bit.
"""


import json
import math
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from programs.checkpoints import Checkpoints, list_checkpoints
from programs.settings import BRANCH_STAGES, Settings, largest_divisor
from support.files import BadInput, append_line, read_log, write_text
from support.images import save_image
from support.machine import barrier, processes
from support.plots import draw_curves

# ---------------------------------------------------------------- what is trained, in which order


@dataclass
class Task:
    """What a stage trains."""

    name: str  # what it is called in messages
    modules: dict[str, nn.Module]  # trained, by name
    samples: Dataset  # samples[(index, seed)] -> dict of tensors
    loss: Callable[[dict, Generator], Tensor]  # (batch, generator for further randomness) -> scalar
    draw: Callable[[], Image.Image]  # a sheet that shows what the modules do now
    save: Callable[[Path], None]  # writes the public folders
    next: list[list[str]] = field(default_factory=list)  # commands to go on with after the training
    identifiers: dict[str, str] | None = None  # [D] of each category, which a resumed run must keep
    frozen: str | None = None  # fingerprint of the frozen weights beside it


class Loss(nn.Module):
    """A task's loss as a module, whose gradients DistributedDataParallel averages over the processes."""

    def __init__(self, task: Task):
        super().__init__()
        self.trained, self.loss = nn.ModuleDict(task.modules), task.loss

    def forward(self, batch: dict, generator: Generator) -> Tensor:
        return self.loss(batch, generator)


def seed_of(*parts: object) -> int:
    """A seed that depends on all of `parts`. 32 bits: torch's CPU generator uses no more."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


class Batches:
    """Sampler of batches of (index, seed): every index once per epoch, in random order, from step `start` on.

    Each of several processes gets every `world`-th sample in a batch, from its rank on.
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


def ignore_sigterm(worker: int) -> None:
    """A loader's workers ignore SIGTERM, which is sent to the whole group; the main process handles it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def learning_rate(step: int, lr: float, steps: int, warmup: int = 0, decay: float = 0.0) -> float:
    """Linear warm-up, a constant rate, linear decay over the last part of the run. The paper's rate is constant."""
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = min(1.0, (steps - step) / (decay * steps)) if decay else 1.0
    return lr * up * down


# ---------------------------------------------------------------- averages and log


class MovingAverage:
    """The exponential moving average (EMA) of parameters; with decay 0 there is none."""

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    def update(self, step: int) -> None:
        """Moves the averages towards the parameters."""
        if self.values:
            rate = min(self.decay, (1 + step) / (10 + step))  # the averages follow faster at first
            torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - rate)

    def swap(self) -> None:
        """Exchanges parameters and averages."""
        for name, average in self.values.items():
            p = self.parameters[name]
            p.data, self.values[name] = average, p.data

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the parameters hold their averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


class Log:
    """log.jsonl: a line every --log-every steps, with the smoothed loss and the raw one, the mean since the line
    before. It is also shown beside `bar`, or printed on stderr if that is no terminal.
    """

    def __init__(self, file: Path, start: int, settings: Settings):
        self.file, self.settings, self.bar = file, settings, None
        lines = [line for line in (read_log(file) if start else []) if line["step"] <= start]
        # drops the lines that an interrupted run wrote after `start`
        write_text("".join(json.dumps(line) + "\n" for line in lines), file)
        self.average = lines[-1]["loss"] if lines else None
        self.losses, self.clock = [], time.perf_counter()

    def add(self, done: int, loss: float, lr: float) -> None:
        """Takes the loss of a step, the `done`-th, and writes a line if one is due."""
        self.average = loss if self.average is None else 0.98 * self.average + 0.02 * loss
        self.losses.append(loss)
        if done % self.settings.log_every and done != self.settings.steps:
            return
        count, seconds = len(self.losses), time.perf_counter() - self.clock
        speed = count * self.settings.batch / seconds
        line = {"step": done, "loss": round(self.average, 6), "raw": round(sum(self.losses) / count, 6), "lr": lr,
                "images_per_second": round(speed, 2), "time": round(time.time(), 1)}
        append_line(line, self.file)
        shown = f"loss {self.average:.4f}, lr {lr:.1e}, {speed:.1f} images/s"
        if self.bar.disable:
            print(f"step {done:,} of {self.settings.steps:,}: {shown}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(shown)
        self.losses, self.clock = [], time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as training."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start


def sheet_path(folder: Path, step: int) -> Path:
    """The file of the sheet that is drawn after so many steps."""
    return folder / f"sheet_{step:06}.png"


# ---------------------------------------------------------------- the trainer


class Trainer:
    """A task with its optimiser, averages, log and checkpoints, in one of several processes; the first one writes."""

    def __init__(self, task: Task, settings: Settings):
        self.task, self.settings = task, settings
        (self.rank, self.world), folder = processes(), settings.folder
        self.micro_batch = settings.micro_batch  # becomes smaller if the memory does not hold as many
        for module in task.modules.values():
            module.to(memory_format=settings.memory_format)
        self.parameters = {f"{m}.{n}": p for m, module in task.modules.items() for n, p in module.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), settings.lr, weight_decay=settings.weight_decay,
                                           fused=True)
        # float16 gradients would vanish below 6e-8: the loss is scaled up, and the gradients back down
        self.scaler = torch.amp.GradScaler(torch.device(settings.device).type, enabled=settings.amp == torch.float16)
        self.ema = MovingAverage(self.parameters, settings.ema)
        self.checkpoints = Checkpoints(folder, settings.keep, settings.recorded() | {"frozen weights": task.frozen},
                                       task.identifiers)
        self.start = self.checkpoints.load(*self.state()) if settings.resume else 0
        loss = Loss(task)
        self.loss = DistributedDataParallel(loss) if self.world > 1 else loss
        self.log = Log(folder / "log.jsonl", self.start, settings) if self.rank == 0 else None
        self.sigterm = False  # whether this process has received it
        self.stopping = False  # whether any process has; all know it after a step
        if self.rank == 0 and self.start >= settings.steps:
            print(f"{folder} is done: it is at step {self.start:,}; a larger --steps trains it further",
                  file=sys.stderr)
        elif self.rank == 0:
            millions = sum(p.numel() for p in self.parameters.values()) / 1e6
            print(f"training {task.name}, {millions:.1f} million parameters, on {len(task.samples):,} pictures from "
                  f"{settings.data}: steps {self.start + 1:,} to {settings.steps:,} of {settings.batch} pictures each, "
                  f"on {settings.device}", file=sys.stderr)

    def state(self) -> tuple:
        """What a checkpoint holds."""
        return self.parameters, self.ema.values, self.optimizer, self.scaler

    def batches(self) -> Iterator[tuple[int, dict]]:
        """Yields each step still to be taken, counted from 0, and this process's share of its batch.

        If the run was killed between its last checkpoint and the sheet after it, the sheet is drawn first.
        """
        s = self.settings
        if self.start and self.due(self.start - 1, s.sample_every) and not sheet_path(s.folder, self.start).exists():
            self.draw(self.start - 1)
        order = Batches(len(self.task.samples), s.batch, s.seed, self.start, s.steps, self.rank, self.world)
        loader = DataLoader(self.task.samples, batch_sampler=order, num_workers=s.workers, pin_memory=s.device != "cpu",
                            worker_init_fn=ignore_sigterm)
        bar = tqdm(loader, initial=self.start, total=s.steps, unit="step",
                   disable=self.rank > 0 or not sys.stderr.isatty())
        if self.log:
            self.log.bar = bar
        handler = signal.signal(signal.SIGTERM, self.note_sigterm)
        try:
            yield from enumerate(bar, self.start)
        finally:
            signal.signal(signal.SIGTERM, handler)

    def note_sigterm(self, *_) -> None:
        self.sigterm = True

    # ------------------------------------------------------------ a step

    def backward(self, step: int, batch: dict) -> float:
        """Adds up the gradients of a batch. Returns its mean loss over all parts and processes."""
        while True:
            try:
                loss = self.accumulate(step, batch)
                break
            except torch.OutOfMemoryError:
                self.shrink_micro_batch()
            self.optimizer.zero_grad(set_to_none=True)
        if self.world == 1:
            self.stopping = self.sigterm
            return loss
        total = torch.tensor([loss, self.sigterm], dtype=torch.float32, device=self.settings.device)
        dist.all_reduce(total)
        self.stopping = bool(total[1])
        return total[0].item() / self.world

    def accumulate(self, step: int, batch: dict) -> float:
        """The mean loss of this process's share, computed in parts of micro_batch pictures, and its gradients."""
        s = self.settings
        generator = Generator().manual_seed(seed_of(s.seed, "step", step, *([self.rank] if self.rank else [])))
        parts, total = s.batch // self.world // self.micro_batch, 0.0
        # On a CPU the fused attention's backward pass is slow: at the toy's size plain matrix products train faster
        attention = sdpa_kernel(SDPBackend.MATH) if s.device == "cpu" and s.size <= 128 else nullcontext()
        with attention:
            for i in range(parts):
                rows = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
                part = {name: x[rows].to(s.device, non_blocking=True) for name, x in batch.items()}
                # the processes exchange their gradients once, after the last part
                with self.loss.no_sync() if self.world > 1 and i < parts - 1 else nullcontext(), s.autocast():
                    loss = self.loss(part, generator) / parts
                    self.scaler.scale(loss).backward()
                total += loss.item()
        return total

    def shrink_micro_batch(self) -> None:
        """Takes the next smaller micro-batch, after a step that did not fit the memory. Raises BadInput if there is
        none, or if other processes are in the middle of the step.
        """
        s, size = self.settings, self.micro_batch
        message = f"--micro-batch {size} does not fit the memory of {s.device}"
        if self.world > 1 or size == 1 or s.stage == "clip":
            smaller = "give a smaller one, or " if size > 1 else ""
            checkpointing = " or --checkpointing" if s.stage in BRANCH_STAGES else ""
            raise BadInput(f"{message}: {smaller}add --amp{checkpointing}")
        self.micro_batch = largest_divisor(s.batch, size - 1)
        print(f"{message}, so the run goes on with {self.micro_batch}", file=sys.stderr)
        if s.device != "cpu":
            torch.cuda.empty_cache()

    def update(self, step: int, loss: float) -> None:
        """Takes a step of AdamW and updates the averages. Raises BadInput if the loss or a gradient is not finite,
        before it changes a weight.
        """
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s.lr, s.steps, s.warmup, s.decay)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), s.clip_gradient or math.inf).item()
        # a scaler skips steps whose gradients overflow, and then scales the loss less; below 1 that can't help
        skips = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(loss) or not (math.isfinite(norm) or skips):
            raise BadInput(f"the loss is {loss}, its gradient's length {norm} at step {step + 1}; {self.remedy(step)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)

    def remedy(self, step: int) -> str:
        """What to do about a step whose loss is not finite."""
        saved = list_checkpoints(self.settings.folder)
        if step == self.start and saved:
            return (f"the weights in {saved[-1]} seem to have diverged: remove it, and go on from the one before, or "
                    "anew, with a lower --lr")
        if step == self.start:
            return ("the weights that it starts from are broken" + (", or overflow: leave out --amp, or get them again"
                    if self.settings.amp else ": get them again"))
        return f"{f'{saved[-1]} is whole: resume from it' if saved else 'start again'}, with a lower --lr"

    def record(self, step: int, loss: float) -> None:
        """Passes a step's loss to the log and the progress bar."""
        if self.log:
            self.log.add(step + 1, loss, self.optimizer.param_groups[0]["lr"])

    # ------------------------------------------------------------ what the first process writes

    def due(self, step: int, every: int) -> bool:
        """Whether this process has something to write: the first one has, every so many steps and after the last."""
        return self.rank == 0 and ((step + 1) % every == 0 or step + 1 == self.settings.steps)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context for writing: it does not count as training time, and a full disk raises BadInput."""
        try:
            with self.log.paused():
                yield
        except (OSError, SafetensorError) as error:
            whole = [f": {old.name} is whole" for old in list_checkpoints(self.settings.folder)[-1:]]
            raise BadInput(f"{self.settings.out} can't be written ({error}); make room and add --resume"
                           + "".join(whole)) from None

    def save_models(self) -> None:
        """Saves the modules with their averaged weights, as public folders."""
        with self.writing(), self.ema.in_place(), torch.no_grad(), self.settings.autocast():
            self.task.save(self.settings.out)

    def save_checkpoint(self, step: int) -> None:
        """Saves everything that a resumed run needs."""
        with self.writing():
            self.checkpoints.save(step + 1, *self.state())

    def draw(self, step: int) -> None:
        """Draws the loss as a curve, and a sheet that shows what the averaged weights do now."""
        folder = self.settings.folder
        with self.writing():
            if lines := read_log(self.log.file):
                curves = {name: [(line["step"], line[key]) for line in lines]
                          for name, key in (("raw", "raw"), ("smoothed", "loss"))}
                save_image(draw_curves(curves, f"loss of {self.task.name}", "step"), folder / "loss.png")
            try:
                with self.ema.in_place(), torch.no_grad(), self.settings.autocast():
                    save_image(self.task.draw(), sheet_path(folder, step + 1))
            except torch.OutOfMemoryError:
                print("no sheet: painting it does not fit the GPU's memory", file=sys.stderr)

    def leave_if_stopped(self, step: int) -> None:
        """If any process has received SIGTERM, ends all of them with status 143."""
        if self.stopping and step + 1 < self.settings.steps:
            barrier()
            print(f"stopped at step {step + 1}; --resume goes on from there", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)

    def finish(self) -> None:
        """Says what was written and what can be done with it."""
        barrier()  # no process goes on before the first has saved
        if self.rank:
            return
        folder, out = self.settings.folder, self.settings.out
        print(f"trained {self.task.name}: {', '.join(str(out / name) for name in self.task.modules)}")
        sheets = [sheet.name for sheet in sorted(folder.glob("sheet_*.png"))[-1:]]
        print(f"to look at, in {folder}: {', '.join(['loss.png', *sheets, 'log.jsonl'])}")
        for label, words in zip(["next:", *["  or:"] * len(self.task.next)], self.task.next):
            print(label, shlex.join(words))
