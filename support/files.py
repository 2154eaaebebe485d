"""Support: user errors, names of files, files written whole, one run per folder, JSON; not needed to understand the
paper."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

# ---------------------------------------------------------------- names

# What systems put into folders of pictures, besides names that start with a dot; in lower case
SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found",
                "@eadir", "#recycle", "@recycle", "__pycache__"}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and not the user's."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def nfc(name: str) -> str:
    """A name as Unicode composes it: file names from a Mac may hold 'é' as 'e' and an accent, which looks the same."""
    return unicodedata.normalize("NFC", name)


def is_unicode(name: str) -> bool:
    """False if a file's name is not UTF-8: Python keeps the odd bytes as surrogates, which no text may hold."""
    return not re.search("[\ud800-\udfff]", name)


def one_line(text: str) -> str:
    """Text with escapes in place of line breaks and other control characters, which a file's name may hold."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: c[0].encode("unicode_escape").decode(), text)


def from_here(path: Path) -> str:
    """A path, relative to the current folder if it lies below: the whole path may hold the user's name."""
    return str(path).removeprefix(f"{Path.cwd()}{os.sep}")


def result_name(stem: str, suffix: str) -> str:
    """A file's name, stem + suffix, cut to the 255 bytes that file systems take, which are 85 Chinese characters.

    A longer stem keeps its beginning and its end, where the seed is; a hash of the whole stem between them keeps
    different names different.
    """
    name = stem.encode("utf-8", "surrogateescape")
    if len(name) + len(suffix) <= 255:
        return stem + suffix
    start, end = (part.decode(errors="ignore") for part in (name[:180], name[-60:]))  # no halves of characters
    return f"{start}~{hashlib.blake2b(name, digest_size=4).hexdigest()}~{end}{suffix}"


# ---------------------------------------------------------------- errors of use

REMEDY = "check the path, its permissions and the room on the disk"


class BadInput(ValueError):
    """A user error. Its message is one line that names the file or option and the remedy; programs exit with 2."""


def explain(error: Exception) -> str | None:
    """The line that says what is wrong and what to do, for an error that the user can fix; None for a bug of ours."""
    text = str(error)
    if isinstance(error, BadInput):
        return text.split("BadInput: ")[-1].strip()  # a DataLoader's worker puts its traceback in front
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "the memory is full; lower --batch (in training --micro-batch) or --size"
    if re.search(r"\(shm\)|</torch_|Bus error", text):  # as a DataLoader's workers report it
        return "/dev/shm, shared memory, is full; make it larger, as by docker run --shm-size 16g, or give --workers 0"
    if isinstance(error, RuntimeError) and re.search("gloo|NCCL", text):
        return "another process of this run has ended; its own message says why"
    if isinstance(error, UnicodeError):
        return f"{text}; rename the file, or write the text as UTF-8"
    if isinstance(error, OSError):
        return f"{text}; {REMEDY}"
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


def check_folder(out: Path, option: str = "--out") -> None:
    """Raises BadInput if an option's output folder can't be made or written to."""
    nearest = out.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise BadInput(f"{option} {out}: {nearest} is not a folder that can be written to; choose another")


# ---------------------------------------------------------------- one process per folder


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """A context in which this process alone has locked the file .in_use in a folder. The operating system frees the
    lock however the process ends, and its children, such as a loader's workers, do not keep it.

    Yields False where there are no locks. Raises BadInput if another process has locked the file.
    """
    if fcntl is None:
        yield False
        return
    path, has_locks = folder / ".in_use", True
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError  # the process that had locked it has just removed it
        except BlockingIOError:
            raise BadInput(f"--out {folder}: another run writes into it; wait for its end, or name another") from None
        except OSError:
            has_locks = False  # a file system without
        try:
            yield has_locks
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A context in which no other run writes into --out. The folder is made, and removed again if it stays empty; what
    killed processes have left in it is removed. In a torchrun the first process locks it for all.

    Raises BadInput if another run is alive, or if the folder can't be made.
    """
    check_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _lock(out) if os.environ.get("RANK", "0") == "0" else nullcontext():
            sweep(out)
            yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@cache
def sweep(folder: Path) -> None:
    """Removes the scratch folders that killed processes have left in a folder. Each process looks once."""
    for scratch in folder.glob(".scratch-*"):
        with suppress(OSError, BadInput):  # its process is alive, or another one sweeps too
            if {file.name for file in scratch.iterdir()} <= {"new", ".in_use"}:  # else it is the user's own
                with _lock(scratch) as has_locks:
                    if not has_locks:
                        return
                    shutil.rmtree(scratch / "new", ignore_errors=True)
                    (scratch / "new").unlink(missing_ok=True)  # if it was a file
                scratch.rmdir()


# ---------------------------------------------------------------- writing

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Calls write(temporary) and renames: `path` is either the old file or the whole new one, never a part.

    `write` makes a file, or a folder that is not there yet. Raises BadInput if `path` can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with _scratch(path.parent) as new:
            write(new)
            if new.is_file():
                new.chmod(0o666 & ~UMASK)  # safetensors writes files that only their owner may read
                with open(new, "rb+") as file:
                    os.fsync(file)
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} can't be written: {reason}; {REMEDY}") from None


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A path for a file or folder that is being written, in a new folder, which is locked and in the end removed."""
    with ExitStack() as stack:
        while True:
            scratch = Path(tempfile.mkdtemp(prefix=".scratch-", dir=folder))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            with suppress(BadInput, FileNotFoundError):  # another process has swept it before it was locked
                stack.enter_context(_lock(scratch))
                break
        yield scratch / "new"


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
    return [_parse(line, f"{file}:{n}", "remove that line") for n, line in enumerate(finished.splitlines(), 1)]


def read_json(path: Path) -> dict:
    """The object in a JSON file: UTF-8 or UTF-16, with or without a byte order mark. Raises BadInput if the file is
    missing or holds none.
    """
    try:
        return _parse(path.read_bytes(), path, "fix it, or get it again")
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; is {path.parent} a complete folder of weights?") from None


def _parse(text: bytes, source: Path | str, remedy: str) -> dict:
    """The object that a JSON text holds. Raises BadInput if it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{source} can't be read as JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{source} does not hold a JSON object; {remedy}")
    return content
