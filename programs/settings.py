"""Programs: the settings of a training run, each in one place, and what is settled before its first step; not needed to
understand the paper.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from data import IDENTIFIER, SIGMA, THETA
from programs.models import TOY, branch_path, categories_file
from support.datasets import Item, categories_of, read_identifiers
from support.files import BadInput, check_folder
from support.machine import bfloat16_is_faster, cores, pick_device, processes
from support.options import Parser, real_number, whole_number

BRANCHES = ("cg", "pg", "joint", "controlnet")  # the stages that train a branch on a frozen base


def option(help: str, type: Callable | None = None, stages: tuple[str, ...] | None = None, default: object = None,
           **others) -> Field:
    """A field of Settings that is also an option of train.py; without a type it is a flag.

    stages: those that have the option; None: all. others: more arguments of add_argument.
    """
    if default is not None:
        help += f" [{default}]"
    kind = {"type": type} if type else {"action": "store_true"}
    return field(default=default, metadata={"stages": stages, "argument": {"help": help} | kind | others})


POSITIVE = whole_number(1, 10**9)


@dataclass(frozen=True)
class Settings:
    """All settings of a run; None where an option is not given, or where a stage has no such setting."""

    stage: str
    data: Path = option("BG60k as released, or a folder with metadata.jsonl [the toy's]", Path)
    weights: Path = option("frozen Stable Diffusion, folder or single file [toy/base; the paper's: SD 1.5]", Path,
                           ("unet", *BRANCHES))
    tokenizer: Path = option("folder with its vocab.json and merges.txt [in --weights; beside a single file]", Path,
                             BRANCHES)
    vae: Path = option("VAE in place of the base's own, folder or single file", Path, BRANCHES)
    cg: Path = option("stage pg: the trained CG [toy/cg]", Path, ("pg",))
    init: Path = option("stages vae and unet: start from these weights [random]", Path, ("vae", "unet"))
    decoder_only: bool = option("stage vae: keep the encoder, and so all latents, as they are", None, ("vae",))
    init_control: Path = option("branches: start from a ControlNet, CG or PG [SD's encoder, zero convolutions]", Path,
                                BRANCHES)

    # The method. Defaults in brackets: the toy's on its base, else the paper's
    size: int = option("side of the pictures in pixels [toy 128; paper 512]", whole_number(32, 4096))
    refine: int = option("stage unet: also learn the second pass, at this multiple of --size", whole_number(1, 16),
                         ("unet",))
    attention: str = option("in CG: Eq. 3, as in the paper, or (ours) Eq. 2 on P, as in an ordinary ControlNet",
                            str, ("cg", "joint"), "mask-guided", choices=("mask-guided", "plain"))
    prompt_dropout: float = option("fraction of the prompts replaced by '' [0.5, as ControlNet; toy's CG 0.1]",
                                   real_number(0, 1), BRANCHES)
    theta: int = option("PG's dilation in pixels of a 512-px image, Eq. 5, section 5.1; 0: masks stay as they are",
                        whole_number(0, 512), ("pg", "joint"), THETA)
    sigma: tuple = option("PG's mixup, Eq. 6, section 5.1: range of σ, the ad's share; 1 1: no mixup",
                          real_number(0, 1), ("pg", "joint"), SIGMA, nargs=2, metavar=("LOW", "HIGH"))
    noise_offset: float = option("spread of the mean of ε [toy 0.1; paper 0]", real_number(0, 10), ("unet", *BRANCHES))
    weighting: str = option("weight of the error at each timestep [toy min-snr or debias; paper uniform, Eq. 1]",
                            str, ("unet", *BRANCHES), choices=("uniform", "min-snr", "debias"))
    identifier: str = option("[D] of a category, with {} for its number ['sks {}', section 5.1; a known one stays]",
                             str, ("cg", "joint"))

    # The optimiser
    lr: float = option("AdamW's learning rate [toy 1e-3 or 2e-3; paper 1e-5]", real_number(1e-9, 10))
    batch: int = option("pictures per step, over all processes [toy 12 to 64; paper 128]", POSITIVE)
    steps: int = option("steps in all [toy 800 to 10400; paper 300 epochs]", POSITIVE)
    epochs: int = 0  # the number of steps follows from them, unless it is given
    warmup: int = 0  # first steps, in which the rate rises
    decay: float = option("last part of the run, in which the rate falls to 0 [toy 0.3 or 0.5; paper 0]",
                          real_number(0, 1))
    clip_gradient: float = 0.0  # longer gradients are shortened to this length; 0: none
    ema: float = option("decay of the weights' moving average [toy 0 to 0.999; paper 0: none]",
                        real_number(0, 0.99999))
    amp: torch.dtype = option(
        "mixed precision; trained weights stay float32 [without a value: bfloat16 if that is faster here]",
        str, nargs="?", const="auto", choices=("auto", "bfloat16", "float16"))
    seed: int = option("decides everything random", whole_number(0, 2**32 - 1), default=0)

    # The machine and the records
    device: str = option("cpu, cuda, cuda:1, ...; auto: cuda where there is one", str, default="auto")
    micro_batch: int = option(
        "pictures a process computes at once; fewer need less memory [toy all; else 4, on one GPU 16]", POSITIVE)
    checkpointing: bool = option(
        "compute activations again for the backward pass instead of keeping them: less memory, more time",
        None, BRANCHES)
    workers: int = option("processes that load samples [0 up to 128 px; else one a core, at most 8]",
                          whole_number(0, 256))
    out: Path = option("where models, log, sheets and checkpoints go; latents: in cache/ beside it [runs/STAGE]", Path)
    resume: bool = option("go on from the newest checkpoint in --out; start if there is none")
    log_every: int = option("steps between lines of the log", POSITIVE, default=20)
    save_every: int = option("steps between checkpoints; the newest two are kept", POSITIVE, default=250)
    sample_every: int = option("steps between sheets and saved models", POSITIVE, default=500)
    save_dtype: torch.dtype = option("dtype of the saved models", str, default="float32",
                                     choices=("float32", "float16"))

    @property
    def folder(self) -> Path:
        """Where log, curve, sheets and checkpoints go."""
        return self.out / "training" / self.stage

    @property
    def cache(self) -> Path:
        """Where latents are kept, encoded once; it may be deleted."""
        return self.out.parent / "cache"

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory layout in which convolutions are fastest: float32 at full size is the exception."""
        return torch.channels_last if self.amp or self.size <= 128 else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """With --amp a context of half precision. It caches the weights in it, unless --checkpointing saves memory."""
        return torch.autocast(torch.device(self.device).type, self.amp, self.amp is not None, not self.checkpointing)

    def for_samples(self, count: int) -> "Settings":
        """These settings with the number of steps in which `count` samples are seen in so many epochs."""
        return replace(self, steps=self.steps or math.ceil(self.epochs * count / self.batch))

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint_*.pt"))

    def newest_checkpoint(self) -> dict:
        """What the newest checkpoint holds, its tensors memory-mapped; {} if there is none, or if it is broken."""
        try:
            return torch.load(self.checkpoints()[-1], "cpu", weights_only=True, mmap=True)
        except Exception:  # torch raises many kinds
            return {}


