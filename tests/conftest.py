"""Tests: tiny networks in the shapes of Stable Diffusion 1.x and 2.x, with random weights, and inputs for them.

They have SD's four levels (attention in three) with two layers each, hence its 12 skip connections. Every level has
another width, so that a tensor that goes the wrong way does not fit.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracles read local files only
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from torch import Tensor, nn

from clip import TextEncoder, load_tokenizer
from model import CategoryGenerator, PersonalityGenerator, Prompts, UNet
from rivals.lama import LaMa
from support.files import BadInput
from toy.stages import TOY_TEXT, TOY_UNET, TOY_VAE, train_tokenizer
from vae import VAE
from weights import TEXT_FILE, UNET_FILE, control_config, public_tensors, save_control, save_module

SD1 = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "act_fn": "silu", "sample_size": 16,
       "block_out_channels": [16, 24, 32, 48], "layers_per_block": 2, "attention_head_dim": 2,
       "cross_attention_dim": 24, "norm_num_groups": 8, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
       "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
       "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
UNETS = {"sd1": SD1, "sd2": SD1 | {"attention_head_dim": [1, 2, 4, 8], "use_linear_projection": True}}
VAE_CONFIG = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
              "block_out_channels": [8, 16, 16, 24], "layers_per_block": 2, "norm_num_groups": 8, "act_fn": "silu",
              "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
              "scaling_factor": 0.18215}
TEXT_CONFIG = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 600,
               "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
               "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
               "bos_token_id": 598, "eos_token_id": 599, "pad_token_id": 599}
VISION_CONFIG = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                 "num_attention_heads": 3, "image_size": 32, "patch_size": 8, "num_channels": 3,
                 "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 20}
CLIP_CONFIG = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 20,
               "text_config": TEXT_CONFIG | {"projection_dim": 20}, "vision_config": VISION_CONFIG}
LAMA = {"_class_name": "LaMa", "width": 4, "levels": 3, "blocks": 2, "global_channels": 24, "sample_size": 64}


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights for every parameter, also in zero convolutions, biases and norms; activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.copy_(0.2 * noise + name.endswith("weight"))  # a norm's scale is about 1, a bias about 0
    return module.eval().requires_grad_(False)


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    """N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, divided by the largest value."""
    assert ours.shape == theirs.shape, f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def equal_weights(ours: nn.Module, theirs: nn.Module | dict[str, Tensor]) -> bool:
    """Whether two networks, or a network and tensors by name, hold the same numbers under the same names."""
    a, b = (x if isinstance(x, dict) else public_tensors(x) for x in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def random_lama(seed: int = 0) -> LaMa:
    """Random weights, and running variances about 1."""
    lama = randomise(LaMa(LAMA), seed)
    for name, p in lama.named_parameters():
        if name.endswith("running_var"):
            p.abs_().add_(0.8)
    return lama


def write_tiny_toy(folder: Path, categories: dict[str, str]) -> None:
    """Writes a folder like toy/: base, cg and pg with random weights, 64 pixels and a quarter of the toy's channels.

    categories: their identifiers.
    """
    torch.manual_seed(0)
    texts = [f"a photo of {name}, in the background of {identifier}" for name, identifier in categories.items()]
    train_tokenizer(texts * 9, 600, 32, folder / "base" / "tokenizer")
    tokenizer = load_tokenizer(folder / "base" / "tokenizer")
    text = TOY_TEXT | {"vocab_size": tokenizer.bpe.get_vocab_size(), "eos_token_id": tokenizer.end, "hidden_size": 32}
    unet = TOY_UNET | {"sample_size": 16, "block_out_channels": [8, 16, 16, 16], "cross_attention_dim": 32}
    save_module(TextEncoder(text), folder / "base" / "text_encoder", TEXT_FILE)
    save_module(VAE(TOY_VAE | {"block_out_channels": [8, 8, 16]}), folder / "base" / "vae", UNET_FILE)
    save_module(UNet(unet), folder / "base" / "unet", UNET_FILE)
    for name, branch in (("cg", CategoryGenerator), ("pg", PersonalityGenerator)):
        save_control(branch(control_config(unet, 4)), folder / name, categories=categories)


@pytest.fixture(scope="session")
def unet() -> UNet:
    return randomise(UNet(SD1))


@pytest.fixture(scope="session")
def cg() -> CategoryGenerator:
    return randomise(CategoryGenerator(control_config(SD1, factor=8)), seed=1)


@pytest.fixture(scope="session")
def pg() -> PersonalityGenerator:
    return randomise(PersonalityGenerator(control_config(SD1, factor=8)), seed=2)


@pytest.fixture(scope="session")
def vae() -> VAE:
    return randomise(VAE(VAE_CONFIG), seed=3)


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return randomise(TextEncoder(TEXT_CONFIG), seed=4)


def inputs(batch: int = 2) -> SimpleNamespace:
    """The networks' inputs at 128 pixels: z_t, t, prompts, the two hints, a soft mask. For the fixtures above."""
    ramp = torch.linspace(0, 1, 128)
    return SimpleNamespace(
        z=random(batch, 4, 16, 16, seed=10), t=torch.tensor([981, 21, 1, 500])[:batch],
        prompts=Prompts(*(random(batch, 7, 24, seed=11 + i) for i in range(3))),
        hint=random(batch, 3, 128, 128, seed=14).sigmoid(), hint_ref=random(batch, 3, 128, 128, seed=15).sigmoid(),
        mask=(3 * ramp - 1).clamp(0, 1).expand(batch, 1, 128, 128).clone())  # 0, then a ramp, then 1


class Still(nn.Module):
    """A stand-in for the UNet: keeps the z_t and t that it sees, and predicts zero noise."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.seen = nn.Conv2d(4, 4, 1), []

    def forward(self, z, t, context, residuals=None):
        self.seen.append((z.clone(), int(t[0])))
        return torch.zeros(len(context), *z.shape[1:])  # a row per prompt: both guidance passes


@contextmanager
def refused(message: str, source: object = ""):
    """What runs here is refused in one line, which matches the message and names the source."""
    with pytest.raises(BadInput, match=message) as error:
        yield
    assert "\n" not in str(error.value) and str(source) in str(error.value)
