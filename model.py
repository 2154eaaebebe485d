"""The method: the networks of Fig. 2, Stable Diffusion's UNet and the ControlNet-shaped branches CG and PG (section 3).

Reading order: the blocks; the UNet; ControlNet; CategoryGenerator (Eq. 3) and PersonalityGenerator (Eq. 4), which
differ from ControlNet in one function each; `predict_noise`, which runs SD, CG and PG in parallel. Every class is built
from a public config.json, and its parameters carry the names of the public diffusers folders.

Shapes: images (B, 3, H, W); latents z (B, 4, h, w), h = H/f, f = 8 for SD 1.5; prompts P (B, L, D); hints (B, 3, H, W).
With guidance, prompts, masks and all that comes after the first cross-attention have 2B rows, those of '' first.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import SpatialTransformer, SplitPrompt, mask_at, one_row_per_prompt


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions; the timestep is added between them. (B, C_in, h, w) -> (B, C_out, h, w).

    `time_channels` is None in the VAE, which has no timestep.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C_in, h, w), time (B, T) from UNetEncoder.embed_time -> (B, C_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Downsample(nn.Module):
    """Strided convolution, (B, C, h, w) -> (B, C, h/2, w/2). The VAE pads right and bottom only."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a convolution. (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ---------------------------------------------------------------- UNet


def timestep_encoding(t: Tensor, channels: int) -> Tensor:
    """The timestep as sinusoids, cosines first (Vaswani et al. 2017). t (B,) -> (B, channels) float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two layers on the timestep's encoding. (B, C) -> (B, T)."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class DownBlock(nn.Module):
    """One level of the encoder. x (B, C_in, h, w), time (B, T) -> x (B, C, h/2, w/2), or (B, C, h, w) in the last
    level, and the skip connections: the outputs of each layer and of the downsampling, with C channels each.
    """

    def __init__(self, layers: int, in_channels: int, out_channels: int, time_channels: int, norm: dict,
                 attention: dict | None, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, time_channels=time_channels, **norm)
            for i in range(layers))
        self.attentions = nn.ModuleList(
            SpatialTransformer(out_channels, **attention) for _ in range(layers if attention else 0))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor | SplitPrompt,
                mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)  # (B, C, h, w)
            if self.attentions:
                x = self.attentions[i](x, context, mask)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # (B, C, h/2, w/2)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The middle block: residual, attention, residual. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, time_channels: int, norm: dict, attention: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, time_channels=time_channels, **norm) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(channels, **attention)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor | SplitPrompt, mask: Tensor | None = None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context, mask)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level of the decoder. x (B, C_in, h, w) -> (B, C, 2h, 2w), or (B, C, h, w) in the last level.

    Each layer takes x and one skip connection (B, S, h, w), the last of `skips`, which it removes.
    """

    def __init__(self, layers: int, in_channels: int, out_channels: int, skip_channels: list[int], time_channels: int,
                 norm: dict, attention: dict | None, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((in_channels if i == 0 else out_channels) + skip_channels[i], out_channels,
                        time_channels=time_channels, **norm)
            for i in range(layers))
        self.attentions = nn.ModuleList(
            SpatialTransformer(out_channels, **attention) for _ in range(layers if attention else 0))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)  # (B, C_in + S, h, w) -> (B, C, h, w)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x)  # (B, C, 2h, 2w)
        return x


def _level_options(config: dict) -> tuple[dict, list[dict]]:
    """From a config.json: the options that all residual blocks share, and those of each level's attention."""
    levels = len(config["block_out_channels"])
    # Despite its name, attention_head_dim is the number of heads: one for all levels, or a list
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = heads if isinstance(heads, list) else [heads] * levels
    groups = config.get("norm_num_groups", 32)
    norm = dict(groups=groups, eps=config.get("norm_eps", 1e-5))
    attention = [dict(heads=n, context_channels=config["cross_attention_dim"], groups=groups) for n in heads]
    return norm, attention


