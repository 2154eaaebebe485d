"""Public weights in and out: finds a folder's files, checks every tensor's name and shape, loads and saves safetensors.

A Stable Diffusion folder holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/; a ControlNet folder (CG and PG
are ones) config.json and one file of weights; a CLIP folder likewise. Models are built on the meta device and filled
from memory-mapped tensors: nothing is initialised only to be overwritten, and nothing lies in memory twice.
Loading is strict: a missing, extra or misshapen tensor is an error that names it. Only safetensors are read: a pickle
runs code when it is opened.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import BRANCHES, CLIP, VAE, ControlNet, TextEncoder, UNet
from sampler import Schedule

UMASK = os.umask(0)
os.umask(UMASK)  # there is no way to read it but to set it
PICKLES = (".ckpt", ".pth", ".pt", ".bin", ".pkl")


class BadInput(ValueError):
    """An error of use. Its message is one line that names the file or option and the remedy; programs exit with 2."""


def check_folder(out: Path) -> None:
    """Raises BadInput where the output folder `--out` can't be made or written to."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "read-only" if nearest.is_dir() else "a file"
        raise BadInput(f"--out {out}: {nearest} is {what}; choose another folder")


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Calls write(temporary) and renames: `path` is either the old file or the whole new one, never a part.

    `write` may make a file or a folder; a folder replaces the old one.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise BadInput(f"{path}: can't be written ({error.strerror or error}); choose another output path") from None
    try:
        new, old = scratch / path.name, scratch / "old"
        write(new)
        for file in (new, *new.rglob("*")):
            if file.is_file():
                file.chmod(0o666 & ~UMASK)  # safetensors writes files that only their owner may read
        if new.is_dir() and path.is_dir():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder where a file is to be written; choose another output path") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pick_device(name: str) -> str:
    """A device that is here; 'auto' is cuda where there is one. Raises BadInput for one that isn't."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {name}: no such device here; choose auto, cpu"
                       f"{', cuda' * torch.cuda.is_available()}") from None
    return name


# ---------------------------------------------------------------- files


def read_json(path: Path) -> dict | list:
    """The contents of a JSON file. Raises BadInput where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; is {path.parent} a complete folder of weights?") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} can't be read as JSON ({error}); download it again") from None


def write_json(content: object, path: Path) -> None:
    """Writes a JSON file, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors of a safetensors file. Raises BadInput for a pickle, or a broken or missing file."""
    if path.suffix in PICKLES:
        raise BadInput(f"{path} is a pickle, which can run code when opened, and is not read; "
                       "get the .safetensors version of these weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; check the path, or download the weights again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); download it again") from None


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

# Older and newer spellings of the public folders: (pattern, what it is here). First the tensors that carry no weights.
IGNORED = re.compile(r".*\.position_ids$")  # counts 0, 1, 2, …
RENAMES = [
    (re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.0)\.query\."), r"\1.to_q."),  # VAEs before 2023
    (re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.0)\.key\."), r"\1.to_k."),
    (re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.0)\.value\."), r"\1.to_v."),
    (re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.0)\.proj_attn\."), r"\1.to_out.0."),
    (re.compile(r"^(embeddings|encoder\.layers|final_layer_norm)\.(?=token|position|\d|weight|bias)"),
     r"text_model.\1."),  # text encoders saved by recent transformers
]


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path, device, dtype) -> nn.Module:
    """Puts tensors into a module built on the meta device, by name. Raises BadInput naming what does not fit."""
    wanted, named, problems = module.state_dict(), {}, []
    for name, tensor in tensors.items():
        if IGNORED.match(name):
            continue
        if name not in wanted:
            for pattern, replacement in RENAMES:
                name = pattern.sub(replacement, name)
        if name in named:
            problems.append(f"{name} is there twice, by an older and a newer name")
        named[name] = tensor
    problems += [f"{n} is missing" for n in wanted if n not in named]
    problems += [f"{n} is not part of this model" for n in named if n not in wanted]
    problems += [f"{n} has shape {list(named[n].shape)}, expected {list(wanted[n].shape)}"
                 for n in wanted if n in named and named[n].shape != wanted[n].shape]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadInput(f"{source} does not fit a {type(module).__name__}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict({n: t.to(device=device, dtype=dtype) for n, t in named.items()}, assign=True)
    return module.eval().requires_grad_(False)


class NoInit(TorchFunctionMode):
    """Within this context torch.nn.init does nothing: on meta, nn.Embedding's imports a compiler (1.5 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


def load_module(build: Callable[[dict], nn.Module], folder: Path, names: tuple[str, ...], device, dtype) -> nn.Module:
    """A module from a folder's config.json and weights."""
    path = find_weights(folder, *names)
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"), NoInit():
            module = build(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder / 'config.json'} is not the configuration of such a model "
                       f"({type(error).__name__}: {error})") from None
    return fill(module, read_tensors(path), path, device, dtype)


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


class Tokenizer:
    """CLIP's byte-pair encoding: lower case, words and digits apart, start and end tokens, padded to `length`."""

    def __init__(self, bpe: BPETokenizer, length: int = 77, pad: str = "<|endoftext|>"):
        self.bpe, self.length = bpe, length
        self.start, self.end, self.pad = (bpe.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>", pad))

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, length) int64; what is too long loses its end, never the end token."""
        ids = torch.full((len(texts), self.length), self.pad)
        for row, encoding in zip(ids, self.bpe.encode_batch(texts, add_special_tokens=False)):
            tokens = [self.start, *encoding.ids[: self.length - 2], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def clip_bpe(model: models.BPE) -> BPETokenizer:
    """CLIP's normalisation and splitting around a byte-pair model."""
    bpe = BPETokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="removed", invert=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return bpe


