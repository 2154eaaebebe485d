"""Support: user errors, files written whole, JSON, tensors; not needed to understand the paper."""


import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

# What systems put into folders of pictures, besides names that start with a dot; in lower case
SYSTEM_NAMES = {
    "__macosx", "network trash folder", "temporary items", "icon\r",  # macOS
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "recycled", "system volume information",
    "found.000",  # Windows
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@__thumb", "@recently-snapshot", "@sharebin",  # NAS boxes
    "lost+found", "__pycache__",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and not the user's."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def nfc(name: str) -> str:
    """A name as Unicode composes it: file names from a Mac may hold 'é' as 'e' and an accent, which looks the same."""
    return unicodedata.normalize("NFC", name)


def is_unicode(name: str) -> bool:
    """False if a file's name is not UTF-8: Python keeps the odd bytes as surrogates, which no text may hold."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def one_line(text: str) -> str:
    """Text with escapes in place of line breaks and other control characters, which a file's name may hold."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: c[0].encode("unicode_escape").decode(), text)


def result_name(stem: str, suffix: str, limit: int = 255) -> str:
    """A file's name, stem + suffix, cut to what file systems take: `limit` bytes, or 85 Chinese characters.

    A longer stem keeps its beginning and its end, where the seed is; a hash of the whole stem between them keeps
    different names different.
    """
    if len(os.fsencode(stem + suffix)) <= limit:
        return stem + suffix
    middle = f"~{hashlib.blake2b(os.fsencode(stem), digest_size=4).hexdigest()}~"
    room = limit - len(os.fsencode(middle + suffix))
    end = _whole_characters(stem[::-1], room // 4)[::-1]
    return _whole_characters(stem, room - len(os.fsencode(end))) + middle + end + suffix


def _whole_characters(text: str, limit: int) -> str:
    """The longest beginning of a text that takes at most `limit` bytes in a file's name."""
    size = 0
    for i, c in enumerate(text):
        size += len(os.fsencode(c))
        if size > limit:
            return text[:i]
    return text


UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it



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








try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

TRIES, PAUSE = 10, 0.1  # seconds: long enough for a run that is just ending, or for this run's first process


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A context in which no other run writes into --out, which is made. All processes of a torchrun are one run.

    The operating system locks the file OUT/.in_use until the process ends, however it ends. On a file
    system without locks nothing is locked. Also removes what killed processes have left in the folder.
    Raises BadInput if another run is alive, or if the folder can't be made.
    """
    check_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".in_use"
    handle = take(path) if fcntl else None
    try:
        sweep(out)
        yield
    finally:
        if handle is not None:
            if lock(handle, fcntl.LOCK_EX):  # we are the run's last process
                path.unlink(missing_ok=True)
            os.close(handle)
        with suppress(OSError):  # a command that wrote nothing leaves nothing
            for folder in made:
                folder.rmdir()


def take(path: Path) -> int:
    """Locks a file for this run; returns its handle. The first process writes who it is; the others share the lock."""
    from support.machine import processes

    run, (_, world), other = this_run(), processes(), {}
    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if lock(handle, fcntl.LOCK_EX) and is_at(handle, path):
            write(handle, path, {"run": run, "process": os.getpid(), "machine": socket.gethostname()})
            if world > 1:
                lock(handle, fcntl.LOCK_SH)
            return handle
        other = read(handle)
        if other.get("run") == run and lock(handle, fcntl.LOCK_SH) and is_at(handle, path):
            return handle
        os.close(handle)
        time.sleep(PAUSE)
    raise BadInput(f"--out {path.parent}: process {other.get('process', '?')} on {other.get('machine', '?')} writes "
                   "into this folder; wait until it ends, or name another folder")


def this_run() -> list[str]:
    """What identifies this run: it is the same in all processes of a torchrun, and different in other living runs."""
    from support.machine import processes

    if processes()[1] == 1:
        return [host_name(), str(os.getpid())]
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return [host_name() if one_machine else "", *(os.environ.get(name, "") for name in names)]


def lock(handle: int, kind: int) -> bool:
    """Takes or changes a lock; False if another process has it. Such a lock belongs to one process: its children, such
    as a loader's workers, do not keep it.
    """
    try:
        fcntl.lockf(handle, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether the file at `path` is still the one we opened: the run before may have removed it since."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def write(handle: int, path: Path, content: dict) -> None:
    """Replaces the content of the file. Raises OSError, which names the file."""
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(content).encode(), 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read(handle: int) -> dict:
    """The content of the file; {} while it is being written."""
    try:
        return json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}


def check_folder(out: Path, option: str = "--out") -> None:
    """Raises BadInput if an option's output folder can't be made or written to."""
    try:
        out.stat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(f"{option} {out}: {error.strerror}; {REMEDIES[error.errno]}") from None
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise BadInput(f"{option} {out}: {nearest} is a file; choose another folder")
    if not os.access(nearest, os.W_OK):
        raise BadInput(f"{option} {out}: {nearest} is read-only; choose another folder")

