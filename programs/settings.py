"""Programs: the settings of a training run, and their checks; not needed to understand the paper."""


import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data import SIGMA, THETA
from programs.checkpoints import list_checkpoints, read_header
from programs.latents import autocast
from programs.models import TOY, branch_path, categories_file
from support.datasets import Item, categories_of, read_identifiers
from support.files import BadInput, check_folder
from support.machine import bfloat16_is_faster, cores, pick_device, processes
from support.options import real_number, whole_number
from weights import CONTROL_FILE, TEXT_FILE

BASE_STAGES, BRANCH_STAGES = ("vae", "clip", "unet"), ("cg", "pg", "joint", "controlnet")
ALL_STAGES = (*BASE_STAGES, *BRANCH_STAGES, "lama", "paint-by-example", "segmenter")
# Options that only some stages have
BELONGS = {"init": ("vae", "unet"), "decoder_only": ("vae",), "refine": ("unet",),
           "cg": ("pg",), "theta": ("pg", "joint"), "sigma": ("pg", "joint"),
           "identifier": ("cg", "joint"), "attention": ("cg", "joint"),
           **dict.fromkeys(("init_control", "checkpointing", "prompt_dropout", "tokenizer"), BRANCH_STAGES),
           **dict.fromkeys(("weights", "weighting", "noise_offset"), ("unet", *BRANCH_STAGES))}
# Settings that a resumed run may change without becoming another run
HARMLESS = {"stage", "resume", "init", "identifier", "out", "cache", "micro_batch", "epochs", "device", "checkpointing",
            "workers", "log_every", "save_every", "keep", "sample_every", "save_dtype"}
WRITTEN = {"config.json", "categories.json", CONTROL_FILE, TEXT_FILE, "vocab.json", "merges.txt",
           "tokenizer_config.json", "scheduler_config.json"}  # what training writes into a model's folder


