"""Rivals: trains the toy's Paint by Example, self-supervised as in its paper.

    python rivals/lab.py train paint-by-example

The UNet is the base's with five more input channels. The image encoder is the toy's CLIP, frozen, with a mapper on top.
Each ad that CG and PG learn from is its own target: its product is kept, the background is to be painted, and the
exemplar is a crop of the same ad, distorted so that it can't be copied. Crops are large and show the product too,
because in Table 2 the exemplar is a whole reference.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from data import Canvas, product_hint
from model import UNet
from programs.latents import latent_samples, sheet_ads, sheet_of
from programs.models import TOY
from programs.settings import Settings
from programs.trainer import Task
from rivals.paint_by_example import GUIDANCE, PaintByExample, PaintByExampleEncoder
from sampler import SamplerSettings, seeded
from support.datasets import read_items
from support.files import write_json
from support.images import canvas_size
from support.solvers import timestep_weights
from weights import CLIP_FILE, UNET_FILE, VAE_FILE, load_clip, load_stable_diffusion, save_module

FOLDER = "paint-by-example"  # in --out
MAPPER_BLOCKS = 2  # the toy's CLIP has 3 layers; the mapper of the original, on 24 layers, has 5
CROP = (0.5, 1.0)  # range of an exemplar's height and width, in parts of the picture's; our choice
ANGLE = 20  # degrees: the largest turn of an exemplar, as in the original code; half are flipped, half blurred


def exemplars_from(images: Tensor, generator: Generator) -> Tensor:
    """A crop of each picture, squashed to the picture's size, flipped, turned and blurred. (B, 3, S, S) -> the same."""
    uniform = torch.rand(7, len(images), generator=generator)
    h, w = CROP[0] + (CROP[1] - CROP[0]) * uniform[:2]  # the picture reaches from -1 to 1
    y, x = (1 - h) * (2 * uniform[2] - 1), (1 - w) * (2 * uniform[3] - 1)
    angle = math.radians(ANGLE) * (2 * uniform[4] - 1)
    flipped = torch.where(uniform[5] < 0.5, -w, w)
    affine = torch.stack([flipped * angle.cos(), -flipped * angle.sin(), x, h * angle.sin(), h * angle.cos(), y], dim=1)
    grid = F.affine_grid(affine.view(-1, 2, 3).to(images), images.shape, align_corners=False)
    crops = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(crops, 5, stride=1, padding=2, count_include_pad=False)
    return torch.where((uniform[6] < 0.5).to(images.device)[:, None, None, None], blurred, crops)


@dataclass
class ExampleLoss:
    """E ‖ε − ε_θ(z_t, what is kept, t, c)‖²; c is the exemplar's token, or the unconditional vector in its place."""

    pbe: PaintByExample
    dropout: float  # the fraction of exemplars replaced by the unconditional vector
    weight: Tensor  # (T,): weight of the error at each timestep

    def __call__(self, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        """A batch of `TrainingSamples`, "inpainting" as for an inpainting Stable Diffusion -> the loss, ()."""
        z_0, eps, t, masked = batch["z_0"], batch["eps"], batch["t"], batch["inpainting"][:, 1:]
        unet, schedule = self.pbe.sd.unet, self.pbe.sd.schedule
        dropped = (batch["drop"] < self.dropout)[:, None, None]
        c = torch.where(dropped, self.pbe.unconditional, self.pbe.encode(exemplars_from(batch["image"], generator)))
        kept = self.pbe.kept(batch["mask"], *z_0.shape[2:])
        output = unet(torch.cat([schedule.add_noise(z_0, eps, t), masked, kept], dim=1), t, c).float()
        error = (output - schedule.target(z_0, eps, t)).square().mean(dim=(1, 2, 3))  # (B,)
        return (error * self.weight[t]).mean()


def initial(settings: Settings) -> PaintByExample:
    """The base, whose UNet gets five more input channels with weights of zero, and the toy's CLIP with a mapper."""
    base = load_stable_diffusion(settings.weights, settings.device)
    torch.manual_seed(settings.seed)
    n = base.vae.config["latent_channels"]
    unet = UNet(base.unet.config | {"in_channels": 2 * n + 1}).to(settings.device)
    weights = base.unet.state_dict()
    unet.load_state_dict(weights | {"conv_in.weight": F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, n + 1))})
    clip = load_clip(TOY / "clip")
    encoder = PaintByExampleEncoder(clip.config["vision_config"] | {
        "architectures": ["PaintByExampleImageEncoder"], "projection_dim": unet.config["cross_attention_dim"],
        "mapper_blocks": MAPPER_BLOCKS})
    encoder.model["vision_model"].load_state_dict(clip.vision_model.state_dict())
    encoder.model.requires_grad_(False)
    nn.init.normal_(encoder.uncond_vector)
    return PaintByExample(replace(base, unet=unet), encoder.to(settings.device))


def paint_by_example_task(settings: Settings) -> Task:
    """Stage paint-by-example: trains the UNet, the mapper, its norm and projection, and the unconditional vector."""
    pbe, items, size = initial(settings), read_items(settings.data)[0], settings.size
    sd = pbe.sd
    canvas_size(1, 1, size, sd.multiple)  # refuses a size that does not fit the base
    sd.vae.to(memory_format=settings.memory_format)
    # The masked ad's latent is the same as for an inpainting Stable Diffusion, for which latent_samples keeps it
    samples = latent_samples(sd, items, size, settings)
    loss = ExampleLoss(pbe, settings.prompt_dropout,
                       timestep_weights(sd.schedule, settings.weighting).to(settings.device))
    label, _, (rgb, mask, reference, _) = sheet_ads(settings, "bgpair", items)

    def draw():
        """A sheet with a column for each ad: product, exemplar, the painted picture, and the original ad."""
        canvas = Canvas(rgb, mask, [], seeded(settings.seed, len(rgb)), reference)
        painted = pbe.paint(canvas, SamplerSettings(25, GUIDANCE))
        return sheet_of({"product": product_hint(rgb, mask), "exemplar": reference, "painted": painted, label: rgb})

    def save(out: Path) -> None:
        parts = (pbe.image_encoder, "image_encoder", CLIP_FILE), (sd.unet, "unet", UNET_FILE), (sd.vae, "vae", VAE_FILE)
        for module, part, file in parts:
            save_module(module, out / FOLDER / part, file, settings.save_dtype)
        write_json(sd.schedule.config, out / FOLDER / "scheduler" / "scheduler_config.json")

    trained = nn.ModuleDict({"unet": sd.unet, "image_encoder": pbe.image_encoder})
    return Task("Paint by Example", {FOLDER: trained}, samples, loss, draw, save,
                [["python", "evaluate.py", "table2", "--paint-by-example", str(settings.out / FOLDER)]])
