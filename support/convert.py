"""Support: `python weights.py convert`, from torch.save's files to safetensors; not needed to understand the paper.

torch.save writes a zip that holds a pickle and one member for each storage; before version 1.6 it wrote five pickles in
a row and the storages after them. In both formats a tensor's numbers lie outside the pickles. They are copied as bytes,
one tensor at a time.
"""


import io
import json
import math
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support.files import BadInput, write_atomic
from support.tensors import PICKLES

# A tensor takes some 40 instructions and 200 bytes of the pickle; each instruction at most 170 bytes of memory here.
LARGEST_PICKLE, MOST_INSTRUCTIONS = 32 << 20, 1_000_000
LONGEST_NAME = 300

# Types of storages: their names in safetensors, if they have one, and the bytes per number
STORAGES = {f"torch.{kind}Storage": (dtype, width) for kind, dtype, width in (
    ("Double", "F64", 8), ("Float", "F32", 4), ("Half", "F16", 2), ("BFloat16", "BF16", 2), ("Long", "I64", 8),
    ("Int", "I32", 4), ("Short", "I16", 2), ("Char", "I8", 1), ("Byte", "U8", 1), ("Bool", "BOOL", 1),
    ("ComplexDouble", None, 16), ("ComplexFloat", None, 8),
    ("QInt8", None, 1), ("QUInt8", None, 1), ("QInt32", None, 4))}


class Storage(NamedTuple):
    """A row of numbers outside the pickle."""

    key: str
    dtype: str | None  # as safetensors calls it
    width: int  # bytes per number
    numel: int


class View(NamedTuple):
    """A tensor as the pickle describes it, unchecked: offset and strides count numbers of its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Placeholder:
    """Stands for a class or a function, and for the result of calling it."""

    name: str
    content: list = field(default_factory=list)


# ---------------------------------------------------------------- in place of imports and calls


def find_storage(identifier: object, storages: dict[str, Storage]) -> Storage | Placeholder:
    """("storage", type, key, device, numel) -> the storage, which is also put into `storages`."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
        return Placeholder("an object outside the pickle", [identifier])
    _, kind, key, _, numel, *view = identifier
    if kind.name not in STORAGES:
        return Placeholder(kind.name, [identifier])
    if not isinstance(key, str) or not isinstance(numel, int) or view not in ([], [None]):
        raise ValueError("it names a storage as torch.save does not")
    storage = Storage(key, *STORAGES[kind.name], numel)
    if storages.setdefault(key, storage) != storage:
        raise ValueError("it gives one storage two types or sizes")
    return storage


def tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> View | Placeholder:
    """In place of the functions by which torch rebuilds a tensor."""
    if not isinstance(storage, Storage) or storage.dtype is None or metadata:  # metadata: values to be negated
        return Placeholder("a complex, quantized or other tensor that safetensors do not hold", [storage])
    return View(storage, offset, size, stride)


# All that can be "called". An OrderedDict must start empty: one made from a list of pairs would cost as much memory as
# the list, again each time that a few bytes of the file repeat the call.
CALLS = {"collections.OrderedDict": lambda *pairs: Placeholder("collections.OrderedDict", [pairs]) if pairs else {},
         "torch._utils._rebuild_tensor": tensor,
         "torch._utils._rebuild_tensor_v2": tensor,
         "torch._utils._rebuild_parameter": lambda data, *_: data,
         "torch._utils._rebuild_parameter_with_state": lambda data, *_: data}


def call(taken: list) -> object:
    """In place of function(*arguments, **keywords), from [function, arguments, keywords]."""
    function, arguments, *_ = taken
    name = function.name if isinstance(function, Placeholder) else type(function).__name__
    if name in CALLS and isinstance(arguments, tuple) and len(arguments) <= 7:
        return CALLS[name](*arguments)
    return Placeholder(name, taken[1:])


def name_class(taken: list) -> Placeholder:
    """In place of an import, from [module, name]."""
    if sum(map(len, taken)) > LONGEST_NAME:  # a few bytes of the file can have it joined again and again
        raise ValueError("its pickle holds a name that is too long")
    return Placeholder(".".join(taken))


# ---------------------------------------------------------------- the machine


def append(container: list | Placeholder, values: list) -> None:
    """Adds values to a list, or to a placeholder's content."""
    (container.content if isinstance(container, Placeholder) else container).extend(values)


