"""The method: ads and their masks (section 4), the generators' hints, and the background perturbation (Eq. 5 and 6).

Reading order: an ad and its mask; what the generators see of it; the background perturbation, which keeps PG from
copying and pasting (section 3.3); the training samples. To check a data set:

    python data.py DIR --sheet sheet.png            # BG60k as released, or a folder with metadata.jsonl
    python data.py DIR --list --sheet sheet.png     # DIR/CATEGORY/NAME.png: writes metadata.jsonl first

Everywhere a picture is (3, H, W) float32 in [0, 1]. Its mask M is (1, H, W): 1 on the product, 0 on the background,
values between at soft edges.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Dataset

from support.datasets import (
    MASK_OF_ITEM,
    Item,
    check_ads,
    drop_lines,
    list_folder,
    list_of,
    parse,
    read_items,
    refuse_many_broken,
)
from support.files import BadInput, check_folder, one_line_errors
from support.images import fit, load_masked, save_image, sheet

# Background perturbation, section 5.1
THETA = 50  # kernel of the dilation in pixels of a 512 x 512 image; scaled with the image's size
SIGMA = (0.75, 0.95)  # σ of the mixup is uniform in this range
# The paper gives no numbers for random masks and mask translation. Ours, as fractions of the image's side:
EXTRA_MASKS = 3  # at most this many, each a rectangle or an ellipse
EXTRA_RADII = (0.03, 0.15)  # half their height and half their width
TRANSLATION = 0.15  # the mask's copy moves at most this far, up or down and left or right

# ---------------------------------------------------------------- an ad and its mask


class Ad(NamedTuple):
    """What one ad is painted from, at the files' own sizes. Without a reference CG works alone."""

    rgb: Tensor  # (3, H, W), the product, without its old background at soft edges (support/cutouts.py)
    mask: Tensor  # (1, H, W), M
    texts: tuple[str, str, str]  # for P, P_fg, P_bg
    seed: int
    reference: tuple[Tensor, Tensor] | None = None  # I_ref (3, H', W') and M_ref (1, H', W')


def load_ad(item: Item, size: int) -> tuple[Tensor, Tensor]:
    """A whole ad and its mask, (3, size, size) and (1, size, size).

    Both are cropped to the largest square, centred as near to the product's centroid as it fits. Raises BadInput.
    """
    image, mask = load_masked(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)
    h, w = mask.shape[1:]
    y, x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    rows, columns = mask[0].sum(1), mask[0].sum(0)
    centre = float(rows @ y / rows.sum()), float(columns @ x / columns.sum())
    return fit(image, size, size, "cover", centre)[0], fit(mask, size, size, "cover", centre)[0]


