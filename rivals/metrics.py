"""Rivals: embeddings, CLIP similarity, Fréchet distance, rankings, intervals; not needed to understand the paper."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from support.datasets import MASK_OF_ITEM, Item
from support.files import BadInput
from support.images import load_masked, open_image, to_tensor
from support.tensors import compute_parts, file_fingerprint, weights_fingerprint

RESAMPLES = 200  # bootstrap samples
PART = 64  # pictures that are embedded at once; their embeddings lie in one file

# ---------------------------------------------------------------- pictures


def embed_pictures(clip: nn.Module, pictures: list[tuple[Path, Item | None]], folder: Path) -> Tensor:
    """CLIP embeddings of pictures, not normalised: (n, d), computed once and kept in `folder`. Processes share
    the work.

    With the item that it was painted for, a picture's background alone is embedded, I ⊗ (1 − M). The embedding of a
    picture that is missing or can't be read is NaN; the latter is reported.
    """
    parts = [pictures[start : start + PART] for start in range(0, len(pictures), PART)]
    device = clip.visual_projection.weight.device

    def preprocessed(path: Path, item: Item | None) -> Tensor:
        try:
            picture = to_tensor(open_image(path).convert("RGB"))
            if item:
                picture *= 1 - load_masked(item.image, item.mask, "image", MASK_OF_ITEM, item.inverted)[1]
        except BadInput as error:
            if path.exists():
                print(f"skipped: {error}", file=sys.stderr)
            picture = torch.full((3, 8, 8), math.nan)
        return clip.preprocess(picture[None].to(device))

    @torch.no_grad()
    def compute(k: int) -> dict[str, Tensor]:
        part = tqdm(parts[k], f"embedding {k + 1} of {len(parts)}", leave=False, disable=None)
        return {"embeddings": clip.encode_image(torch.cat([preprocessed(*picture) for picture in part])).cpu()}

    weights = weights_fingerprint(clip)
    keys = [[weights, [[item and item.inverted, *map(file_fingerprint, (path, item and item.image, item and item.mask))]
                       for path, item in part]] for part in parts]
    return torch.cat([part["embeddings"] for part in compute_parts(folder, keys, compute)])


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """CLIP similarity of pairs of pictures: 100 times the cosine of their embeddings. (n, d), (n, d) -> (n,)"""
    return 100 * F.cosine_similarity(x, y, dim=1)


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """Fréchet distance between Gaussians fitted to two sets of embeddings (FID, section 5.2). (n, d), (m, d) -> ().

    ‖μ_x − μ_y‖² + tr Σ_x + tr Σ_y − 2 tr (Σ_x Σ_y)^½. With Σ_x = AᵀA and Σ_y = BᵀB the last trace is the sum of the
    singular values of A Bᵀ: this needs no matrix square root, and is exact for fewer samples than dimensions too.
    """
    (A, mu_x), (B, mu_y) = _root(x.double()), _root(y.double())
    traces = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return ((mu_x - mu_y).square().sum() + traces).clamp(min=0)  # rounding can make it negative if both are equal


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """A with at most d rows, such that AᵀA is the covariance of x (n, d), and the mean (d,)."""
    mu = x.mean(dim=0)
    A = (x - mu) / math.sqrt(len(x) - 1)
    return (torch.linalg.qr(A).R if len(x) > x.shape[1] else A), mu


def joint_frechet(x: Tensor, y: Tensor, conditions: Tensor) -> Tensor:
    """Fréchet distance between embeddings joined with what they were painted for. (n, d), (n, d), (n, c) -> ()

    The plain distance compares two sets and ignores which picture belongs to which product. This one compares the
    vectors (embedding, α · condition), where x and y share their conditions, so that the covariances between the two
    parts count too. α gives both parts the same mean length. DeVries et al. 2019 (FJD).
    """
    h = conditions.to(x)
    h = h * y.norm(dim=1).mean() / h.norm(dim=1).mean()
    return frechet(torch.cat([x, h], dim=1), torch.cat([y, h], dim=1))


def interval(statistic: Callable[[Tensor], Tensor], n: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """A statistic of n items, statistic(indices), and 1.96 times its standard deviation over bootstrap samples of n
    items, drawn with replacement.

    For a mean, or a difference of two methods, that is half the width of its 95% interval. A Fréchet distance of few
    pictures is biased upwards, by a floor that two sets of the same kind show: no interval around it holds the truth.
    Percentiles would not do either: a sample with repetitions varies less, so its distance is larger still.
    """
    generator = Generator().manual_seed(0)
    values = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    return float(statistic(torch.arange(n))), 1.96 * float(torch.stack(values).std())


def markdown_table(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its head."""
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def plus_minus(pair: tuple[float, float]) -> str:
    """A figure and half of its interval, as from `interval`, in print."""
    return "{:.2f} ± {:.2f}".format(*pair)


# ---------------------------------------------------------------- rankings


def rank_scores(utility: Tensor) -> Tensor:
    """The rank scores of Table 3, from 1 for the worst of M to M for the best. (..., M) -> (..., M)"""
    return utility.argsort(dim=-1).argsort(dim=-1) + 1.0


def resampled_means(values: Tensor, resamples: int = RESAMPLES) -> Tensor:
    """Means over raters and pairs in bootstrap samples: (R, P, ...) -> (resamples, ...).

    Each sample draws R raters and, independently, P pairs, both with replacement. With a single rater only the pairs
    vary.
    """
    generator = Generator().manual_seed(0)
    raters, pairs = (torch.randint(n, (resamples, n), generator=generator) for n in values.shape[:2])
    return torch.stack([values[rows][:, columns].mean(dim=(0, 1)) for rows, columns in zip(raters, pairs)])


def half_width(means: Tensor) -> Tensor:
    """Half of the 95% interval of resampled figures, as in `interval`. (resamples, ...) -> (...)"""
    return 1.96 * means.std(dim=0)


def wins(scores: Tensor) -> Tensor:
    """Which method ranks above which: (R, P, M) -> (R, P, M, M), 1 where the first is above the second."""
    return (scores[..., :, None] > scores[..., None, :]).float()


def kendalls_w(scores: Tensor) -> Tensor:
    """Kendall's coefficient of concordance W for each pair: (R, P, M) -> (P,).

    12 S / (R² (M³ − M)), where S is the sum of squares of the methods' total ranks around their mean. It is 1 where
    all R raters agree, and 1 / R on average where they rank at random.
    """
    raters, _, methods = scores.shape
    S = methods * scores.sum(dim=0).var(dim=1, correction=0)
    return 12 * S / (raters**2 * (methods**3 - methods))
