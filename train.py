"""The method: training CG and PG by Eq. 1, in one process or many (section 5.1).

    python train.py cg                                                      # the toy: its shipped base, its ads
    python train.py pg --cg runs/cg/cg
    python train.py cg --data BG60K --weights SD15                          # the paper's settings (section 5.1)
    python train.py cg --attention plain                                    # without Eq. 3, to measure what it adds
    python train.py cg --resume                                             # continues exactly where it stopped
    torchrun --nproc_per_node 8 train.py cg --data BG60K --weights SD15     # on eight GPUs

Stages: cg and then pg beside the frozen CG, or joint, train the paper's branches on a frozen base. controlnet trains a
general ControlNet on captions, for comparison. vae, clip and unet (toy/stages.py) make a base from pictures with
captions. One loop serves all. A sample depends only on the run's seed and its position in the run, so an interruption
changes nothing. For the paper's branches, the number of processes and --micro-batch change only the order of summation.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import product_hint
from generate import IDENTIFIER, Canvas, paint, prompts_by_category
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet, predict_noise
from programs.latents import caption_prompts, category_prompts, held_out_ads, latent_samples, prompt_table, sheet_of
from programs.models import TOY, load_branch
from programs.settings import Settings, begin, category_identifiers, parser, settle
from programs.trainer import Stage, Task, Trainer
from sampler import Painting, Schedule, seeded, timestep_weights
from support.datasets import Item, read_items
from support.files import BadInput, locked, one_line_errors
from support.images import canvas_size
from support.machine import processes
from toy.stages import BASE_STAGES
from toy.world import TOY_DATA, draw_on_first_use
from weights import StableDiffusion, control_config, load_stable_diffusion, save_control

# Section 5.1. Where it gives no value, we follow ControlNet: AdamW, no schedule, half of the prompts dropped.
PAPER = dict(lr=1e-5, batch=128, epochs=300, size=512, ema=0.0, warmup=0, decay=0.0, clip_gradient=0.0,
             noise_offset=0.0, weighting="uniform", prompt_dropout=0.5)
# The toy's own settings, found by trial. CG must rely on the prompt to choose the scene, so only a tenth is dropped.
TOY_BRANCH = dict(lr=1e-3, batch=16, steps=2600, size=128, ema=0.99, warmup=50, decay=0.3, clip_gradient=1.0,
                  noise_offset=0.1, weighting="debias", prompt_dropout=0.5)

# ---------------------------------------------------------------- Eq. 1 and the loop


@dataclass
class Eq1:
    """Eq. 1: E ‖ε − ε_θ(z_t, t, prompts, hints)‖², to be minimised over the parameters of the trained branches.

    An ad is its own target: z_0 is its latent, its product is CG's hint, and its perturbed background is PG's.
    """

    unet: UNet  # frozen
    schedule: Schedule
    branches: list[tuple[ControlNet, str]]  # and what each one's hint shows: "product" or "background"
    prompts: Callable[[Tensor, Tensor], Prompts]  # (index, dropped), both (B,) -> the ads' prompts, or ''
    prompt_dropout: float  # the fraction of prompts replaced by ''
    weight: Tensor  # (T,): weight of the error at each timestep; in Eq. 1 all are 1

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of `Samples` -> the loss, ()."""
        z_0, eps, t, image, mask = (batch[name] for name in ("z_0", "eps", "t", "image", "mask"))
        z_t = self.schedule.add_noise(z_0, eps, t)
        prompts = self.prompts(batch["index"], batch["drop"] < self.prompt_dropout)
        hints = {"product": product_hint(image, mask), "background": batch.get("background")}
        branches = [(branch, branch.hint_features(hints[shows])) for branch, shows in self.branches]
        output = predict_noise(self.unet, z_t, t, prompts, branches, mask, batch.get("inpainting")).float()
        error = (output - self.schedule.target(z_0, eps, t)).square().mean(dim=(1, 2, 3))  # (B,)
        return (error * self.weight[t]).mean()


