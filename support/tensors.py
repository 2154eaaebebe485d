"""Support: finds, reads and fingerprints files of weights, whole or in shards; not needed to understand the paper."""

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.files import BadInput, read_json, sweep, write_atomic
from support.machine import barrier, processes

PICKLES = (".ckpt", ".pth", ".pt", ".bin", ".pkl")

# Prefixes from the checkpoint's dictionary, from data-parallel training and from compilation.
WRAPPERS = re.compile(r"^(state_dict\.|module\.|_orig_mod\.)+")

# Marker tensors, which say that the numbers beside them mean something else.
REFUSED_MARKERS = {
    "ztsnr": "it was trained with a noise schedule of zero terminal SNR",
    "difference": "it holds the differences from a base, not weights",
}


def find_weights(folder: Path, name: str) -> Path:
    """The safetensors file in a folder by its public name, or the index of its shards; half-precision variants last.

    Raises BadInput if the folder holds none.
    """
    for variant in ("", ".fp16", ".bf16"):
        file = name.replace(".safetensors", f"{variant}.safetensors")
        for found in (folder / file, folder / f"{name}.index{variant}.json", folder / f"{file}.index.json"):
            if found.is_file():
                return found
    for other in sorted(folder.glob("*")):
        if other.suffix in PICKLES:
            raise pickle_refused(other, folder / name)
    raise BadInput(f"{folder} holds no {name} and no {name}.index.json: is it a whole folder of weights?")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors from a safetensors file, or from all shards that an index names. Raises BadInput."""
    tensors = read_shards(path) if path.suffix == ".json" else read_tensors(path)
    for marker in REFUSED_MARKERS.keys() & tensors:
        raise BadInput(f"{path} holds the marker {marker}: {REFUSED_MARKERS[marker]}, which is not supported; choose "
                       "another model")
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise BadInput(f"{path} holds tensors twice, with 'state_dict.' or the like before their names and without; "
                       "remove one of each")
    return bare


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names. Raises BadInput if a shard or a tensor in it is missing."""
    try:
        places = {name: index.parent / Path(file).name for name, file in read_json(index)["weight_map"].items()}
        shards = {path: read_tensors(path) for path in {*places.values()}}
        return {name: shards[path][name] for name, path in places.items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{index} is not an index of the files beside it ({error!r}); download both again") from None


def read_tensors(path: Path, remedy: str = "download it again") -> dict[str, Tensor]:
    """Memory-mapped tensors from a safetensors file. Raises BadInput for a pickle, or a broken or missing file."""
    if path.suffix in PICKLES:
        raise pickle_refused(path, path.with_suffix(".safetensors"))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; check the path, or download the weights again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); {remedy}") from None
    # Some public files have a header of odd length, so numbers at odd addresses: these are copied
    return {n: t.clone() if t.data_ptr() % t.element_size() else t for n, t in tensors.items()}


def pickle_refused(path: Path, out: Path) -> BadInput:
    """The error for a pickle, with the command that writes its weights to `out`."""
    return BadInput(f"{path} is a pickle, which can run code when it is opened, and is not read; convert it safely: "
                    f"python weights.py convert {shlex.quote(str(path))} {shlex.quote(str(out))}")


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, if one does."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


# ---------------------------------------------------------------- computed once


def compute_parts(folder: Path, keys: list, compute: Callable[[int], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Reads a dict of tensors for each key, memory-mapped, from a file in `folder`; if a file is missing, compute(k)
    makes what belongs to keys[k]. Processes share the work.

    A key holds everything that its tensors depend on, and its fingerprint is the file's name: so nothing outdated is
    ever read. An interrupted computation leaves no file. Raises BadInput if a file is broken.
    """
    paths = [folder / f"{fingerprint(key)}.safetensors" for key in keys]
    rank, world = processes()
    sweep(folder)
    for k in range(rank, len(keys), world):
        if not paths[k].exists():
            write_atomic(paths[k], lambda new, k=k: save_file({n: t.contiguous() for n, t in compute(k).items()}, new))
    barrier()
    return [read_tensors(path, "remove it, and it is computed again") for path in paths]


# ---------------------------------------------------------------- fingerprints


def fingerprint(key: object) -> str:
    """A fingerprint of any value that JSON can hold: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """A fingerprint of a module's weights: 32 hexadecimal digits."""
    return fingerprint([hashlib.blake2b(p.cpu().flatten().view(torch.uint8).numpy()).hexdigest()
                        for p in module.state_dict().values()])


def file_fingerprint(path: Path | None) -> list:
    """A fingerprint that changes whenever the file does: its path, size and time; [] without a file."""
    return [str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] if path and path.exists() else []


def model_fingerprint(path: Path) -> list[list]:
    """A fingerprint that changes when a model's files do: their names, sizes and times. Runs in its folder don't count.

    Raises BadInput if the path is missing.
    """
    if not path.exists():
        raise BadInput(f"{path} is missing; give a folder or file of weights")
    parts = ("", "image_encoder", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
    files = [file for part in parts for file in sorted((path / part).glob("*"))
             if file.suffix in (".safetensors", ".json", ".txt")]
    return [[file.name, *file_fingerprint(file)[1:]] for file in files or [path]]