def parser(description: str, stages: list[str]) -> Parser:
    """The command line of train.py. What it returns holds only the options that are given."""
    program = Parser(description=description, argument_default=argparse.SUPPRESS)
    program.add_argument("stage", choices=stages, metavar="stage", help=", ".join(stages))
    for setting in fields(Settings):
        if setting.metadata:
            program.add_argument(f"--{setting.name.replace('_', '-')}", **setting.metadata["argument"])
    return program


def settle(given: dict, preset: dict, data: Path) -> Settings:
    """Settings from the options given, the settings of the stage or the paper, and the toy's data set. Raises BadInput
    for all errors that show before loading.

    Two may stay open: steps if the preset counts epochs, and amp, which is "auto" for --amp without a value.
    """
    stage, world = given["stage"], processes()[1]
    for setting in fields(Settings):
        stages = setting.metadata.get("stages")
        if setting.name in given and stages and stage not in stages:
            raise BadInput(f"--{setting.name.replace('_', '-')} belongs to stage {' and '.join(stages)}; leave it out")
    s = Settings(**{"out": Path("runs", stage), "data": data} | preset | given)
    if s.identifier and "{}" not in s.identifier:
        raise BadInput(f"--identifier {s.identifier}: needs {{}} where the category's number is to stand")
    device, share = pick_device(s.device), s.batch // world
    if s.batch % world:
        raise BadInput(f"--batch {s.batch}: must be a multiple of the {world} processes")
    most = share  # of the toy's pictures all fit
    if s.epochs:
        most = 16 if device.startswith("cuda") and world == 1 else 4
    micro_batch = min(s.micro_batch or max(n for n in range(1, min(share, most) + 1) if share % n == 0), share)
    if share % micro_batch:
        raise BadInput(f"--micro-batch {micro_batch}: must divide --batch {s.batch} over the processes, {share} each")
    check_folder(s.out)
    return replace(
        s, data=s.data.absolute(), weights=s.weights or TOY / "base", device=device, micro_batch=micro_batch,
        cg=branch_path("cg", s.cg, s.weights) if stage == "pg" else None,
        workers=min(8, cores()) if s.workers is None and s.size > 128 else s.workers or 0,
        amp=s.amp if s.amp in (None, "auto") else getattr(torch, s.amp), save_dtype=getattr(torch, s.save_dtype))


