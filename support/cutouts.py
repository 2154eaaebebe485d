"""Support: what masks mean, and the product's own colours at soft edges; not needed to understand the paper."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FAINT = 0.1  # up to this M a pixel shows the background: a haze or the end of a shadow hides none of it
SOLID = 0.99  # from this M on a pixel is all product: its colour is never touched

# JPEG and video change a mask's black and white by some levels of 255
NOISE = 16  # levels: the values of one colour spread this far
FAINTEST_WHITE = 235  # a mask whose brightest level is lower means a translucent product

# What a cut-out stores at its soft edges, beside the mask
STRAIGHT, PREMULTIPLIED, STORED = "the product's colours", "those times M", "those mixed with a stored background"

# ---------------------------------------------------------------- masks


def black_and_white(histogram: np.ndarray) -> tuple[int, int]:
    """The levels that mean 0 and 1 in an 8-bit mask: 0 and 255, unless its black is raised or its white is grey."""
    white = 255 - plateau(histogram[:127:-1])
    return plateau(histogram[:128]), white if white >= FAINTEST_WHITE else 255


def plateau(pixels: np.ndarray) -> int:
    """The commonest of the first levels that occur, if over a tenth of the pixels have it, else 0: a gradient has no
    such level. pixels (128,): how many pixels each level has.
    """
    first = pixels.nonzero()[0][0]
    level = first + pixels[first : first + NOISE + 1].argmax()
    return int(level) if pixels[level] > pixels.sum() / 10 else 0


def covers_border(mask: Tensor) -> bool:
    """Whether M (1, H, W) covers most of each side of the picture, as it does if it is white on the background."""
    M = mask[0]
    return all(side.median() > 0.5 for side in (M[0], M[-1], M[:, 0], M[:, -1]))


# ---------------------------------------------------------------- soft edges


def extend(rgb: Tensor, known: Tensor) -> Tensor:
    """Continues the colours of the known pixels over all others: normalised convolution on a pyramid of halved sizes.

    rgb (C, H, W), known (1, H, W) bool -> (C, H, W), equal to rgb where known, or everywhere if nothing is known.
    """
    if known.all() or not known.any():
        return rgb
    count = sum_blocks(known.to(rgb))
    coarse = extend(sum_blocks(rgb * known) / count.clamp(min=1), count > 0)  # from the means of the known pixels
    wide = F.interpolate(coarse[None], size=(coarse.shape[1], rgb.shape[2]), mode="bilinear")[0]
    y = ((torch.arange(rgb.shape[1]) + 0.5) * (wide.shape[1] / rgb.shape[1]) - 0.5).clamp(min=0)
    above = y.long()
    below = (above + 1).clamp(max=wide.shape[1] - 1)
    enlarged = wide[:, above].lerp_(wide[:, below], (y - above)[:, None].to(rgb))
    return torch.where(known, rgb, enlarged, out=enlarged)


def sum_blocks(x: Tensor) -> Tensor:
    """The sums of the 2 x 2 blocks, padded with zeros at odd ends. (C, H, W) -> (C, ⌈H/2⌉, ⌈W/2⌉)."""
    x = F.pad(x, (0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x[:, ::2] + x[:, 1::2]
    return x[:, :, ::2] + x[:, :, 1::2]


def own_edge(solid: Tensor, empty: Tensor) -> Tensor:
    """Where the product itself ends: where both kinds of pixels are as near as they are along a quarter of its outline,
    and a block around.

    All (1, H, W) bool. A shadow, a glow and glass lie deeper than that; a wide feather, soft all around, does not.
    """
    beside, facing = near(solid), near(empty)
    if not facing[beside & ~solid].float().mean() < 0.25:
        return near(beside & facing)
    blocks = own_edge(sum_blocks(solid), sum_blocks(empty))  # of bools: whether any of 2 x 2 is true
    return blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : solid.shape[1], : solid.shape[2]]


def near(x: Tensor) -> Tensor:
    """Whether a pixel or one of its eight neighbours is true."""
    x = F.pad(x, (1, 1, 1, 1))
    x = x[:, :-2] | x[:, 1:-1] | x[:, 2:]
    return x[..., :-2] | x[..., 1:-1] | x[..., 2:]


def edge_holds(rgb: Tensor, mask: Tensor) -> str:
    """What the soft edges of a picture with an alpha channel hold: STRAIGHT, PREMULTIPLIED or STORED.

    Programs store F (STRAIGHT), M F (PREMULTIPLIED, over black) or the photo's M F + (1 − M) B (STORED). With F and B
    continued from where M is 1 and 0, each predicts the colours C at the product's own edge. The answer is STRAIGHT
    unless another has less than half its error, and a quarter of a black shadow's. So what can't be told apart stays as
    it is stored: a premultiplied product with a shadow on all sides, and premultiplied glass without a soft edge.
    """
    most = mask.max()
    solid, empty = mask >= SOLID * most, mask <= 1 - SOLID
    edge = own_edge(solid, mask <= FAINT) & ~solid & (mask > FAINT)
    M, errors = mask[edge] / most, torch.zeros(4)  # of each explanation
    for channel in rgb.split(1):
        C, first, B = channel[edge], extend(channel, solid)[edge], extend(channel, empty)[edge]
        explained = first, torch.zeros_like(C), first * M, torch.lerp(B, first, M)
        errors += torch.stack([(C - colours).abs().sum() for colours in explained])
    straight, shadow, premultiplied, stored = errors
    if min(premultiplied, stored) >= min(straight / 2, shadow / 4):
        return STRAIGHT
    return PREMULTIPLIED if premultiplied < stored else STORED


def unmix_edges(rgb: Tensor, mask: Tensor) -> Tensor:
    """The product's pure colours F at soft edges, where a photo shows C = M F + (1 − M) B and B is the old background.

    rgb (3, H, W), mask (1, H, W) -> (3, H, W); the colours of solid pixels are untouched, bit for bit.
    B and a first F are continued from the pixels that are all background or all product. They leave a part of C
    unexplained. In a shadow or glass it is divided by M and added to F, which explains C exactly. At the product's own
    edge, errors of M and B would shine then: there M times that part is added, as in Forte's 'Approximate Fast
    Foreground Colour Estimation' (2021).
    """
    solid, empty = mask >= SOLID * mask.max(), mask <= 1 - SOLID
    share = torch.where(own_edge(solid, mask <= FAINT), mask, 1 / mask.clamp(min=FAINT))

    def pure(C: Tensor) -> Tensor:
        first, B = extend(C, solid), extend(C, empty)
        unexplained = C - mask * first - (1 - mask) * B
        return torch.where(mask >= SOLID, C, (first + share * unexplained).clamp(0, 1))

    return torch.cat([pure(channel) for channel in rgb.split(1)])  # one by one, because photos may have 100 megapixels


def pure_colours(rgb: Tensor, mask: Tensor, holds: str) -> Tensor:
    """The product's pure colours F, (3, H, W), from those of a picture whose soft edges hold what `edge_holds` says.

    F is continued from the other pixels where M = 0, and, if premultiplied, where M is so near 0 that 8 bits hold no
    colour.
    """
    if holds == STORED:
        return unmix_edges(rgb, mask)
    if holds == PREMULTIPLIED:
        return extend((rgb / mask.clamp(min=0.01)).clamp(0, 1), mask > 0.05)
    return extend(rgb, mask > 0)