def set_items(container: dict | Placeholder, values: list) -> None:
    """Adds [key, value, key, value, ...]. Only short strings stay keys: hashing nested tuples can take 2^depth."""
    if isinstance(container, Placeholder):
        append(container, values)
    else:
        for key, value in zip(values[::2], values[1::2], strict=True):
            container[key if isinstance(key, str) and len(key) <= LONGEST_NAME else object()] = value


def set_state(container: object, values: list) -> None:
    """In place of __setstate__ or of setting attributes; a dict or a tensor does not need its state."""
    if isinstance(container, Placeholder):
        append(container, values)


# The instructions, by their names in pickletools. Those that push what stands beside them in the file;
LITERALS = {"NONE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
            "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
MARKED = None
# those that take so many values (or all above the last mark) from the stack and push what the function makes of them;
MAKES = {"EMPTY_TUPLE": (0, tuple), "TUPLE1": (1, tuple), "TUPLE2": (2, tuple), "TUPLE3": (3, tuple),
         "TUPLE": (MARKED, tuple), "EMPTY_DICT": (0, dict), "EMPTY_LIST": (0, list),
         "EMPTY_SET": (0, list), "FROZENSET": (MARKED, list),  # a list, because a set would hash what it holds
         "NEWTRUE": (0, lambda _: True), "NEWFALSE": (0, lambda _: False), "STACK_GLOBAL": (2, name_class),
         "REDUCE": (2, call), "NEWOBJ": (2, call), "NEWOBJ_EX": (3, call)}
# and those that change the value below.
CHANGES = {"APPEND": (1, append), "APPENDS": (MARKED, append), "ADDITEMS": (MARKED, append), "SETITEM": (2, set_items),
           "SETITEMS": (MARKED, set_items), "BUILD": (1, set_state)}


def unpickle(stream: io.BytesIO, storages: dict[str, Storage]) -> object:
    """Carries out one pickle's instructions up to STOP; puts the storages it names into `storages`.

    A broken or hostile pickle raises ArithmeticError, AttributeError, LookupError, TypeError or ValueError.
    """
    stack, marks, memo = [], [], {}

    def take(n: int | None) -> list:
        start = marks.pop() if n is MARKED else len(stack) - n
        if start < 0:
            raise ValueError("its pickle takes more from the stack than there is")
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, arg, _ in islice(pickletools.genops(stream), MOST_INSTRUCTIONS):
        name = opcode.name
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in LITERALS:
            stack.append(arg)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in MAKES:
            n, make = MAKES[name]
            stack.append(make(take(n)))
        elif name in CHANGES:
            n, change = CHANGES[name]
            values = take(n)
            change(stack[-1], values)
        elif name == "GLOBAL":
            stack.append(Placeholder(arg.replace(" ", ".")))
        elif name == "BINPERSID":
            stack.append(find_storage(*take(1), storages))
        elif name == "POP":
            take(1)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle holds {name}, which torch.save does not write")
    raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")


# ---------------------------------------------------------------- what came out


def printable(text: str, length: int = 80) -> str:
    """Text from a file, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:length])


def survey(value: object, seen: set[int]) -> str:
    """What a value holds that was not `seen` before, such as "(1,234 tensors, pytorch_lightning.callbacks.Timer)"."""
    tensors, classes, left = 0, {}, [value]
    while left:  # a recursion would fail where a hostile file nests too deep
        value = left.pop()
        tensors += isinstance(value, View)
        if type(value) in (dict, list, tuple, Placeholder) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else getattr(value, "content", value)
            classes |= {value.name: None} if isinstance(value, Placeholder) else {}
    parts = [f"{tensors:,} tensor{'s' * (tensors > 1)}"] if tensors else []
    parts += [printable(name) for name in [*classes][:3]] + ["..."] * (len(classes) > 3)
    return f"({', '.join(parts)})" if parts else ""


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles before version 1.6
LARGEST_GROWTH = 4  # size written / size read: tied weights, stored once in a checkpoint, are written under every name

# How files begin that people mistake for checkpoints
OTHERS = {rb"(\xef\xbb\xbf)?\s*<": "a web page",
          rb"version https://git-lfs": "a Git LFS pointer, not the file itself",
          rb'.{8}\{\s*"': "a safetensors file already",
          rb"\x1f\x8b": "compressed by gzip: unpack it",
          rb".{257}ustar": "a tar file: unpack it, or if torch 0.1 wrote it, save it anew",
          rb"(?!PK|\x80)": "not what torch.save writes"}

# The errors that a broken file causes
MALFORMED = (ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, TypeError,
             ValueError, struct.error, zipfile.BadZipFile)


class BoundedFile(io.FileIO):
    """A file that is read in small pieces, whatever lengths are written in it. Larger reads raise ValueError."""

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_PICKLE:
            raise ValueError(f"its pickle or its directory is larger than {LARGEST_PICKLE >> 20} MB")
        return super().read(LARGEST_PICKLE if size < 0 else size)


def read_zip(file: BoundedFile) -> tuple[object, dict[str, tuple[int, int]]]:
    """Returns the pickled object, and the place of each storage in the file: its first byte and its length."""

    def place(name: str) -> tuple[int, int]:
        member = archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError("its members are compressed or encrypted, which torch.save never does")
        file.seek(member.header_offset)
        lengths = struct.unpack("<26x2H", file.read(30))  # of name and padding before the content
        return member.header_offset + 30 + sum(lengths), member.file_size

    def read(name: str) -> bytes:
        start, length = place(name)
        file.seek(start)
        return file.read(length)

    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    folder = next((name[: -len("data.pkl")] for name in names if re.fullmatch("[^/]*/data[.]pkl", name)), None)
    if folder is None:
        packed = next((name for name in names if name.endswith(PICKLES)), "what is in it")
        raise ValueError(f"it is a zip of other files: unpack it and convert {packed}")
    if f"{folder}byteorder" in names and read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages = {}
    root = unpickle(io.BytesIO(read(f"{folder}data.pkl")), storages)
    return root, {key: place(f"{folder}data/{key}") for key in storages}


def read_legacy(file: BoundedFile) -> tuple[object, dict[str, tuple[int, int]]]:
    """The same for a file from before version 1.6: magic number, protocol, system, object, keys, then the storages."""
    file.seek(0)
    stream, storages, places = io.BytesIO(file.read()), {}, {}
    magic = unpickle(stream, {})
    if magic != MAGIC or unpickle(stream, {}) != PROTOCOL:
        raise ValueError(f"it is a pickle that torch.save did not write {survey(magic, set())}".strip())
    if unpickle(stream, {})["little_endian"] is not True:
        raise ValueError("its numbers are big-endian")
    root, keys = unpickle(stream, storages), unpickle(stream, {})
    end = stream.tell()
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise ValueError("it holds a storage of an unknown type")
        file.seek(end)
        (numel,) = struct.unpack("<q", file.read(8))
        places[key] = end + 8, numel * storages[key].width
        end += 8 + numel * storages[key].width
    return root, places


def bytes_in(view: View, places: dict[str, tuple[int, int]], end: int) -> int:
    """A tensor's length in bytes. Raises ValueError unless it fits in its storage, and the storage in the file."""
    (key, _, width, numel), offset, size, stride = view
    fits = len(size) == len(stride) <= 32
    fits = fits and all(type(n) is int and 0 <= n < 2**48 for n in (numel, offset, *size, *stride))
    start, length = places[key]
    if fits and 0 not in size:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        fits = last < numel and numel * width <= length and start + length <= end
    if not fits or math.prod(n or 1 for n in size) >= 2**48:
        raise ValueError("it holds a tensor that reaches beyond its storage")
    return math.prod(size) * width


def read_tensor(source: Path, view: View, start: int) -> np.ndarray:
    """A tensor as unsigned integers of the same width: the meaning of the bytes does not matter here."""
    (_, _, width, numel), offset, size, stride = view
    if 0 in size:
        return np.empty(0, np.uint8)
    numbers = np.memmap(source, f"u{width}", "r", start, shape=(numel,))
    steps = [step * width if n > 1 else 0 for n, step in zip(size, stride)]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers[offset:], size, steps))


