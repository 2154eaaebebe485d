"""Support: fingerprints, and tensors that are computed once and kept in files; not needed to understand the paper."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.files import BadInput, read_tensors, sweep, write_atomic
from support.machine import barrier, processes


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
