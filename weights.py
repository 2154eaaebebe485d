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
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
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


def check_folder(out: Path, option: str = "--out") -> None:
    """Raises BadInput where an option's output folder can't be made or written to."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "read-only" if nearest.is_dir() else "a file"
        raise BadInput(f"{option} {out}: {nearest} is {what}; choose another folder")


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Calls write(temporary) and renames: `path` is either the old file or the whole new one, never a part.

    `write` may make a file or a folder; a folder replaces the old one, and is missing between two renames. Raises
    BadInput where the old one holds more than the new one: that would be lost.
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
        try:
            if new.is_dir() and path.is_dir():
                if others := sorted({file.name for file in path.iterdir()} - {file.name for file in new.iterdir()}):
                    raise BadInput(f"{path} would be replaced, and holds {others[0]} too; choose another output path")
                os.replace(path, old)
            os.replace(new, path)
        except BaseException:  # an interrupt too
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
    except (IsADirectoryError, NotADirectoryError):
        raise BadInput(f"{path} is a {'folder' if path.is_dir() else 'file'} where the other is to be written; "
                       "choose another output path") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pick_device(name: str) -> str:
    """A device that is here; 'auto' is a GPU where there is one; 'cuda' is, under torchrun, this process's own.

    Raises BadInput for one that isn't here.
    """
    given = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=name).item()  # "meta" has no values
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {given}: no such device here; choose auto, cpu"
                       f"{', cuda' * torch.cuda.is_available()}") from None
    return name


def processes() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------- files


def read_log(file: Path) -> list[dict]:
    """The lines of a JSON-lines file that a program appends to; none where there is no file. One that a killed process
    has left unfinished is cut off.
    """
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomic(file, lambda new: new.write_bytes(whole))
    return [json.loads(line) for line in whole.splitlines()]


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput where it is missing or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; is {path.parent} a complete folder of weights?") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} can't be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} does not hold a JSON object; download it again")
    return content


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # Some public files have a header of odd length, and numbers at odd addresses: these are copied
        return {n: t.clone() if t.data_ptr() % t.element_size() else t for n, t in tensors.items()}
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

# Where a single file keeps each model. A ControlNet's file may also hold it without any prefix.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",  # CLIP, as transformers names it: SD 1.x
    "cond_stage_model.model.": "text_encoder",  # OpenCLIP: SD 2.x
    "control_model.": "control",
}

# What a single file may hold beside them, and folders of weights.
IGNORED = re.compile("|".join((
    r".*\.position_ids",  # counts 0, 1, 2, …
    r"model_ema\..*",  # moving averages of the weights, in files that are not pruned
    r"(sqrt_|sqrt_recip_|sqrt_recipm1_|(sqrt|log)_one_minus_)?alphas_cumprod(_prev)?|betas|logvar|lvlb_weights",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor",  # the noise schedule: see sampler.py
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..*",  # SD 2.x reads OpenCLIP before its last layer
    r"cond_stage_model\.model\.(logit_scale|text_projection|attn_mask)",
)))

# From the names of public files, without prefix, to ours; numbers in a pattern are the function's arguments.
# Our own names come through unchanged.
RENAMES = [(re.compile(pattern), name) for pattern, name in (
    # The UNet's and ControlNet's levels: three input_blocks each, two layers and what halves the resolution
    (r"^time_embed\.([02])\.", lambda i: f"time_embedding.linear_{i // 2 + 1}."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda i: f"down_blocks.{(i - 1) // 3}.downsamplers.0.conv."),
    (r"^input_blocks\.(\d+)\.0\.", lambda i: f"down_blocks.{(i - 1) // 3}.resnets.{(i - 1) % 3}."),
    (r"^input_blocks\.(\d+)\.1\.", lambda i: f"down_blocks.{(i - 1) // 3}.attentions.{(i - 1) % 3}."),
    (r"^middle_block\.([02])\.", lambda i: f"mid_block.resnets.{i // 2}."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    # three output_blocks a level, the last of them followed by what doubles the resolution
    (r"^output_blocks\.(\d+)\.[12]\.conv\.", lambda i: f"up_blocks.{i // 3}.upsamplers.0.conv."),
    (r"^output_blocks\.(\d+)\.0\.", lambda i: f"up_blocks.{i // 3}.resnets.{i % 3}."),
    (r"^output_blocks\.(\d+)\.1\.", lambda i: f"up_blocks.{i // 3}.attentions.{i % 3}."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    # within a residual block
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.(skip_connection|nin_shortcut)\.", ".conv_shortcut."),
    # ControlNet: zero convolutions, and the hint encoder, whose odd layers are activations
    (r"^zero_convs\.(\d+)\.0\.", lambda i: f"controlnet_down_blocks.{i}."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out."),
    (r"^input_hint_block\.(\d+)\.", lambda i: f"controlnet_cond_embedding.blocks.{i // 2 - 1}."),
    # VAE: the original counts the decoder's levels from the fine end
    (r"^encoder\.down\.(\d)\.block\.", lambda i: f"encoder.down_blocks.{i}.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", lambda i: f"encoder.down_blocks.{i}.downsamplers.0."),
    (r"^decoder\.up\.(\d)\.block\.", lambda i: f"decoder.up_blocks.{3 - i}.resnets."),
    (r"^decoder\.up\.(\d)\.upsample\.", lambda i: f"decoder.up_blocks.{3 - i}.upsamplers.0."),
    (r"\.mid\.block_([12])\.", lambda i: f".mid_block.resnets.{i - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^((?:en|de)coder)\.norm_out\.", r"\1.conv_norm_out."),
    # within its attention; then the public folders' names before 2023
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
    (r"^((?:en|de)coder\.mid_block\.attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
    # CLIP's text encoder: recent folders leave out its first word
    (r"^(?=(?:embeddings|encoder\.layers|final_layer_norm)\.)", "text_model."),
    # OpenCLIP's
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", lambda i: f".layer_norm{i}."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)]


def rename(name: str) -> str:
    """Our name of a tensor, from that in a public file (without the prefix of a single file)."""
    for pattern, new in RENAMES:
        name = pattern.sub(new if isinstance(new, str) else lambda match: new(*map(int, match.groups())), name)
    return name


def renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under our names. OpenCLIP's queries, keys and values come in one matrix and leave as three."""
    for name, tensor in tensors.items():
        name = rename(name)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                yield name.replace(".in_proj_", f".{letter}_proj."), part
        else:
            yield name, tensor


