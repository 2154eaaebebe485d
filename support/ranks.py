"""Support: statistics of people's rankings, and simulated raters; not needed to understand the paper."""

import torch
from torch import Generator, Tensor

from support.metrics import RESAMPLES


def rank_scores(utility: Tensor) -> Tensor:
    """The rank scores of Table 3, from 1 for the worst of M to M for the best. (..., M) -> (..., M)"""
    return utility.argsort(dim=-1).argsort(dim=-1) + 1.0


def resampled_means(values: Tensor, resamples: int = RESAMPLES) -> Tensor:
    """Means over raters and pairs in bootstrap samples: (R, P, ...) -> (resamples, ...).

    Each sample draws R raters and, independently, P pairs, both with replacement. Its mean weights each ranking by how
    often its rater and its pair were drawn. With a single rater only the pairs vary.
    """
    generator = Generator().manual_seed(0)

    def weights(n: int) -> Tensor:
        drawn = torch.randint(n, (resamples, n), generator=generator)
        return torch.zeros(resamples, n).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / n))

    raters, pairs = values.shape[:2]
    of_raters = (weights(raters) @ values.reshape(raters, -1)).view(resamples, pairs, -1)
    return (weights(pairs)[:, None] @ of_raters).view(resamples, *values.shape[2:])


def half_width(means: Tensor) -> Tensor:
    """Half of the 95% interval of resampled figures, as `interval` in support/metrics.py. (resamples, ...) -> (...)"""
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
    totals = scores.sum(dim=0)
    S = (totals - totals.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return 12 * S / (raters**2 * (methods**3 - methods))


# ---------------------------------------------------------------- simulated raters


def simulated(similarities: Tensor, raters: int, noise: float, generator: Generator) -> Tensor:
    """Rank scores of simulated people: (P, M) -> (raters, P, M). The last one clicks at random.

    The others rank by the similarity of each picture to its reference, plus noise of their own. Its standard deviation
    is `noise` times that of the similarities within a pair, averaged over the pairs.
    """
    spread = similarities.std(dim=1).mean()
    errors = torch.randn(raters, *similarities.shape, generator=generator)
    utility = similarities + noise * spread * errors
    utility[-1] = errors[-1]
    return rank_scores(utility)


def detected(similarities: Tensor, raters: int, noise: float, studies: int, generator: Generator) -> Tensor:
    """How often a study with this many raters finds a difference: (P, M) -> (M, M), the part of the simulated studies
    in which the first method's mean rank score is above the second's by more than half of the 95% interval.

    Each study draws its P pairs from the given ones, with replacement.
    """
    count, methods = similarities.shape
    found = torch.zeros(methods, methods)
    for _ in range(studies):
        pairs = torch.randint(count, (count,), generator=generator)
        scores = simulated(similarities[pairs], raters, noise, generator)
        mean, means = scores.mean(dim=(0, 1)), resampled_means(scores)
        found += mean[:, None] - mean > half_width(means[:, :, None] - means[:, None])
    return found / studies
