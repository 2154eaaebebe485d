"""The method: training CG and PG by Eq. 1, in one process or many (section 5.1).

    python train.py cg                                                      # the toy: its shipped base, its ads
    python train.py pg --cg runs/cg/cg
    python train.py cg --data BG60K --weights SD15                          # the paper's settings (section 5.1)
    python train.py cg --attention plain                                    # without Eq. 3, to measure what it adds
    python train.py cg --resume                                             # continues exactly where it stopped
    torchrun --nproc_per_node 8 train.py cg --data BG60K --weights SD15     # on eight GPUs

Stages: cg, then pg beside the frozen CG, or joint (the paper does not say which), train the paper's branches on a
frozen base; controlnet, for comparison, a ControlNet on captions. vae, clip and unet (toy/stages.py) make a base. One
loop serves all. A sample depends only on the run's seed and its position in the run, so neither interruptions nor more
processes change it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data import product_hint
from generate import paint
from model import CategoryGenerator, ControlNet, PersonalityGenerator, Prompts, UNet, predict_noise
from programs.latents import batch_prompts, latent_samples, load_base_and_ads, sheet_painter
from programs.models import load_branch
from programs.settings import Settings, begin, next_commands, parser, settle
from programs.trainer import Stage, Task, Trainer, learning_rate, recompute_activations, update_averages
from sampler import Schedule
from support.files import locked, one_line_errors
from support.solvers import timestep_weights
from toy.stages import BASE_STAGES
from toy.world import TOY_DATA, draw_on_first_use
from weights import StableDiffusion, control_config, save_control

# Section 5.1. Where it gives no value, we follow ControlNet: AdamW, no schedule, half of the prompts dropped.
PAPER = dict(lr=1e-5, batch=128, epochs=300, size=512, ema=0.0, warmup=0, decay=0.0, clip_gradient=0.0,
             noise_offset=0.0, weighting="uniform", prompt_dropout=0.5)
WEIGHT_DECAY = 0.01  # AdamW's, as ControlNet's
# The toy's own settings, found by trial
TOY_BRANCH = dict(lr=1e-3, batch=16, steps=2600, size=128, ema=0.99, warmup=50, decay=0.3, clip_gradient=1.0,
                  noise_offset=0.1, weighting="debias", prompt_dropout=0.5)

# ---------------------------------------------------------------- Eq. 1 and the loop


@dataclass
class Eq1:
    """Eq. 1: E ‖ε − ε_θ(z_t, t, prompts, hints)‖², as a mean, to be minimised over the trained branches' parameters.

    An ad is its own target: z_0 is its latent, its product is CG's hint, and its perturbed background is PG's.
    """

    unet: UNet  # frozen: loaded without gradients
    schedule: Schedule
    branches: list[tuple[ControlNet, str]]  # each with its hint's name: "product" or "background"
    prompts: Callable[[Tensor, Tensor], Prompts]  # (index, dropped), both (B,) -> the ads' prompts, or ''
    prompt_dropout: float  # the fraction of prompts replaced by ''
    weight: Tensor  # (T,): weight of the error at each timestep; in Eq. 1 all are 1

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of `TrainingSamples` -> the loss, ()."""
        z_0, eps, t, image, mask = (batch[name] for name in ("z_0", "eps", "t", "image", "mask"))
        z_t = self.schedule.add_noise(z_0, eps, t)
        prompts = self.prompts(batch["index"], batch["drop"] < self.prompt_dropout)
        hints = {"product": product_hint(image, mask), "background": batch.get("background")}
        branches = [(branch, branch.hint_features(hints[name])) for branch, name in self.branches]
        output = predict_noise(self.unet, z_t, t, prompts, branches, mask, batch.get("inpainting")).float()
        error = (output - self.schedule.target(z_0, eps, t)).square().mean(dim=(1, 2, 3))  # (B,)
        return (error * self.weight[t]).mean()


