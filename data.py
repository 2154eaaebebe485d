"""The method: prompts, ads and their masks, the generators' hints, the background perturbation (section 4, Eq. 5, 6).

Reading order: prompts; what an ad is painted from; what the generators see of it; the background perturbation, which
keeps PG from copying and pasting (section 3.3); training samples. To check a data set:

    python data.py DIR --sheet sheet.png            # BG60k as released, or a folder with metadata.jsonl
    python data.py DIR --list --sheet sheet.png     # DIR/CATEGORY/NAME.png: writes metadata.jsonl first
    python data.py DIR --hold-out 0.02              # marks ads that training leaves out

Everywhere a picture is (3, H, W) float32 in [0, 1]. Its mask M is (1, H, W): 1 on the product, 0 on the background,
values between at soft edges.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Dataset

from support.checks import check_data_set
from support.datasets import Item, load_square, refuse_many_broken
from support.files import BadInput, one_line_errors

# Background perturbation, section 5.1
THETA = 50  # kernel of the dilation in pixels of a 512 x 512 image; scaled with the image's size
SIGMA = (0.75, 0.95)  # σ of the mixup is uniform in this range
# The paper gives no numbers for random masks and mask translation. Ours, as fractions of the image's side:
EXTRA_MASKS = 3  # at most this many, each a rectangle or an ellipse
EXTRA_RADII = (0.03, 0.15)  # half their height and half their width
TRANSLATION = 0.15  # the mask's copy moves at most this far, up or down and left or right

# ---------------------------------------------------------------- prompts

FOREGROUND, BACKGROUND = "A photo of {}", "in the background of {}"  # section 3.2: P_fg, P_bg, and joined P
IDENTIFIER = "sks {}"  # [D], section 5.1: 'sks' and the category's id


def prompt_texts(category: str, identifier: str | None, tokenizer=None) -> tuple[str, str, str]:
    """The texts for P, P_fg and P_bg (section 3.2). Without an identifier, all three are the plain prompt.

    With a tokenizer, a category that is too long for the text encoder is cut, but never the identifier after it.
    """
    if tokenizer and identifier:
        category = tokenizer.shorten(category, *prompt_texts("{}", identifier)[0].split("{}"))
    fg = FOREGROUND.format(category)
    bg = BACKGROUND.format(identifier)
    return (f"{fg}, {bg}", fg, bg) if identifier else (fg, fg, fg)


def prompts_by_category(identifiers: dict[str, str | None], tokenizer) -> dict[str, tuple[str, str, str]]:
    """Each category's texts for P, P_fg and P_bg."""
    return {name: prompt_texts(name, identifier, tokenizer) for name, identifier in identifiers.items()}


def caption_texts(item: Item) -> tuple[str, str, str] | None:
    """The same of an item's own words for product and scene; None if it has none."""
    return prompt_texts(item.product, item.scene) if item.product and item.scene else None


# ---------------------------------------------------------------- what an ad is painted from


class AdInputs(NamedTuple):
    """What one ad is painted from, at the files' own sizes. Without a reference CG works alone."""

    rgb: Tensor  # (3, H, W), the product, without its old background at soft edges (support/cutouts.py)
    mask: Tensor  # (1, H, W), M
    texts: tuple[str, str, str]  # for P, P_fg, P_bg
    seed: int
    reference: tuple[Tensor, Tensor | None] | None = None  # I_ref (3, H', W') and M_ref (1, H', W'), which PG needs


class Canvas(NamedTuple):
    """A batch of B products and their references, at the size at which the products are painted."""

    rgb: Tensor  # (B, 3, H, W)
    mask: Tensor  # (B, 1, H, W), M
    texts: list[tuple[str, str, str]]  # for P, P_fg, P_bg
    generators: list[Generator]  # one per picture, for its noise
    reference: Tensor | None = None  # (B, 3, H, W), I_ref
    reference_mask: Tensor | None = None  # (B, 1, H, W), M_ref


def load_ad(item: Item, size: int) -> tuple[Tensor, Tensor]:
    """A whole ad and its mask, (3, size, size) and (1, size, size), as load_square crops them. Raises BadInput."""
    return load_square(item, size)[:2]