@dataclass(frozen=True)
class Settings:
    """All settings of a run, under the names of train.py's options (`python train.py --help` explains them).

    None if a stage has no such setting.
    """

    stage: str
    resume: bool
    # what is trained, on what
    data: Path
    weights: Path
    tokenizer: Path | None
    cg: Path | None
    init: Path | None
    decoder_only: bool
    init_control: Path | None
    out: Path
    cache: Path
    # the method
    size: int
    refine: int | None
    attention: str | None
    prompt_dropout: float | None
    theta: int
    sigma: tuple[float, float]
    noise_offset: float | None
    weighting: str | None
    identifier: str | None
    # the optimiser
    lr: float
    batch: int
    micro_batch: int
    epochs: int | None
    steps: int
    warmup: int
    decay: float
    weight_decay: float
    clip_gradient: float
    ema: float
    seed: int
    # machine and records
    device: str
    amp: torch.dtype | None
    checkpointing: bool
    workers: int
    log_every: int
    save_every: int
    keep: int
    sample_every: int
    save_dtype: torch.dtype

    @property
    def folder(self) -> Path:
        """Where log, curve, sheets and checkpoints go."""
        return self.out / "training" / self.stage

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory layout in which convolutions are fastest: float32 at full size is the exception."""
        return torch.channels_last if self.amp or self.size <= 128 else torch.contiguous_format

    @property
    def what(self) -> str:
        """What a branch's stage trains, in words."""
        cg = "CG with plain attention" if self.attention == "plain" else "CG"
        return {"cg": cg, "pg": "PG", "joint": f"{cg} and PG", "controlnet": "a ControlNet"}[self.stage]

    def autocast(self) -> torch.autocast:
        """With --amp a context of half precision. It caches the weights in it, unless --checkpointing saves memory."""
        return autocast(self.device, self.amp, cache=not self.checkpointing)

    def recorded(self) -> dict:
        """The settings that make a resumed run the same as the interrupted one, as JSON can hold them."""
        values = {name: value for name, value in vars(self).items() if name not in HARMLESS}
        return {name: value if isinstance(value, (int, float, tuple)) else str(value) for name, value in values.items()}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that do not belong to the method: the optimiser's and the machine's."""
    add = parser.add_argument_group("the optimiser [likewise]").add_argument
    add("--lr", metavar="X", type=real_number(1e-9, 10), help="AdamW's learning rate [toy 1e-3 or 2e-3; paper 1e-5]")
    add("--batch", metavar="N", type=whole_number(1, 65536),
        help="pictures per step, over all processes [toy 12 to 64; paper 128]")
    add("--epochs", metavar="N", type=whole_number(1, 10**6),
        help="passes over the data, unless --steps is given [paper 300]")
    add("--steps", metavar="N", type=whole_number(1, 10**9), help="steps in all [toy 800 to 10400; else from --epochs]")
    add("--warmup", metavar="N", type=whole_number(0, 10**9),
        help="first steps, in which the rate rises [toy 50 or 100; paper 0]")
    add("--decay", metavar="X", type=real_number(0, 1),
        help="last part of the run, in which the rate falls to 0 [toy 0.3 or 0.5; paper 0]")
    add("--weight-decay", metavar="X", type=real_number(0, 10), default=1e-2,
        help="weight decay of AdamW [0.01, as ControlNet]")
    add("--clip-gradient", metavar="X", type=real_number(0, 1e6),
        help="longer gradients are shortened to this length; 0: none [toy 1; paper 0]")
    add("--ema", metavar="X", type=real_number(0, 0.99999),
        help="decay of the weights' moving average [toy 0 to 0.999; paper 0: none]")
    add("--seed", metavar="N", type=whole_number(0, 2**32 - 1), default=0, help="decides everything random [0]")
    add = parser.add_argument_group("machine and records").add_argument
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--amp", nargs="?", const="auto", choices=["auto", "bfloat16", "float16"],
        help="mixed precision; trained weights stay float32 [without a value: bfloat16 if that is faster here]")
    add("--micro-batch", metavar="N", type=whole_number(1, 65536),
        help="pictures a process computes at once; fewer need less memory [toy all; else 4, on one GPU 16]")
    add("--checkpointing", action="store_true",
        help="compute activations again for the backward pass instead of keeping them: less memory, more time")
    add("--workers", metavar="N", type=whole_number(0, 256),
        help="processes that load samples during the computation [0 up to 128 px; else one a core, at most 8]")
    add("--out", metavar="DIR", type=Path, help="where models, log, sheets and checkpoints go [runs/STAGE]")
    add("--cache", metavar="DIR", type=Path,
        help="where latents and prompts are kept, encoded once; may be deleted [cache/ beside --out]")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--log-every", metavar="N", type=whole_number(1, 10**9), default=20, help="steps between lines of the log [20]")
    add("--save-every", metavar="N", type=whole_number(1, 10**9), default=250, help="steps between checkpoints [250]")
    add("--keep", metavar="N", type=whole_number(1, 10**6), default=2, help="how many checkpoints stay, the newest [2]")
    add("--sample-every", metavar="N", type=whole_number(1, 10**9), default=500,
        help="steps between sheets and saved models [500]")
    add("--save-dtype", choices=["float32", "float16"], default="float32", help="dtype of the saved models [float32]")


def settle(args: argparse.Namespace, defaults: dict, toy_data: Path) -> Settings:
    """Settings from the options and the stage's defaults. Raises BadInput for all errors that show before loading.

    Two stay open: steps is 0 if only --epochs is given, and amp is None for --amp without a value.
    """
    check_options(args)
    stage, toy, out = args.stage, "steps" in defaults, args.out or Path("runs") / args.stage
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "epochs" in given:
        defaults = {name: value for name, value in defaults.items() if name != "steps"}
    values = dict.fromkeys(Settings.__dataclass_fields__) | {"steps": 0, "theta": THETA, "sigma": SIGMA}
    values |= defaults | given
    device = pick_device(args.device)
    at_most = values["batch"] if toy else 16 if device.startswith("cuda") and processes()[1] == 1 else 4
    values |= {
        "out": out, "cache": args.cache or out.parent / "cache", "device": device,
        "data": args.data.absolute() if args.data else toy_data / ("base" if stage in BASE_STAGES else "ads"),
        "weights": args.weights or TOY / "base",
        "cg": branch_path("cg", args.cg, args.weights) if stage == "pg" else None,
        "attention": (args.attention or "mask-guided") if stage in ("cg", "joint") else None,
        "sigma": tuple(values["sigma"]),
        "micro_batch": settle_micro_batch(values["batch"], args.micro_batch, at_most, stage),
        "amp": None if args.amp in (None, "auto") else getattr(torch, args.amp),
        "workers": given.get("workers", 0 if values["size"] <= 128 else min(8, cores())),
        "save_dtype": getattr(torch, args.save_dtype)}
    settings = Settings(**{name: values[name] for name in Settings.__dataclass_fields__})
    check_out(settings)
    return settings


def check_options(args: argparse.Namespace) -> None:
    """Raises BadInput if the options on the command line do not go together."""
    if args.stage not in ALL_STAGES:
        raise BadInput(f"stage {args.stage} does not exist; the stages are {', '.join(ALL_STAGES)}")
    for option, stages in BELONGS.items():
        value = getattr(args, option)
        if value is not None and value is not False and args.stage not in stages:
            raise BadInput(f"--{option.replace('_', '-')} belongs to stage {' and '.join(stages)}; leave it out")
    if args.sigma and args.sigma[0] > args.sigma[1]:
        raise BadInput("--sigma: give the lower number first")
    if args.identifier and "{}" not in args.identifier:
        raise BadInput(f"--identifier {args.identifier}: needs {{}} where the category's number is to stand")


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is at most `at_most`."""
    return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)


