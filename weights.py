"""Public weights in and out: finds a folder's files, checks every tensor's name and shape, loads and saves safetensors.

A Stable Diffusion folder holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/; a ControlNet folder (CG and PG
are ones) config.json and one file of weights; a CLIP folder likewise. Stable Diffusion and ControlNet also come as a
single file, in the names of the original code: RENAMES tells ours, the tensors' shapes the configuration.
Models are built on the meta device and filled from memory-mapped tensors: nothing is initialised only to be
overwritten, and nothing lies in memory twice. Loading is strict: a missing, extra or misshapen tensor is an error that
names it. Only safetensors are read: a pickle runs code when it is opened.
"""

import json
import os
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
from model import BRANCHES, ControlNet, UNet
from sampler import Schedule
from support.convert import convert
from support.files import (
    PICKLES,
    UMASK,
    BadInput,
    Parser,
    one_line_errors,
    read_json,
    read_tensors,
    write_atomic,
)
from support.layouts import IGNORED, SINGLE_FILE, looks_like, renamed, split, text_config, unet_config, vae_config
from vae import VAE

os.umask(UMASK)  # there is no way to read it but to set it


# ---------------------------------------------------------------- files


def find_weights(folder: Path, *names: str) -> Path:
    """The safetensors file in a folder, by its public name, in full precision or as its .fp16 variant."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is {'a file' if folder.is_file() else 'missing'}; expected a folder with {names[0]}")
    for name in names:
        for candidate in (folder / name, folder / name.replace(".safetensors", ".fp16.safetensors")):
            if candidate.is_file():
                return candidate
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    hint = f"; {pickles[0]} is a pickle and is not read, get the safetensors version" if pickles else ""
    raise BadInput(f"{folder} holds no {names[0]}{hint or ': is it a folder of weights?'}")


# ---------------------------------------------------------------- names


def kind_of(build: type[nn.Module]) -> str:
    """How KINDS calls the files of a network."""
    return {UNet: "a UNet", VAE: "a VAE", TextEncoder: "a text encoder", CLIP: "a CLIP model"}.get(build, "a ControlNet")


# ---------------------------------------------------------------- models


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path, device, dtype) -> nn.Module:
    """Puts tensors into a module built on the meta device, by name. Raises BadInput naming what does not fit."""
    wanted, named, problems = module.state_dict(), {}, []
    for name, tensor in renamed(tensors):
        if IGNORED.fullmatch(name):
            continue
        if name in named:
            problems.append(f"{name} is there twice, by an older and a newer name")
        if name in wanted and tensor.shape == (*wanted[name].shape, 1, 1):
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution for a linear layer: the VAE's attention in single files
        named[name] = tensor
    problems += [f"{n} is missing" for n in wanted if n not in named]
    problems += [f"{n} is not part of this model" for n in named if n not in wanted]
    problems += [f"{n} has shape {list(named[n].shape)}, expected {list(wanted[n].shape)}"
                 for n in wanted if n in named and named[n].shape != wanted[n].shape]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadInput(f"{source} does not fit a {type(module).__name__}: {'; '.join(problems[:3])}{more}"
                       f"{looks_like(tensors, kind_of(type(module)))}")
    module.load_state_dict({n: t.to(device=device, dtype=dtype) for n, t in named.items()}, assign=True)
    if dtype in (torch.float16, torch.bfloat16):
        module.to(memory_format=torch.channels_last)  # where convolutions in half precision are fastest
    return module.eval().requires_grad_(False)


class NoInit(TorchFunctionMode):
    """Within this context torch.nn.init does nothing: on meta, nn.Embedding's imports a compiler (1.5 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


def make(build: Callable[[dict], nn.Module], config: dict, tensors: dict[str, Tensor], source: Path, device, dtype,
         config_source: Path | None = None) -> nn.Module:
    """A module of a configuration, filled with tensors. Raises BadInput where either does not fit."""
    try:
        with torch.device("meta"), NoInit():
            module = build(config)
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise BadInput(f"{config_source or source} is not the configuration of such a model "
                       f"({type(error).__name__}: {error})") from None
    return fill(module, tensors, source, device, dtype)


