"""Rivals: finds products in pictures, to count those that a method adds to a background, see eq3.duplicates.

    python train.py segmenter

A small U-Net that labels each place with the category of the product it shows. It learns on the ads that CG learns
from, into which further products are pasted (Ghiasi et al. 2021, 'Simple Copy-Paste'): in an ad there is only one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from data import Samples
from programs.latents import held_out_ads
from programs.settings import Settings
from programs.trainer import Task
from support.datasets import read_items
from support.files import read_json
from support.images import sheet
from support.tensors import read_weights
from weights import save_module

SEGMENTER_SETTINGS = dict(lr=2e-3, batch=8, steps=1200, size=256, ema=0.99, warmup=50, decay=0.5, clip_gradient=1.0)
SEGMENTER_FILE = "model.safetensors"
WIDTHS = (16, 32, 48, 64, 64)  # channels at 1/2, 1/4, ... of the picture's side
PASTED, SCALE = 2, (0.15, 0.8)  # products pasted into each ad, and their size in parts of their own


class Segmenter(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> logits (B, 1 + C, H/4, W/4), sides rounded up: no product, each category's."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, widths = config, config["widths"]
        self.down = nn.ModuleList(self.layer(a, b, 2) for a, b in zip([3, *widths], widths))
        self.up = nn.ModuleList(self.layer(a + b, b, 1) for a, b in zip(widths[2:], widths[1:]))
        self.out = nn.Conv2d(widths[1], 1 + len(config["categories"]), 1)

    @staticmethod
    def layer(before: int, after: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU(),
                             nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x, skips = 2 * x - 1, []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, skip in zip(reversed(self.up), reversed(skips[1:-1])):
            x = up(torch.cat([F.interpolate(x, skip.shape[2:]), skip], dim=1))
        return self.out(x)


def load_segmenter(folder: Path) -> Segmenter:
    """The network that train.py segmenter wrote."""
    segmenter = Segmenter(read_json(folder / "config.json"))
    segmenter.load_state_dict(read_weights(folder / SEGMENTER_FILE))
    return segmenter.eval()


def paste(image: Tensor, label: Tensor, product: Tensor, mask: Tensor, category: Tensor,
          generator: Generator) -> tuple[Tensor, Tensor]:
    """Pastes a product into each ad, smaller and somewhere else: image (B, 3, S, S), label (B, S, S), product and mask
    as `image`, category (B,) -> image, label.
    """
    scale, y, x = torch.rand(3, len(image), generator=generator).to(image)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * scale
    zero = torch.zeros_like(scale)
    affine = torch.stack([1 / scale, zero, (1 - 2 * x) / scale, zero, 1 / scale, (1 - 2 * y) / scale], dim=1)
    grid = F.affine_grid(affine.view(-1, 2, 3), image.shape, align_corners=False)
    cutout = F.grid_sample(torch.cat([product * mask, mask], dim=1), grid, align_corners=False)
    return (image * (1 - cutout[:, 3:]) + cutout[:, :3],
            torch.where(cutout[:, 3] > 0.5, category[:, None, None], label))


def blur(x: Tensor, side: int) -> Tensor:
    """Reduced to the means of squares of `side` pixels, and enlarged again."""
    return x if side == 1 else F.interpolate(F.avg_pool2d(x, side), x.shape[2:], mode="bilinear")


def draw(below: int, generator: Generator) -> int:
    """A whole number from 0 on, below `below`."""
    return int(torch.randint(below, (), generator=generator))


@dataclass
class SegmenterLoss:
    """Cross entropy at each place of ads with further products. The background, and then all of it, is blurred to a
    random degree: what a method paints is softer than what the ads hold.
    """

    segmenter: Segmenter
    labels: Tensor  # (N,): 1 + each ad's category

    def __call__(self, batch: dict, generator: Generator) -> Tensor:
        image, label = self.crowd(batch, generator)
        logits = self.segmenter(blur(image, 2 ** draw(3, generator))).float()
        return F.cross_entropy(logits, label[:, 2::4, 2::4])

    def crowd(self, batch: dict, generator: Generator) -> tuple[Tensor, Tensor]:
        """A batch of `Samples` -> ads with pasted products (B, 3, S, S), labels (B, S, S)."""
        image, mask = batch["image"], batch["mask"]
        category = self.labels.to(image.device)[batch["index"]]
        label = (mask[:, 0] > 0.5) * category[:, None, None]
        crowded = blur(image, 2 ** draw(5, generator)) * (1 - mask) + image * mask
        for k in range(1, 1 + PASTED):
            crowded, label = paste(crowded, label, image.roll(k, 0), mask.roll(k, 0), category.roll(k), generator)
        return crowded, label


def segmenter_task(settings: Settings) -> Task:
    """Stage segmenter: where is a product, and of which category?"""
    items = read_items(settings.data)[0]
    categories = sorted({item.category for item in items})
    torch.manual_seed(settings.seed)
    segmenter = Segmenter({"_class_name": "Segmenter", "categories": categories, "widths": WIDTHS}).to(settings.device)
    loss = SegmenterLoss(segmenter, torch.tensor([1 + categories.index(item.category) for item in items]))
    _, (rgb, mask, *_) = held_out_ads(settings.data, "bg1k", items, None, settings.size)
    rgb, mask = rgb.to(settings.device), mask.to(settings.device)
    crowded, _ = paste(rgb, torch.zeros_like(mask[:, 0]), rgb.roll(1, 0), mask.roll(1, 0), mask[:, 0, 0, 0],
                       Generator().manual_seed(0))

    def draw_sheet():
        with torch.no_grad():
            found = F.interpolate(1 - segmenter(crowded).softmax(dim=1)[:, :1], scale_factor=4.0)
        return sheet([[*crowded], [*found.expand_as(rgb)]], row_labels=["ads, each with another", "products found"])

    def save(out: Path) -> None:
        save_module(segmenter, out / "segmenter", SEGMENTER_FILE, settings.save_dtype)

    return Task("a segmenter of products", {"segmenter": segmenter}, Samples(items, settings.size), loss, draw_sheet,
                save, [["python", "evaluate.py", "duplicates", "--size", "256"]])
