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
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data import SIGMA, THETA, Samples, load_ad, product_hint
from generate import IDENTIFIER, TOY, branch_path, categories_file, encode_prompts, load_branch, paint, prompt_texts
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet, predict_noise
from sampler import seeded, timestep_weights
from support.cache import cached, digest, hashed
from support.checkpoints import checkpoints
from support.datasets import categories_of, read_items
from support.files import (
    BadInput,
    Parser,
    barrier,
    check_folder,
    native_bfloat16,
    one_line_errors,
    pick_device,
    processes,
    read_json,
    real,
    whole,
)
from support.images import canvas_size, sheet
from support.tensors import fingerprint
from support.trainer import Latents, Task, divisor, memory_format, mixed_precision, run
from toy.world import write_world
from weights import (
    CONTROL_FILE,
    TEXT_FILE,
    StableDiffusion,
    control_config,
    load_stable_diffusion,
    save_control,
)

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
WRITTEN = {"config.json", "categories.json", CONTROL_FILE, TEXT_FILE, "vocab.json", "merges.txt",
           "tokenizer_config.json"}  # to a trained model's folder

# ---------------------------------------------------------------- processes


# ---------------------------------------------------------------- the loop


# ---------------------------------------------------------------- checkpoints


# ---------------------------------------------------------------- what frozen networks make of the data, once


# ---------------------------------------------------------------- samples


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
    args.frozen = hashed([fingerprint(path) for path in (args.weights, args.cg) if path])
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
    with one_line_errors():
        main()
