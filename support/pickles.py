"""Support: reads pickles without running what is in them; not needed to understand the paper.

A pickle is a program for a small stack machine. Most of its instructions push a number or fill a list. But GLOBAL
imports whatever name it gives, and REDUCE calls it: a file that names os.system there runs a command on the computer
that loads it. A checkpoint needs containers, strings, numbers and five functions, and that is all
`unpickle` knows. Every other name becomes a Placeholder, which holds what it is given and does nothing.

pickle.Unpickler with another find_class would not do: its REDUCE still calls, BUILD sets attributes, EXT1 takes classes
from a cache, and one LONG_BINPUT makes its memo as long as the file says. Here, only what stands in a table can happen,
and no instruction costs more than what it takes from the file or from the stack.
"""

import io
import pickletools
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

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
