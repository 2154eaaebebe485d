"""Programs: the steps of the training loop, and checkpoints; not needed to understand the paper.

`train.train` is the loop; a Trainer takes care of processes, checks, averages, logs and memory.
Everything random in a step follows from the run's seed and the step's number, so a run can be resumed bit for bit.
"""

import json
import math
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from attention import SpatialTransformer
from model import ResnetBlock
from programs.settings import BRANCHES, Settings
from support.files import BadInput, append_line, explain, read_log, write_atomic, write_text
from support.images import save_image
from support.machine import barrier, processes
from support.plots import draw_curves, draw_film
from support.tensors import not_finite

CHECKPOINTS = 2  # so many are kept

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
    next_commands: list[list[str]]  # to go on with after the training
    identifiers: dict[str, str] | None = None  # [D] of each category, which a resumed run must keep
    held_out: Dataset | None = None  # samples of ads that are not trained on
    held_out_loss: Callable[[dict], Tensor] | None = None  # (batch of them) -> scalar


@dataclass
class Stage:
    """A stage of train.py."""

    task: Callable[[Settings], Task]
    settings: dict  # its own on the toy's base, by the names of Settings
    paper: dict | None = None  # the paper's settings, for another base
    data: str = "ads"  # what it trains on in toy/data, unless --data is given

    def preset(self, given: dict, toy: Path) -> dict:
        """Its own settings on the toy's base or data, else the paper's. given: the options, by name."""
        on_toy = "weights" not in given or given.get("data", toy).absolute().parent == toy.parent
        return self.settings if on_toy else self.paper or self.settings