def begin(settings: Settings) -> Settings:
    """Checks what --out holds, joins the other processes under torchrun, and settles what --amp without a value means:
    bfloat16 if this machine multiplies it faster than float32. A resumed run keeps its earlier choice.

    --resume without a run starts one. Raises BadInput if there is one, and --resume is missing.
    """
    if settings.checkpoints() and not settings.resume:
        raise BadInput(f"--out {settings.out} holds a run of this stage; to go on, add --resume, or name another")
    if not settings.checkpoints() and (settings.folder / "film.png").exists():
        raise BadInput(f"--out {settings.out} holds a finished run whose checkpoints are gone; name another")
    if settings.resume and not settings.checkpoints():
        settings = replace(settings, resume=False)
        if processes()[0] == 0:
            print(f"--resume: --out {settings.out} holds no run to go on with; a new one starts", file=sys.stderr)
    cuda = settings.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(settings.device)
    if processes()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if settings.amp != "auto":
        return settings
    amp = [settings.newest_checkpoint().get("settings", {}).get("amp")]
    if not settings.resume and processes()[0] == 0:
        faster = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else bfloat16_is_faster()
        amp = ["torch.bfloat16" if faster else "None"]
        print(f"--amp: trains in {'bfloat16' if faster else 'float32: bfloat16 is not faster here'}", file=sys.stderr)
    if dist.is_initialized():
        dist.broadcast_object_list(amp)
    return replace(settings, amp=getattr(torch, str(amp[0]).removeprefix("torch."), None))


# ---------------------------------------------------------------- the categories' identifiers: once given, they stay


def category_identifiers(items: list[Item], settings: Settings) -> dict[str, str]:
    """The identifier [D] of each category, by name (section 3.2). Categories that the frozen CG, --init-control or the
    resumed run knows keep theirs; new ones get the next numbers, in place of {} in --identifier or IDENTIFIER.

    Raises BadInput if the frozen CG lacks a category.
    """
    names, known = categories_of(items), {}
    if settings.stage == "pg":
        known = read_identifiers(categories_file(settings.cg))
        if unknown := [name for name in names if name not in known]:
            raise BadInput(f"{settings.data}: category {unknown[0]} was not in CG's training set; train CG on this "
                           f"data first (train.py cg; --init-control {settings.cg} starts from this CG)")
    elif settings.resume:
        known = settings.newest_checkpoint().get("identifiers") or {}
    elif settings.init_control and (file := categories_file(settings.init_control)).is_file():
        known = read_identifiers(file)
    return number_categories(names, settings.identifier or IDENTIFIER, known)


def number_categories(names: list[str], template: str, known: dict[str, str]) -> dict[str, str]:
    """`known` in its order; then, for each other name, the template with the next number in place of {}."""
    numbered = (template.replace("{}", str(number)) for number in count(len(known)))
    free = (identifier for identifier in numbered if identifier not in known.values())  # someone may have edited them
    return known | {name: next(free) for name in names if name not in known}


def next_commands(settings: Settings, trained: list[str]) -> list[list[str]]:
    """Commands to go on with: after CG train PG, and paint."""
    paths = {name: getattr(settings, name) for name in ("weights", "tokenizer", "vae", "cg")}
    paths |= {name: settings.out / name for name in trained}

    def command(*program: str, **paths: Path) -> list[str]:
        given = {name: path for name, path in paths.items() if path and TOY not in path.absolute().parents}
        return ["python", *program, *(word for name, path in given.items() for word in (f"--{name}", str(path)))]

    paint = [*command("generate.py", **paths), "--product", "PHOTO.png", "--category", "NAME"]
    return [command("train.py", "pg", **paths, data=settings.data), paint] if settings.stage == "cg" else [paint]
