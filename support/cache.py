"""Support: fingerprints, and tensors computed once and kept by them; not needed to understand the paper."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.files import read_tensors, write_atomic


def cached(folder: Path, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors computed once and kept in a file named by a hash of all they depend on; memory-mapped.

    Nothing stale is read: what has changed has another name. An interrupted computation leaves nothing.
    """
    path = folder / f"{hashed(key)}.safetensors"
    if not path.exists():
        write_atomic(path, lambda new: save_file({n: t.contiguous() for n, t in compute().items()}, new))
    return read_tensors(path)


def hashed(key: object) -> str:
    """A hash of what JSON can hold."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def digest(module: nn.Module) -> str:
    """A hash of a module's weights."""
    h = hashlib.blake2b(digest_size=16)
    for p in module.state_dict().values():
        h.update(p.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return h.hexdigest()


def stamp(path: Path | None) -> list:
    """What changes when a file does."""
    return [str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] if path else []
