"""Rivals: LaMa (Suvorov et al. 2022), in Table 1. It paints the surroundings in one pass, without prompt or noise.

Its features are a pair: local ones, which are convolved as usual, and global ones, which a Fourier transform mixes over
the whole picture (Chi et al. 2020, 'Fast Fourier Convolution'). Modules are named as in big-lama's public weights,
whose layers are numbered; layers without weights count, too.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cutouts import SOLID
from support.files import BadInput
from support.layouts import looks_like, split_by_model
from support.tensors import read_weights
from weights import build_from_shapes, load_module

LAMA_FILE = "model.safetensors"  # in a folder that its training wrote

Pair = tuple[Tensor, Tensor | None]  # local and global features, each (B, C, h, w); the first layers lack global ones


# ---------------------------------------------------------------- layers


class BatchNorm(nn.Module):
    """nn.BatchNorm2d whose running statistics are parameters without gradient: so checkpoints hold them."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class FourierUnit(nn.Module):
    """A 1x1 convolution of the spectrum: each of its frequencies sees the whole picture. (B, C, h, w) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.bn = BatchNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        z = torch.fft.rfft2(x.float(), norm="ortho")  # (B, C, h, w // 2 + 1), complex
        z = torch.stack([z.real, z.imag], dim=2).flatten(1, 2)  # (B, 2C, h, w // 2 + 1): re_0, im_0, re_1, im_1, ...
        z = F.relu(self.bn(self.conv_layer(z))).float()  # half precision has no such transforms
        return torch.fft.irfft2(torch.complex(z[:, ::2], z[:, 1::2]), s=(h, w), norm="ortho")


class SpectralTransform(nn.Module):
    """Global to global features: a Fourier unit at half the channels, added to its input. (B, C, h, w) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Sequential(nn.Conv2d(channels, half, 1, bias=False), BatchNorm(half), nn.ReLU())
        self.fu = FourierUnit(half)
        self.conv2 = nn.Conv2d(half, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x + self.fu(x))