class Ads(Dataset):
    """The ads of a data set: {"image": (3, S, S), "mask": (1, S, S), "index": position in items}.

    A broken item is reported once on stderr, and its index is kept in `broken`. The next item takes its place ("index"
    says which). Raises BadInput once more than 1% are broken. Each worker of a DataLoader has its own `broken`.
    """

    def __init__(self, items: list[Item], size: int):
        self.items, self.size, self.broken = items, size, {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        while index in self.broken:
            index = (index + 1) % len(self)
        try:
            image, mask = load_ad(self.items[index], self.size)
        except BadInput as error:
            self.broken[index] = str(error)
            print(f"skipped: {error}", file=sys.stderr)
            refuse_many_broken(list(self.broken.values()), len(self), "data set")
            return self[index]
        return {"image": image, "mask": mask, "index": index}


# ---------------------------------------------------------------- what the generators see


def product_hint(image: Tensor, mask: Tensor) -> Tensor:
    """I ⊗ M, what CG sees. (..., 3, H, W) and (..., 1, H, W) -> (..., 3, H, W)."""
    return image * mask


def inpaint_hint(image: Tensor, mask: Tensor) -> Tensor:
    """What ControlNet 1.1 inpaint sees instead: I, but −1 where 1 − M > 0.5. Shapes as in product_hint."""
    return torch.where(1 - mask > 0.5, -1.0, image)


def background_hint(image: Tensor, mask: Tensor) -> Tensor:
    """I ⊗ (1 − M), what PG sees of a reference. (..., 3, H, W) and (..., 1, H, W) -> (..., 3, H, W)."""
    return image * (1 - mask)


# ---------------------------------------------------------------- background perturbation, for PG's training


def dilate(mask: Tensor, theta: int) -> Tensor:
    """Eq. 5: Dilate(M | θ), the maximum over θ x θ pixels around each pixel. (1, H, W) -> (1, H, W)."""
    before, after = theta // 2, (theta - 1) // 2
    mask = F.pad(mask, (before, after, before, after))
    mask = F.max_pool2d(mask, (theta, 1), stride=1)  # a square's maximum is its columns' largest maximum:
    return F.max_pool2d(mask, (1, theta), stride=1)  # 2 θ comparisons per pixel instead of θ²


def perturb(image: Tensor, mask: Tensor, other: Tensor, generator: Generator, theta: int = THETA,
            sigma: tuple[float, float] = SIGMA) -> Tensor:
    """PG's hint in training: a background whose outline and elements can't simply be copied.

    image I, other I_rand (3, H, W), mask M (1, H, W) -> (3, H, W). theta is in pixels of a 512 x 512 image; σ is
    uniform in the range sigma. theta 0 leaves the mask as it is, and sigma (1, 1) leaves out the mixup: Fig. 7 compares
    no perturbation, dilation alone, and both. All randomness comes from the CPU `generator`, so a run can be resumed.
    """
    h, w = mask.shape[1:]
    if theta:
        M_aug = dilate(mask, max(1, round(theta * min(h, w) / 512)))  # Eq. 5
        dy, dx = ((torch.rand(2, generator=generator) * 2 - 1) * TRANSLATION * torch.tensor([h, w])).int().tolist()
        moved = F.pad(M_aug, (dx, -dx, dy, -dy))
        # Their union hides the product itself, whatever is drawn
        M_aug = M_aug.maximum(moved).maximum(random_masks(h, w, generator))
    else:
        M_aug = mask
    s = sigma[0] + (sigma[1] - sigma[0]) * torch.rand((), generator=generator)  # σ
    I_aug = s * image + (1 - s) * other  # Eq. 6
    return I_aug * (1 - M_aug)  # the paper prints I_aug ⊗ M_aug, a slip: PG must see the background


def random_masks(h: int, w: int, generator: Generator) -> Tensor:
    """The union of up to EXTRA_MASKS rectangles and ellipses at random places, (1, h, w) of 0 and 1."""
    y, x = (torch.arange(h)[:, None] + 0.5) / h, (torch.arange(w)[None, :] + 0.5) / w  # (h, 1), (1, w) in [0, 1]
    low, high = EXTRA_RADII
    union = torch.zeros(h, w, dtype=torch.bool)
    for _ in range(torch.randint(EXTRA_MASKS + 1, (), generator=generator)):
        cy, cx, ry, rx, ellipse = torch.rand(5, generator=generator).tolist()
        dy, dx = ((y - cy) / (low + (high - low) * ry)).abs(), ((x - cx) / (low + (high - low) * rx)).abs()
        union |= (dy**2 + dx**2 < 1) if ellipse < 0.5 else (dy < 1) & (dx < 1)
    return union[None].float()


# ---------------------------------------------------------------- training samples


class Samples(Dataset):
    """Training samples by (index, seed). The seed decides all that is random in a sample, whichever worker makes it.

    Each has "index". `pictures` adds "image" and "mask". `perturbed` adds PG's hint, "background" (Eq. 5, 6), with
    `theta` and `sigma` as in `perturb`. `latents` adds what one step of Eq. 1 draws: "z_0", "eps" and "t" (see
    `diffuse`), and "drop" in [0, 1), which decides whether the prompt is dropped; for an inpainting UNet also
    "inpainting" (5, h, w). They come from programs/latents.py, in parts of equally many pictures; `scale` makes them
    the UNet's z.
    """

    def __init__(self, items: list[Item], size: int, latents: list[dict[str, Tensor]] | None = None, scale: float = 1.0,
                 T: int = 1000, pictures: bool = True, perturbed: bool = False, theta: int = THETA,
                 sigma: tuple[float, float] = SIGMA, noise_offset: float = 0.0):
        self.ads, self.latents, self.scale, self.T = Ads(items, size), latents, scale, T
        self.pictures, self.perturbed = pictures, perturbed
        self.theta, self.sigma, self.noise_offset = theta, sigma, noise_offset

    def __len__(self) -> int:
        return len(self.ads)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        generator = Generator().manual_seed(seed)
        sample = self.ads[index] if self.pictures else {"index": index}
        if self.perturbed:
            away = int(torch.randint(1, max(2, len(self)), (), generator=generator))
            other = self.ads[(sample["index"] + away) % len(self)]["image"]
            sample["background"] = perturb(sample["image"], sample["mask"], other, generator, self.theta, self.sigma)
        if self.latents:
            part, row = divmod(sample["index"], len(self.latents[0]["mean"]))
            stored = {name: x[row].float() for name, x in self.latents[part].items()}
            mean, std = stored.pop("mean") * self.scale, (stored.pop("logvar") / 2).exp() * self.scale
            z_0, eps, t = diffuse(mean, std, generator, self.T, self.noise_offset)
            drop = torch.rand((), generator=generator)
            sample |= {"z_0": z_0, "eps": eps, "t": t, "drop": drop, **stored}
        return sample


def diffuse(mean: Tensor, std: Tensor, generator: Generator, T: int,
            noise_offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draws what Eq. 1 needs: z_0 (4, h, w) from the VAE's posterior (mean, std), ε of the same shape, and t () < T.

    Even at the largest t, z_t still carries the picture's mean brightness; the pure noise that sampling starts from
    does not, and dark scenes come out grey. With noise_offset > 0 the mean of ε varies too (Guttenberg 2023), so that
    the model relies on the prompt for the brightness.
    """
    draw = torch.randn(2, *mean.shape, generator=generator)
    z_0, eps = mean + std * draw[0], draw[1]
    if noise_offset:
        eps = eps + noise_offset * torch.randn(len(mean), 1, 1, generator=generator)
    return z_0, eps, torch.randint(T, (), generator=generator)


# ---------------------------------------------------------------- checking a data set


def save_sheet(ads: Ads, count: int, path: Path) -> None:
    """Writes a sheet of eight of the first `count` ads, evenly spaced over them: what the networks see of each."""
    samples = [ads[index] for index in range(0, count, -(-count // 8))]
    generator, rows = Generator().manual_seed(0), []
    for sample, other in zip(samples, samples[1:] + samples[:1]):
        I, M = sample["image"], sample["mask"]
        rows.append([I, M, product_hint(I, M), perturb(I, M, other["image"], generator)])
    names = [ads.items[sample["index"]].category for sample in samples]
    save_image(sheet(rows, ["image", "mask", "CG's hint", "PG's hint, perturbed"], names), path)
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.sheet:
        check_folder(args.sheet.parent, "--sheet")  # before loading, which may take an hour
    if args.list:
        print(list_folder(args.dir))
    file = list_of(args.dir, args.split)
    try:
        items, notes = read_items(args.dir, args.split)
        print("\n".join(notes))
        references = [replace(item, image=item.reference, mask=item.reference_mask) for item in items if item.reference]
        ads = Ads(items + references, args.size)
        blank = check_ads(ads, len(items), file)
        if args.sheet:
            save_sheet(ads, len(items), args.sheet)
    except BaseException:  # also an interrupt
        if args.list:
            file.unlink()  # so that the same command can run again
        raise
    if args.drop_blank and blank:
        print(f"dropped them from {file}; the whole list is {drop_lines(file, blank)}")
    if args.split == "bg60k":
        print(f"next, train CG on it: python train.py cg --data {args.dir} --weights SD15")
    else:
        print(f"next, with the CG and PG that you trained: python generate.py --data {args.dir} --split {args.split} "
              "--out results --weights SD15 --cg CG --pg PG")


if __name__ == "__main__":
    with one_line_errors():
        main()
