"""Beside the method: loads and saves public weights (safetensors), and checks every tensor's name and shape.

A Stable Diffusion folder holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/. A ControlNet folder, such as CG's
or PG's, holds config.json and one file of weights, or several with an index; so does a CLIP folder. Stable Diffusion
and ControlNet also come as a single file with the names of the original code: support/layouts.py maps them to ours,
infers the configuration from the tensors' shapes, and lists what a config.json may say.

Models are built on the meta device and filled from memory-mapped tensors: nothing is initialised only to be
overwritten, and nothing is in memory twice. Loading is strict: a missing, extra or misshapen tensor is an error that
names it. Only safetensors are read, because opening a pickle can run code; `python weights.py convert` copies a
pickle's tensors to safetensors without running it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip import CLIP, TextEncoder, Tokenizer, load_tokenizer
from model import BRANCHES, ControlNet, UNet, UNetEncoder
from sampler import Schedule
from support.convert import convert
from support.files import BadInput, one_line_errors, read_json, write_atomic, write_json
from support.images import note
from support.layouts import (
    IGNORED,
    IMAGE_TOWER,
    RENAMES,
    SINGLE_FILE,
    check_config,
    looks_like,
    read_scheduler_config,
    split_by_model,
    text_config,
    under_our_names,
    unet_config,
    vae_config,
)
from support.options import Parser
from support.tensors import find_weights, not_finite, read_weights
from vae import VAE

UNET_FILE = VAE_FILE = CONTROL_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = CLIP_FILE = "model.safetensors"

# ---------------------------------------------------------------- Stable Diffusion


@dataclass
class StableDiffusion:
    """The frozen base. vae.encode and vae.decode use unscaled latents; `encode` and `decode` here use the UNet's."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    schedule: Schedule

    def prompts(self, texts: list[str]) -> Tensor:
        """B texts -> their encodings (B, L, D)."""
        return self.text_encoder(self.tokenizer(texts).to(self.text_encoder.text_model.final_layer_norm.weight.device))

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> z (B, 4, h, w), the mean of the VAE's posterior."""
        return self.vae.encode(2 * images.to(self.vae.quant_conv.weight) - 1)[0] * self.vae.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w) -> images (B, 3, H, W) float32 in [0, 1]."""
        x = self.vae.decode(z.to(self.vae.quant_conv.weight) / self.vae.scaling_factor)
        x = x.masked_fill(x.isinf(), torch.nan)  # clamp keeps NaN; it would make infinite pixels white
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape (4, h, w) of the latent of one picture of height x width pixels."""
        return self.vae.config["latent_channels"], height // self.vae.factor, width // self.vae.factor

    def inpainting(self, rgb: Tensor, mask: Tensor) -> Tensor | None:
        """What an inpainting UNet reads beside z_t, (B, 5, h, w); None for an ordinary UNet.

        rgb (B, 3, H, W) in [0, 1], mask M (B, 1, H, W) -> 1 − M, the mask of what is to be painted, and the latent of
        the picture with that part grey. Both have hard edges, as in the training of these UNets. The latent is the mean
        of the VAE's posterior, so that a seed decides only the noise; the original code draws from the posterior.
        """
        if self.unet.config["in_channels"] == self.vae.config["latent_channels"]:
            return None
        M = (mask > 0.5).to(rgb)
        z = self.encode(rgb * M + 0.5 * (1 - M))
        return torch.cat([1 - F.interpolate(M, size=z.shape[2:]).to(z), z], dim=1)

    @property
    def size(self) -> int:
        """The side in pixels of the pictures that the base was trained on (the larger of two): 512 for SD 1.5."""
        sides = self.unet.config.get("sample_size") or 512 // self.vae.factor
        return (max(sides) if isinstance(sides, list) else sides) * self.vae.factor

    @property
    def multiple(self) -> int:
        """A picture's sides must be multiples of the VAE's factor times the UNet's: 64 for SD 1.5."""
        return self.vae.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)


