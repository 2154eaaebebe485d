"""Stable Diffusion's VAE, by hand: pictures to latents and back.

Read from the end: VAE, its encoder and decoder, the levels they are made of. Built from the fields of the public
vae/config.json, with its names. Shapes: pictures (B, 3, H, W); latents (B, 4, h, w) with h = H / f, f = 8 for SD 1.5.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attend
from model import Downsample, ResnetBlock, Upsample

# ---------------------------------------------------------------- large maps, a strip of rows at a time

STRIP = 2**16  # positions of a feature map: a larger one is computed in strips of so many


def in_strips(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x), for a layer of 3x3 windows that keeps or doubles the height of x (B, C, h, w); no seam shows.

    A layer holds its input several times over: normalised, through SiLU, rearranged for the convolution. Here it does
    so for a strip of rows only, which has a row more on either side, whose own results are left out. Under autograd,
    which keeps all of it, the map stays whole.
    """
    h, rows = x.shape[2], max(1, STRIP // x.shape[3])
    if rows >= h or torch.is_grad_enabled():
        return layer(x)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    result = None
    for top in range(0, h, rows):
        first, last = max(top - 1, 0), min(top + rows + 1, h)
        strip = layer(x[:, :, first:last])
        n = strip.shape[2] // (last - first)  # 2 where the layer doubles
        strip = strip[:, :, n * (top - first) :][:, :, : n * rows]
        if result is None:
            shape = len(x), strip.shape[1], n * h, strip.shape[3]
            result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        result[:, :, n * top : n * (top + rows)] = strip
    return result


def normalised(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`norm` by the means and variances of the whole of x (B, C, h, w): a function of x or of a strip of its rows."""
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


class VAEResnet(ResnetBlock):
    """The UNet's residual block without a timestep. (B, C_in, h, w) -> (B, C, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__(in_channels, out_channels, groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm2, self.conv2, norm_silu_conv(self.norm1, self.conv1, x))
        return h.add_(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)  # in place: at the peak of memory


# ---------------------------------------------------------------- the network


class VAEAttention(nn.Module):
    """One-head self-attention over the positions of the VAE's bottom. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, hw, C)
        y = self.to_out[0](attend(self.to_q(y), self.to_k(y), self.to_v(y), heads=1))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class VAEMidBlock(nn.Module):
    """The bottom: residual, attention, residual. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAELevel(nn.Module):
    """Residual blocks, then a change of resolution: (B, C_in, h, w) -> (B, C, h/2, w/2) where `resample` is "down",
    (B, C, 2h, 2w) where it is "up", and (B, C, h, w) in the last level, where it is None.
    """

    def __init__(self, layers: int, in_channels: int, out_channels: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            VAEResnet(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def layers(self) -> list[Callable[[Tensor], Tensor]]:
        """In their order. Whoever calls them one by one holds no level's input until its end: it may be 1 GB."""
        up = [partial(in_strips, upsampler) for upsampler in getattr(self, "upsamplers", ())]
        return [*self.resnets, *getattr(self, "downsamplers", ()), *up]


class VAEEncoder(nn.Module):
    """(B, 3, H, W) -> (B, 8, h, w): mean and log-variance, before quant_conv. Each level but the last halves."""

    def __init__(self, config: dict):
        super().__init__()
        channels, groups = config["block_out_channels"], config["norm_num_groups"]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAELevel(config["layers_per_block"], channels[max(i - 1, 0)], c, groups, "down" if i < last else None)
            for i, c in enumerate(channels))
        self.mid_block = VAEMidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in chain(*(block.layers() for block in self.down_blocks), [self.mid_block]):
            x = layer(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class VAEDecoder(nn.Module):
    """(B, 4, h, w) -> (B, 3, H, W). Each level has one residual block more than the encoder's."""

    def __init__(self, config: dict):
        super().__init__()
        channels, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config["latent_channels"], channels[0], 3, padding=1)
        self.mid_block = VAEMidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            VAELevel(config["layers_per_block"] + 1, channels[max(i - 1, 0)], c, groups, "up" if i < last else None)
            for i, c in enumerate(channels))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config["out_channels"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for layer in chain(*(block.layers() for block in self.up_blocks)):
            x = layer(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class VAE(nn.Module):
    """Pictures to latents and back. Latents here are unscaled: the UNet's z is `scaling_factor` times them."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.scaling_factor = config.get("scaling_factor", 0.18215)
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)  # f: pixels a latent position, 8 for SD 1.5
        n = config["latent_channels"]
        self.encoder, self.decoder = VAEEncoder(config), VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1)
        self.post_quant_conv = nn.Conv2d(n, n, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> mean and log-variance of its latent, each (B, 4, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w), unscaled -> (B, 3, H, W), nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))
