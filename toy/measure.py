"""Toy: measures its parts on held-out ads at 256 pixels, for the table in toy/README.md.

    python toy/measure.py vae --vae toy/base/vae        # the decoder: PSNR, and the error beside edges
    python toy/measure.py base --base toy/base          # the UNet: error of ε by timestep, at both passes' sizes
    python toy/measure.py flat --base toy/base          # grain on flat surfaces, painted and drawn
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root, for a direct call

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Ad, Ads
from generate import canvas_of, paint, prompts_by_category
from programs.gallery import TOY_REFINE
from programs.models import TOY, ModelChoice, load_models
from sampler import Painting, draw_noise, seeded
from support.datasets import Item, read_items
from support.files import one_line_errors
from support.images import load_cutout, load_masked
from support.options import Parser, whole_number
from toy.stages import near_edges
from toy.world import SAMPLES, TOY_DATA, draw_on_first_use
from vae import VAE
from weights import UNET_FILE, load_module, load_stable_diffusion

SIZE = 256


def held_out(data: Path, count: int) -> list[Item]:
    draw_on_first_use(data)
    return read_items(data, "bg1k")[0][:count]


def pictures(items: list[Item], size: int) -> Tensor:
    """The items' pictures, (n, 3, size, size) in [0, 1]."""
    ads = Ads(items, size)
    return torch.stack([ads[i]["image"] for i in range(len(ads))])


@torch.no_grad()
def measure_vae(folder: Path, images: Tensor) -> None:
    """Prints the PSNR, and the mean absolute error, of 255 levels, within two pixels of strong edges and elsewhere."""
    vae = load_module(VAE, folder, UNET_FILE, "cpu", torch.float32)
    x = 2 * images - 1
    decoded = torch.cat([vae.decode(vae.encode(part)[0]).clamp(-1, 1) for part in x.split(8)])
    error, edge = (decoded - x).abs() * 127.5, (near_edges(x) == 1).expand_as(x)
    psnr = (10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))).mean()
    print(f"{folder}: {psnr:.2f} dB on {len(x)} ads; error {error[edge].mean():.2f} of 255 within two pixels of edges "
          f"({edge.float().mean():.0%} of the pixels), {error[~edge].mean():.2f} elsewhere")


@torch.no_grad()
def measure_base(folder: Path, items: list[Item]) -> None:
    """Prints the squared error of ε by timestep, without a prompt, at both passes' sizes."""
    sd = load_stable_diffusion(folder)
    for size, timesteps in ((SIZE // 2, (1, 21, 101, 201, 301, 501, 701, 901)), (SIZE, (1, 21, 101, 201, 301, 381))):
        z_0 = torch.cat([sd.encode(part) for part in pictures(items, size).split(8)])
        noise = torch.cat([draw_noise(z_0.shape[1:], g) for g in seeded(0, len(z_0))])
        P = sd.prompts([""])
        errors = []
        for t in timesteps:
            ts = torch.full((len(z_0),), t)
            z_t = sd.schedule.add_noise(z_0, noise, ts)
            eps = torch.cat([sd.unet(z, ts[: len(z)], P.expand(len(z), -1, -1)) for z in z_t.split(8)])
            errors.append(f"{t}: {(eps - noise).square().mean():.4f}")
        print(f"{folder}, {size} px, {len(z_0)} ads, error of ε at t = {', '.join(errors)}")


def grain(images: Tensor) -> float:
    """The mean absolute Laplacian, in levels of 255, on flat surfaces, where neighbouring blocks of 8 x 8 px are alike.

    images (n, 3, h, w) in [0, 1].
    """
    blocks = F.avg_pool2d(images, 8) * 255
    change = F.pad(blocks.diff(dim=2).abs(), (0, 0, 0, 1)).maximum(F.pad(blocks.diff(dim=3).abs(), (0, 1)))
    change = change.amax(dim=1, keepdim=True)
    flat = F.interpolate((F.max_pool2d(change, 3, stride=1, padding=1) < 4).float(), scale_factor=8)[:, :, 1:-1, 1:-1]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    laplacian = F.conv2d(images * 255, kernel, groups=3).abs().mean(dim=1, keepdim=True)
    return (laplacian * flat).sum().item() / flat.sum().item()


def measure_flat(base: Path) -> None:
    """Prints the grain of the samples that CG + PG paint, before and after the second pass, beside their references'.

    It is measured before the pictures are rounded to 8 bits.
    """
    names = [name for name, sample in SAMPLES.items() if sample.reference_seed is not None]
    categories = [SAMPLES[name].product for name in names]
    models = load_models(ModelChoice(base, cg=TOY / "cg", pg=TOY / "pg", dtype="float32"), None, {*categories}, True)
    texts = prompts_by_category(models.identifiers, models.sd.tokenizer)
    ads = [Ad(*load_cutout(TOY / "samples" / f"{name}.png"), texts[category], 0,
              load_masked(TOY / "samples" / f"{name}_reference.png")) for name, category in zip(names, categories)]
    how = Painting(**TOY_REFINE)
    first = paint(models.sd, canvas_of(ads, SIZE // 2, SIZE // 2, seeded(0, len(ads)))[0], how, models.cg, models.pg)
    large = canvas_of(ads, SIZE, SIZE, seeded(0, len(ads)))[0]
    pictures = {"drawn references": large.reference, "second pass": paint(models.sd, large, how, first=first),
                "first pass, enlarged": F.interpolate(first, size=(SIZE, SIZE), mode="bicubic", antialias=True)}
    print(f"{base}, mean absolute Laplacian of 255 on flat surfaces, {len(ads)} samples: "
          + ", ".join(f"{name} {grain(x):.2f}" for name, x in pictures.items()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vae", "base", "flat"])
    parser.add_argument("--vae", metavar="DIR", type=Path, default=TOY / "base" / "vae")
    parser.add_argument("--base", metavar="DIR", type=Path, default=TOY / "base")
    parser.add_argument("--data", metavar="DIR", type=Path, default=TOY_DATA / "ads", help="[the toy's ads]")
    parser.add_argument("--limit", metavar="N", type=whole_number(1, 10**6), default=64, help="held-out ads [64]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.what == "flat":
        measure_flat(args.base)
        return
    items = held_out(args.data, args.limit)
    if args.what == "vae":
        measure_vae(args.vae, pictures(items, SIZE))
    else:
        measure_base(args.base, items)


if __name__ == "__main__":
    with one_line_errors():
        main()