def load_stable_diffusion(path: Path | str, device="cpu", dtype=torch.float32,
                          tokenizer: Path | str | None = None, vae: Path | str | None = None) -> StableDiffusion:
    """Loads a Stable Diffusion folder or single file. `tokenizer` names a folder if the tokenizer is elsewhere, `vae` a
    folder or single file in place of the VAE.

    Raises BadInput if a file is missing or broken, or does not fit the others.
    """
    path, vae = Path(path), vae and load_network(VAE, Path(vae), "VAE", vae_config, device, dtype)
    if path.is_dir():
        text_encoder = load_module(TextEncoder, path / "text_encoder", TEXT_FILE, device, dtype)
        unet = load_module(UNet, path / "unet", UNET_FILE, device, dtype)
        vae = vae or load_module(VAE, path / "vae", VAE_FILE, device, dtype)
        schedule = read_schedule(path / "scheduler" / "scheduler_config.json", unet)
        folder, pad = Path(tokenizer or path / "tokenizer"), None
    else:
        text_encoder, unet, vae, schedule = load_single_file(path, device, dtype, vae)
        folder, pad = Path(tokenizer or path.parent), "!" if unet.config["use_linear_projection"] else None
    sd = StableDiffusion(load_tokenizer(folder, pad), text_encoder, unet, vae, schedule)
    check_together(sd, path, folder)
    return sd


def check_together(sd: StableDiffusion, path: Path, tokenizer: Path) -> None:
    """Raises BadInput if one network can't read what another writes."""
    unet, text, n = sd.unet.config, sd.text_encoder.config, sd.vae.config["latent_channels"]
    if unet["in_channels"] not in (n, 2 * n + 1) or unet["out_channels"] != n:
        raise BadInput(f"{path}: its UNet reads {unet['in_channels']} channels and writes {unet['out_channels']}; "
                       f"choose one that reads {n} (text-to-image) or {2 * n + 1} (inpainting), and writes {n}")
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise BadInput(f"{path}: its text encoder writes prompts of width {text['hidden_size']}, its UNet reads "
                       f"{unet['cross_attention_dim']}; give parts of one model")
    length, vocabulary = sd.tokenizer.length, 1 + max(sd.tokenizer.bpe.get_vocab().values())
    if length > text["max_position_embeddings"] or vocabulary > text["vocab_size"]:
        raise BadInput(f"{tokenizer} is not the tokenizer of {path}: it makes {length} tokens from a vocabulary of "
                       f"{vocabulary:,}, the text encoder reads {text['max_position_embeddings']} from "
                       f"one of {text['vocab_size']:,}; give its own by --tokenizer")


def read_schedule(file: Path, unet: UNet) -> Schedule:
    """Reads a scheduler_config.json, which SD 1.x may lack. Raises BadInput if it is missing or of another kind."""
    if file.is_file():
        return Schedule(read_scheduler_config(file))
    if unet.config.get("use_linear_projection"):
        # Tensors don't distinguish an SD 2.x that predicts v (2.1, 768 px) from one that predicts ε (2.1-base, 512 px)
        raise BadInput(f"{file} is missing: an SD 2.x may predict ε or v; put the one from its public folder there")
    return Schedule()


def load_single_file(path: Path, device, dtype, vae: VAE | None = None) -> tuple[TextEncoder, UNet, VAE, Schedule]:
    """Loads SD 1.x or 2.x from one file in the original layout, whole or pruned; with `vae` in place of its own, if it
    has one. Raises BadInput for another file.
    """
    tensors = read_weights(path)
    if any(name.startswith("model_ema.") for name in tensors):
        note(f"{path} also holds moving averages of its weights, model_ema.*: they are not used, the weights are")
    predicts_v = tensors.pop("v_pred", None) is not None  # a marker that some tools add
    parts = split_by_model(tensors)
    missing = [part for part in ("unet", "text_encoder") if not parts[part]]
    if missing or parts[""]:
        what = f"it holds no {missing[0]}" if missing else f"{', '.join(list(parts[''])[:3])} are not part of one"
        raise BadInput(f"{path} is not {SINGLE_FILE}: {what}{looks_like(tensors, SINGLE_FILE)}")
    if not vae and not parts["vae"]:
        raise BadInput(f"{path} holds no VAE; give one by --vae, such as the public sd-vae-ft-mse")
    openclip = any(name.startswith("transformer.resblocks.") for name in parts["text_encoder"])  # SD 2.x
    text_encoder = build_from_shapes(TextEncoder, partial(text_config, activation="gelu" if openclip else "quick_gelu"),
                                     parts["text_encoder"], path, device, dtype)
    unet = build_from_shapes(UNet, unet_config, parts["unet"], path, device, dtype)
    vae = vae or build_from_shapes(VAE, vae_config, parts["vae"], path, device, dtype)
    schedule, beside = Schedule(), path.parent / "scheduler_config.json"
    if openclip and (beside.is_file() or not predicts_v):
        schedule = read_schedule(beside, unet)
    if predicts_v:
        schedule = Schedule(schedule.config | {"prediction_type": "v_prediction"})
    unet.config["sample_size"] = 96 if openclip and schedule.config["prediction_type"] == "v_prediction" else 64
    return text_encoder, unet, vae, schedule