class UNetEncoder(nn.Module):
    """What UNet and ControlNet have in common: input convolution, timestep, encoder levels and middle block."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        norm, attention = _level_options(config)
        time_channels = 4 * channels[0]
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        self.down_blocks = nn.ModuleList(
            DownBlock(layers, channels[max(i - 1, 0)], channels[i], time_channels, norm,
                      attention[i] if kind == "CrossAttnDownBlock2D" else None, last=i == len(channels) - 1)
            for i, kind in enumerate(config["down_block_types"]))
        self.mid_block = MidBlock(channels[-1], time_channels, norm, attention[-1])

    def embed_time(self, t: Tensor) -> Tensor:
        """t (B,) int64 -> (B, T), with the SiLU that every residual block expects already applied."""
        encoding = timestep_encoding(t, self.conv_in.out_channels).to(self.conv_in.weight.dtype)
        return F.silu(self.time_embedding(encoding))

    def encode(self, x: Tensor, time: Tensor, context: Tensor | SplitPrompt,
               mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, h, w), after conv_in -> the middle block's output and the skip connections.

        For SD 1.5 at 512 px with guidance: x (B, 320, 64, 64) -> (2B, 1280, 8, 8), and 12 skips of 320 to 1280
        channels, three each at 64, 32, 16 and 8 positions a side.
        """
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, context, mask)
            skips += outputs
        x = self.mid_block(x, time, context, mask)
        return x, [one_row_per_prompt(skip, context) for skip in skips]


