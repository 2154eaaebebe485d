"""The method: attention, where text reaches the picture and the paper changes Stable Diffusion (Eq. 2, 3; section 3.2).

Reading order: scaled dot-product attention; the cross-attention layer CA of Eq. 2; its mask-guided form, Eq. 3; and the
transformer block, which the UNet and the ControlNet branches have at every level with attention.

Shapes: B pictures, h x w positions of a feature map, N = hw, C channels, L prompt tokens, D text width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v in each of `heads` heads, with d = C / heads channels per head.

    q (B, N, C); k, v (B, L, C) -> (B, N, C). With `causal`, position n sees positions 0..n only.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or L, d)
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, N, d)
    return x.transpose(1, 2).flatten(2)  # (B, N, C)


def attention_weights(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """The weights softmax(q kᵀ / √d); `attend` does not return them. q (B, N, C), k (B, L, C) -> (B, heads, N, L)."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


def mask_at(mask: Tensor, h: int, w: int) -> Tensor:
    """Area-averages M, (B, 1, H, W) -> (B, 1, h, w), so Eq. 3 and 4 blend at soft edges. The paper leaves this open."""
    return F.interpolate(mask, size=(h, w), mode="area")


class SplitPrompt(NamedTuple):
    """The prompt in two parts, each (B, L, D), which Eq. 3 reads in place of P (section 3.2)."""

    P_fg: Tensor  # 'A photo of [category]', for positions on the product
    P_bg: Tensor  # 'in the background of [D]', for positions around it


class Attention(nn.Module):
    """Multi-head attention: x attends to a context, or to itself if there is none.

    x (B, N, C); context (B, L, D) or None -> (B, N, C). With the prompt's encoding P as context this is CA(x, P).
    """

    on_weights: Callable[[Tensor], None] | None = None  # for maps: called with (B, heads, N, L); in Eq. 3 twice

    def __init__(self, channels: int, heads: int, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out[0](self.read(self.to_q(x), x if context is None else context))

    def mask_guided(self, x: Tensor, P_fg: Tensor, P_bg: Tensor, M: Tensor) -> Tensor:
        """CA(x, P_fg) ⊗ M + CA(x, P_bg) ⊗ (1 − M): the two terms that Eq. 3 adds to x.

        x (B, N, C); P_fg, P_bg (B, L, D); M (B, N, 1), 1 on the product -> (B, N, C).
        Positions on the product attend only to the product's prompt, positions around it only to the background's.
        Both use the same layers. The output layer is affine and M + (1 − M) = 1, so it is applied once, to the blend.
        """
        q = self.to_q(x)
        fg, bg = self.read(q, P_fg), self.read(q, P_bg)
        return self.to_out[0](fg * M + bg * (1 - M))

    def read(self, q: Tensor, context: Tensor) -> Tensor:
        """The queries q (B, N, C) attend to a context (B, L, D) -> (B, N, C), before the output layer."""
        k, v = self.to_k(context), self.to_v(context)
        if self.on_weights:
            self.on_weights(attention_weights(q, k, self.heads))
        return attend(q, k, v, self.heads)


class GEGLU(nn.Module):
    """(B, N, C) -> (B, N, C_out): a linear layer gated by the exact GELU of another, both in one matrix."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C) through 4C hidden channels. The layers of `net` keep their public numbers, 0 and 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def one_row_per_prompt(x: Tensor, context: Tensor | SplitPrompt) -> Tensor:
    """Repeats x (B, ...) to the prompts' rows, (2B, ...) with guidance.

    Until a prompt is read, the two passes of guidance are equal and run as one. It saves 4% of a step of SD 1.5.
    """
    rows = len(context if isinstance(context, Tensor) else context[0])
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to its input.

    "All the attention layers" that the paper replaces in CG are read as all cross-attentions.
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | SplitPrompt, M: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C), or (2B, N, C). context: P (B, L, D), or P_fg and P_bg with M (B, N, 1)."""
        x = one_row_per_prompt(x + self.attn1(self.norm1(x)), context)
        if isinstance(context, Tensor):
            x = x + self.attn2(self.norm2(x), context)  # Eq. 2
        else:
            x = x + self.attn2.mask_guided(self.norm2(x), *context, M)  # Eq. 3
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it. (B, C, h, w) -> (B, C, h, w).

    SD 1.x's files project in and out with 1x1 convolutions, SD 2.x's with linear layers, which compute the same.
    Here they are linear; weights.py changes the shapes when it loads and saves.
    """

    def __init__(self, channels: int, heads: int, context_channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_channels)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | SplitPrompt, mask: Tensor | None = None) -> Tensor:
        """context: P, or P_fg and P_bg with mask M (B, 1, H, W), at any resolution."""
        residual, (h, w) = x, x.shape[2:]  # (B, 320, 64, 64) in SD 1.5's first layer, at 512 px
        M = None if isinstance(context, Tensor) else mask_at(mask, h, w).flatten(2).transpose(1, 2)  # (2B, 4096, 1)
        x = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, 4096, 320), copied once for all layers below
        x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x, context, M)  # (2B, 4096, 320): guidance's rows
        x = self.proj_out(x).transpose(1, 2).unflatten(2, (h, w))  # (2B, 320, 64, 64)
        return one_row_per_prompt(residual, context) + x  # this order: a sum takes its first term's memory format