def train_tokenizer(texts: list[str], size: int, length: int, folder: Path) -> None:
    """Grows a byte-pair vocabulary on texts and writes it as CLIP's files are: vocab.json, merges.txt, config."""
    bpe = clip_bpe(models.BPE(end_of_word_suffix="</w>"))
    # single bytes, within words and at their ends: any text can be spelt
    single = [c + end for end in ("", "</w>") for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size - len(single) - 2, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]))
    grown = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in grown["merges"]]
    # CLIP's order: single bytes, the same as ends of words, merges, and the two special tokens with the largest ids
    tokens = [*single, *dict.fromkeys("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]

    def write(scratch: Path) -> None:
        scratch.mkdir()
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (scratch / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (scratch / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True,
                    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>"}
        (scratch / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    write_atomic(folder, write)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """From vocab.json and merges.txt, or tokenizer.json; length and padding from tokenizer_config.json if there."""
    folder = Path(folder)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            bpe = clip_bpe(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                                unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
        elif (folder / "tokenizer.json").is_file():
            bpe = BPETokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            raise BadInput(f"{folder} holds no tokenizer; put CLIP's vocab.json and merges.txt there")
    except BadInput:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise BadInput(f"{folder}: the tokenizer can't be read ({error}); download its files again") from None
    pad = settings.get("pad_token", "<|endoftext|>")
    tokenizer = Tokenizer(bpe, settings.get("model_max_length", 77), pad["content"] if isinstance(pad, dict) else pad)
    if None in (tokenizer.start, tokenizer.end, tokenizer.pad):
        raise BadInput(f"{folder} is not CLIP's tokenizer: its vocabulary lacks a start, end or padding token")
    return tokenizer


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

    @property
    def multiple(self) -> int:
        """What a picture's sides must be multiples of: the VAE's factor times the UNet's (64 for SD 1.5)."""
        return self.vae.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)


def load_stable_diffusion(path: Path | str, device="cpu", dtype=torch.float32,
                          tokenizer: Path | str | None = None) -> StableDiffusion:
    """A Stable Diffusion folder; its tokenizer from another one if given.

    Raises BadInput where a file is missing, broken or does not fit.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        read_tensors(path)  # says why not
    if not path.is_dir():
        raise BadInput(f"{path} is {'not a folder of weights' if path.exists() else 'missing'}; "
                       "--weights takes a Stable Diffusion folder with unet/, vae/, text_encoder/ and tokenizer/")
    scheduler = path / "scheduler" / "scheduler_config.json"
    text_encoder = load_module(TextEncoder, path / "text_encoder", TEXT_FILES, device, dtype)
    folder = Path(tokenizer or path / "tokenizer")
    tokenizer, config = load_tokenizer(folder), text_encoder.config
    if tokenizer.length > config["max_position_embeddings"] or tokenizer.bpe.get_vocab_size() > config["vocab_size"]:
        raise BadInput(f"{folder} is not the tokenizer of {path / 'text_encoder'}: it makes {tokenizer.length} tokens of a "
                       f"vocabulary of {tokenizer.bpe.get_vocab_size():,}, the encoder reads "
                       f"{config['max_position_embeddings']} of {config['vocab_size']:,}; give its own by --tokenizer")
    return StableDiffusion(
        tokenizer,
        text_encoder,
        load_module(UNet, path / "unet", UNET_FILES, device, dtype),
        load_module(VAE, path / "vae", VAE_FILES, device, dtype),
        Schedule(read_json(scheduler) if scheduler.is_file() else None))


def load_control(path: Path | str, kind: str = "controlnet", device="cpu", dtype=torch.float32) -> ControlNet:
    """A ControlNet folder as a plain ControlNet, as CG (kind 'category') or as PG ('personality')."""
    return load_module(BRANCHES[kind], Path(path), CONTROL_FILES, device, dtype)


def save_control(control: ControlNet, folder: Path | str, dtype=None, categories: list[str] | None = None) -> None:
    """An ordinary ControlNet folder; with the category names, whose positions are the identifiers' ids."""
    save_module(control, Path(folder), CONTROL_FILES[0], dtype, {"categories.json": categories} if categories else None)


def load_clip(path: Path | str, device="cpu", dtype=torch.float32) -> CLIP:
    """A CLIP folder: both towers."""
    return load_module(CLIP, Path(path), TEXT_FILES, device, dtype)


def control_config(unet_config: dict, factor: int) -> dict:
    """The config.json of a branch for a UNet. Its hint encoder halves as often as the base's VAE: thrice for f = 8."""
    same = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim",
            "cross_attention_dim", "norm_num_groups", "norm_eps", "use_linear_projection")
    return {"_class_name": "ControlNetModel", **{k: unet_config[k] for k in same if k in unet_config},
            "conditioning_embedding_out_channels": [16, 32, 96, 256][: factor.bit_length()],
            "flip_sin_to_cos": True, "freq_shift": 0}
