"""Tests: support/: files are written whole or not at all, names of any kind work, and errors of use are one line."""

import argparse
import errno
import os
import subprocess
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support import machine
from support.files import (
    BadInput,
    append_line,
    check_folder,
    explain,
    is_hidden,
    is_unicode,
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
from support.options import Parser, real_number, unicode_text, whole_number
from support.tensors import compute_parts

ROOT = Path(__file__).resolve().parent.parent
GBK = os.fsdecode("杯".encode("gbk"))  # a name as a Chinese zip leaves it on Linux


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def python(code, **options):
    """Runs a few lines of Python in the project."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options)


# ---------------------------------------------------------------- written whole


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, tmp_path):
    (tmp_path / "file").write_text("old")

    def fails(new):
        new.write_text("half of the n")
        raise error

    with pytest.raises(error):
        write_atomic(tmp_path / "file", fails)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_can_not_be_written_is_one_line_that_names_it_and_leaves_nothing(tmp_path, monkeypatch):
    def full(new):
        new.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "folder").mkdir()
    for path, write, reason in [("full", full, "No space left on device"), ("folder", Path.touch, "Is a directory"),
                                ("n" * 300, Path.touch, "File name too long")]:
        with pytest.raises(BadInput, match=f"{tmp_path / path} can't be written: {reason}; check the path, its"):
            write_atomic(tmp_path / path, write)
    assert names(tmp_path) == ["folder"]


def test_a_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(Path(file.name).read_text()), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    write_text("whole", tmp_path / "file")
    assert events == ["whole", "rename"]


def test_written_files_have_the_users_usual_mode(tmp_path):
    def only_mine(new):
        new.write_text("")
        new.chmod(0o600)  # as safetensors does

    (tmp_path / "usual").write_text("")
    write_atomic(tmp_path / "file", only_mine)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert python("import os, support.files; print(os.umask(0))", umask=0o027).stdout.strip() == str(0o027)


@pytest.mark.parametrize("name", ["n" * 255, "杯" * 85, f"{GBK}.png", "a\nb"])
def test_names_as_long_as_a_file_system_takes_and_odd_ones_are_written(name, tmp_path):
    for content in ("one", "two"):
        write_text(content, tmp_path / name)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "two"


# ---------------------------------------------------------------- what killed processes leave

KILLED = """
import os, signal, sys
from support.files import write_atomic
def write(new):
    new.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomic(sys.argv[1], write)
"""


@contextmanager
def writer(path, fork=""):
    """A process that is writing `path`, and has forked a child if asked to."""
    code = f"""
import os, signal, sys
from pathlib import Path
from support.files import write_atomic
def write(new):
    new.write_text("half")
    {fork}
    print("writing", flush=True)
    signal.pause()
write_atomic(Path(sys.argv[1]), write)
"""
    process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    yield
    process.kill()
    process.wait()


def test_scratch_of_a_killed_process_is_swept_at_the_next_write_and_that_of_a_living_one_is_not(tmp_path):
    with writer(tmp_path / "living"):
        with writer(tmp_path / "killed", "if not os.fork(): os.close(1), signal.alarm(20), signal.pause()"):
            assert len(os.listdir(tmp_path)) == 2
        for empty in ("b", "c"):  # a process that was killed before it could lock its folder
            (tmp_path / f".scratch-{empty}").mkdir()
        (tmp_path / ".scratch-paper" / "the user's").mkdir(parents=True)
        write_text("whole", tmp_path / "file")
        left = set(os.listdir(tmp_path)) - {".scratch-paper", "file"}
        assert len(left) == 1 and (tmp_path / left.pop() / "new").read_text() == "half"
    write_text("more", tmp_path / "file")
    sweep.cache_clear()
    write_text("more", tmp_path / "file")
    assert names(tmp_path) == [".scratch-paper", ".scratch-paper/the user's", "file"]


def test_processes_that_begin_to_write_together_do_not_sweep_one_another(tmp_path):
    code = """
import sys
from pathlib import Path
from support.files import sweep, write_text
folder = Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while len(list(folder.glob("p?"))) < 3:
    pass
for i in range(100):
    sweep.cache_clear()
    write_text("whole", folder / f"{sys.argv[2]}_{i}")
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path, f"p{i}"], cwd=ROOT) for i in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert len(os.listdir(tmp_path)) == 303 and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_with_a_byte_order_mark_too(encoding, tmp_path):
    (tmp_path / "a.json").write_bytes('{\r\n"a": "杯"}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"a": "杯"}


@pytest.mark.parametrize("content, message", [(b"{", "can't be read as JSON .*; fix it, or get it again"),
                                              (b"[1]", "does not hold a JSON object; fix it"),
                                              (b"[" * 10**5, "can't be read as JSON"), (b"\xb1\xad", "can't be read"),
                                              (None, "a.json is missing")])
def test_what_is_no_json_object_is_refused_in_one_line_that_names_it(content, message, tmp_path):
    if content:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(error.value) and "\n" not in str(error.value)


def test_a_log_loses_only_the_line_that_was_cut_even_within_a_letter(tmp_path):
    (tmp_path / "log").write_bytes('{"a": "杯\u2028"}\n{"a": "杯'.encode()[:-1])
    assert read_log(tmp_path / "log") == [{"a": "杯\u2028"}] and (tmp_path / "log").read_bytes().endswith(b"}\n")
    assert read_log(tmp_path / "none") == []


def test_a_broken_line_of_a_log_is_named(tmp_path):
    for line in ("{", "[1]", "[" * 10**5):
        (tmp_path / "log").write_text(f'{{"a": 1}}\n{line}\n')
        with pytest.raises(BadInput, match="log:2 .*; remove that line"):
            read_log(tmp_path / "log")


def test_names_that_are_no_unicode_are_written_as_escapes_and_read_back(tmp_path):
    append_line({"image": GBK, "category": "杯"}, tmp_path / "log")
    append_line({"image": "b"}, tmp_path / "log")
    write_json({GBK: 1}, tmp_path / "a.json")
    assert r'{"image": "\udcb1\udcad", "category": "杯"}' in (tmp_path / "log").read_text(encoding="utf-8")
    assert [os.fsencode(line["image"]) for line in read_log(tmp_path / "log")] == ["杯".encode("gbk"), b"b"]
    assert read_json(tmp_path / "a.json") == {GBK: 1}


def test_a_process_whose_partner_has_ended_says_so_in_one_line():
    for lost in ("[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:40372: Connection reset by peer",
                 "NCCL communicator was aborted on rank 1"):
        assert explain(RuntimeError(lost)) == "another process of this run has ended; its own message says why"


def test_a_broken_file_of_a_cache_is_named(tmp_path):
    compute_parts(tmp_path, ["key"], lambda k: {"x": torch.ones(2)})
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match=f"{file.name} is not a whole .*; remove it, and it is computed again"):
        compute_parts(tmp_path, ["key"], dict)