# ---------------------------------------------------------------- what is written


def attributes(root: Placeholder) -> dict[str, View]:
    """The tensors of a TorchScript module and its submodules, by their attributes' paths."""
    found, seen, left = {}, set(), [("", root)]
    while left:
        path, value = left.pop()
        if isinstance(value, View):
            found[path] = value
        elif isinstance(value, (Placeholder, dict)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Placeholder):
                left += [(path, state) for state in value.content]
            elif len(path) <= LONGEST_NAME:
                left += [(f"{path}.{name}".lstrip("."), value[name]) for name in value if isinstance(name, str)]
    return found


def choose(root: object) -> tuple[dict[str, View], list[str]]:
    """Returns the tensors to write, by name, and a description of what else the pickle holds.

    They come from the dict under "state_dict", where Lightning keeps the model's tensors apart from the optimizer's;
    without one, from the dict with the most tensors: the top one, or one directly in it ("model", "params", ...).
    """

    def tensors_in(values: dict) -> int:
        return sum(isinstance(value, View) for value in values.values())

    kind = {View: "a tensor", Placeholder: "an object"}.get(type(root), f"a {type(root).__name__}")
    chosen, rest = {}, [(kind, root)]
    if isinstance(root, Placeholder) and root.name.startswith("__torch__."):
        chosen, rest = attributes(root), [("a TorchScript's code and lists", None)]
    elif isinstance(root, dict):
        dicts = {id(value): value for value in (root, *root.values()) if isinstance(value, dict)}
        chosen = dicts.get(id(root.get("state_dict"))) or max(dicts.values(), key=tensors_in)
        rest = [item for item in root.items() if chosen is not root and item[1] is not chosen]
    tensors = {name: value for name, value in chosen.items() if isinstance(value, View)
               and isinstance(name, str) and name.isprintable() and name != "__metadata__"}
    rest += [item for item in chosen.items() if item[0] not in tensors]
    seen = set()
    return tensors, [f"{printable(name) if isinstance(name, str) else '?'} {survey(value, seen)}".strip()
                     for name, value in rest]