def settle_micro_batch(batch: int, given: int | None, at_most: int, stage: str) -> int:
    """How many of a batch's pictures a process computes at once: as given, else the largest part of its share up to a
    limit. Raises BadInput if the processes, or the parts, can't share the batch equally.
    """
    world = processes()[1]
    if batch % world:
        raise BadInput(f"--batch {batch}: must be a multiple of the {world} processes")
    share = batch // world
    micro_batch = min(given, share) if given else largest_divisor(share, at_most)
    if share % micro_batch:
        raise BadInput(f"--micro-batch {micro_batch}: must divide --batch {batch}"
                       f"{f' over {world} processes' if world > 1 else ''}")
    if stage == "clip" and micro_batch < batch:
        raise BadInput("stage clip compares the pictures in a batch and needs all at once: one process, and no "
                       "--micro-batch")
    return micro_batch


def check_out(settings: Settings) -> None:
    """Raises BadInput if --out can't be written or holds other files, or if --resume is missing or finds no run."""
    out, stage = settings.out, settings.stage
    check_folder(out)
    folders = {"joint": ("cg", "pg"), "clip": ("clip", "text_encoder", "tokenizer"),
               "paint-by-example": [f"{stage}/{part}" for part in ("image_encoder", "unet", "vae", "scheduler")]}
    for name in folders.get(stage, (stage,)):
        if others := sorted({file.name for file in (out / name).glob("[!.]*")} - WRITTEN):
            raise BadInput(f"--out {out}: the trained model would replace {out / name}, which holds {others[0]}; "
                           "choose another folder")
    found = list_checkpoints(settings.folder)
    if settings.resume and not found:
        raise BadInput(f"nothing to resume: {settings.folder} holds no checkpoint; leave out --resume, or give the "
                       "run's --out")
    if found and not settings.resume:
        raise BadInput(f"--out {out} holds a run of this stage; add --resume to go on, or name another folder")