def fit(task: Task, settings: Settings) -> None:
    """Trains a task for settings.steps steps. On SIGTERM it finishes the step, saves, and exits with status 143."""
    trainer = Trainer(task, settings)
    with trainer.running():
        for step, batch in trainer.batches():
            loss = trainer.backward(step, batch)  # task.loss over all parts and processes, and its gradients
            trainer.update(step, loss)  # AdamW and the moving average
            trainer.record(step, loss)
            if trainer.due(step, settings.sample_every):
                trainer.save_models()
                trainer.draw(step)
            if trainer.due(step, 1 if trainer.stopping else settings.save_every):
                trainer.save_checkpoint(step)  # last: a run that is killed before does the step again
            trainer.leave_if_stopped(step)
    trainer.finish()


# ---------------------------------------------------------------- the paper's branches


def build_branches(sd: StableDiffusion, settings: Settings) -> dict[str, ControlNet]:
    """The branches that a stage trains, by name: copies of SD's encoder or of --init-control (section 3.1)."""
    config, stage = control_config(sd.unet.config, sd.vae.factor), settings.stage
    torch.manual_seed(settings.seed)  # for their hint encoders, which start at random
    branches: dict[str, ControlNet] = {}
    if stage in ("cg", "joint"):
        branches["cg"] = CategoryGenerator(config | {"attention": settings.attention})
    if stage in ("pg", "joint"):
        branches["pg"] = PersonalityGenerator(config)
    if stage == "controlnet":
        branches["controlnet"] = ControlNet(config)
    for branch in branches.values():
        branch.to(settings.device).init_from_unet(sd.unet)
        if path := settings.init_control:
            given = load_branch("controlnet", path, sd)
            if given.config["conditioning_embedding_out_channels"] != config["conditioning_embedding_out_channels"]:
                raise BadInput(f"--init-control {path}: its hint encoder's channels are not those of ours")
            branch.load_state_dict(given.state_dict())
        if settings.checkpointing:
            branch.recompute_activations()
    return branches


def batch_prompts(sd: StableDiffusion, items: list[Item], identifiers: dict[str, str] | None,
                  settings: Settings) -> Callable[[Tensor, Tensor], Prompts]:
    """Eq1.prompts: each category's, with its identifier, encoded here once; without identifiers, the captions."""
    if identifiers is None:
        return caption_prompts(sd, [", ".join(item.caption) for item in items])
    texts = [*prompts_by_category(identifiers, sd.tokenizer).values(), ("", "", "")]
    rows = {name: row for row, name in enumerate(identifiers)}
    return category_prompts(prompt_table(sd, texts, settings), [rows[item.category] for item in items], settings.device)


def branch_task(settings: Settings) -> Task:
    """Stages cg, pg, joint and controlnet: Eq. 1 over the parameters of CG, of PG beside a frozen CG, of both, or of an
    ordinary ControlNet that reads captions.
    """
    stage, size = settings.stage, settings.size
    sd = load_stable_diffusion(settings.weights, settings.device, tokenizer=settings.tokenizer)
    canvas_size(1, 1, size, sd.multiple)  # raises BadInput if the size does not fit the base
    items, notes = read_items(settings.data)
    if processes()[0] == 0:
        print(*notes, sep="\n", file=sys.stderr)
    if stage == "controlnet" and not all(item.caption for item in items):
        raise BadInput(f"{settings.data}: stage controlnet trains on captions, which this data set lacks; to train an "
                       "ordinary ControlNet on these ads, give train.py cg --attention plain")
    identifiers = None if stage == "controlnet" else category_identifiers(items, settings, IDENTIFIER)

    trained = build_branches(sd, settings)
    cg = load_branch("category", settings.cg, sd) if stage == "pg" else trained.get("cg")
    control, pg = trained.get("controlnet"), trained.get("pg")
    for frozen in (sd.unet, sd.vae, sd.text_encoder, *([cg] if stage == "pg" else [])):
        frozen.to(settings.amp or torch.float32, memory_format=settings.memory_format)
    if settings.checkpointing:
        sd.unet.recompute_activations()

    samples = latent_samples(sd, items, size, settings, perturbed=pg is not None, theta=settings.theta,
                             sigma=settings.sigma, noise_offset=settings.noise_offset)
    branches = [(branch, shows) for branch, shows in ((cg or control, "product"), (pg, "background")) if branch]
    eq1 = Eq1(sd.unet, sd.schedule, branches, batch_prompts(sd, items, identifiers, settings), settings.prompt_dropout,
              timestep_weights(sd.schedule, settings.weighting).to(settings.device))
    canvas = held_out_canvas(sd, items, identifiers, settings, with_references=pg is not None)

    def save(out: Path) -> None:
        for folder, branch in trained.items():
            save_control(branch, out / folder, settings.save_dtype, identifiers)

    name = " and ".join({"cg": "CG", "pg": "PG"}.get(name, "a ControlNet") for name in trained)
    return Task(name, trained, samples, lambda batch, generator: eq1(batch),
                partial(draw_branches, sd.unet, cg or control, pg, canvas, settings), save,
                next_commands(settings, [*trained]), identifiers)


