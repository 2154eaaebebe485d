"""Rivals: trains the toy's LaMa, by reconstruction and against a discriminator of patches, as its paper does.

    python rivals/lab.py train lama

The public LaMa fills holes in photos; this one learns to paint the surroundings of products, which is its task here, on
the ads that CG learns from. It lacks LaMa's perceptual loss, which needs a network that segments.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from data import TrainingSamples, product_hint
from programs.latents import sheet_ads, sheet_of
from programs.settings import Settings
from programs.trainer import Task
from rivals.lama import LAMA_FILE, LaMa
from support.cutouts import SOLID
from support.datasets import read_items
from support.images import canvas_size
from weights import save_module

TOY_LAMA = {"_class_name": "LaMa", "width": 16, "levels": 3, "blocks": 6, "global_channels": 96}

# Weights of the loss's terms. Those of matching and R1, relative to the adversarial one, are LaMa's. LaMa reconstructs
# the known pixels; here the whole picture is reconstructed, in the perceptual loss's place: this keeps a short training
# steady. With 100 in place of 500, LaMa painted a grid of all colours over its pictures
RECONSTRUCTION, ADVERSARIAL, MATCHING, R1 = 500.0, 1.0, 10.0, 1e-3


class Discriminator(nn.Module):
    """Whether a picture's patches are real: (B, 3, H, W) -> logits (B, 1, h, w), and the features of all layers but the
    first. These are normalised, or the discriminator, which gains by different features, would make them ever larger.
    """

    def __init__(self, width: int = 32, levels: int = 3):
        super().__init__()
        widths = [3, *(width * 2**i for i in range(levels))]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = F.leaky_relu(self.layers[0](x), 0.2), []
        for layer in self.layers[1:]:
            x = F.leaky_relu(F.instance_norm(layer(x)), 0.2)
            features.append(x)
        return self.last(x), features


@dataclass
class LaMaLoss:
    """One loss for both networks: the discriminator learns from detached pictures, and LaMa from a discriminator whose
    parameters are detached.
    """

    lama: LaMa
    discriminator: Discriminator

    def __call__(self, batch: dict, generator: torch.Generator) -> Tensor:
        """A batch of `TrainingSamples` -> the loss, ()."""
        real, known = batch["image"], (batch["mask"] >= SOLID).to(batch["image"])
        painted = self.lama.fill(real, known)
        return self.of_discriminator(real, painted.detach(), known) + self.of_lama(real, painted)

    def of_discriminator(self, real: Tensor, painted: Tensor, known: Tensor) -> Tensor:
        """The logistic loss, with R1 (Mescheder et al. 2018), which keeps the gradient at real pictures short. Patches
        that LaMa was shown count as real.
        """
        real = real.detach().requires_grad_()
        logits = self.discriminator(real)[0]
        gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]
        fake = self.discriminator(painted)[0]
        shown = F.interpolate(known, size=fake.shape[2:], mode="area")
        error = shown * F.softplus(-fake) + (1 - shown) * F.softplus(fake)
        return F.softplus(-logits).mean() + error.mean() + R1 * gradient.square().sum(dim=(1, 2, 3)).mean()

    def of_lama(self, real: Tensor, painted: Tensor) -> Tensor:
        """The distance from the ad, in pixels and in the discriminator's features, and the adversarial loss."""
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        logits, features = functional_call(self.discriminator, frozen, painted)
        with torch.no_grad():
            wanted = self.discriminator(real)[1]
        matching = sum(F.mse_loss(ours, theirs) for ours, theirs in zip(features, wanted)) / len(wanted)
        return (RECONSTRUCTION * F.l1_loss(painted, real) + MATCHING * matching
                + ADVERSARIAL * F.softplus(-logits).mean())


def lama_task(settings: Settings) -> Task:
    """Stage lama: LaMa learns to paint the surroundings of products. Raises BadInput for a size that does not fit."""
    items = read_items(settings.data)[0]
    torch.manual_seed(settings.seed)
    lama = LaMa(TOY_LAMA | {"sample_size": settings.size}).to(settings.device)
    discriminator = Discriminator().to(settings.device)
    canvas_size(1, 1, settings.size, 2 * lama.multiple)  # refuses a size that does not fit
    label, _, (rgb, mask, *_) = sheet_ads(settings, "bg1k", items)

    def draw():
        lama.eval()
        painted = lama(rgb.to(settings.device), mask.to(settings.device))
        lama.train()
        return sheet_of({"product": product_hint(rgb, mask), "painted": painted, label: rgb})

    def save(out: Path) -> None:
        save_module(lama, out / "lama", LAMA_FILE, settings.save_dtype)

    return Task("LaMa and its discriminator", {"lama": nn.ModuleList([lama, discriminator])},
                TrainingSamples(items, settings.size), LaMaLoss(lama, discriminator), draw, save,
                [["python", "evaluate.py", "table1", "--lama", str(settings.out / "lama")]])
