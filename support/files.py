"""Support: user errors, files written whole, JSON, tensors; not needed to understand the paper."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from support.names import one_line

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it

PICKLES = (".ckpt", ".pth", ".pt", ".bin", ".pkl")


class BadInput(ValueError):
    """A user error. Its message is one line that names the file or option and the remedy; programs exit with 2."""


REMEDIES = {  # by the operating system's error number; the last is for all others
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or give fewer --workers",
    None: "check its permissions and the disk, or choose another place",
}


def explain(error: Exception) -> str | None:
    """The line that says what is wrong and what to do, for an error that the user can fix; None for a bug of ours."""
    if isinstance(error, BadInput):
        return str(error).split("BadInput: ")[-1].strip()  # a DataLoader's worker puts its traceback in front
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; lower --batch (in training --micro-batch) or --size"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return "the memory is full; lower --batch (in training --micro-batch) or --size"
    if isinstance(error, RuntimeError) and re.search("gloo|NCCL", str(error)):
        return "another process of this run has ended; its own message says why"
    if isinstance(error, SafetensorError):
        return f"{error}; make room, or choose another place"
    if isinstance(error, UnicodeError):
        return f"{error}; rename the file, or write the text as UTF-8"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; {REMEDIES.get(error.errno, REMEDIES[None])}"
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wraps a program's main: user errors become one line on stderr and exit status 2, Ctrl-C one line and 130.

    Also lets stdout and stderr print every name: what a console can't show, or is not Unicode, becomes an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; all files written are complete, and the same command can be given again", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as by `| head`: the reader of our output has left, and no one is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        print("error:", one_line(message), file=sys.stderr)
        raise SystemExit(2) from None


# ---------------------------------------------------------------- writing


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Calls write(temporary) and renames: `path` is either the old file or the whole new one, never a part, even after
    a power cut.

    `write` makes a file or a folder. A folder replaces the old one by two renames, between which `path` is missing.
    Raises BadInput if `path` can't be written, or if the old folder holds other files, which would be lost.
    """
    path = Path(path)
    if path.is_dir():
        path = path.resolve()  # a link to a folder, perhaps on a larger disk, stays a link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".scratch-{host_name()}-{os.getpid()}-", dir=path.parent))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise BadInput(f"{path}: can't be written ({error.strerror or error}); choose another output path") from None
    try:
        new, old = scratch / "new", scratch / "old" / path.name
        write(new)
        files = [new, *new.rglob("*")]
        for file in files:
            if file.is_file():
                file.chmod(0o666 & ~UMASK)  # safetensors writes files that only their owner may read
        if len(files) > MANY_FILES and hasattr(os, "sync"):
            os.sync()  # the whole disk at once: a wait for each of thousands of files would take minutes
        else:
            for file in files:
                _sync(file)
        try:
            if new.is_dir() and path.is_dir():
                if others := sorted({file.name for file in path.iterdir()} - {file.name for file in new.iterdir()}):
                    raise BadInput(f"{path} would be replaced, and holds {others[0]} too; choose another output path")
                old.parent.mkdir()
                os.replace(path, old)
            os.replace(new, path)
        except BaseException:  # an interrupt too
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        _sync(path.parent)
    except (IsADirectoryError, NotADirectoryError):
        raise BadInput(f"{path} is a {'folder, not a file' if path.is_dir() else 'file, not a folder'}; "
                       "choose another output path") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


MANY_FILES = 100
# Errors from a file system that can't sync, or from a folder that we may write to but not open
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EROFS}


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk, if the file system can sync."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def host_name() -> str:
    """A hash that names this machine or container, within which process numbers are unique."""
    namespace = Path("/proc/self/ns/pid")
    name = socket.gethostname() + (os.readlink(namespace) if namespace.is_symlink() else "")
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


DAY = 24 * 60 * 60  # seconds; older scratch folders of other machines, whose processes we can't see, are abandoned

_swept: set[Path] = set()  # the folders that this process has swept


def sweep(folder: Path) -> None:
    """Removes the scratch folders that killed processes have left in a folder; write_atomic calls it, once per process.

    If a process was killed while it replaced a folder, the old folder is put back.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    for scratch in folder.glob(".scratch-*"):
        if _abandoned(scratch):
            for old in scratch.glob("old/*"):
                if not (folder / old.name).exists():
                    with suppress(FileNotFoundError):  # another process of the run has done it
                        os.replace(old, folder / old.name)
            shutil.rmtree(scratch, ignore_errors=True)


def _abandoned(scratch: Path) -> bool:
    """Whether the process that made a scratch folder has ended, or, on another machine, whether the folder is old."""
    owner = re.fullmatch(r"\.scratch-([0-9a-f]{8})-(\d+)-\w+", scratch.name)
    try:
        if owner and scratch.stat().st_mtime > time.time() - DAY:
            if owner[1] != host_name():
                return False
            os.kill(int(owner[2]), 0)  # signal 0: only checks whether there is such a process
            return False
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's, or gone by now
    return owner is not None


def write_text(text: str, path: Path, odd_bytes: str = "backslashreplace") -> None:
    """Writes a UTF-8 file, atomically. odd_bytes: Python's error handler for the bytes of names that are not UTF-8; the
    default turns them into JSON's escapes, "surrogateescape" writes them as they are.
    """
    write_atomic(path, lambda new: new.write_bytes(text.encode("utf-8", odd_bytes)))


def write_json(content: object, path: Path) -> None:
    """Writes a JSON file, atomically."""
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def append_line(entry: dict, file: Path) -> None:
    """Adds a line to a JSON-lines file, which read_log reads."""
    with open(file, "ab") as lines:
        lines.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


# ---------------------------------------------------------------- reading


def read_log(file: Path) -> list[dict]:
    """The objects in a JSON-lines file that a program appends to; [] without a file. A line that a killed process has
    left unfinished is cut off. Raises BadInput for a line that is not a JSON object.
    """
    content = file.read_bytes() if file.exists() else b""
    finished = content[: content.rfind(b"\n") + 1]
    if finished != content:
        write_atomic(file, lambda new: new.write_bytes(finished))
    entries = []
    for number, line in enumerate(finished.splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{file}:{number} can't be read as JSON ({error}); remove that line") from None
        if not isinstance(entries[-1], dict):
            raise BadInput(f"{file}:{number} does not hold a JSON object; remove that line")
    return entries


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput if the file is missing or holds none."""
    try:
        content = json.loads(path.read_bytes())  # from bytes: UTF-8 or UTF-16, with or without a byte order mark
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; is {path.parent} a complete folder of weights?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} can't be read as JSON ({error}); fix it, or get it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} does not hold a JSON object; fix it, or get it again")
    return content


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
