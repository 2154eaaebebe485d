"""Support: CLIP similarity, Fréchet distance, their intervals; not needed to understand the paper."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

RESAMPLES = 200  # of the bootstrap


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """CLIP similarity of pairs of pictures, 100 times the cosine of their embeddings. (n, d), (n, d) -> (n,)"""
    return 100 * F.cosine_similarity(x, y, dim=1)


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """Fréchet distance between Gaussians fitted to two sets of embeddings. (n, d), (m, d) -> ().

    ‖μ_x − μ_y‖² + tr Σ_x + tr Σ_y − 2 tr (Σ_x Σ_y)^½. With Σ_x = AᵀA and Σ_y = BᵀB the last trace is the sum of the
    singular values of A Bᵀ: no root of a matrix, and exact where there are fewer samples than dimensions too.
    """
    (A, mu_x), (B, mu_y) = map(_root, (x.double(), y.double()))
    traces = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    return ((mu_x - mu_y).square().sum() + traces).clamp(min=0)  # of equal sets rounding makes it less


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """A with AᵀA = the covariance of x (n, d), of at most d rows, and the mean (d,)."""
    mu = x.mean(dim=0)
    A = (x - mu) / math.sqrt(len(x) - 1)
    return (torch.linalg.qr(A).R if len(x) > x.shape[1] else A), mu


def joint_frechet(x: Tensor, y: Tensor, conditions: Tensor) -> Tensor:
    """Fréchet distance of embeddings together with what they were painted for. (n, d), (n, d), (n, c) -> ()

    The plain distance compares two sets, whichever picture belongs to whichever product. This one is of the vectors
    (embedding, α · condition), where x and y share their conditions: covariances between the two parts tell what
    follows what. α gives both parts the same mean length. DeVries et al. 2019 (FJD).
    """
    h = conditions.to(x)
    h = h * y.norm(dim=1).mean() / h.norm(dim=1).mean()
    return frechet(torch.cat([x, h], dim=1), torch.cat([y, h], dim=1))


def interval(statistic: Callable[[Tensor], Tensor], n: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """A statistic of n items, statistic(indices), and half the width of its 95% interval.

    1.96 times its standard deviation over bootstrap samples, n items drawn with replacement. Not their percentiles: a
    sample with repetitions is less varied, which raises every Fréchet distance above the one that is reported.
    """
    generator = Generator().manual_seed(0)
    values = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    return float(statistic(torch.arange(n))), 1.96 * float(torch.stack(values).std())
