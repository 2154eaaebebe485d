"""Support: finds, reads and fingerprints files of weights, whole or in shards; not needed to understand the paper."""


import hashlib
import json
import re
import shlex
from collections.abc import Callable
from functools import partial
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
    if not folder.is_dir():
        raise BadInput(f"{folder} is {'a file' if folder.is_file() else 'missing'}; expected a folder with {name}")
    for variant in ("", ".fp16", ".bf16"):
        file = name.replace(".safetensors", f"{variant}.safetensors")
        for found in (folder / file, folder / f"{name}.index{variant}.json", folder / f"{file}.index.json"):
            if found.is_file():
                return found
    for other in sorted(folder.iterdir()):
        if other.suffix in PICKLES:
            raise pickle_refused(other, folder / name)
        if other.suffix == ".safetensors":
            raise BadInput(f"{folder} holds {other.name}, but no {name} and no {name}.index.json; download it again")
    raise BadInput(f"{folder} holds no {name}: is it a folder of weights?")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors from a safetensors file, or from all shards that an index names. Raises BadInput."""
    tensors = read_shards(path) if path.suffix == ".json" else read_tensors(path)
    if marker := next((marker for marker in REFUSED_MARKERS if marker in tensors), None):
        raise BadInput(f"{path} holds the marker {marker}: {REFUSED_MARKERS[marker]}, which is not supported; choose "
                       "another model")
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise BadInput(f"{path} holds tensors twice, with 'state_dict.' or the like before their names and without; "
                       "remove one of each")
    return bare


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names. Raises BadInput if a shard or a tensor in it is missing."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise BadInput(f"{index} is not an index of weights; download it again")
    shards = {file: read_tensors(index.parent / file) for file in sorted(set(places.values()))}
    if missing := next((name for name, file in places.items() if name not in shards[file]), None):
        raise BadInput(f"{index.parent / places[missing]} lacks {missing}, which {index.name} names; download it again")
    return {name: shards[file][name] for name, file in places.items()}


def model_fingerprint(path: Path) -> list[list]:
    """A fingerprint that changes when a model's files do: their names, sizes and times. Runs in its folder don't count.

    Raises BadInput if the path is missing.
    """
    if not path.exists():
        raise BadInput(f"{path} is missing; give a folder or file of weights")
    files = [path]
    if path.is_dir():
        parts = ("image_encoder", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
        folders = [path, *(path / part for part in parts)]
        files = [file for folder in folders for file in sorted(folder.glob("*"))
                 if file.suffix in (".safetensors", ".json", ".txt")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def compute_once(folder: Path, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Reads tensors, memory-mapped, from a file in `folder`, and computes them first if the file is missing.

    `key` holds everything that the tensors depend on, and its fingerprint is the file's name: so nothing outdated is
    ever read. An interrupted computation leaves no file. Raises BadInput if the file is broken.
    """
    path = folder / f"{fingerprint(key)}.safetensors"
    sweep(folder)
    if not path.exists():
        write_atomic(path, lambda new: save_file({n: t.contiguous() for n, t in compute().items()}, new))
    try:
        return read_tensors(path)
    except BadInput:
        raise BadInput(f"{path} is broken; remove it, and it is computed again") from None


def compute_parts(folder: Path, keys: list, compute: Callable[[int], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """`compute_once` for several parts: compute(k) makes the part with keys[k]. Processes share the work."""
    rank, world = processes()
    for k in range(rank, len(keys), world):
        compute_once(folder, keys[k], partial(compute, k))
    barrier()
    return [compute_once(folder, key, partial(compute, k)) for k, key in enumerate(keys)]


def fingerprint(key: object) -> str:
    """A fingerprint of any value that JSON can hold: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """A fingerprint of a module's weights: 32 hexadecimal digits."""
    h = hashlib.blake2b(digest_size=16)
    for p in module.state_dict().values():
        h.update(p.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return h.hexdigest()


def file_fingerprint(path: Path | None) -> list:
    """A fingerprint that changes whenever the file does: its path, size and time; [] without a file."""
    return [str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] if path else []





def pickle_refused(path: Path, out: Path) -> BadInput:
    """The error for a pickle, with the command that writes its weights to `out`."""
    return BadInput(f"{path} is a pickle, which can run code when it is opened, and is not read; convert it safely: "
                    f"python weights.py convert {shlex.quote(str(path))} {shlex.quote(str(out))}")



def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, if one does."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)



def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors from a safetensors file. Raises BadInput for a pickle, or a broken or missing file."""
    if path.suffix in PICKLES:
        raise pickle_refused(path, path.with_suffix(".safetensors"))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # Some public files have a header of odd length, so numbers at odd addresses: these are copied
        return {n: t.clone() if t.data_ptr() % t.element_size() else t for n, t in tensors.items()}
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; check the path, or download the weights again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); download it again") from None

