"""Support: finds, reads and fingerprints files of weights, whole or in shards; not needed to understand the paper."""

import re
from pathlib import Path

from torch import Tensor

from support.files import PICKLES, BadInput, pickle_refused, read_json, read_tensors

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