class FFCLayer(nn.Module):
    """Convolutions between all groups of features, local and global, that there are; normalisation and ReLU.

    channels, out: of the local and the global features, 0 where there are none. The edges are mirrored.
    """

    def __init__(self, channels: tuple[int, int], out: tuple[int, int], kernel: int = 3, stride: int = 1):
        super().__init__()
        (l, g), (l_out, g_out) = channels, out
        conv = partial(nn.Conv2d, kernel_size=kernel, stride=stride, bias=False)
        self.edges = (kernel // 2,) * 4
        self.ffc = nn.ModuleDict({"convl2l": conv(l, l_out)})
        if g_out:
            self.ffc["convl2g"] = conv(l, g_out)
        if g:
            self.ffc.update({"convg2l": conv(g, l_out), "convg2g": SpectralTransform(g)})
        self.bn_l, self.bn_g = BatchNorm(l_out), BatchNorm(g_out) if g_out else None

    def forward(self, features: Pair) -> Pair:
        l, g = features
        l = F.pad(l, self.edges, mode="reflect")
        l_out, g_out = self.ffc["convl2l"](l), self.ffc["convl2g"](l) if self.bn_g else None
        if g is not None:
            l_out = l_out + self.ffc["convg2l"](F.pad(g, self.edges, mode="reflect"))
            g_out = g_out + self.ffc["convg2g"](g)
        return F.relu(self.bn_l(l_out)), F.relu(self.bn_g(g_out)) if self.bn_g else None


class Block(nn.Module):
    """Two layers, added to their input."""

    def __init__(self, channels: tuple[int, int]):
        super().__init__()
        self.conv1, self.conv2 = FFCLayer(channels, channels), FFCLayer(channels, channels)

    def forward(self, features: Pair) -> Pair:
        (l, g), (l_new, g_new) = features, self.conv2(self.conv1(features))
        return l + l_new, g + g_new


class Begin(nn.Module):
    """x -> (x, None): at first all features are local."""

    def forward(self, x: Tensor) -> Pair:
        return x, None


class Join(nn.Module):
    """Local and global features -> one tensor."""

    def forward(self, features: Pair) -> Tensor:
        return torch.cat(features, dim=1)


# ---------------------------------------------------------------- the network


def mirrored(n: int, multiple: int) -> Tensor:
    """The positions 0, ..., n − 1 of n pixels, then n − 1, n − 2, ... up to a multiple; two multiples at least, since
    the convolutions at the coarsest level mirror a neighbour.
    """
    i = torch.arange(max(2, -(-n // multiple)) * multiple) % (2 * n)
    return torch.where(i < n, i, 2 * n - 1 - i)


class LaMa(nn.Module):
    """lama(rgb, mask): pictures with their products kept and their surroundings painted.

    config: the first layer has `width` channels; each of `levels` doubles them and halves the resolution; the coarsest
    has `blocks`, in which `global_channels` are global. big-lama has 64, 3, 18 and 384. sample_size: the side in pixels
    of the pictures that it is for [512].
    """

    exemplar = None  # it reads no reference

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        widths = [config["width"] * 2**i for i in range(config["levels"] + 1)]
        channels = widths[-1] - config["global_channels"], config["global_channels"]  # of the blocks
        down = [FFCLayer((before, 0), (after, 0), stride=2) for before, after in zip(widths, widths[1:-1])]
        up = [layer for before, after in zip(widths[:0:-1], widths[-2::-1]) for layer in (
            nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1), BatchNorm(after), nn.ReLU())]
        self.model = nn.Sequential(
            Begin(), FFCLayer((4, 0), (widths[0], 0), kernel=7), *down, FFCLayer((widths[-2], 0), channels, stride=2),
            *(Block(channels) for _ in range(config["blocks"])),
            Join(), *up, nn.ReflectionPad2d(3), nn.Conv2d(widths[0], 3, 7), nn.Sigmoid())

    @property
    def size(self) -> int:
        """The side in pixels of the pictures that it is for."""
        return self.config.get("sample_size") or 512

    @property
    def multiple(self) -> int:
        """A picture's sides must be multiples of it; `forward` pads other ones."""
        return 2 ** self.config["levels"]

    def fill(self, rgb: Tensor, known: Tensor) -> Tensor:
        """rgb (B, 3, H, W), hidden except where `known` (B, 1, H, W) is 1 -> the network's picture (B, 3, H, W)."""
        x = torch.cat([rgb * known, 1 - known], dim=1)
        return self.model(x.contiguous(memory_format=torch.channels_last))  # on a CPU about a tenth faster

    def forward(self, rgb: Tensor, mask: Tensor) -> Tensor:
        """rgb (B, 3, H, W) in [0, 1] of any size, M (B, 1, H, W) -> (B, 3, H, W): rgb where M = 1, all else painted.

        Soft edges are painted anew. Padding mirrors the picture together with its edge, as the original's does.
        """
        known = (mask >= SOLID).to(rgb)
        h, w = rgb.shape[2:]
        rows, columns = mirrored(h, self.multiple), mirrored(w, self.multiple)
        filled = self.fill(rgb[:, :, rows][..., columns], known[:, :, rows][..., columns])
        return rgb * known + filled[:, :, :h, :w] * (1 - known)

    @torch.inference_mode()
    def paint(self, canvas, settings, on_step: Callable | None = None) -> Tensor:
        """As generate.paint: a Canvas -> (B, 3, H, W) float32, in one step, whatever the settings."""
        weight = self.model[1].bn_l.weight
        return self(canvas.rgb.to(weight), canvas.mask.to(weight))


# ---------------------------------------------------------------- loading

PREFIXES = {"generator.": "generator", "model.generator.": "generator"}  # before the names in public files, if any


def lama_config(tensors: dict[str, Tensor]) -> dict:
    """The configuration of a LaMa, from its tensors' shapes. Raises KeyError for other tensors."""
    layers = [name for name in tensors if name.endswith(".ffc.convl2l.weight")]
    blocks = sum(".conv1." in name for name in layers)
    levels = len(layers) - 2 * blocks - 1
    return {"_class_name": "LaMa", "width": tensors["model.1.ffc.convl2l.weight"].shape[0], "levels": levels,
            "blocks": blocks, "global_channels": tensors[f"model.{levels + 1}.bn_g.weight"].shape[0]}


def load_lama(path: Path | str, device="cpu") -> LaMa:
    """LaMa in float32, from a file with big-lama's generator or a folder that its training wrote. Raises BadInput."""
    path = Path(path)
    if path.is_dir():
        return load_module(LaMa, path, LAMA_FILE, device, torch.float32)
    tensors = read_weights(path)
    parts = split_by_model(tensors, PREFIXES)
    own = parts["generator"] or parts[""]
    if not any(".ffc." in name for name in own):
        raise BadInput(f"{path} holds no generator of LaMa{looks_like(tensors)}; give big-lama's weights")
    return build_from_shapes(LaMa, lama_config, own, path, device, torch.float32)
