"""The networks: Stable Diffusion's UNet, the two ControlNet-shaped branches CG and PG (section 3), VAE and CLIP.

Reading order: ResnetBlock and the down/mid/up blocks; UNet; ControlNet, from which CategoryGenerator (Eq. 3) and
PersonalityGenerator (Eq. 4) differ by a line each; VAE; CLIP's text and image encoders.
Every class is built from the fields of its public config.json, so one class is the toy's and SD 1.5's. Modules and
parameters carry the names of the public diffusers folders.

Shapes: images (B, 3, H, W); latents z (B, 4, h, w) with h = H / f, f = 8 for SD 1.5; prompts P (B, L, D).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Reused, SpatialTransformer, attend, mask_at, once, to_rows

# ---------------------------------------------------------------- blocks


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, the timestep added between them. (B, C_in, h, w) -> (B, C_out, h, w).

    `time_channels` is None in the VAE, which knows no timestep.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """time (B, T), already through SiLU."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nn.Module):
    """Strided convolution, (B, C, h, w) -> (B, C, h/2, w/2). The VAE pads right and bottom only."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ---------------------------------------------------------------- UNet


def timestep_encoding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep, cosines first. t (B,) -> (B, channels) float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """(B, C) -> (B, T)."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def run_layer(block: nn.Module, *inputs) -> Tensor:
    """block.layer(*inputs). Where block.recompute is set (gradient checkpointing), what it computes on the way is not
    kept for the backward pass but computed again there: less memory for more time.
    """
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block.layer, *inputs, use_reentrant=False)
    return block.layer(*inputs)


class DownBlock(nn.Module):
    """One level of the encoder. x (B, C_in, h, w), time (B, T) -> its output, (B, C, h/2, w/2) or for the last level
    (B, C, h, w), and what each layer and the downsampling leave as skip connections, of C channels each.
    """

    recompute = False

    def __init__(self, layers: int, in_channels: int, out_channels: int, time_channels: int, norm: dict,
                 attention: dict | None, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, time_channels=time_channels, **norm)
            for i in range(layers))
        if attention:
            self.attentions = nn.ModuleList(SpatialTransformer(out_channels, **attention) for _ in range(layers))
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(out_channels)])

    def layer(self, i, x, time, context, mask):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context, mask) if hasattr(self, "attentions") else x

    def forward(self, x, time, context, mask=None):
        skips = []
        for i in range(len(self.resnets)):
            x = run_layer(self, i, x, time, context, mask)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The bottom: residual, attention, residual. (B, C, h, w) -> (B, C, h, w)."""

    recompute = False

    def __init__(self, channels: int, time_channels: int, norm: dict, attention: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, time_channels=time_channels, **norm) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(channels, **attention)])

    def layer(self, x, time, context, mask):
        x = self.attentions[0](self.resnets[0](x, time), context, mask)
        return self.resnets[1](x, time)

    def forward(self, x, time, context, mask=None):
        return run_layer(self, x, time, context, mask)


class UpBlock(nn.Module):
    """One level of the decoder. x (B, C_in, h, w) -> (B, C, 2h, 2w), or for the last level (B, C, h, w). Each layer reads
    x beside one skip connection (B, S, h, w), the last ones left first.
    """

    recompute = False

    def __init__(self, layers: int, in_channels: int, out_channels: int, skip_channels: list[int], time_channels: int,
                 norm: dict, attention: dict | None, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((in_channels if i == 0 else out_channels) + skip_channels[i], out_channels,
                        time_channels=time_channels, **norm)
            for i in range(layers))
        if attention:
            self.attentions = nn.ModuleList(SpatialTransformer(out_channels, **attention) for _ in range(layers))
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def layer(self, i, x, skip, time, context):
        x = self.resnets[i](torch.cat([x, skip], dim=1), time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x

    def forward(self, x, skips, time, context):
        for i in range(len(self.resnets)):
            x = run_layer(self, i, x, skips.pop(), time, context)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


def _level_options(config: dict) -> tuple[dict, list[dict]]:
    """The options that all residual blocks share, and those of each level's attention, from a config.json."""
    levels = len(config["block_out_channels"])
    heads = config["attention_head_dim"]  # despite its name: the number of heads, for all levels or for each
    heads = heads if isinstance(heads, list) else [heads] * levels
    groups = config.get("norm_num_groups", 32)
    norm = dict(groups=groups, eps=config.get("norm_eps", 1e-5))
    attention = [dict(heads=n, context_channels=config["cross_attention_dim"], groups=groups,
                      linear_projection=config.get("use_linear_projection", False)) for n in heads]
    return norm, attention


