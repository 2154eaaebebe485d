"""Attention: the one place where text reaches the picture, and where the paper changes Stable Diffusion (section 3.2).

Read from `attend` on: scaled dot-product attention, the cross-attention layer CA of Eq. 2, its mask-guided form of Eq. 3,
and the transformer block that every attention level of the UNet and of the ControlNet branches is made of.
Parameters are named as in the public diffusers folders, so weights load without renaming.

Shapes: B pictures, h x w positions of a feature map, C channels, L prompt tokens, D text width.
"""

from collections.abc import Callable, Hashable

import torch.nn.functional as F
from torch import Tensor, nn

# Reused, once and to_rows only save time: without them every step would compute the same again, and every picture twice
# what does not depend on its prompt. A first reading can go on at `attend`.


class Reused:
    """A value that stays the same over many calls, as prompts, hints and mask do over the steps of a picture."""

    def __init__(self, value: Tensor):
        self.value, self.made = value, {}


def once(key: Hashable, make: Callable, value: Tensor | Reused):
    """make(value); for a Reused value computed at the first call and kept under `key`, the layer that asks."""
    if not isinstance(value, Reused):
        return make(value)
    if key not in value.made:
        value.made[key] = make(value.value)
    return value.made[key]


def to_rows(x: Tensor, rows: int) -> Tensor:
    """x (B, ...) repeated to (rows, ...). Guidance runs pictures with and without their prompts: until the first prompt
    is read both are the same, and one row a picture does for both.
    """
    if rows % len(x):
        raise ValueError(f"{rows} rows of prompts or mask for {len(x)} pictures: give as many, or a multiple")
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v in each of `heads` heads of d = C / heads channels.

    q (B, N, C); k, v (B, L, C) -> (B, N, C). With `causal`, position n sees positions 0..n only.
    """
    q = to_rows(q, len(k))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or L, d)
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, N, d)
    return x.transpose(1, 2).flatten(2)  # (B, N, C)


def attention_weights(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d), which `attend` never shows: q (B, N, C), k (B, L, C) -> (B, heads, N, L)."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (to_rows(q, len(k)), k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


def mask_at(mask: Tensor | Reused, h: int, w: int) -> Tensor:
    """M (B, 1, H, W), area-averaged to a feature map's (B, 1, h, w): edges stay soft, so Eq. 3 and 4 blend there."""
    return once((h, w), lambda M: F.interpolate(M, size=(h, w), mode="area"), mask)


class Attention(nn.Module):
    """Multi-head attention of x on a context; of x on itself where there is none.

    x (B, N, C); context (B, L, D) or None -> (B, N, C). With the prompt's encoding P as context this is CA(x, P).
    """

    watch: Callable[[Tensor], None] | None = None  # where set, is shown the weights (B, heads, N, L) of every call

    def __init__(self, channels: int, heads: int, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> k, v, each (B, L, C)."""
        return self.to_k(context), self.to_v(context)

    def read(self, q: Tensor, context: Tensor | Reused) -> Tensor:
        """What the queries q (B, N, C) read from a context (B, L, D), before the output layer: (B, N, C)."""
        k, v = once(self, self.keys_values, context)
        if self.watch:
            self.watch(attention_weights(q, k, self.heads))
        return attend(q, k, v, self.heads)

    def forward(self, x: Tensor, context: Tensor | Reused | None = None) -> Tensor:
        return self.to_out[0](self.read(self.to_q(x), x if context is None else context))

    def mask_guided(self, x: Tensor, P_fg: Tensor | Reused, P_bg: Tensor | Reused, M: Tensor) -> Tensor:
        """CA(x, P_fg) ⊗ M + CA(x, P_bg) ⊗ (1 − M): the two terms that Eq. 3 adds to x.

        x (B, N, C); P_fg, P_bg (B, L, D); M (B, N, 1), 1 on the product -> (B, N, C).
        The product's positions read the product's prompt only, the background's the background's only, with one set
        of weights. The output layer is affine and M + (1 − M) = 1, so it is applied once, to the blend.
        """
        q = self.to_q(x)
        fg, bg = self.read(q, P_fg), self.read(q, P_bg)
        return self.to_out[0](fg * M + bg * (1 - M))


class GEGLU(nn.Module):
    """(B, N, C) -> (B, N, C_out): a linear layer gated by the exact GELU of another, both in one matrix."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C) through 4C hidden channels. `net` keeps the public numbering: 0 and 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to its input."""

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context, M: Tensor | None = None) -> Tensor:
        """x (B, N, C); context P (B, L, D), or with M (B, N, 1) the pair (P_fg, P_bg) -> (B, N, C).

        Where a prompt has several rows for each of x's, so has M and the result: see `to_rows`.
        """
        x = x + self.attn1(self.norm1(x))
        if M is None:
            y = self.attn2(self.norm2(x), context)
        else:
            y = self.attn2.mask_guided(self.norm2(x), *context, M)
        x = to_rows(x, len(y)) + y  # Eq. 2, or with M Eq. 3
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it. (B, C, h, w) -> (B, C, h, w).

    SD 1.x projects in and out with 1x1 convolutions, SD 2.x (`linear_projection`) with the same matrices as linear
    layers.
    """

    def __init__(self, channels: int, heads: int, context_channels: int, groups: int, linear_projection: bool = False):
        super().__init__()
        projection = nn.Linear if linear_projection else lambda i, o: nn.Conv2d(i, o, kernel_size=1)
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_channels)])
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context, mask: Tensor | Reused | None = None) -> Tensor:
        """context as in TransformerBlock; mask (B, 1, H, W) or None, at any resolution."""
        residual, (h, w) = x, x.shape[2:]
        M = None if mask is None else mask_at(mask, h, w).flatten(2).transpose(1, 2)  # (B, hw, 1)
        x = self.norm(x)
        if not self.linear_projection:
            x = self.proj_in(x)
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, hw, C); once, or every layer below would copy it
        if self.linear_projection:
            x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x, context, M)
        if self.linear_projection:
            x = self.proj_out(x)
        x = x.transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        if not self.linear_projection:
            x = self.proj_out(x)
        return to_rows(residual, len(x)) + x  # in this order: a sum lies in memory as its first term does
