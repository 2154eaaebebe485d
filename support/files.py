"""Support: errors of use, atomic writing, JSON, devices and processes, kinds of options; not needed to understand the paper."""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

UMASK = os.umask(0)
os.umask(UMASK)  # there is no way to read it but to set it

PICKLES = (".ckpt", ".pth", ".pt", ".bin", ".pkl")


class BadInput(ValueError):
    """An error of use. Its message is one line that names the file or option and the remedy; programs exit with 2."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a program's main: BadInput, a full GPU and a file system that refuses become one line on stderr and exit
    status 2, no traceback.
    """
    try:
        yield
    except BadInput as error:
        # A DataLoader's worker puts its traceback and the error's name before the message
        print("error:", str(error).strip().splitlines()[-1].split("BadInput: ")[-1], file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; lower --batch (in training --micro-batch) or --size", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:  # no room or no permission, or a name that is too long
        where = f"{name}: " if (name := getattr(error, "filename", None)) else ""
        print(f"error: {where}{getattr(error, 'strerror', None) or error}; make room, or choose another place",
              file=sys.stderr)
        raise SystemExit(2) from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, without the usage."""

    def error(self, message: str) -> None:
        raise BadInput(message)


def number(kind: type, low: float, high: float, text: str):
    """An option's value within [low, high]."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be a {'whole ' * (kind is int)}number from {low} to {high}")
    return value


def whole(low: int, high: int):
    return partial(number, int, low, high)


def real(low: float, high: float):
    return partial(number, float, low, high)


# ---------------------------------------------------------------- writing


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


def write_json(content: object, path: Path) -> None:
    """Writes a JSON file, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- reading


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
        content = json.loads(path.read_bytes())  # UTF-8, 16 or 32, with or without the mark that editors put in front
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; is {path.parent} a complete folder of weights?") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} can't be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} does not hold a JSON object; download it again")
    return content


def pickle_refused(path: Path, out: Path) -> BadInput:
    """The error for a pickle, with the command that writes its weights to `out`."""
    return BadInput(f"{path} is a pickle, which can run code when it is opened, and is not read; convert it safely: "
                    f"python weights.py convert {shlex.quote(str(path))} {shlex.quote(str(out))}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors of a safetensors file. Raises BadInput for a pickle, or a broken or missing file."""
    if path.suffix in PICKLES:
        raise pickle_refused(path, path.with_suffix(".safetensors"))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # Some public files have a header of odd length, and numbers at odd addresses: these are copied
        return {n: t.clone() if t.data_ptr() % t.element_size() else t for n, t in tensors.items()}
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; check the path, or download the weights again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); download it again") from None


# ---------------------------------------------------------------- device and processes


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


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def pick_dtype(name: str, device: str) -> torch.dtype:
    """--dtype, with "auto" settled for the device: half precision where the hardware multiplies it."""
    if name == "auto":
        name = "float16" if device.startswith("cuda") else "float32"
        name = "bfloat16" if device == "cpu" and native_bfloat16() else name
    return getattr(torch, name)


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware, by Linux's list of its features."""
    try:
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def one_for_each(values: list | None, others: list | None, option: str, other: str) -> list:
    """One value of an option for each of another's. Raises BadInput unless the option was given zero times, once, or once
    for each.
    """
    values, count = values or [None], len(others or ())
    if len(values) not in (1, count) or (option.endswith("mask") and values[0] and len(values) != count):
        raise BadInput(f"{option}: {len(values)} given for {count} of {other}; give one for each")
    return values * count if len(values) == 1 else values


def check_together(args, exclusive: list[tuple[str, ...]] = (), needed: list[tuple[str, str]] = ()) -> None:
    """Raises BadInput where options of one group of `exclusive` are given together, or the first of a pair in `needed`
    without the second.
    """
    def given(option: str) -> bool:
        return getattr(args, option) not in (None, False)

    for group in exclusive:
        if len(some := [f"--{option.replace('_', '-')}" for option in group if given(option)]) > 1:
            raise BadInput(f"{some[0]} and {some[1]} exclude each other; leave one out")
    for option, other in needed:
        if given(option) and not given(other):
            raise BadInput(f"--{option.replace('_', '-')} goes with --{other}; add that one")