def start_processes(device: str) -> None:
    """Under torchrun, joins the other processes."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if processes()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl")


def fastest_amp(settings: Settings) -> torch.dtype | None:
    """What --amp without a value means: bfloat16 if this machine multiplies it faster than float32, else None.

    Prints it on stderr. All processes take the first one's measurement; a resumed run keeps its earlier choice.
    """
    rank, world = processes()
    choice = [None]
    if before := settings.resume and read_header(settings.folder).get("settings", {}).get("amp"):
        choice = [None if before == "None" else getattr(torch, before.removeprefix("torch."))]
    elif rank == 0:
        cuda = settings.device.startswith("cuda")
        faster = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else bfloat16_is_faster()
        choice = [torch.bfloat16 if faster else None]
    if world > 1:
        dist.broadcast_object_list(choice)
    if rank == 0:
        print("--amp: " + (f"trains in mixed precision, {str(choice[0])[6:]}" if choice[0] else
                           "trains in float32: this machine does not multiply bfloat16 faster"), file=sys.stderr)
    return choice[0]


def next_commands(settings: Settings, toy: bool) -> list[list[str]]:
    """Commands for the trained branches: paint, and after CG train PG; on the toy's ads, paint its sample."""

    def command(program: str, *options: str) -> list[str]:
        given = {option: getattr(settings, option) for option in options}
        paths = {option: path for option, path in given.items() if path and TOY not in path.absolute().parents}
        return ["python", *program.split(), *(word for o, path in (paths | branches).items()
                                              for word in (f"--{o}", str(path)))]

    stage, out = settings.stage, settings.out
    branches = {"cg": {"cg": out / "cg"}, "pg": {"cg": settings.cg, "pg": out / "pg"},
                "joint": {"cg": out / "cg", "pg": out / "pg"}, "controlnet": {"controlnet": out / "controlnet"}}[stage]
    paint = command("generate.py", "weights", "tokenizer")
    if stage == "controlnet" or not toy:
        paint += ["--product", "PHOTO.png", "--category", "NAME"]
    return [command("train.py pg", "weights", "tokenizer", "data"), paint] if stage == "cg" else [paint]


def category_identifiers(items: list[Item], settings: Settings, template: str) -> dict[str, str]:
    """The identifier [D] of each category, by name (section 3.2). Categories that the frozen CG, --init-control or the
    resumed run knows keep theirs; new ones get the next numbers. template: the default of --identifier. Raises BadInput
    if the frozen CG lacks a category, or if --identifier contradicts the known ones.
    """
    names, known, source = categories_of(items), {}, settings.folder
    if settings.stage == "pg":
        known = read_identifiers(categories_file(settings.cg))
        if unknown := [name for name in names if name not in known]:
            raise BadInput(f"{settings.data}: category {unknown[0]} was not in CG's training set; train CG on this "
                           f"data first (train.py cg; --init-control {settings.cg} starts from this CG)")
        return known
    if settings.resume:
        known = read_header(settings.folder).get("identifiers") or {}
    elif settings.init_control and (source := categories_file(settings.init_control)).is_file():
        known = read_identifiers(source)
    if settings.identifier and known != number_categories([*known], settings.identifier):
        raise BadInput(f"--identifier {settings.identifier}: {source} has other identifiers, such as "
                       f"{[*known.values()][-1]!r}; leave it out, and new categories get the next numbers")
    return number_categories(names, settings.identifier or template_of(known) or template, known)


def number_categories(names: list[str], template: str, known: dict[str, str] | None = None) -> dict[str, str]:
    """`known` in its order; then, for each other name, the template with the next number in place of {}."""
    identifiers = dict(known or {})
    number = len(identifiers)
    for name in names:
        if name not in identifiers:
            while template.replace("{}", str(number)) in identifiers.values():  # if someone has edited the file
                number += 1
            identifiers[name] = template.replace("{}", str(number))
    return identifiers


def template_of(known: dict[str, str]) -> str | None:
    """The template of these identifiers, inferred from the last one and its number; None if it can't be."""
    if not known:
        return None
    before, number, after = [*known.values()][-1].rpartition(str(len(known) - 1))
    return before + "{}" + after if number else None