def write_safetensors(path: Path, source: Path, tensors: dict[str, View], sizes: dict[str, int], places: dict) -> None:
    """Writes the header's length, the header in JSON, then the tensors, each read from `source` when its turn comes."""
    names = sorted(tensors, key=lambda name: -tensors[name].storage.width)  # keeps addresses multiples of it
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        header[name] = {"dtype": tensors[name].storage.dtype, "shape": tensors[name].size,
                        "data_offsets": [at, at := at + sizes[name]]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in tqdm(names, "converting", disable=None):
            file.write(read_tensor(source, tensors[name], places[tensors[name].storage.key][0]))


def convert(source: Path, out: Path) -> tuple[list[str], list[str]]:
    """Writes a checkpoint's tensors to a safetensors file. Returns their names, and what was left out.

    Raises BadInput if the file is not a complete checkpoint, or if the name `out` does not end in .safetensors.
    """
    if out.suffix != ".safetensors" or out.exists() and source.exists() and out.samefile(source):
        raise BadInput(f"{out}: give the output another name, one that ends in .safetensors")
    if not source.is_file():
        raise BadInput(f"{source} is {'not a file' if source.exists() else 'missing'}; give a .ckpt, .pth, .pt or .bin")
    end = source.stat().st_size
    with BoundedFile(source) as file:
        try:
            start = file.read(512)
            if other := next((kind for pattern, kind in OTHERS.items() if re.match(pattern, start, re.DOTALL)), None):
                raise ValueError(f"it is {other}")
            root, places = (read_zip if start[:2] == b"PK" else read_legacy)(file)
            tensors, left_out = choose(root)
            sizes = {name: bytes_in(view, places, end) for name, view in tensors.items()}
            if sum(sizes.values()) > LARGEST_GROWTH * end:
                raise ValueError("its tensors repeat themselves: they would be much larger than the file")
        except MALFORMED as error:
            reason = printable(str(error) if isinstance(error, ValueError) else repr(error), 200)
            raise BadInput(f"{source} can't be converted: {reason}; download it again, or get its .safetensors version"
                           ) from None
    if not tensors:
        raise BadInput(f"{source} holds no dict of tensors, but {', '.join(left_out[:5]) or 'an empty one'}; save the "
                       "model's state_dict() where you trust it, or get its .safetensors version")

    write_atomic(out, lambda scratch: write_safetensors(scratch, source, tensors, sizes, places))
    return [*tensors], left_out
