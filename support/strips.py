"""Support: large feature maps computed a strip of rows at a time; not needed to understand the paper."""


from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 2**16  # positions: a larger feature map is computed in strips of this size


def in_strips(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x), for a layer of 3x3 windows that keeps or doubles the height of x (B, C, h, w); no seam shows.

    A layer holds its input several times over: normalised, through SiLU, rearranged for the convolution. Here it holds
    only a strip of rows and one row more on either side, whose own results are left out. Autograd would keep all of
    it anyway, so under autograd the map stays whole.
    """
    h, rows = x.shape[2], max(1, STRIP // x.shape[3])
    if rows >= h or torch.is_grad_enabled():
        return layer(x)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    result = None
    for top in range(0, h, rows):
        first, last = max(top - 1, 0), min(top + rows + 1, h)
        strip = layer(x[:, :, first:last])
        n = strip.shape[2] // (last - first)  # 2 if the layer doubles the height
        strip = strip[:, :, n * (top - first) :][:, :, : n * rows]
        if result is None:
            shape = len(x), strip.shape[1], n * h, strip.shape[3]
            result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        result[:, :, n * top : n * (top + rows)] = strip
    return result


def normalised(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`norm` with the means and variances of the whole x (B, C, h, w), as a function of x or of a strip of its rows."""
    if x[0, 0].numel() <= STRIP or torch.is_grad_enabled():
        return norm
    rows = [torch.var_mean(strip.float(), dim=3, correction=0) for strip in x.split(max(1, STRIP // x.shape[3]), dim=2)]
    var, mean = (torch.cat(parts, 2).unflatten(1, (norm.num_groups, -1)) for parts in zip(*rows))  # (B, groups, C', h)
    std = (var.mean((2, 3)) + mean.var((2, 3), correction=0) + norm.eps).sqrt()  # within rows and between them
    scale = (norm.weight.unflatten(0, (norm.num_groups, -1)) / std[:, :, None]).flatten(1)  # (B, C)
    shift = norm.bias - mean.mean((2, 3)).repeat_interleave(mean.shape[2], 1) * scale
    return lambda strip: torch.addcmul(shift[:, :, None, None], strip.float(), scale[:, :, None, None]).to(x.dtype)


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))), (B, C_in, h, w) -> (B, C, h, w)."""
    normalise = normalised(norm, x)
    return in_strips(lambda strip: conv(F.silu(normalise(strip))), x)
