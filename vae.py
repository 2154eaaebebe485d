"""Beside the method: Stable Diffusion's VAE, from pictures to latents and back.

Read it from the end: VAE, its encoder and decoder, the levels that they are made of. It is built from the fields of the
public vae/config.json, and uses the public names. Shapes: pictures (B, 3, H, W); latents (B, 4, h, w) with h = H / f,
f = 8 for SD 1.5.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from attention import attend
from model import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every normalisation


class VAEAttention(nn.Module):
    """One-head self-attention over the positions of the smallest feature map. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in "qkv")
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, hw, C)
        y = self.to_out[0](attend(self.to_q(y), self.to_k(y), self.to_v(y), heads=1))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class VAEMidBlock(nn.Module):
    """The middle block: residual, attention, residual. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAELevel(nn.Module):
    """Residual blocks, then a change of resolution: (B, C_in, h, w) -> (B, C, h/2, w/2) if `resample` is "down",
    (B, C, 2h, 2w) if it is "up", and (B, C, h, w) in the last level, where it is None.
    """

    def __init__(self, layers: int, in_channels: int, out_channels: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, EPS) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample == "up" else [])

    def layers(self) -> list[nn.Module]:
        """The layers in order. Calling them one by one frees a level's input, up to 1 GB, after its first layer."""
        return [*self.resnets, *self.downsamplers, *self.upsamplers]


class VAEEncoder(nn.Module):
    """(B, 3, H, W) -> (B, 8, h, w): mean and log-variance, before quant_conv. All levels but the last halve h and w."""

    def __init__(self, config: dict):
        super().__init__()
        channels, groups = config["block_out_channels"], config["norm_num_groups"]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAELevel(config["layers_per_block"], channels[max(i - 1, 0)], c, groups, "down" if i < last else None)
            for i, c in enumerate(channels))
        self.mid_block = VAEMidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


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
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config["out_channels"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Pictures to latents and back. Latents here are unscaled: the UNet's z is `scaling_factor` times as large."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.scaling_factor = config.get("scaling_factor", 0.18215)
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)  # f: pixels per latent position, 8 for SD 1.5
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