class UNetEncoder(nn.Module):
    """What the UNet and a ControlNet have in common: input convolution, timestep, encoder levels and middle block."""

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
        """t (B,) int64 -> (B, T), through SiLU as every residual block wants it."""
        encoding = timestep_encoding(t, self.conv_in.out_channels).to(self.conv_in.weight.dtype)
        return F.silu(self.time_embedding(encoding))

    def encode(self, x, time, context, mask=None):
        """x (B, C, h, w), after conv_in -> the middle block's output and the skip connections (12 for SD 1.5)."""
        skips = [x]
        for block in self.down_blocks:
            x, left = block(x, time, context, mask)
            skips += left
        x = self.mid_block(x, time, context, mask)
        return x, [to_rows(skip, len(x)) for skip in skips]

    def recompute_activations(self) -> None:
        """Gradient checkpointing from now on, see `run_layer`."""
        for block in (*self.down_blocks, self.mid_block, *getattr(self, "up_blocks", ())):
            block.recompute = True


def skip_channels(config: dict) -> list[int]:
    """Channels of the skip connections, in the order in which the encoder leaves them."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    last = len(channels) - 1  # does not halve the size, so that it leaves one less
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
        """z_t (B, 4, h, w), t (B,) or for all alike (1,) int64, context P (B, L, D) -> eps (B, 4, h, w). An inpainting
        UNet reads five channels more than z_t: see StableDiffusion.inpainting.

        residuals: what the branches add, one tensor a skip connection and, last, one for the middle block (13 for
        SD 1.5); those of several branches are summed by the caller.
        """
        time = self.embed_time(t)
        x, skips = self.encode(self.conv_in(z), time, context)
        if residuals is not None:
            *skip_residuals, middle = residuals
            skips = [s + r for s, r in zip(skips, skip_residuals, strict=True)]
            x = x + middle
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ---------------------------------------------------------------- the branches


class HintEncoder(nn.Module):
    """ControlNet's small convolutional encoder of the hint. (B, 3, H, W) in [0, 1] (ControlNet 1.1 inpaint: −1 where it
    is to paint) -> (B, C, h, w).

    One strided convolution for each step of `channels`: three for SD 1.5, f = 8.
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
    """A trainable copy of SD's encoder that sees a hint beside z_t, and leaves through zero convolutions (section 3.1).

    The zero convolutions (1x1) start at zero, so that at the start of training SD is unchanged.
    """

    def __init__(self, config: dict):
        super().__init__(config)
        channels = config["block_out_channels"]
        self.controlnet_cond_embedding = HintEncoder(config["conditioning_embedding_out_channels"], channels[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in skip_channels(config))  # zero convolutions
        self.controlnet_mid_block = nn.Conv2d(channels[-1], channels[-1], 1)

    @torch.no_grad()
    def init_from_unet(self, unet: UNet) -> None:
        """ControlNet's own initialisation: the encoder is SD's, all that leads in or out of the branch is zero."""
        weights = {k: v for k, v in unet.state_dict().items()
                   if not k.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
        weights["conv_in.weight"] = weights["conv_in.weight"][:, : self.conv_in.in_channels]  # an inpainting UNet has more
        result = self.load_state_dict(weights, strict=False)
        assert all(name.startswith("controlnet_") for name in result.missing_keys) and not result.unexpected_keys
        for layer in (self.controlnet_cond_embedding.conv_out, self.controlnet_mid_block, *self.controlnet_down_blocks):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, context, hint, mask=None):
        """z_t (B, 4, h, w), t (B,) or (1,), context P (B, L, D), hint (B, 3, H, W) -> residuals for UNet.forward.

        With mask (B, 1, H, W), every cross-attention is Eq. 3 and context is the pair (P_fg, P_bg).
        """
        x = self.conv_in(z) + once(self, self.controlnet_cond_embedding, hint)
        middle, skips = self.encode(x, self.embed_time(t), context, mask)
        return [conv(s) for conv, s in zip(self.controlnet_down_blocks, skips)] + [self.controlnet_mid_block(middle)]


class CategoryGenerator(ControlNet):
    """CG (section 3.2): reads the product I ⊗ M; every cross-attention is mask-guided (Eq. 3)."""

    def forward(self, z: Tensor, t: Tensor, context: tuple[Tensor, Tensor], hint: Tensor, mask: Tensor):
        return super().forward(z, t, context, hint, mask)


class PersonalityGenerator(ControlNet):
    """PG (section 3.3): reads a reference's background I_ref ⊗ (1 − M_ref); attends on P as a ControlNet does.

    `mask` is that of the product being generated for, never the reference's.
    """

    def forward(self, z: Tensor, t: Tensor, context: Tensor, hint: Tensor, mask: Tensor):
        ys = super().forward(z, t, context, hint)
        # Eq. 4, after the zero convolution, so that its bias can't leak onto the product
        return [y * (1 - mask_at(mask, *y.shape[2:])).to(y) for y in ys]


BRANCHES = {"controlnet": ControlNet, "category": CategoryGenerator, "personality": PersonalityGenerator}


class Prompts(NamedTuple):
    """The three encodings of a batch of prompts, each (B, L, D) (section 3.2)."""

    P: Tensor  # 'A photo of [category], in the background of [D]'
    P_fg: Tensor  # 'A photo of [category]'
    P_bg: Tensor  # 'in the background of [D]'


def predict_noise(unet: UNet, z: Tensor, t: Tensor, prompts: Prompts, branches=(), mask: Tensor | Reused | None = None,
                  inpainting: Tensor | None = None) -> Tensor:
    """Fig. 2: SD, CG and PG in parallel, the branches' outputs summed into SD's decoder -> eps (B, 4, h, w).

    branches: pairs of a branch and its hint (B, 3, H, W); mask M (B, 1, H, W) of the product generated for.
    inpainting (B, 5, h, w): what an inpainting UNet reads beside z_t, the mask of what it paints and the rest's latent.
    What is the same at every step (prompts, hints, mask) may be Reused. Prompts and mask may have n B rows, for n passes
    of the same pictures; t is (1,) then, and the result (n B, 4, h, w).
    """
    residuals = None
    for branch, hint in branches:
        if isinstance(branch, CategoryGenerator):
            xs = branch(z, t, (prompts.P_fg, prompts.P_bg), hint, mask)
        elif isinstance(branch, PersonalityGenerator):
            xs = branch(z, t, prompts.P, hint, mask)
        else:
            xs = branch(z, t, prompts.P, hint)
        residuals = xs if residuals is None else [a + b for a, b in zip(residuals, xs)]
    return unet(z if inpainting is None else torch.cat([z, inpainting], dim=1), t, prompts.P, residuals)


# ---------------------------------------------------------------- VAE


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
    """Residual, attention, residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, 1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAELevel(nn.Module):
    """Residual blocks, then a change of resolution unless it is the last level."""

    def __init__(self, layers: int, in_channels: int, out_channels: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, 1e-6) for i in range(layers))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class VAEEncoder(nn.Module):
    """(B, 3, H, W) -> (B, 8, h, w), halved once a level but the last."""

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
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    """(B, 4, h, w) -> (B, 3, H, W), with one residual block a level more than the encoder."""

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
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Images to latents and back. Latents here are unscaled: the UNet's z is `scaling_factor` times them."""

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


# ---------------------------------------------------------------- CLIP

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases. (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class CLIPMLP(nn.Module):
    """(B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: dict, causal: bool):
        super().__init__()
        channels, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.layer_norm1 = nn.LayerNorm(channels, eps)
        self.self_attn = CLIPAttention(channels, config["num_attention_heads"], causal)
        self.layer_norm2 = nn.LayerNorm(channels, eps)
        self.mlp = CLIPMLP(channels, config["intermediate_size"], config.get("hidden_act", "quick_gelu"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPLayers(nn.Module):
    """`encoder` of either tower."""

    def __init__(self, config: dict, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config, causal) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEmbeddings(nn.Module):
    """Token plus position. (B, L) -> (B, L, D)."""

    def __init__(self, config: dict):
        super().__init__()
        self.token_embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = nn.Embedding(config["max_position_embeddings"], config["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """(B, L) int64 -> (B, L, D), the last hidden state after the final norm."""

    def __init__(self, config: dict):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = CLIPLayers(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config["hidden_size"], config.get("layer_norm_eps", 1e-5))

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class TextEncoder(nn.Module):
    """SD's prompt encoder: CLIP's text tower. ids (B, L) int64 -> P (B, L, D)."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)


class VisionEmbeddings(nn.Module):
    """Patches and a class token, plus position. (B, 3, S, S) -> (B, 1 + (S / patch)², D)."""

    def __init__(self, config: dict):
        super().__init__()
        channels, patch = config["hidden_size"], config["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(channels))
        self.patch_embedding = nn.Conv2d(3, channels, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config["image_size"] // patch) ** 2 + 1, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """(B, 3, S, S), normalised -> (B, D), the class token after the last norm."""

    def __init__(self, config: dict):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config["hidden_size"], config.get("layer_norm_eps", 1e-5))  # (sic)
        self.encoder = CLIPLayers(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config["hidden_size"], config.get("layer_norm_eps", 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers with their projections into one space, where a picture lies near its caption.

    The image tower measures (section 5.2); the text tower is also SD's prompt encoder.
    """

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's preprocessing

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        text, vision, n = config["text_config"], config["vision_config"], config["projection_dim"]
        self.text_model, self.vision_model = TextTransformer(text), VisionTransformer(vision)
        self.text_projection = nn.Linear(text["hidden_size"], n, bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], n, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.get("logit_scale_init_value", 2.6592)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, n), not normalised: the state at the end of the text, which has the largest id."""
        x = self.text_model(ids)
        return self.text_projection(x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)])

    def preprocess(self, x: Tensor) -> Tensor:
        """Pictures of any size, (B, 3, H, W) in [0, 1] -> (B, 3, S, S), S the config's image_size: the middle square.

        The short side becomes S by antialiased bicubic interpolation. As CLIP's own, up to Pillow's rounding to 8 bits.
        """
        S, (h, w) = self.config["vision_config"]["image_size"], x.shape[2:]
        if min(h, w) != S:
            h, w = S * h // min(h, w), S * w // min(h, w)
            x = F.interpolate(x, size=(h, w), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (h - S) // 2, (w - S) // 2
        return x[:, :, top : top + S, left : left + S]

    def encode_image(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S) in [0, 1], S the config's image_size -> (B, n), not normalised."""
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return self.visual_projection(self.vision_model((x - mean) / std))