# ---------------------------------------------------------------- names


def test_a_results_name_is_as_it_was_where_it_fits():
    for stem in ("mug_0", "n" * 251, "杯" * 83, GBK * 125):
        assert result_name(stem, ".png") == stem + ".png"


@pytest.mark.parametrize("stem", ["杯" * 45 + "_like_" + "壶" * 45 + "_12", "n" * 300 + "_12", "a" + "杯" * 100 + "_12",
                                  "😀" * 80 + "_12", "n" * 100 + GBK * 100 + "_12"])
def test_a_long_name_is_cut_between_characters_keeps_its_end_and_its_difference(stem, tmp_path):
    name = result_name(stem, ".png")
    assert len(os.fsencode(name)) <= 255 and name.endswith("_12.png") and name[:45] == stem[:45] and is_unicode(name)
    assert set(name) - set(stem) <= set("~.png0123456789abcdef")
    (tmp_path / name).touch()
    middle = len(stem) // 2
    assert name == result_name(stem, ".png")
    assert name != result_name(stem[:middle] + "x" + stem[middle + 1 :], ".png")


def test_hidden_names_are_those_of_systems():
    assert all(map(is_hidden, [".a", "._a.png", ".DS_Store", "@eaDir", "__MACOSX", "THUMBS.DB", "lost+found"]))
    assert not any(map(is_hidden, ["a.png", "_a.png", "#1.png", "mug", "lost and found", "a.b", "@home.png"]))


# ---------------------------------------------------------------- errors of use