def seed_of(*parts: object) -> int:
    """A seed that depends on all of `parts`. 32 bits: torch's CPU generator uses no more."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


def batches_of_keys(count: int, batch: int, seed: int, start: int, steps: int, rank: int,
                    world: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (index, seed): every index once per epoch, in random order, from step `start` on.

    Each of several processes gets every `world`-th sample in a batch, from its rank on.
    """
    @lru_cache(1)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=Generator().manual_seed(seed_of(seed, "order", epoch))).tolist()

    for step in range(start, steps):
        positions = range(step * batch + rank, (step + 1) * batch, world)
        yield [(order(p // count)[p % count], seed_of(seed, "sample", p)) for p in positions]


def ignore_sigterm(worker: int) -> None:
    """A loader's workers ignore SIGTERM, which is sent to the whole group; the main process handles it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def learning_rate(step: int, lr: float, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, a constant rate, linear decay over the last part of the run. The paper's rate is constant."""
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = min(1.0, (steps - step) / (decay * steps)) if decay else 1.0
    return lr * up * down


def update_averages(averages: list[Tensor], parameters: list[Tensor], step: int, ema: float) -> None:
    """The exponential moving averages (EMA) of the weights: average := rate · average + (1 − rate) · weight.

    The rate is `ema`, and lower in the first steps, so that the averages soon forget where training started.
    """
    if averages:
        rate = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - rate)


def recompute_activations(network: nn.Module) -> None:
    """Gradient checkpointing: residual blocks and transformers keep their inputs only, and compute again what the
    backward pass needs: less memory for more time.
    """
    for module in network.modules():
        if isinstance(module, ResnetBlock | SpatialTransformer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


# ---------------------------------------------------------------- the trainer


class Trainer:
    """What surrounds the steps of train.train: processes, parts of a batch, checks, log and checkpoints.

    Of several processes the first one writes.
    """

    def __init__(self, task: Task, settings: Settings, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self.task, self.settings, (self.rank, self.world) = task, settings, processes()
        s, self.optimizer, self.scaler = settings, optimizer, scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.modules = nn.ModuleDict(task.modules)
        self.averages = [p.detach().clone() for p in self.parameters] if s.ema else []
        self.described = {name: str(value) for name, value in vars(s).items() if name != "resume"}
        self.start = self.load_checkpoint() if s.resume else 0
        self.sigterm = self.stopping = False  # whether this process has received it; whether all know that one has
        self.loss, self.losses, self.clock = 0.0, [], time.perf_counter()
        self.log = s.folder / "log.jsonl"
        if self.rank == 0:
            if self.start == 0:  # without what a run left that was killed before its first checkpoint
                for folder in (s.folder, *(s.out / "best" / name for name in task.modules)):
                    shutil.rmtree(folder, ignore_errors=True)
            lines = [json.dumps(line) + "\n" for line in read_log(self.log) if line["step"] <= self.start]
            write_text("".join(lines), self.log)  # without those that an interrupted run wrote after `start`
            print(f"training {task.name}, {sum(p.numel() for p in self.parameters):,} parameters, on "
                  f"{len(task.samples):,} pictures from {s.data}: from step {self.start:,} to {s.steps:,}, {s.batch} "
                  f"pictures each, on {s.device} in {s.amp or torch.float32}", file=sys.stderr)
            if self.start >= s.steps:
                print(f"{s.folder} is done; a larger --steps trains it further", file=sys.stderr)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for the loop: SIGTERM is noted, and errors name the last good checkpoint."""
        handler = signal.signal(signal.SIGTERM, self.note_sigterm)
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # which keep the loader's workers, and they ignore SIGTERM
            if not isinstance(error, BadInput | OSError):
                raise
            kept = [f"; {path} is whole: --resume goes on from it" for path in self.settings.checkpoints()[-1:]]
            raise BadInput(explain(error) + "".join(kept)) from None
        finally:
            signal.signal(signal.SIGTERM, handler)

    def note_sigterm(self, *_) -> None:
        self.sigterm = True

    # ------------------------------------------------------------ a step

    def batches(self) -> Iterator[tuple[int, dict]]:
        """Yields each step still to be taken, counted from 0, and this process's share of its batch."""
        s = self.settings
        keys = batches_of_keys(len(self.task.samples), s.batch, s.seed, self.start, s.steps, self.rank, self.world)
        loader = DataLoader(self.task.samples, batch_sampler=keys, num_workers=s.workers,
                            pin_memory=s.device.startswith("cuda"), worker_init_fn=ignore_sigterm)
        if self.start == 0 and self.rank == 0:
            self.draw(-1)  # what the modules do at first
        bar = tqdm(loader, initial=self.start, total=s.steps, unit="step", disable=self.rank > 0 or None)
        return enumerate(bar, self.start)

    def generator(self, step: int) -> Generator:
        """For what a loss draws beyond its samples."""
        return Generator().manual_seed(seed_of(self.settings.seed, "step", step, *([self.rank] if self.rank else [])))

    def parts(self, batch: dict) -> Iterator[dict]:
        """Yields a batch on the device, in parts of --micro-batch samples, all of which add to the gradients."""
        s = self.settings
        # On a CPU the fused attention's backward pass is slow: at the toy's size plain matrix products train faster
        with sdpa_kernel(SDPBackend.MATH) if s.device == "cpu" and s.size <= 128 else nullcontext():
            for i in range(0, len(batch["index"]), s.micro_batch):
                rows = slice(i, i + s.micro_batch)
                yield {name: x[rows].to(s.device, non_blocking=True) for name, x in batch.items()}

    def share(self, loss: Tensor) -> Tensor:
        """A part's loss -> its share of the batch's, which adds up in `self.loss`."""
        share = loss / (self.settings.batch // self.settings.micro_batch)
        self.loss += share.item()
        return share

    def sum_over_processes(self) -> None:
        """Sums gradients and loss over the processes, and tells all of them whether one has received SIGTERM."""
        self.stopping = self.sigterm
        if self.world > 1:
            numbers = torch.tensor([self.loss, self.sigterm], device=self.settings.device)
            tensors = [numbers, *(p.grad for p in self.parameters if p.grad is not None)]
            summed = torch.cat([tensor.flatten() for tensor in tensors])  # one exchange is faster than many
            dist.all_reduce(summed)
            for tensor, part in zip(tensors, summed.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))
            self.loss, self.stopping = numbers.tolist()

    def refuse_bad_numbers(self, step: int, norm: Tensor) -> None:
        """Raises BadInput if the loss, or the gradient's length `norm`, is not finite: no weight has changed yet."""
        # a scaler skips steps whose gradients overflow, and then scales the loss less; below 1 that can't help
        skips = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(self.loss) or not (math.isfinite(norm.item()) or skips):
            raise BadInput(f"the loss is {self.loss}, its gradient's length {norm.item()} at step {step + 1}; give a "
                           "lower --lr, or whole weights to start from")

    def record(self, step: int) -> None:
        """Every --log-every steps shows the mean loss since the time before, and adds it to log.jsonl."""
        self.losses.append(self.loss)
        self.loss = 0.0
        if not self.due(step, self.settings.log_every):
            return
        loss, lr = sum(self.losses) / len(self.losses), self.optimizer.param_groups[0]["lr"]
        speed = len(self.losses) * self.settings.batch / (time.perf_counter() - self.clock)
        append_line({"step": step + 1, "loss": loss, "lr": lr, "images_per_second": speed}, self.log)
        tqdm.write(f"step {step + 1:,} of {self.settings.steps:,}: loss {loss:.4f}, lr {lr:.1e}, {speed:.1f} images/s",
                   sys.stderr)
        self.losses, self.clock = [], time.perf_counter()

    def due(self, step: int, every: int) -> bool:
        """Whether this process has something to write: the first one has, every so many steps and after the last."""
        return self.rank == 0 and ((step + 1) % every == 0 or step + 1 == self.settings.steps)

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, step: int) -> None:
        """Saves everything that a resumed run needs; random states follow from the seed and the step. Removes the
        oldest checkpoint. Raises BadInput if a weight is not finite.
        """
        content = {"step": step + 1, "settings": self.described, "identifiers": self.task.identifiers,
                   "weights": self.modules.state_dict(), "averages": self.averages,
                   "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if broken := not_finite(content["weights"]):
            raise BadInput(f"{broken} is not finite at step {step + 1}; give a lower --lr")

        def write(path: Path) -> None:
            try:
                torch.save(content, path)
            except RuntimeError as error:
                raise OSError(f"as on a full disk: {error}") from None

        write_atomic(self.settings.folder / f"checkpoint_{step + 1:08}.pt", write)
        for old in self.settings.checkpoints()[:-CHECKPOINTS]:
            old.unlink()

    def load_checkpoint(self) -> int:
        """Fills everything from the newest checkpoint and returns its step. Reports changed settings on stderr.

        Raises BadInput if it is broken, or from another model, or from a run whose categories had other identifiers.
        """
        saved, now = self.settings.newest_checkpoint(), self.described
        try:
            self.modules.load_state_dict(saved["weights"])
            for average, before in zip(self.averages, saved["averages"], strict=True):
                average.copy_(before)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, KeyError, ValueError):
            raise BadInput(f"{self.settings.checkpoints()[-1]} is broken, or from another model or other settings; "
                           "give the options of the run, or remove it to go on from the one before") from None
        if (saved["identifiers"] or {}).items() - (self.task.identifiers or {}).items():
            raise BadInput(f"the identifiers of {self.settings.data}'s categories are not those that the run began "
                           "with; give the run's --cg and --data, or train anew to another --out")
        changed = [f"{name} {before} -> {now.get(name)}"
                   for name, before in sorted(saved["settings"].items() - now.items())]
        if changed and self.rank == 0:
            print(f"resumed with changed settings: {', '.join(changed)}", file=sys.stderr)
        return saved["step"]

    # ------------------------------------------------------------ what the first process writes

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context for using the modules: their weights are the averages, if there are any."""

        def swap() -> None:
            for p, average in zip(self.parameters, self.averages):
                p.data, average.data = average.data, p.data

        swap()
        try:
            with torch.no_grad(), self.settings.autocast():
                yield
        finally:
            swap()

    def save_models(self) -> None:
        """Saves the modules as public folders."""
        with self.averaged():
            self.task.save(self.settings.out)

    def draw(self, step: int) -> None:
        """Checks the loss of held-out ads, and draws both losses as curves and a sheet of what the modules do now."""
        began = time.perf_counter()
        self.check_held_out(step)
        folder, log = self.settings.folder, read_log(self.log)
        curves = {name: points for name, key in (("loss", "loss"), ("held-out ads", "held_out_loss"))
                  if (points := [(line["step"], line[key]) for line in log if key in line])}
        if "loss" in curves:
            save_image(draw_curves(curves, f"loss of {self.task.name}", "step"), folder / "loss.png")
        try:
            with self.averaged():
                save_image(self.task.draw(), folder / f"sheet_{step + 1:06}.png")
        except torch.OutOfMemoryError:
            print("no sheet: painting it does not fit the GPU's memory", file=sys.stderr)
        self.clock += time.perf_counter() - began  # the log's speed is that of steps

    def check_held_out(self, step: int) -> None:
        """Logs the loss of held-out ads, always with the same noise and timesteps; while it is the lowest, the models
        are kept in OUT/best. The log's "ads" is another number where others are held out.
        """
        s, held_out = self.settings, self.task.held_out
        if not held_out:
            return
        batch = default_collate([held_out[i, seed_of(s.seed, "held out", i)] for i in range(len(held_out))])
        ads = f"{sum(x.double().sum() for x in batch.values()):.3f}"
        before = [line["held_out_loss"] for line in read_log(self.log) if line.get("ads") == ads]
        with self.averaged():
            loss = sum(self.task.held_out_loss(part).item() * len(part["index"]) for part in self.parts(batch))
            loss /= len(held_out)
            if math.isfinite(loss):
                append_line({"step": step + 1, "held_out_loss": loss, "ads": ads}, self.log)
            if loss <= min(before, default=loss):  # never for NaN
                self.task.save(s.out / "best")

    def leave_if_stopped(self, step: int) -> None:
        """If any process has received SIGTERM, ends all of them with status 143."""
        if self.stopping and step + 1 < self.settings.steps:
            barrier()
            print(f"stopped at step {step + 1}; --resume goes on from there", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)

    def finish(self) -> None:
        """Says what was written and what can be done with it."""
        barrier()  # no process goes on before the first has saved
        if self.rank == 0:
            s, out = self.settings, self.settings.out
            print(f"trained {self.task.name}: {', '.join(str(out / name) for name in self.task.modules)}; "
                  f"{s.folder} holds the loss as a curve, sheets and the log")
            if self.task.held_out:
                print(f"{out / 'best'} holds the models at the lowest loss of held-out ads")
            sheets, loss = sorted(s.folder.glob("sheet_*.png")), s.folder / "loss.png"
            if s.stage in BRANCHES and sheets and loss.exists():
                save_image(draw_film(sheets, s.size, loss), s.folder / "film.png")
            for command in self.task.next_commands:
                print("next:", shlex.join(command))