def version(path: Path) -> list[list]:
    """What changes when a model does: name, size and time of each of its files, and not of what is trained in the same
    folder. Raises BadInput where the path is missing.
    """
    if not path.exists():
        raise BadInput(f"{path} is missing; give a folder or file of weights")
    files = [path]
    if path.is_dir():
        folders = [path, *(path / part for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"))]
        files = [file for folder in folders for file in sorted(folder.glob("*"))
                 if file.suffix in (".safetensors", ".json", ".txt")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def load_module(build: Callable[[dict], nn.Module], folder: Path, names: tuple[str, ...], device, dtype) -> nn.Module:
    """A module from a folder's config.json and weights."""
    path, config = find_weights(folder, *names), folder / "config.json"
    return make(build, read_json(config), read_tensors(path), path, device, dtype, config)


def save_module(module: nn.Module, folder: Path, name: str, dtype=None, extra: dict[str, object] | None = None) -> None:
    """Writes config.json, the weights and any extra JSON files, as one folder that appears whole or not at all."""

    def write(scratch: Path) -> None:
        scratch.mkdir()
        for file, content in {"config.json": module.config, **(extra or {})}.items():
            (scratch / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tensors = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in module.state_dict().items()}
        save_file(tensors, scratch / name, metadata={"format": "pt"})

    write_atomic(folder, write)


# ---------------------------------------------------------------- tokenizer


# ---------------------------------------------------------------- single files


def make_from_shapes(build, configure: Callable, tensors: dict[str, Tensor], source: Path, device, dtype) -> nn.Module:
    """A module configured by the shapes of its tensors."""
    named = dict(renamed(tensors))
    try:
        config = configure(named)
    except (KeyError, IndexError) as error:
        raise BadInput(f"{source} does not hold a whole {build.__name__} ({error})"
                       f"{looks_like(tensors, kind_of(build))}") from None
    return make(build, config, named, source, device, dtype)


# ---------------------------------------------------------------- whole models

UNET_FILES = VAE_FILES = CONTROL_FILES = ("diffusion_pytorch_model.safetensors",)
TEXT_FILES = ("model.safetensors",)


@dataclass
class StableDiffusion:
    """The frozen base. vae.encode and decode work on unscaled latents; `encode` and `decode` here on the UNet's."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    schedule: Schedule

    def prompts(self, texts: list[str]) -> Tensor:
        """-> encodings (B, L, D)."""
        return self.text_encoder(self.tokenizer(texts).to(self.text_encoder.text_model.final_layer_norm.weight.device))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> z (B, 4, h, w): the mean, or with noise ~ N(0, 1) a draw."""
        mean, logvar = self.vae.encode(2 * images.to(self.vae.quant_conv.weight) - 1)
        return (mean if noise is None else mean + (logvar / 2).exp() * noise.to(mean)) * self.vae.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w) -> images (B, 3, H, W) float32 in [0, 1]."""
        x = self.vae.decode(z.to(self.vae.quant_conv.weight) / self.vae.scaling_factor)
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of one picture's z."""
        return self.vae.config["latent_channels"], height // self.vae.factor, width // self.vae.factor

    def inpainting(self, rgb: Tensor, mask: Tensor) -> Tensor | None:
        """What an inpainting UNet reads beside z_t, (B, 5, h, w); None for an ordinary one.

        rgb (B, 3, H, W) in [0, 1], mask M (B, 1, H, W) -> the mask of what is to be painted, 1 − M, and the latent of
        the picture with that part grey. Both without soft edges, as these UNets were trained.
        """
        if self.unet.config["in_channels"] == self.vae.config["latent_channels"]:
            return None
        M = (mask > 0.5).to(rgb)
        z = self.encode(rgb * M + 0.5 * (1 - M))
        return torch.cat([1 - F.interpolate(M, size=z.shape[2:]).to(z), z], dim=1)

    @property
    def multiple(self) -> int:
        """What a picture's sides must be multiples of: the VAE's factor times the UNet's (64 for SD 1.5)."""
        return self.vae.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)


def load_stable_diffusion(path: Path | str, device="cpu", dtype=torch.float32,
                          tokenizer: Path | str | None = None) -> StableDiffusion:
    """A Stable Diffusion folder, or a single file of one; its tokenizer from another folder if given.

    Raises BadInput where a file is missing, broken or does not fit.
    """
    path = Path(path)
    if path.is_dir():
        text_encoder = load_module(TextEncoder, path / "text_encoder", TEXT_FILES, device, dtype)
        unet = load_module(UNet, path / "unet", UNET_FILES, device, dtype)
        vae = load_module(VAE, path / "vae", VAE_FILES, device, dtype)
        scheduler = path / "scheduler" / "scheduler_config.json"
        schedule = read_schedule(scheduler) if scheduler.is_file() else Schedule()
        folder, pad = Path(tokenizer or path / "tokenizer"), None
    else:
        text_encoder, unet, vae, schedule = load_single_file(path, device, dtype)
        folder, pad = Path(tokenizer or path.parent), "!" if unet.config["use_linear_projection"] else None
    n = vae.config["latent_channels"]
    if unet.config["in_channels"] not in (n, 2 * n + 1):
        raise BadInput(f"{path}: its UNet reads {unet.config['in_channels']} channels, neither {n} as text-to-image nor "
                       f"{2 * n + 1} as inpainting; choose one of these")
    tokens, config = load_tokenizer(folder, pad), text_encoder.config
    if tokens.length > config["max_position_embeddings"] or tokens.bpe.get_vocab_size() > config["vocab_size"]:
        raise BadInput(f"{folder} is not the tokenizer of {path}: it makes {tokens.length} tokens of a "
                       f"vocabulary of {tokens.bpe.get_vocab_size():,}, the text encoder reads "
                       f"{config['max_position_embeddings']} of {config['vocab_size']:,}; give its own by --tokenizer")
    return StableDiffusion(tokens, text_encoder, unet, vae, schedule)


def read_schedule(file: Path) -> Schedule:
    """Of a scheduler_config.json. Raises BadInput for a schedule other than Stable Diffusion's kind."""
    config = {field: value for field, value in read_json(file).items() if value is not None}  # null: the default
    for field, known in (("beta_schedule", ["scaled_linear"]), ("prediction_type", ["epsilon", "v_prediction"]),
                         ("rescale_betas_zero_snr", [False]), ("trained_betas", [])):
        if field in config and config[field] not in known:
            raise BadInput(f"{file}: {field} {config[field]!r} is not supported ({known or 'none'} is): this model was "
                           "trained in another way than Stable Diffusion")
    try:
        return Schedule(config)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{file} is not a scheduler's configuration ({error}); download it again") from None


def load_single_file(path: Path, device, dtype) -> tuple[TextEncoder, UNet, VAE, Schedule]:
    """Stable Diffusion in one file of the original layout, SD 1.x or 2.x, whole or pruned."""
    tensors = read_tensors(path)
    parts = split(tensors)
    missing = [part for part in ("unet", "vae", "text_encoder") if not parts[part]]
    if missing or parts[""]:
        what = f"it holds no {missing[0]}" if missing else f"{', '.join(list(parts[''])[:3])} are not part of one"
        raise BadInput(f"{path} is not {SINGLE_FILE}: {what}{looks_like(tensors, SINGLE_FILE)}")
    openclip = any(name.startswith("transformer.resblocks.") for name in parts["text_encoder"])
    text_encoder, unet, vae = (
        make_from_shapes(build, configure, parts[part], path, device, dtype) for build, configure, part in (
            (TextEncoder, partial(text_config, activation="gelu" if openclip else "quick_gelu"), "text_encoder"),
            (UNet, unet_config, "unet"), (VAE, vae_config, "vae")))
    schedule = Schedule()
    if openclip:
        # Tensors don't tell an SD 2.x that predicts v (2.1, at 768 px) from one that predicts ε (2.1-base, at 512 px)
        config = path.parent / "scheduler_config.json"
        if not config.is_file():
            raise BadInput(f"{path} is an SD 2.x, which may predict ε or v; put its public folder's "
                           f"scheduler_config.json beside it: {config}")
        schedule = read_schedule(config)
    unet.config["sample_size"] = 64 if schedule.config["prediction_type"] == "epsilon" else 96
    return text_encoder, unet, vae, schedule


def load_control(path: Path | str, kind: str = "controlnet", device="cpu", dtype=torch.float32) -> ControlNet:
    """A ControlNet folder or single file as a plain ControlNet, as CG (kind 'category') or as PG ('personality')."""
    path = Path(path)
    if path.is_dir():
        return load_module(BRANCHES[kind], path, CONTROL_FILES, device, dtype)
    tensors, config = read_tensors(path), path.parent / "config.json"
    if path.name.startswith("diffusion_pytorch_model.") and config.is_file():  # a folder's file
        return make(BRANCHES[kind], read_json(config), tensors, path, device, dtype, config)
    parts = split(tensors)
    own = parts["control"] or parts[""]
    if not own:
        raise BadInput(f"{path} holds no ControlNet{looks_like(tensors, 'a ControlNet')}")
    return make_from_shapes(BRANCHES[kind], unet_config, own, path, device, dtype)


def save_control(control: ControlNet, folder: Path | str, dtype=None, categories: dict[str, str] | None = None) -> None:
    """An ordinary ControlNet folder; with the identifier [D] of each category, by name."""
    save_module(control, Path(folder), CONTROL_FILES[0], dtype, {"categories.json": categories} if categories else None)


def load_clip(path: Path | str, device="cpu", dtype=torch.float32) -> CLIP:
    """A CLIP folder: both towers."""
    return load_module(CLIP, Path(path), TEXT_FILES, device, dtype)


def control_config(unet_config: dict, factor: int) -> dict:
    """The config.json of a branch for a UNet. Its hint encoder halves as often as the base's VAE: thrice for f = 8."""
    same = ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim", "cross_attention_dim",
            "norm_num_groups", "norm_eps", "use_linear_projection")
    return {"_class_name": "ControlNetModel", **{k: unet_config[k] for k in same if k in unet_config},
            "in_channels": unet_config["out_channels"],  # z's alone, also beside an inpainting UNet
            "conditioning_embedding_out_channels": [16, 32, 96, 256][: factor.bit_length()],
            "flip_sin_to_cos": True, "freq_shift": 0}


# ---------------------------------------------------------------- python weights.py convert FILE OUT

NEXT = {SINGLE_FILE: '--weights {} --tokenizer DIR --prompt "a photo of a mug"',
        "a ControlNet": "--weights SD --controlnet {} --product mug.png --category mug"}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="weights.py", description="A public pickle to safetensors, without running what is in it")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("file", metavar="FILE", type=Path, help="what torch.save wrote: a .ckpt, .pth, .pt or .bin")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .safetensors to write; replaced if it is there")
    args = parser.parse_args(argv)
    names, left_out = convert(args.file, args.out)
    kind = looks_like(names, "")
    print(f"{args.out}: {len(names):,} tensors, {args.out.stat().st_size / 1e6:,.1f} MB{kind}")
    if left_out:
        more = f" and {len(left_out) - 10:,} more" if len(left_out) > 10 else ""
        print(f"left out: {', '.join(left_out[:10])}{more}")
    use = next((f"python generate.py {options}" for what, options in NEXT.items() if kind.endswith(what)),
               "give {} where these weights are asked for")
    print("next:", use.format(args.out))


if __name__ == "__main__":
    with one_line_errors():
        main()