# ---------------------------------------------------------------- ControlNet, CG and PG; CLIP


def load_control(path: Path | str, kind: str = "controlnet", device="cpu", dtype=torch.float32) -> ControlNet:
    """Loads a ControlNet folder or single file as a plain ControlNet, as CG (kind 'category') or as PG ('personality').

    Raises BadInput if it is missing, broken or no ControlNet.
    """
    return load_network(BRANCHES[kind], Path(path), "ControlNet", unet_config, device, dtype)


def save_control(control: ControlNet, folder: Path | str, dtype=None, categories: dict[str, str] | None = None) -> None:
    """Writes an ordinary ControlNet folder. `categories`: each category's identifier [D], by name."""
    save_module(control, Path(folder), CONTROL_FILE, dtype, {"categories.json": categories} if categories else None)


def control_config(unet_config: dict, factor: int) -> dict:
    """The config.json of a branch for a UNet. Its hint encoder halves as often as the base's VAE: 3 times for f = 8."""
    same = ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim", "cross_attention_dim",
            "norm_num_groups", "norm_eps", "use_linear_projection")
    return {"_class_name": "ControlNetModel", **{k: unet_config[k] for k in same if k in unet_config},
            "in_channels": unet_config["out_channels"],  # those of z alone, even beside an inpainting UNet
            "conditioning_embedding_out_channels": [16, 32, 96, 256][: factor.bit_length()],
            "flip_sin_to_cos": True, "freq_shift": 0}


def load_clip(path: Path | str, device="cpu", dtype=torch.float32) -> CLIP:
    """Loads both towers from a CLIP folder. Raises BadInput if it is missing or broken."""
    return load_module(CLIP, Path(path), CLIP_FILE, device, dtype)


# ---------------------------------------------------------------- one network: from tensors, from a folder, to a folder


