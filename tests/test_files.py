"""Tests: support/: files are written whole or not at all, one run at a time writes into a folder, names of any kind
work, and errors of use are one line."""

import argparse
import errno
import io
import os
import re
import subprocess
import sys
import unicodedata
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import evaluate
import generate
import train
from support import files, machine
from support.files import (
    BadInput,
    append_line,
    is_unicode,
    locked,
    one_line_errors,
    read_json,
    read_log,
    result_name,
    sweep,
    write_atomic,
    write_json,
    write_text,
)
from support.machine import bfloat16_is_faster, cores, pick_device, pick_dtype
from support.options import unicode_text
from support.tensors import compute_parts

ROOT = Path(__file__).resolve().parent.parent
GBK = os.fsdecode("杯".encode("gbk"))  # a name as a Chinese zip leaves it on Linux


def start(code, *arguments):
    """A process that runs a few lines, given when it has printed one; they may use these names."""
    code = f"import os, signal, sys, time\nfrom pathlib import Path\nfrom support.files import *\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


FORK = "if not os.fork(): os.close(1), signal.alarm(20), signal.pause()"  # like a loader's worker, which outlives us

# ---------------------------------------------------------------- written whole


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error, seen", [(RuntimeError(), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt),
                                         (DISK_FULL, BadInput)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, seen, tmp_path):
    (tmp_path / "file").write_text("old")

    def fails(new):
        new.write_text("half of the n")
        raise error

    with pytest.raises(seen, match="file can't be written: No space left" if seen is BadInput else None):
        write_atomic(tmp_path / "file", fails)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_can_not_be_written_is_one_line_that_names_it_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, reason in [("folder", "Is a directory"), ("n" * 300, "File name too long")]:
        with pytest.raises(BadInput, match=f"^{tmp_path / name} can't be written: {reason}; check the path, its"):
            write_text("", tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_is_on_the_disk_before_it_is_renamed_and_has_the_users_usual_mode(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(Path(file.name).read_text()), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))

    def only_mine(new):
        new.write_text("whole")
        new.chmod(0o600)  # as safetensors does

    write_atomic(tmp_path / "file", only_mine)
    assert events == ["whole", "rename"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("name", ["n" * 255, "杯" * 85, f"{GBK}.png", "a\nb"])
def test_names_as_long_as_a_file_system_takes_and_odd_ones_are_written(name, tmp_path):
    for content in ("one", "two"):
        write_text(content, tmp_path / name)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "two"


# ---------------------------------------------------------------- what killed processes leave


@pytest.mark.slow
def test_scratch_of_a_killed_process_is_swept_at_the_next_write_and_that_of_a_living_one_is_not(tmp_path):
    code = """
def write(new):
    new.write_text("half")
    {}
    print("writing", flush=True)
    signal.pause()
write_atomic(Path(sys.argv[1]), write)
"""
    living, killed = start(code.format(""), tmp_path / "living"), start(code.format(FORK), tmp_path / "killed")
    killed.kill()
    killed.wait()
    (tmp_path / ".scratch-empty").mkdir()  # of a process that was killed before it could lock its folder
    (tmp_path / ".scratch-paper" / "new").mkdir(parents=True)
    (tmp_path / ".scratch-paper" / "the user's").mkdir()
    write_text("whole", tmp_path / "file")
    [left] = set(os.listdir(tmp_path)) - {".scratch-paper", "file"}
    assert (tmp_path / left / "new").read_text() == "half"
    living.kill()
    living.wait()
    sweep.cache_clear()
    write_text("more", tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == [".scratch-paper", "file"]
    assert len(os.listdir(tmp_path / ".scratch-paper")) == 2


@pytest.mark.slow
def test_processes_that_begin_to_write_together_do_not_sweep_one_another(tmp_path):
    code = """
folder = Path(sys.argv[1])
(folder / sys.argv[2]).touch()
print(flush=True)
while len(list(folder.glob("p?"))) < 3:
    time.sleep(0.001)
for i in range(30):
    sweep.cache_clear()
    write_text("whole", folder / f"{sys.argv[2]}_{i}")
"""
    processes = [start(code, tmp_path, f"p{i}") for i in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert len(os.listdir(tmp_path)) == 93 and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- one run per folder


@pytest.mark.slow
def test_a_second_run_is_refused_in_one_line_and_not_after_the_first_was_killed(tmp_path):
    """The first run's workers notice only seconds later that it has ended; they do not keep its lock."""
    process = start(f"with locked(Path(sys.argv[1])):\n    {FORK}\n    print(flush=True)\n    signal.pause()", tmp_path)
    for main, *arguments in ((train.main, "cg", "--data", "none", "--steps", "1"), (generate.main, "--prompt", "a mug"),
                             (generate.main, "--data", "none"), (evaluate.main, "table1", "--data", "none")):
        with pytest.raises(BadInput, match=f"^--out {re.escape(str(tmp_path))}: another run writes into it; .*$"):
            main([*arguments, "--out", str(tmp_path)])
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
    assert not os.listdir(tmp_path)


def test_what_a_run_wrote_stays_and_neither_the_lock_nor_folders_made_for_nothing_do(tmp_path):
    with pytest.raises(BadInput), locked(tmp_path / "a" / "b"):
        raise BadInput
    assert not os.listdir(tmp_path)
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        with locked(tmp_path / name):
            (tmp_path / name / "picture").touch()
        assert os.listdir(tmp_path / name) == ["picture"]


@pytest.mark.parametrize("rank, lock", [("0", [".in_use"]), ("1", [])])
def test_the_first_process_of_a_torchrun_locks_for_all(rank, lock, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with locked(tmp_path):
        assert os.listdir(tmp_path) == lock


@pytest.mark.parametrize("error, outcome", [
    (BlockingIOError, pytest.raises(BadInput, match="another run writes into it")), (OSError, nullcontext())])
def test_a_lock_that_another_process_holds_is_respected_and_a_file_system_without_locks_is_borne(
        error, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "lockf", Mock(side_effect=error))
    with outcome, locked(tmp_path):
        pass


# ---------------------------------------------------------------- JSON


def test_json_is_read_with_a_byte_order_mark_too(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text('{\r\n"a": "杯"}', encoding)
        assert read_json(tmp_path / "a.json") == {"a": "杯"}


@pytest.mark.parametrize("content, message", [(b"{", "can't be read as JSON .*; fix it, or get it again"),
                                              (b"[1]", "does not hold a JSON object; fix it"),
                                              (b"[" * 10**5, "can't be read as JSON"), (b"\xb1\xad", "can't be read"),
                                              (None, "is missing")])
def test_what_is_no_json_object_is_refused_in_one_line_that_names_it(content, message, tmp_path):
    if content:
        (tmp_path / "a.json").write_bytes(content)
        (tmp_path / "log").write_bytes(b"{}\n" + content + b"\n")
        with pytest.raises(BadInput, match="log:2 .*; remove that line$"):
            read_log(tmp_path / "log")
    with pytest.raises(BadInput, match=f"^{tmp_path / 'a.json'} {message}[^\n]*$"):
        read_json(tmp_path / "a.json")


def test_a_log_loses_only_the_line_that_was_cut_even_within_a_letter(tmp_path):
    (tmp_path / "log").write_bytes('{"a": "杯\u2028"}\n{"a": "杯'.encode()[:-1])
    assert read_log(tmp_path / "log") == [{"a": "杯\u2028"}] and (tmp_path / "log").read_bytes().endswith(b"}\n")
    assert read_log(tmp_path / "none") == []


def test_names_that_are_no_unicode_are_written_as_escapes_and_read_back(tmp_path):
    append_line({"image": GBK, "category": "杯"}, tmp_path / "log")
    append_line({"image": "b"}, tmp_path / "log")
    write_json({GBK: 1}, tmp_path / "a.json")
    assert r'{"image": "\udcb1\udcad", "category": "杯"}' in (tmp_path / "log").read_text(encoding="utf-8")
    assert [os.fsencode(line["image"]) for line in read_log(tmp_path / "log")] == ["杯".encode("gbk"), b"b"]
    assert read_json(tmp_path / "a.json") == {GBK: 1}


def test_a_broken_file_of_a_cache_is_named(tmp_path):
    compute_parts(tmp_path, ["key"], lambda k: {"x": torch.ones(2)})
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match=f"{file.name} is not a whole .*; remove it, and it is computed again"):
        compute_parts(tmp_path, ["key"], dict)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("stem", ["杯" * 45 + "_like_" + "壶" * 45 + "_12", "a" + "杯" * 100 + "_12", "😀" * 80 + "_12",
                                  "n" * 100 + GBK * 100 + "_12"])
def test_a_long_name_is_cut_between_characters_keeps_its_end_and_its_difference(stem, tmp_path):
    name, cut = result_name(stem, ".png"), 2 * len(stem) // 3
    (tmp_path / name).touch()
    assert name.startswith(stem[:45]) and name.endswith("_12.png") and is_unicode(name)
    assert set(name) - set(stem) <= set("~.png0123456789abcdef")
    assert name == result_name(stem, ".png") != result_name(stem[:cut] + "x" + stem[cut + 1 :], ".png")


# ---------------------------------------------------------------- errors of use

SHM = "error: /dev/shm, shared memory, is full; make it larger, as by docker run --shm-size 16g, or give --workers 0"
FULL = "error: the memory is full; lower --batch (in training --micro-batch) or --size"


@pytest.mark.parametrize("error, line", [
    (BadInput("a\nb.png: no such file"), r"error: a\nb.png: no such file"),
    (BadInput("Caught BadInput in DataLoader worker process 0.\n  File x\nsupport.files.BadInput: why\n"),
     "error: why"),
    (DISK_FULL, "error: [Errno 28] No space left on device; check the path, its permissions and the room on the disk"),
    (torch.OutOfMemoryError("x"), FULL), (MemoryError(), FULL),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), FULL),
    (RuntimeError("[../gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
     "error: another process of this run has ended; its own message says why"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"), SHM),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. "), SHM),
    (UnicodeDecodeError("utf-8", b"\xb1", 0, 1, "invalid start byte"),
     "error: 'utf-8' codec can't decode byte 0xb1 in position 0: invalid start byte; rename the file, or write the "
     "text as UTF-8"),
    (KeyboardInterrupt(), "interrupted; all files written are complete, and the same command can be given again"),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "")  # fmt: skip
def test_what_a_user_can_mend_is_one_line_without_a_traceback(error, line, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == (2 if line.startswith("error") else 130) and capsys.readouterr().err == line + "\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_line_errors():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("encoding, shown", [("utf-8", r"\udcb1\udcad杯"), ("ascii", r"\udcb1\udcad\u676f")])
def test_names_that_a_console_cannot_show_are_printed_as_escapes(encoding, shown, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with one_line_errors():
        print(GBK + "杯", end="")
    assert sys.stdout.buffer.getvalue().decode(encoding) == shown


def test_a_reader_of_the_output_that_leaves_is_no_error(monkeypatch, capfd):
    """As `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output, pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "stdout", output)
        with one_line_errors():
            print("a line")
    assert not capfd.readouterr().err


# ---------------------------------------------------------------- options


def test_text_is_composed_and_must_be_unicode():
    assert unicode_text(unicodedata.normalize("NFD", "café")) == "caf\u00e9"
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8 text"):
        unicode_text(GBK)


# ---------------------------------------------------------------- the machine


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cores() == (os.cpu_count() or 1)


@pytest.mark.parametrize("ratio, dtype", [(1.95, torch.bfloat16), (1.2, torch.float32), (0.5, torch.float32)])
def test_auto_is_bfloat16_where_it_is_clearly_faster_and_only_there(ratio, dtype, monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_speedup", lambda: ratio)
    bfloat16_is_faster.cache_clear()
    assert pick_dtype("auto", "cpu") == dtype
    assert pick_dtype("auto", "mps") == torch.float32
    assert pick_dtype("auto", "cuda:0") == torch.float16 and pick_dtype("bfloat16", "cpu") == torch.bfloat16
    bfloat16_is_faster.cache_clear()


def test_under_torchrun_cuda_is_this_processs_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # as if every device were here
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [pick_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


def test_an_apple_gpu_is_named_and_used_only_if_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    assert [pick_device(name) for name in ("auto", "mps")] == ["cpu", "mps"]
    assert capsys.readouterr().err.count("--device mps") == 1


def test_a_device_that_is_not_here_is_refused():
    for name in ("meta", "cuda:99", "tpu"):
        with pytest.raises(BadInput, match=f"--device {name}: no such device here; choose auto, cpu"):
            pick_device(name)