class AdDataset(Dataset):
    """The ads of a data set: {"image": (3, S, S), "mask": (1, S, S), "kept": the part of the product that the crop to a
    square leaves, "index": position in items}.

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
            image, mask, kept = load_square(self.items[index], self.size)
        except BadInput as error:
            self.broken[index] = str(error)
            print(f"skipped: {error}", file=sys.stderr)
            refuse_many_broken(list(self.broken.values()), len(self), "data set")
            return self[index]
        return {"image": image, "mask": mask, "kept": kept, "index": index}


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
    """Eq. 5: Dilate(M | θ), the maximum over θ x θ pixels around each, (1, H, W) -> (1, H, W). The square is ours."""
    before, after = theta // 2, (theta - 1) // 2
    mask = F.pad(mask, (before, after, before, after))
    mask = F.max_pool2d(mask, (theta, 1), stride=1)  # a square's maximum is its columns' largest maximum:
    return F.max_pool2d(mask, (1, theta), stride=1)  # 2 θ comparisons per pixel instead of θ²


def perturb(image: Tensor, mask: Tensor, other: Tensor, generator: Generator, theta: int = THETA,
            sigma: tuple[float, float] = SIGMA) -> Tensor:
    """PG's hint in training: a background whose outline and elements can't simply be copied.

    image I, other I_rand (3, H, W), mask M (1, H, W) -> (3, H, W). theta is in pixels of a 512 x 512 image; σ is
    uniform in the range sigma. theta 0 leaves the mask as it is, and sigma (1, 1) leaves out the mixup (Fig. 7). Eq. 4
    keeps the true M, so that PG learns to paint M_aug − M. All randomness comes from `generator`: a run can be resumed.
    """
    h, w = mask.shape[1:]
    M_aug = mask
    if theta:
        M_aug = dilate(mask, max(1, round(theta * min(h, w) / 512)))  # Eq. 5
        dy, dx = ((torch.rand(2, generator=generator) * 2 - 1) * TRANSLATION * torch.tensor([h, w])).int().tolist()
        moved = F.pad(M_aug, (dx, -dx, dy, -dy))  # by dx and dy, with zeros behind
        # Their union hides the product itself, whatever is drawn
        M_aug = M_aug.maximum(moved).maximum(random_masks(h, w, generator))
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


class TrainingSamples(Dataset):
    """Training samples by (index, seed). The seed decides all that is random in a sample, whichever worker makes it.

    Each has "index". `pictures` adds "image", "mask", "kept". `perturbed` adds PG's hint, "background" (Eq. 5, 6), with
    `theta` and `sigma` as in `perturb`. `latents` adds what one step of Eq. 1 draws: "z_0", "eps" and "t" (see
    `diffuse`), and "drop" in [0, 1), which decides whether the prompt is dropped; for an inpainting UNet also
    "inpainting" (5, h, w). latents: equally many ads in each part (programs/latents.py), unscaled; z is `scale` larger.
    """

    def __init__(self, items: list[Item], size: int, latents: list[dict[str, Tensor]] | None = None, scale: float = 1.0,
                 T: int = 1000, pictures: bool = True, perturbed: bool = False, theta: int = THETA,
                 sigma: tuple[float, float] = SIGMA, noise_offset: float = 0.0):
        self.ads, self.latents, self.scale, self.T = AdDataset(items, size), latents, scale, T
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

    Even the noisiest z_t carries the picture's mean brightness, which the noise that sampling starts from does not:
    dark scenes come out grey. With noise_offset > 0 (Guttenberg 2023; ours) the mean of ε varies too.
    """
    draw = torch.randn(2, *mean.shape, generator=generator)
    z_0, eps = mean + std * draw[0], draw[1]
    if noise_offset:
        eps = eps + noise_offset * torch.randn(len(mean), 1, 1, generator=generator)
    return z_0, eps, torch.randint(T, (), generator=generator)


def main(arguments: list[str] | None = None) -> None:
    check_data_set(arguments, AdDataset, product_hint, perturb)


if __name__ == "__main__":
    with one_line_errors():
        main()