class NoInit(TorchFunctionMode):
    """Turns torch.nn.init off: on the meta device, nn.Embedding's initialisation imports a compiler (1.5 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


def build_module(build: type[nn.Module], config: dict, tensors: dict[str, Tensor], source: Path, device, dtype,
                 config_source: Path | None = None) -> nn.Module:
    """Builds a network from its configuration and tensors, under our names. Raises BadInput if either does not fit."""
    config_source = config_source or source
    check_config(config, config_source)
    try:
        with torch.device("meta"), NoInit():
            module = build(config)
    except Exception as error:  # a field is missing, or of any type
        raise BadInput(f"{config_source} is not the configuration of such a model "
                       f"({type(error).__name__}: {error})") from None
    return assign_weights(module, tensors, source, device, dtype)


def build_from_shapes(build: type[nn.Module], configure: Callable[[dict], dict], tensors: dict[str, Tensor],
                      source: Path, device, dtype, renames: list = RENAMES) -> nn.Module:
    """Builds a network whose configuration is inferred from the shapes of its tensors. Raises BadInput."""
    named = under_our_names(tensors, renames)
    try:
        config = configure(named)
    except (KeyError, IndexError) as error:
        raise BadInput(f"{source} does not hold a whole {build.__name__} ({error})"
                       f"{looks_like(tensors, f'a {build.__name__}')}") from None
    return build_module(build, config, named, source, device, dtype)


def assign_weights(module: nn.Module, tensors: dict[str, Tensor], source: Path, device, dtype) -> nn.Module:
    """Fills a module on the meta device with tensors, by name. Raises BadInput, which names what does not fit."""
    wanted, named = module.state_dict(), {}
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape == (*wanted[name].shape, 1, 1):
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution in the file, a linear layer here
        ignored = IGNORED.fullmatch(name) or isinstance(module, TextEncoder) and IMAGE_TOWER.fullmatch(name)
        if name in wanted or not ignored:
            named[name] = tensor
    problems = [f"{n} is missing" for n in wanted if n not in named]
    problems += [f"{n} is not part of this model" for n in named if n not in wanted]
    problems += [f"{n} has shape {list(named[n].shape)}, expected {list(wanted[n].shape)}"
                 for n in wanted if n in named and named[n].shape != wanted[n].shape]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        kind = type(module).__name__
        raise BadInput(f"{source} does not fit a {kind}: {'; '.join(problems[:3])}{more}"
                       f"{looks_like(tensors, f'a {kind}')}")
    module.load_state_dict({n: t.to(device=device, dtype=dtype) for n, t in named.items()}, assign=True)
    if dtype in (torch.float16, torch.bfloat16):
        module.to(memory_format=torch.channels_last)  # where convolutions in half precision are fastest
    return module.eval().requires_grad_(False)


def load_network(build: type[nn.Module], path: Path, kind: str, configure: Callable[[dict], dict], device,
                 dtype) -> nn.Module:
    """Loads a network of a kind, "ControlNet" or "VAE", from a folder or a single file. Raises BadInput."""
    if path.is_dir():
        return load_module(build, path, CONTROL_FILE, device, dtype)
    tensors, config = read_weights(path), path.parent / "config.json"
    if path.name.startswith("diffusion_pytorch_model.") and config.is_file():  # a folder's file
        return build_module(build, read_json(config), under_our_names(tensors), path, device, dtype, config)
    parts = split_by_model(tensors)
    own = parts[kind.lower()] or parts[""]
    if not own:
        raise BadInput(f"{path} holds no {kind}{looks_like(tensors, f'a {kind}')}")
    return build_from_shapes(build, configure, own, path, device, dtype)


def load_module(build: type[nn.Module], folder: Path, name: str, device, dtype, renames: list = RENAMES) -> nn.Module:
    """Loads a network from a folder's config.json and weights, whose public name is `name`. Raises BadInput."""
    path, config = find_weights(folder, name), folder / "config.json"
    tensors = under_our_names(read_weights(path), renames)
    return build_module(build, read_json(config), tensors, path, device, dtype, config)


def public_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors in the shapes of public files: SD 1.x's projections are 1x1 convolutions (C, C, 1, 1)."""
    tensors = module.state_dict()
    if isinstance(module, UNetEncoder) and not module.config.get("use_linear_projection"):
        names = [name for name in tensors if name.endswith((".proj_in.weight", ".proj_out.weight"))]
        tensors |= {name: tensors[name][..., None, None] for name in names}
    return tensors


def save_module(module: nn.Module, folder: Path, name: str, dtype=None, extra: dict[str, object] | None = None) -> None:
    """Writes config.json and any extra JSON files into a folder, and the weights last, so that none are without them.

    Raises BadInput if a tensor is not finite.
    """
    tensors = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in public_tensors(module).items()}
    if broken := not_finite(tensors):
        raise BadInput(f"{folder}: {broken} is not finite, and is not saved; train with a lower --lr" +
                       (", or save it in float32" if dtype == torch.float16 else ""))
    for file, content in {"config.json": module.config, **(extra or {})}.items():
        write_json(content, folder / file)
    write_atomic(folder / name, lambda new: save_file(tensors, new, metadata={"format": "pt"}))


# ---------------------------------------------------------------- python weights.py convert FILE OUT


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="weights.py", description="Converts a public pickle to safetensors, without running it")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("file", metavar="FILE", type=Path, help="a file by torch.save: .ckpt, .pth, .pt or .bin")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .safetensors to write; an existing one is replaced")
    args = parser.parse_args(argv)
    names, left_out = convert(args.file, args.out)
    print(f"{args.out}: {len(names):,} tensors, {args.out.stat().st_size / 1e6:,.1f} MB{looks_like(names)}")
    if left_out:
        more = f" and {len(left_out) - 10:,} more" if len(left_out) > 10 else ""
        print(f"left out: {', '.join(left_out[:10])}{more}")
    print(f"next: give {args.out} where these weights are asked for, as by generate.py --weights or --controlnet")


if __name__ == "__main__":
    with one_line_errors():
        main()
