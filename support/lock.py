"""Support: lets only one run at a time write into a folder; not needed to understand the paper."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.files import BadInput, host_name, sweep
from support.machine import processes
from support.options import check_folder

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