def train(task: Task, settings: Settings) -> None:
    """Trains a task for settings.steps steps. On SIGTERM it finishes the step, saves, and exits with status 143."""
    s = settings.for_samples(len(task.samples))
    parameters = [*nn.ModuleDict(task.modules).to(memory_format=s.memory_format).parameters()]
    optimizer = torch.optim.AdamW(parameters, s.lr, weight_decay=WEIGHT_DECAY, fused=True)
    # float16's gradients would vanish below 6e-8: the loss is scaled up, and the gradients back down
    scaler = torch.amp.GradScaler(torch.device(s.device).type, enabled=s.amp == torch.float16)
    run = Trainer(task, s, optimizer, scaler)
    with run.running():
        for step, batch in run.batches():
            generator = run.generator(step)
            for part in run.parts(batch):  # --micro-batch samples at once
                with s.autocast():
                    loss = run.share(task.loss(part, generator))  # for the paper's branches Eq. 1
                    scaler.scale(loss).backward()
            run.sum_over_processes()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, s.clip_gradient or torch.inf)
            run.refuse_bad_numbers(step, norm)
            optimizer.param_groups[0]["lr"] = learning_rate(step, s.lr, s.steps, s.warmup, s.decay)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            update_averages(run.averages, parameters, step, s.ema)
            run.record(step)
            if run.due(step, s.sample_every):
                run.save_models()
                run.draw(step)
            if run.due(step, 1 if run.stopping else s.save_every):
                run.save_checkpoint(step)  # last: a run that is killed before does the step again
            run.leave_if_stopped(step)
    run.finish()


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
            branch.load_state_dict(load_branch("controlnet", path, sd, config).state_dict())
    return branches


def branch_task(settings: Settings) -> Task:
    """Stages cg, pg, joint and controlnet: Eq. 1 over the parameters of CG, of PG beside a frozen CG, of both, or of an
    ordinary ControlNet that reads captions.
    """
    sd, items, held_out, identifiers = load_base_and_ads(settings)
    trained = build_branches(sd, settings)
    frozen = [load_branch("category", settings.cg, sd)] if settings.stage == "pg" else []
    cg = frozen[0] if frozen else next(iter(trained.values()))  # in stage controlnet the ControlNet in its place
    pg = trained.get("pg")
    for network in (sd.unet, sd.vae, sd.text_encoder, *frozen):
        network.to(settings.amp or torch.float32, memory_format=settings.memory_format)
    for network in (sd.unet, *trained.values()) if settings.checkpointing else ():
        recompute_activations(network)

    samples, checked = (latent_samples(sd, ads, settings.size, settings, perturbed=pg is not None)
                        for ads in (items, held_out))
    branches = [(cg, "product")] + ([(pg, "background")] if pg else [])
    weight = timestep_weights(sd.schedule, settings.weighting).to(settings.device)
    loss, check = (Eq1(sd.unet, sd.schedule, branches, batch_prompts(sd, ads, identifiers, settings),
                       settings.prompt_dropout, weight) for ads in (items, held_out))

    def save(out: Path) -> None:
        for folder, branch in trained.items():
            save_control(branch, out / folder, settings.save_dtype, identifiers)

    name = " and ".join({"cg": "CG", "pg": "PG"}.get(name, "a ControlNet") for name in trained)
    return Task(name, trained, samples, lambda batch, generator: loss(batch),
                sheet_painter(paint, sd, cg, pg, items, identifiers, settings), save,
                next_commands(settings, [*trained]), identifiers, checked, check)


STAGES = BASE_STAGES | {  # on the toy CG must rely on the prompt to choose the scene: only a tenth is dropped
    "cg": Stage(branch_task, TOY_BRANCH | dict(steps=4500, prompt_dropout=0.1), PAPER),
    "pg": Stage(branch_task, TOY_BRANCH, PAPER),
    "joint": Stage(branch_task, TOY_BRANCH | dict(prompt_dropout=0.1), PAPER),
    "controlnet": Stage(branch_task, TOY_BRANCH, PAPER),
}


def main(arguments: list[str] | None = None, stages: dict[str, Stage] = STAGES) -> None:
    options = vars(parser(__doc__, stages).parse_args(arguments))
    stage = stages[options["stage"]]
    toy = TOY_DATA / stage.data
    settings = begin(settle(options, stage.preset(options, toy), toy))
    draw_on_first_use(settings.data)
    with locked(settings.out):
        train(stage.task(settings), settings)


if __name__ == "__main__":
    with one_line_errors():
        main()
