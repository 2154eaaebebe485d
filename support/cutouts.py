"""Support: what masks mean, and the product's own colours at soft edges; not needed to understand the paper.

Photos may have 100 megapixels, so everything here works on strips of rows, and in place where `out` is given.
"""


from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SOLID = 0.99  # from this M on a pixel is all product: its colour is never touched

# JPEG and video change a mask's black and white by some levels of 255
NOISE = 16  # levels: the values of one colour spread this far
FAINTEST_WHITE = 235  # a mask whose brightest level is lower means a translucent product

# What a cut-out stores at its soft edges, beside the mask
STRAIGHT, PREMULTIPLIED, STORED = "the product's colours", "those times M", "those mixed with a stored background"


def strips(height: int, width: int) -> list[slice]:
    """The rows of a picture in parts of about half a megapixel, each starting at an even row."""
    rows = max(2, 2**19 // width // 2 * 2)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


# ---------------------------------------------------------------- masks


def black_and_white(mask: Image.Image) -> tuple[int, int]:
    """The levels that mean 0 and 1 in an 8-bit mask: 0 and 255, unless its black is raised or its white is grey."""
    histogram, (low, high) = mask.histogram(), mask.getextrema()
    black = plateau(histogram, range(low, min(low + NOISE, 127) + 1), sum(histogram[:128]))
    white = plateau(histogram, range(max(high - NOISE, 128), high + 1), sum(histogram[128:]))
    return black or 0, white if white and white >= FAINTEST_WHITE else 255


def plateau(histogram: list[int], levels: range, pixels: int) -> int | None:
    """The most frequent of `levels` if over a tenth of `pixels` have it, else None: a gradient has no such level."""
    most = max(levels, key=lambda level: histogram[level])
    return most if histogram[most] > pixels / 10 else None


def covers_border(mask: Image.Image) -> bool:
    """Whether the mask covers most of each side of the picture, as it does if it is white on the background."""
    w, h = mask.size
    sides = (0, 0, w, 1), (0, h - 1, w, h), (0, 0, 1, h), (w - 1, 0, w, h)
    return all(sum(mask.crop(side).histogram()[128:]) > max(side[2] - side[0], side[3] - side[1]) / 2 for side in sides)


# ---------------------------------------------------------------- continuing colours


def extension(rgb: Tensor, known: Tensor) -> Callable[[slice], Tensor]:
    """`extend` a strip at a time: a function from a slice of n rows to their colours, (3, n, W)."""
    if known.all() or not known.any():
        return lambda rows: rgb[:, rows]
    size, coarse = rgb.shape[1:], extended_half(rgb, known)
    return lambda rows: torch.where(known[:, rows], rgb[:, rows], enlarged_rows(coarse, size, rows))


def extend(rgb: Tensor, known: Tensor, out: Tensor | None = None) -> Tensor:
    """Continues the colours of the known pixels over all others: normalised convolution on a pyramid of halved sizes.

    rgb (3, H, W), known (1, H, W) bool -> (3, H, W), equal to rgb where known, or everywhere if nothing is known.
    The result is written to `out`, which may be rgb itself.
    """
    out = torch.empty_like(rgb) if out is None else out
    extended = extension(rgb, known)
    for rows in strips(*rgb.shape[1:]):
        out[:, rows] = extended(rows)
    return out


def extended_half(rgb: Tensor, known: Tensor) -> Tensor:
    """The extension at half the size, (3, ⌈H/2⌉, ⌈W/2⌉): the mean of known pixels in each 2 x 2 block, extended."""
    h, w = rgb.shape[1:]
    means = rgb.new_empty(len(rgb), (h + 1) // 2, (w + 1) // 2)
    some = known.new_empty(1, *means.shape[1:])
    for rows in strips(h, w):
        half = slice(rows.start // 2, (rows.stop + 1) // 2)
        count = sum_blocks(known[:, rows].to(rgb))
        means[:, half] = sum_blocks(rgb[:, rows] * known[:, rows]) / count.clamp(min=1)
        some[:, half] = count > 0
    return extend(means, some, out=means)


def sum_blocks(x: Tensor) -> Tensor:
    """The sums of the 2 x 2 blocks, padded with zeros at odd ends. (C, H, W) -> (C, ⌈H/2⌉, ⌈W/2⌉)."""
    x = F.pad(x, (0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x[:, ::2] + x[:, 1::2]
    return x[:, :, ::2] + x[:, :, 1::2]


def enlarged_rows(x: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Some rows of x (C, h, w) enlarged bilinearly to `size`, as by F.interpolate but without the other rows."""
    y = ((torch.arange(rows.start, rows.stop) + 0.5) * (x.shape[1] / size[0]) - 0.5).clamp(min=0)
    above = y.long()
    below = (above + 1).clamp(max=x.shape[1] - 1)
    first, last = int(above[0]), int(below[-1]) + 1
    wide = F.interpolate(x[None, :, first:last], size=(last - first, size[1]), mode="bilinear")[0]
    return torch.lerp(wide[:, above - first], wide[:, below - first], (y - above)[:, None].to(x))


# ---------------------------------------------------------------- soft edges


def ends(rgb: Tensor, mask: Tensor) -> tuple[Tensor, Callable, Callable]:
    """Where a picture is all product, (1, H, W) bool, and the extensions of the product's and background's colours."""
    solid = mask >= SOLID * mask.max()
    return solid, extension(rgb, solid), extension(rgb, mask <= 1 - SOLID)


def unmix_edges(rgb: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """The product's pure colours F at soft edges, where a photo shows C = M F + (1 − M) B and B is the old background.

    rgb (3, H, W), mask (1, H, W) -> (3, H, W); the colours of solid pixels are untouched, bit for bit.
    B and a first F are continued from the pixels that are all background or all product. They leave a part of C
    unexplained, and M times that part is added to F, as in Forte's 'Approximate Fast Foreground Colour Estimation'
    (2021): next to nothing at an ordinary edge, but the texture of a product that is half clear, such as glass. The
    result is written to `out`, which may be rgb itself.
    """
    out = torch.empty_like(rgb) if out is None else out
    solid, foreground, background = ends(rgb, mask)
    for rows in strips(*rgb.shape[1:]):
        C, M, first_F, B = rgb[:, rows], mask[:, rows], foreground(rows), background(rows)
        unexplained = C - M * first_F - (1 - M) * B
        out[:, rows] = torch.where(solid[:, rows], C, (first_F + M * unexplained).clamp(0, 1))
    return out


def divide(rgb: Tensor, mask: Tensor) -> None:
    """Turns premultiplied colours C = M F (3, H, W) into F, in place; mask (1, H, W). Where M is near 0, 8 bits hold no
    colour: there F is continued from the other pixels.
    """
    for rows in strips(*rgb.shape[1:]):
        rgb[:, rows] = (rgb[:, rows] / mask[:, rows].clamp(min=0.01)).clamp(0, 1)
    extend(rgb, mask > 0.05, out=rgb)


def edge_holds(rgb: Tensor, mask: Tensor) -> str:
    """What the soft edges of a picture with an alpha channel hold: STRAIGHT, PREMULTIPLIED or STORED.

    Programs store F (STRAIGHT), M F (PREMULTIPLIED, over black) or the photo's M F + (1 − M) B (STORED). With F and B
    continued from where M is 1 and 0, the answer is the one that explains the stored colours C best; it is STRAIGHT
    unless another halves the error. Colours under M = 0 prove nothing: programs leave anything there, lossy formats
    noise.
    """
    solid, foreground, background = ends(rgb, mask)
    most, off = mask.max(), torch.zeros(3)  # the error of each explanation
    soft_pixels = brighter = 0  # brighter than M, which M times a colour can't be
    for rows in strips(*rgb.shape[1:]):
        soft = (mask[:, rows] > 1 - SOLID) & ~solid[:, rows]
        if not soft.any():
            continue
        C, first_F, B = (x[:, soft[0]] for x in (rgb[:, rows], foreground(rows), background(rows)))  # (3, pixels)
        M = mask[:, rows][soft]
        explained = torch.stack([first_F, first_F * M / most, first_F * M + B * (1 - M)])  # (3, 3, pixels)
        off += (C - explained).abs().sum(dim=(1, 2))
        soft_pixels += M.numel()
        brighter += int((C.amax(0) > M + NOISE / 255).sum())
    straight, premultiplied, stored = off.tolist()
    if premultiplied < straight / 2 and brighter <= 0.02 * soft_pixels:
        return PREMULTIPLIED
    return STORED if stored < straight / 2 else STRAIGHT