@pytest.mark.parametrize("error, line, status", [
    (BadInput("--mask m.png is empty; give another"), "error: --mask m.png is empty; give another", 2),
    (BadInput("a\nb.png: no such file"), r"error: a\nb.png: no such file", 2),
    (BadInput("Caught BadInput in DataLoader worker process 0.\n  File x\nsupport.files.BadInput: why\n"),
     "error: why", 2),
    (OSError(errno.ENOSPC, "No space left on device", "a.png"),
     "error: [Errno 28] No space left on device: 'a.png'; check the path, its permissions and the room on the disk", 2),
    (torch.OutOfMemoryError("x"), "error: the memory is full; lower --batch (in training --micro-batch) or --size", 2),
    (MemoryError(), "error: the memory is full; lower --batch (in training --micro-batch) or --size", 2),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "error: the memory is full; lower --batch (in training --micro-batch) or --size", 2),
    (UnicodeDecodeError("utf-8", b"\xb1", 0, 1, "invalid start byte"),
     "error: 'utf-8' codec can't decode byte 0xb1 in position 0: invalid start byte; rename the file, or write the "
     "text as UTF-8", 2),
    (KeyboardInterrupt(), "interrupted; all files written are complete, and the same command can be given again", 130),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "")  # fmt: skip
def test_what_a_user_can_mend_is_one_line_without_a_traceback(error, line, status, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == status and capsys.readouterr().err == line + "\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_line_errors():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_that_a_console_cannot_show_are_printed_as_escapes(encoding):
    code = f"from support.files import one_line_errors\nwith one_line_errors(): print({GBK!r} + '\\u676f')"
    result = python(code, env=os.environ | {"PYTHONIOENCODING": encoding})
    shown = r"\udcb1\udcad" + ("杯" if encoding.startswith("utf") else r"\u676f")
    assert (result.stdout, result.stderr, result.returncode) == (shown + "\n", "", 0)


def test_a_reader_of_the_output_that_leaves_is_no_error():
    code = "from support.files import one_line_errors\nwith one_line_errors(): [print(i) for i in range(10**5)]"
    piped = f"{sys.executable} -c '{code}' | head -1"
    result = subprocess.run(piped, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("0\n", "")


# ---------------------------------------------------------------- options


def test_numbers_outside_of_their_range_are_refused_by_name():
    parser = Parser()
    parser.add_argument("--steps", type=whole_number(1, 500))
    parser.add_argument("--guidance", type=real_number(1, 30))
    given = parser.parse_args(["--steps", "50", "--guidance", "2.5"])
    assert (given.steps, given.guidance) == (50, 2.5)
    for option, value, what in [("--steps", "0", "whole number from 1 to 500"), ("--steps", "2.5", "whole number"),
                                ("--guidance", "nan", "number from 1 to 30"), ("--guidance", "x", "number from 1")]:
        with pytest.raises(BadInput, match=f"{option}: '{value}' must be a {what}"):
            parser.parse_args([option, value])


def test_text_is_composed_and_must_be_unicode():
    assert unicode_text(unicodedata.normalize("NFD", "café")) == "caf\u00e9"
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8 text"):
        unicode_text(GBK)


def test_an_output_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "new" / "deep")
    with pytest.raises(BadInput, match="--out .*file is not a folder that can be written to; choose another"):
        check_folder(tmp_path / "file" / "out")
    with pytest.raises(OSError, match="File name too long"):
        check_folder(tmp_path / ("n" * 300))


# ---------------------------------------------------------------- the machine


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nfrom support.machine import cores\n"
        loader = ("from torch.utils.data import DataLoader\n"
                  "print(cores(), *DataLoader([1, 2], batch_size=None, num_workers=min(8, cores())))")
        result = python(code + loader)
        assert result.stdout == "1 1 2\n" and "Warning" not in result.stderr
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert cores() == (os.cpu_count() or 1)


@pytest.mark.parametrize("ratio, dtype", [(1.95, torch.bfloat16), (1.2, torch.float32), (0.5, torch.float32)])
def test_auto_is_bfloat16_where_it_is_clearly_faster_and_only_there(ratio, dtype, monkeypatch):
    measured = []
    monkeypatch.setattr(machine, "bfloat16_speedup", lambda: measured.append(True) or ratio)
    bfloat16_is_faster.cache_clear()
    assert [pick_dtype("auto", "cpu") for _ in range(2)] == [dtype] * 2 and len(measured) == 1, "once a process"
    assert pick_dtype("auto", "cuda:0") == torch.float16 and pick_dtype("bfloat16", "cpu") == torch.bfloat16
    bfloat16_is_faster.cache_clear()


def test_the_measurement_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    assert machine.bfloat16_speedup() > 0 and torch.get_num_threads() == threads


def test_under_torchrun_cuda_is_this_processs_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # as if every device were here
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [pick_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


def test_a_device_that_is_not_here_is_refused():
    for name in ("meta", "cuda:99", "tpu"):
        with pytest.raises(BadInput, match=f"--device {name}: no such device here; choose auto, cpu"):
            pick_device(name)
