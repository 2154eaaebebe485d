"""Support: `python weights.py convert`, from torch.save's files to safetensors; not needed to understand the paper.

A pickle can name any function and have it called. Here each name stands for one of the few functions by which torch
rebuilds tensors, or else for an inert class: nothing is imported, and nothing else is called. torch.load does the rest.
"""

import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from support.files import BadInput, one_line, write_atomic

LARGEST_GROWTH = 4  # size written / size read: tied weights, stored once in a checkpoint, are written under every name

KNOWN = {"collections.OrderedDict": OrderedDict, **{
    f"torch._utils.{name}": getattr(torch._utils, name) for name in (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")}}


class Inert(dict):
    """Stands for any other class or function, and for what it would have made. It may be filled, as dict or list."""

    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs):
        super().__init__()

    def append(self, item):
        """Forgets what a list would hold."""


class Unpickler(pickle._Unpickler):
    """Python's own, without imports. Nor does it set attributes (BUILD), which could change the functions above."""

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: lambda self: self.stack.pop()}

    def find_class(self, module: str, name: str):
        return KNOWN.get(f"{module}.{name}") or type(name, (Inert,), {})

    def get_extension(self, code: int):
        raise pickle.UnpicklingError("it names an extension of pickle")


INERT_PICKLE = SimpleNamespace(  # what torch.load uses of the module pickle
    __name__="inert", Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load())


def read_checkpoint(source: Path) -> object:
    """What torch.save wrote; a zip's tensors are memory-mapped. Broken and hostile files raise errors of many kinds."""
    with source.open("rb") as file:
        start = file.read(4)
    zipped = start == b"PK\3\4"
    if not zipped and start[:1] != pickle.PROTO or tarfile.is_tarfile(source):  # torch.load would unpack a tar file
        raise ValueError("torch.save does not write such files")
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(source)).get_all_records():
        raise ValueError("it is a TorchScript, a program, which torch.load would run")
    if zipped and any(member.compress_type for member in zipfile.ZipFile(source).infolist()):
        raise ValueError("it is a compressed zip")  # mapped to memory, its bytes would be taken for numbers
    with warnings.catch_warnings(action="ignore"):
        return torch.load(source, "cpu", INERT_PICKLE, weights_only=False, mmap=zipped)


def convert(source: Path, out: Path) -> tuple[list[str], list[str]]:
    """Writes a checkpoint's tensors to a safetensors file. Returns their names, and what was left out.

    They come from the dict under "state_dict", where Lightning keeps the model's tensors apart from the optimizer's;
    without one, from the dict with the most tensors: the top one, or one directly in it ("model", "params", ...).
    Raises BadInput if the file is not a complete checkpoint, or if the name `out` does not end in .safetensors.
    """
    if out.suffix != ".safetensors":
        raise BadInput(f"{out}: give the output a name that ends in .safetensors")
    try:
        root = read_checkpoint(source)
        top = root if isinstance(root, dict) else {}
        dicts = {name: value for name, value in top.items() if isinstance(value, dict)} | {"": top}
        chosen = dicts.get("state_dict") or max(dicts.values(), key=lambda x: sum(map(torch.is_tensor, x.values())))
        tensors = {name: x.detach() for name, x in chosen.items()
                   if isinstance(name, str) and torch.is_tensor(x) and not x.is_complex()}
        if not tensors:
            raise ValueError(f"it holds no dict of tensors, but a {type(root).__name__}")
        if sum(x.nbytes for x in tensors.values()) > LARGEST_GROWTH * source.stat().st_size:
            raise ValueError("its tensors repeat themselves: they would be much larger than the file")
        tensors = {name: x.contiguous() for name, x in tensors.items()}
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise BadInput(f"{source} can't be converted ({reason}); check the path, download it again, or get its "
                       ".safetensors version") from None
    places = [x.untyped_storage().data_ptr() for x in tensors.values()]
    tensors = {name: x if places.count(place) == 1 else x.clone()  # safetensors refuses tied weights
               for (name, x), place in zip(tensors.items(), places)}
    write_atomic(out, lambda new: save_file(tensors, new, {"format": "pt"}))
    return [*tensors], [one_line(f"{name} ({type(x).__name__})")[:80] for name, x in {**top, **chosen}.items()
                        if x is not chosen and name not in tensors]