def split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A single file's tensors by model ("" where no prefix tells), without their prefix and what is ignored."""
    parts = {part: {} for part in ("", *PREFIXES.values())}
    for name, tensor in tensors.items():
        if not IGNORED.fullmatch(name):
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
            parts[PREFIXES.get(prefix, "")][name[len(prefix) :]] = tensor
    return parts


# What a file is, by the first pattern that one of its names matches.
SINGLE_FILE = "a whole Stable Diffusion"
KINDS = [(re.compile(pattern), kind) for pattern, kind in (
    (r"conditioner\.|add_embedding\.|label_emb\.", "SDXL"),
    (r"(joint|double)_blocks\.|add_[qkv]_proj", "SD 3 or Flux"),
    (r"lora_|\.lora[._]|_lora\.", "a LoRA"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion"),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter"),
    (r"control_model\.|input_hint_block\.|controlnet_|zero_convs\.", "a ControlNet"),
    (r"^model\.diffusion_model\.", SINGLE_FILE),
    (r"vision_model\.|visual\.", "a CLIP model"),
    (r"text_model\.|resblocks\.", "a text encoder"),
    (r"^(down_blocks|input_blocks)\.", "a UNet"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.", "a VAE"),
)]


def looks_like(names: Iterable[str], expected: str) -> str:
    """The end of a message: what kind of file has these tensors, if another than expected."""
    kind = next((kind for pattern, kind in KINDS if any(map(pattern.search, names))), expected)
    return "" if kind == expected else f"; it looks like {kind}"


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


def load_tokenizer(folder: Path | str, pad: str | None = None) -> Tokenizer:
    """From vocab.json and merges.txt, or tokenizer.json; length and padding from the folder's settings if there.

    pad: the padding token where the folder does not say; by default the end token.
    """
    folder = Path(folder)
    settings = {"pad_token": pad or "<|endoftext|>"}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # SD 2.x: they differ, and the second is right
        if (folder / name).is_file():
            settings |= {field: value for field, value in read_json(folder / name).items() if value is not None}
    vocabulary, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    pair = vocabulary.is_file() and merges.is_file()
    if not pair and not whole.is_file():
        raise BadInput(f"{folder} holds no tokenizer; put CLIP's vocab.json and merges.txt there, or name the folder that "
                       "holds them by --tokenizer")
    try:
        if pair:
            bpe = clip_bpe(models.BPE.from_file(str(vocabulary), str(merges), unk_token="<|endoftext|>",
                                                end_of_word_suffix="</w>"))
        else:
            bpe = BPETokenizer.from_file(str(whole))
            bpe.no_padding()  # which transformers may have stored there; Tokenizer does both itself
            bpe.no_truncation()
    except Exception as error:  # the library raises bare Exceptions
        raise BadInput(f"{folder}: the tokenizer can't be read ({error}); download its files again") from None
    pad = settings["pad_token"]
    pad = pad["content"] if isinstance(pad, dict) else pad
    bpe.add_special_tokens([pad])  # so that a '!' that pads is never a part of a word, as in transformers
    length = settings.get("model_max_length", 77)
    tokenizer = Tokenizer(bpe, 77 if length > 10**6 else length, pad)  # transformers writes 10^30 for "not known"
    if None in (tokenizer.start, tokenizer.end, tokenizer.pad):
        raise BadInput(f"{folder} is not CLIP's tokenizer: its vocabulary lacks a start, end or padding token")
    return tokenizer


# ---------------------------------------------------------------- single files

# What shapes don't tell is the same in all public Stable Diffusions.
UNET_CONSTANTS = {"norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}


def count(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are under a prefix, such as "down_blocks."."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def unet_config(tensors: dict[str, Tensor]) -> dict:
    """The config.json of a UNet or a ControlNet, from its tensors' shapes. Raises KeyError where it is neither."""
    levels = range(count(tensors, "down_blocks."))
    channels = [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels]
    first = f"down_blocks.{attention.index(True) if True in attention else 0}.attentions.0"
    linear = tensors[f"{first}.proj_in.weight"].ndim == 2
    config = {"in_channels": tensors["conv_in.weight"].shape[1], "block_out_channels": channels,
              "layers_per_block": count(tensors, "down_blocks.0.resnets."), **UNET_CONSTANTS,
              "cross_attention_dim": tensors[f"{first}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
              # SD 1.x has 8 heads, SD 2.x heads of 64 channels
              "attention_head_dim": [c // 64 for c in channels] if linear else 8, "use_linear_projection": linear,
              "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]}
    if "controlnet_mid_block.weight" in tensors:
        hint = "controlnet_cond_embedding."
        strided = [tensors[f"{hint}blocks.{i}.weight"].shape[0] for i in range(1, count(tensors, f"{hint}blocks."), 2)]
        return config | {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels":
                         [tensors[f"{hint}conv_in.weight"].shape[0], *strided]}
    return config | {"_class_name": "UNet2DConditionModel", "out_channels": tensors["conv_out.weight"].shape[0],
                     "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]}


def vae_config(tensors: dict[str, Tensor]) -> dict:
    """The config.json of a VAE, from its tensors' shapes. Raises KeyError where it is none."""
    levels = range(count(tensors, "encoder.down_blocks."))
    return {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "norm_num_groups": 32, "act_fn": "silu",
            "latent_channels": tensors["post_quant_conv.weight"].shape[0], "scaling_factor": 0.18215,
            "block_out_channels": [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels],
            "layers_per_block": count(tensors, "encoder.down_blocks.0.resnets."),
            "down_block_types": ["DownEncoderBlock2D" for _ in levels],
            "up_block_types": ["UpDecoderBlock2D" for _ in levels]}


def text_config(tensors: dict[str, Tensor], activation: str) -> dict:
    """The config.json of a text encoder, from its tensors' shapes. Raises KeyError where it is none."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": vocabulary,
            "hidden_size": width, "num_attention_heads": width // 64, "hidden_act": activation, "layer_norm_eps": 1e-5,
            "num_hidden_layers": count(tensors, "text_model.encoder.layers."),
            "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0]}


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
