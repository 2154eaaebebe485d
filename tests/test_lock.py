"""Tests: support/files.py: one run at a time writes into a folder, and a killed process leaves no lock."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import generate
import train
from support import files
from support.files import BadInput, locked

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys
from pathlib import Path
from support.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(out, code=HOLD, **environment):
    """A process that has locked a folder, until its stdin is closed."""
    process = subprocess.Popen([sys.executable, "-c", code, out], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=os.environ | environment)
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_is_refused_in_one_line_and_not_after_the_first_was_killed(tmp_path):
    process, message = hold(tmp_path), f"^--out {re.escape(str(tmp_path))}: another run writes into it; .*$"
    for main, *arguments in ((train.main, "cg", "--data", "none", "--steps", "1"), (generate.main, "--prompt", "a mug"),
                             (generate.main, "--data", "none"), (evaluate.main, "table1", "--data", "none")):
        with pytest.raises(BadInput, match=message):
            main([*arguments, "--out", str(tmp_path)])
    process.kill()
    process.communicate()
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


def test_the_first_process_of_a_torchrun_locks_for_all(tmp_path):
    torchrun = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")
    first, second = (hold(tmp_path, RANK=rank, **torchrun) for rank in "01")
    with pytest.raises(BadInput, match="another run writes into it"), locked(tmp_path):
        pass
    second.communicate()
    assert os.listdir(tmp_path) == [".in_use"]
    first.communicate()
    assert not os.listdir(tmp_path)


def test_a_loaders_workers_do_not_keep_the_lock_of_a_killed_run(tmp_path):
    """They notice only seconds later that it has ended."""
    worker = "    import os\n    if not os.fork(): os.close(1); os.read(0, 1)\n    print("
    process = hold(tmp_path, HOLD.replace("    print(", worker))
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
    process.stdin.close()


def test_a_file_system_without_locks_is_borne(tmp_path, monkeypatch):
    def unsupported(handle, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "lockf", unsupported)
    with locked(tmp_path), locked(tmp_path):
        pass
    assert not os.listdir(tmp_path)