def skip_channels(config: dict) -> list[int]:
    """Channels of the skip connections, in the order in which the encoder produces them."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    last = len(channels) - 1  # the last level has no downsampling, hence one skip connection fewer
    return channels[:1] + [c for i, c in enumerate(channels) for _ in range(layers + (i < last))]


class UNet(UNetEncoder):
    """Stable Diffusion's denoiser, ε_θ(z_t, t, P, residuals)."""

    def __init__(self, config: dict):
        super().__init__(config)
        channels, layers = config["block_out_channels"], config["layers_per_block"]
        norm, attention = _level_options(config)
        skips = skip_channels(config)
        self.up_blocks = nn.ModuleList()
        previous = channels[-1]
        for i, kind in enumerate(config["up_block_types"]):
            level = len(channels) - 1 - i
            taken = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(
                UpBlock(layers + 1, previous, channels[level], taken, 4 * channels[0], norm,
                        attention[level] if kind == "CrossAttnUpBlock2D" else None, last=level == 0))
            previous = channels[level]
        self.conv_norm_out = nn.GroupNorm(norm["groups"], channels[0], norm["eps"])
        self.conv_out = nn.Conv2d(channels[0], config["out_channels"], 3, padding=1)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, residuals: list[Tensor] | None = None) -> Tensor:
        """z_t (B, 4, h, w), nine channels for an inpainting UNet; t (B,) or (1,); P (B, L, D) -> ε or v (B, 4, h, w).

        residuals: what the branches add, one tensor per skip connection and one for the middle block (13 for SD 1.5).
        """
        time = self.embed_time(t)  # (B or 1, 1280) for SD 1.5, as all shapes below
        x, skips = self.encode(self.conv_in(z), time, context)  # (2B, 1280, 8, 8) and 12 skips
        if residuals is not None:
            *skip_residuals, middle = residuals
            skips = [s + r for s, r in zip(skips, skip_residuals, strict=True)]
            x = x + middle
        for block in self.up_blocks:  # (2B, 1280, 16, 16), (2B, 1280, 32, 32), (2B, 640, 64, 64), (2B, 320, 64, 64)
            x = block(x, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (2B, 4, 64, 64)


# ---------------------------------------------------------------- the branches


class Prompts(NamedTuple):
    """The three encodings of a batch of prompts, each (B, L, D) (section 3.2)."""

    P: Tensor  # 'A photo of [category], in the background of [D]'
    P_fg: Tensor  # 'A photo of [category]'
    P_bg: Tensor  # 'in the background of [D]'


class HintEncoder(nn.Module):
    """ControlNet's small convolutional encoder of the hint. (B, 3, H, W) -> (B, C, h, w).

    Each step from one entry of `channels` to the next halves h and w: three steps for SD 1.5, so f = 8.
    """

    def __init__(self, channels: list[int], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in zip(channels, channels[1:]):
            self.blocks += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)  # starts at zero

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """A trainable copy of SD's encoder that also sees a hint; its outputs pass through zero convolutions (section 3.1).

    These 1x1 convolutions start at zero, so training starts from an unchanged SD.
    """

    def __init__(self, config: dict):
        super().__init__(config)
        self.scale = 1.0  # its outputs are multiplied by it: generate.py's --cg-scale and --pg-scale
        channels = config["block_out_channels"]
        self.controlnet_cond_embedding = HintEncoder(config["conditioning_embedding_out_channels"], channels[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in skip_channels(config))
        self.controlnet_mid_block = nn.Conv2d(channels[-1], channels[-1], 1)

    @torch.no_grad()
    def init_from_unet(self, unet: UNet) -> None:
        """ControlNet's initialisation: SD's encoder copied, and the layers that connect the branch to SD at zero."""
        weights = {k: v for k, v in unet.state_dict().items()
                   if not k.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
        weights["conv_in.weight"] = weights["conv_in.weight"][:, : self.conv_in.in_channels]  # 4 of 9 if inpainting
        self.load_state_dict(weights, strict=False)
        for layer in (self.controlnet_cond_embedding.conv_out, self.controlnet_mid_block, *self.controlnet_down_blocks):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, t: Tensor, context: Tensor | SplitPrompt, hint: Tensor,
                mask: Tensor | None = None) -> list[Tensor]:
        """z_t (B, 4, h, w), t (B,) or (1,), hint (B, 3, H, W) -> residuals for UNet.forward (13 for SD 1.5).

        context: P (B, L, D); for CG P_fg and P_bg. mask: M (B, 1, H, W), which CG and PG need.
        """
        return self.residuals(z, t, context, self.hint_features(hint), mask)

    def hint_features(self, hint: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w). They are the same at every step: computed once, before denoising."""
        return self.controlnet_cond_embedding(hint)

    def residuals(self, z: Tensor, t: Tensor, context: Tensor | SplitPrompt, features: Tensor,
                  mask: Tensor | None = None) -> list[Tensor]:
        """As `forward`, but for a hint whose features (B, C, h, w) have been computed."""
        x = self.conv_in(z) + features  # (B, 320, 64, 64) for SD 1.5
        middle, skips = self.encode(x, self.embed_time(t), context, mask)  # (2B, 1280, 8, 8) and 12 skips
        convs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        return [self.scale * conv(y) for conv, y in zip(convs, [*skips, middle])]

    def context(self, prompts: Prompts) -> Tensor | SplitPrompt:
        """What its cross-attentions read: P."""
        return prompts.P


class CategoryGenerator(ControlNet):
    """CG (section 3.2): its hint is the product I ⊗ M, and every cross-attention is mask-guided (Eq. 3).

    Ours: with "attention": "plain" in its config it uses Eq. 2, to measure what Eq. 3 adds (`--attention plain`).
    """

    def context(self, prompts: Prompts) -> Tensor | SplitPrompt:
        if self.config.get("attention") == "plain":
            return prompts.P  # Eq. 2
        return SplitPrompt(prompts.P_fg, prompts.P_bg)  # Eq. 3


class PersonalityGenerator(ControlNet):
    """PG (section 3.3): its hint is a reference's background I_ref ⊗ (1 − M_ref); it attends to P as a ControlNet does.

    The paper does not say which prompt PG reads.
    """

    def residuals(self, z: Tensor, t: Tensor, context: Tensor, features: Tensor, mask: Tensor) -> list[Tensor]:
        """Eq. 4: y_i := y_i ⊗ (1 − M), for each output y_i (2B, C, h, w); M is the product's, never the reference's.

        The paper's y_i are cross-attentions' outputs. Here they are all 13 outputs of the branch, as in ControlNet,
        after the zero convolutions, so that no bias leaks onto the product.
        """
        ys = super().residuals(z, t, context, features)
        return [y * (1 - mask_at(mask, *y.shape[2:])).to(y) for y in ys]


BRANCHES = {"controlnet": ControlNet, "category": CategoryGenerator, "personality": PersonalityGenerator}


def predict_noise(unet: UNet, z: Tensor, t: Tensor, prompts: Prompts, branches: list[tuple[ControlNet, Tensor]],
                  mask: Tensor | None, inpainting: Tensor | None = None) -> Tensor:
    """Fig. 2: SD, CG and PG run in parallel; SD's decoder adds the branches' outputs -> ε or v (B, 4, h, w).

    branches: pairs (branch, branch.hint_features(hint)). mask: M (B, 1, H, W), the product's. inpainting (B, 5, h, w):
    what an inpainting UNet reads beside z_t (see StableDiffusion.inpainting).
    """
    residuals = None
    for branch, features in branches:
        outputs = branch.residuals(z, t, branch.context(prompts), features, mask)
        residuals = outputs if residuals is None else [x + y for x, y in zip(residuals, outputs)]
    return unet(z if inpainting is None else torch.cat([z, inpainting], dim=1), t, prompts.P, residuals)
