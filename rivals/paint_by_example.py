"""Rivals: Paint by Example (Yang et al. 2023), by hand: a picture, the exemplar, replaces the text of the prompt.

It is a Stable Diffusion with two changes. The prompt is a single token that an image encoder makes from the exemplar.
And the UNet reads what is to be kept from five channels beside z_t, which differ in order and polarity from those of
Stable Diffusion inpainting. Read from the top: the image encoder; the model, with what its UNet reads and how it
paints; loading.

In Table 2 "we encode the reference image as the condition" (section 5.3.2): the exemplar is the whole reference.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention, FeedForward
from clip import CLIP, VisionTransformer
from model import Prompts, UNet
from sampler import Conditions, SamplerSettings, Schedule, sample
from support.files import BadInput
from support.layouts import looks_like, modules_under, split_by_model, unet_config, vae_config
from support.tensors import read_weights
from vae import VAE
from weights import CLIP_FILE, UNET_FILE, VAE_FILE, StableDiffusion, build_from_shapes, load_module, read_schedule

GUIDANCE = 5.0  # in all commands that its authors published

# ---------------------------------------------------------------- exemplar to token


class MapperBlock(nn.Module):
    """Self-attention and MLP, each on the normalised input and added to it. (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=1)  # for a single token to_out(to_v(x)), since softmax is 1
        for name in ("to_q", "to_k", "to_v"):  # with biases
            setattr(self.attn1, name, nn.Linear(channels, channels))
        self.norm3 = nn.LayerNorm(channels)  # there is no cross-attention, hence no norm2
        self.ff = FeedForward(channels)
        # the exact GELU, unlike CLIP's, and without a gate, unlike the UNet's
        self.ff.net[0] = nn.Sequential(OrderedDict(proj=nn.Linear(channels, 4 * channels), gelu=nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class PaintByExampleEncoder(nn.Module):
    """CLIP's frozen image tower, and the trained layers on top: mapper, norm, projection, unconditional vector.

    Exemplars (B, 3, H, W) in [0, 1], of any size -> their tokens c (B, 1, D).
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        width, n = config["hidden_size"], config.get("projection_dim", 768)
        # The public config.json does not say how many blocks the mapper has: 5 for the 24 layers of ViT-L/14
        blocks = config.get("mapper_blocks", (config["num_hidden_layers"] + 1) // 5)
        self.model = nn.ModuleDict({"vision_model": VisionTransformer(config)})
        self.mapper = nn.ModuleDict({"blocks": nn.ModuleList(MapperBlock(width) for _ in range(blocks))})
        self.final_layer_norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, n)
        self.uncond_vector = nn.Parameter(torch.zeros(1, 1, n))

    def preprocess(self, exemplar: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S), normalised as for CLIP; squashed, while CLIP.preprocess crops."""
        size = (self.config["image_size"],) * 2
        x = F.interpolate(exemplar.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(v)[:, None, None] for v in (CLIP.mean, CLIP.std))
        return ((x - mean) / std).to(self.proj_out.weight)

    def forward(self, exemplar: Tensor) -> Tensor:
        x = self.model["vision_model"](self.preprocess(exemplar))[:, None]  # (B, 1, C), without CLIP's projection
        for block in self.mapper["blocks"]:
            x = block(x)
        return self.proj_out(self.final_layer_norm(x))


# ---------------------------------------------------------------- the model


@dataclass
class PaintByExample:
    """UNet, VAE and schedule, as a Stable Diffusion without text encoder and tokenizer; and the image encoder."""

    sd: StableDiffusion
    image_encoder: PaintByExampleEncoder

    def encode(self, exemplar: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> the tokens that the cross-attentions read, (B, 1, D)."""
        return self.image_encoder(exemplar)

    @property
    def unconditional(self) -> Tensor:
        """(1, 1, D), trained: what the cross-attentions read in place of an exemplar, as '' in Stable Diffusion."""
        return self.image_encoder.uncond_vector

    def inpainting(self, rgb: Tensor, mask: Tensor) -> Tensor:
        """What the UNet reads beside z_t, (B, 5, h, w): first the latent of the picture, grey where it will be painted,
        then the mask, 1 where it is kept. StableDiffusion.inpainting has the mask first, 1 where it is painted.

        rgb (B, 3, H, W) in [0, 1]; mask M (B, 1, H, W), whose soft edges are made hard. The latent is the mean of the
        VAE's posterior, as everywhere here; the original code draws from the posterior.
        """
        M = (mask >= 0.5).to(rgb)
        z = self.sd.encode(rgb * M + 0.5 * (1 - M))
        return torch.cat([z, self.kept(mask, *z.shape[2:]).to(z)], dim=1)

    def kept(self, mask: Tensor, h: int, w: int) -> Tensor:
        """The last of the five channels, (B, 1, h, w): M reduced bilinearly without antialiasing. For f = 8 this is the
        mean of the middle 2 x 2 pixels in each cell.
        """
        return F.interpolate((mask >= 0.5).float(), size=(h, w), mode="bilinear")

    @torch.inference_mode()
    def paint(self, canvas, settings: SamplerSettings, on_step: Callable | None = None) -> Tensor:
        """As generate.paint: a Canvas, whose references of any size are the exemplars -> (B, 3, H, W) float32.

        z_T is pure noise. on_step as in `sampler.sample`.
        """
        weight = self.sd.unet.conv_in.weight
        c = self.encode(canvas.reference.to(weight.device))
        u = self.unconditional.expand_as(c)
        given = Conditions(Prompts(c, c, c), Prompts(u, u, u),
                           inpainting=self.inpainting(canvas.rgb.to(weight), canvas.mask.to(weight)))
        shape = self.sd.latent_shape(*canvas.rgb.shape[2:])
        z = sample(self.sd.unet, self.sd.schedule, given, canvas.generators, shape, settings, on_step=on_step)
        return self.sd.decode(z)

    @property
    def size(self) -> int:
        """The side in pixels of the pictures that it is for."""
        return self.sd.size

    @property
    def multiple(self) -> int:
        """A picture's sides must be multiples of it."""
        return self.sd.multiple

    @property
    def exemplar(self) -> int:
        """The side in pixels to which exemplars are squashed."""
        return self.image_encoder.config["image_size"]


# ---------------------------------------------------------------- loading

# As in support/layouts.py: prefixes in the single file, where the last layers and learnable_vector have none; and the
# rules from public names to ours, for the image encoder
PREFIXES = {"model.diffusion_model.": "unet", "first_stage_model.": "vae", "cond_stage_model.": "image_encoder"}
RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^transformer\.", "model."),
    (r"^model\.(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "model.vision_model."),  # recent folders
    (r"^mapper\.resblocks\.", "mapper.blocks."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.attn\.c_qkv\.", ".attn1.to_{}."),
    (r"\.attn\.c_proj\.", ".attn1.to_out.0."),
    (r"\.ln_2\.", ".norm3."),
    (r"\.mlp\.c_fc\.", ".ff.net.0.proj."),
    (r"\.mlp\.c_proj\.", ".ff.net.2."),
    (r"^final_ln\.", "final_layer_norm."),
    (r"^learnable_vector$", "uncond_vector"),
)]


def encoder_config(tensors: dict[str, Tensor]) -> dict:
    """The config.json of the image encoder, from its tensors' shapes. Raises KeyError for other tensors."""
    tower = "model.vision_model."
    width, _, patch, _ = tensors[f"{tower}embeddings.patch_embedding.weight"].shape
    patches = len(tensors[f"{tower}embeddings.position_embedding.weight"]) - 1
    return {"model_type": "clip_vision_model", "architectures": ["PaintByExampleImageEncoder"], "hidden_size": width,
            "num_attention_heads": width // 64, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            "num_hidden_layers": modules_under(f"{tower}encoder.layers.", tensors),
            "intermediate_size": tensors[f"{tower}encoder.layers.0.mlp.fc1.weight"].shape[0],
            "image_size": math.isqrt(patches) * patch, "patch_size": patch, "num_channels": 3,
            "projection_dim": tensors["proj_out.weight"].shape[0],
            "mapper_blocks": modules_under("mapper.blocks.", tensors)}


def load_paint_by_example(path: Path | str, device="cpu", dtype=torch.float32) -> PaintByExample:
    """The public folder, with image_encoder/, unet/, vae/ and scheduler/, or the original's single file.

    Raises BadInput if a part is missing, broken, or does not fit the others. The UNet of an inpainting Stable
    Diffusion has the same names and shapes as Paint by Example's: only its text encoder gives such a model away.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "image_encoder").is_dir():
            raise BadInput(f"{path} is not Paint by Example: it holds no image_encoder/"
                           + ("; it looks like Stable Diffusion" if (path / "text_encoder").is_dir() else ""))
        encoder = load_module(PaintByExampleEncoder, path / "image_encoder", CLIP_FILE, device, dtype, RENAMES)
        unet = load_module(UNet, path / "unet", UNET_FILE, device, dtype)
        vae = load_module(VAE, path / "vae", VAE_FILE, device, dtype)
        schedule = read_schedule(path / "scheduler" / "scheduler_config.json", unet)
    else:
        encoder, unet, vae = load_single_file(path, device, dtype)
        schedule = Schedule()
    n, width = vae.config["latent_channels"], encoder.proj_out.out_features
    if (unet.config["in_channels"], unet.config["out_channels"]) != (2 * n + 1, n):
        raise BadInput(f"{path}: its UNet reads {unet.config['in_channels']} channels, Paint by Example's {2 * n + 1}; "
                       "give parts of one model")
    if unet.config["cross_attention_dim"] != width:
        raise BadInput(f"{path}: its image encoder writes tokens of width {width}, its UNet reads "
                       f"{unet.config['cross_attention_dim']}; give parts of one model")
    return PaintByExample(StableDiffusion(None, None, unet, vae, schedule), encoder)


def load_single_file(path: Path, device, dtype) -> tuple[PaintByExampleEncoder, UNet, VAE]:
    """Paint by Example from one file in the original layout. Raises BadInput."""
    tensors = read_weights(path)
    parts = split_by_model(tensors, PREFIXES)
    parts["image_encoder"] |= parts.pop("")  # its last layers and the unconditional vector
    if "learnable_vector" not in tensors:
        raise BadInput(f"{path} is not Paint by Example: it holds no learnable_vector{looks_like(tensors)}")
    if missing := [part for part in parts if not parts[part]]:
        raise BadInput(f"{path} is not a whole Paint by Example: it holds no {missing[0]}; download it again")
    encoder = build_from_shapes(PaintByExampleEncoder, encoder_config, parts["image_encoder"], path, device, dtype,
                                RENAMES)
    unet = build_from_shapes(UNet, unet_config, parts["unet"], path, device, dtype)
    vae = build_from_shapes(VAE, vae_config, parts["vae"], path, device, dtype)
    unet.config["sample_size"] = 64
    return encoder, unet, vae