def held_out_canvas(sd: StableDiffusion, items: list[Item], identifiers: dict[str, str] | None, settings: Settings,
                    with_references: bool) -> Canvas:
    """The ads that sheets are painted from, with their categories' prompts or, without identifiers, their captions."""
    split = "bgpair" if with_references else "bg1k"
    ads, (rgb, mask, *references) = held_out_ads(settings.data, split, items, identifiers, settings.size)
    texts = prompts_by_category(identifiers, sd.tokenizer) if identifiers else None
    texts = [texts[ad.category] if texts else (", ".join(ad.caption),) * 3 for ad in ads]
    return Canvas(rgb, mask, texts, [], *(references if with_references else ()))  # draw_branches adds generators


def draw_branches(unet: UNet, cg: ControlNet, pg: ControlNet | None, canvas: Canvas, settings: Settings):
    """A sheet with a column per ad: the product, for PG also the reference, the painted picture, the original ad."""
    base = load_stable_diffusion(settings.weights, "cpu", tokenizer=settings.tokenizer)  # training dropped its VAE
    vae, text_encoder = base.vae.to(settings.device), base.text_encoder.to(settings.device)
    sd = replace(base, unet=unet, vae=vae, text_encoder=text_encoder)
    canvas = canvas._replace(generators=seeded(settings.seed, len(canvas.texts)))
    painted = paint(sd, canvas, Painting(steps=25), cg, pg)
    rows = {"product": product_hint(canvas.rgb, canvas.mask)} | ({"reference": canvas.reference} if pg else {})
    return sheet_of(rows | {"painted": painted, "ad": canvas.rgb})


def next_commands(settings: Settings, trained: list[str]) -> list[list[str]]:
    """Commands to go on with: after CG train PG, and paint."""
    paths = {name: getattr(settings, name) for name in ("weights", "tokenizer", "cg")}
    paths |= {name: settings.out / name for name in trained}

    def command(*program: str, **paths: Path) -> list[str]:
        given = {name: path for name, path in paths.items() if path and TOY not in path.absolute().parents}
        return ["python", *program, *(word for name, path in given.items() for word in (f"--{name}", str(path)))]

    paint = [*command("generate.py", **paths), "--product", "PHOTO.png", "--category", "NAME"]
    return [command("train.py", "pg", **paths, data=settings.data), paint] if settings.stage == "cg" else [paint]


# ---------------------------------------------------------------- the command line

STAGES = BASE_STAGES | {
    "cg": Stage(branch_task, TOY_BRANCH | dict(steps=4500, prompt_dropout=0.1), PAPER),
    "pg": Stage(branch_task, TOY_BRANCH, PAPER),
    "joint": Stage(branch_task, TOY_BRANCH | dict(prompt_dropout=0.1), PAPER),
    "controlnet": Stage(branch_task, TOY_BRANCH, PAPER),
}


def main(arguments: list[str] | None = None, stages: dict[str, Stage] = STAGES) -> None:
    given = vars(parser(__doc__, stages).parse_args(arguments))
    if given["stage"] not in stages:
        raise BadInput(f"stage {given['stage']} does not exist; the stages are {', '.join(stages)}")
    stage = stages[given["stage"]]
    data = TOY_DATA / stage.data
    on_toy = "weights" not in given or given.get("data", data).absolute().parent == TOY_DATA
    settings = begin(settle(given, stage.settings if on_toy else stage.paper or stage.settings, data))
    draw_on_first_use(settings.data)
    with locked(settings.out):
        fit(stage.task(settings), settings)


if __name__ == "__main__":
    with one_line_errors():
        main()
