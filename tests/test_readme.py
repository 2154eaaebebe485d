"""Tests: what README.md, RESULTS.md and REAL_WEIGHTS.md say is so: their commands, through the real command line, in
a copy of the project; their code, their counts of lines, their links.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_lama
from test_paint_by_example import (
    folder as example,  # noqa: F401 (a fixture, and what it needs)
    pbe,  # noqa: F401
)

from rivals.lama import LAMA_FILE
from support.images import open_image
from weights import save_module

ROOT = Path(__file__).resolve().parent.parent
PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md", "REAL_WEIGHTS.md")]
README = PAGES[0]


def blocks(page: str, kind: str = "") -> list[str]:
    """A page's code; commands have no kind, those with placeholders for files of one's own are sh."""
    return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S) if found == kind]


COMMANDS = [line for page in PAGES for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()
            if line.startswith("python ")]
COMMANDS.sort(key=lambda command: "toy/world.py" not in command)  # first the data: train.py would draw all of it
# Options that make each program's run short, added at the end of its command: the last one counts
SHORT = {"generate.py": "--steps 2", "train.py": "--steps 2 --batch 4",
         "toy/world.py": "--base 8 --ads 8 --bg1k 8 --pairs 9",
         "evaluate.py": "--steps 1 --controlnet toy/cg --pg-controlnet toy/pg --guide-clip toy/clip "
                        "--lama toy/lama --paint-by-example toy/example",
         "study.py": "--steps 1"}


@pytest.mark.slow
def test_every_command_of_the_pages_runs(example, tmp_path):  # noqa: F811
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("support", "programs", "rivals", "toy"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("data", "__pycache__"))
    # stand-ins for networks that are trained on first use
    shutil.copytree(example, tmp_path / "toy" / "example")
    save_module(random_lama(), tmp_path / "toy" / "lama", LAMA_FILE)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert {command.split()[1] for command in COMMANDS} == {*SHORT}
    for command in COMMANDS:
        program = command.split()[1]
        done = subprocess.run(["bash", "-c", f"{command} {SHORT[program]}"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        for path in re.findall(r"^out[^: \n]*", done.stdout, re.M) if program == "generate.py" else ():
            assert (tmp_path / path).exists(), f"{command} says that it wrote {path}"


def test_the_eleven_lines_of_python_paint_a_picture(tmp_path, monkeypatch):
    """From the project's root, with two steps instead of fifty."""
    code, = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 12
    monkeypatch.chdir(ROOT)
    exec(code.replace("steps=50", "steps=2").replace('"sneaker.png"', repr(str(tmp_path / "sneaker.png"))), {})
    assert open_image(tmp_path / "sneaker.png").size == (128, 128)


def test_equation_3_stands_in_the_readme_as_in_the_code():
    """Up to its docstring and the hook that shows its maps."""
    shown = [line.strip() for line in blocks(README, "py")[0].splitlines() if line]
    source = [line.strip() for line in (ROOT / "attention.py").read_text(encoding="utf-8").splitlines()]
    start = source.index(shown[0])
    assert [line for line in source[start:] if line in shown][: len(shown)] == shown


def test_the_readme_is_short_and_counts_lines():
    """To the line for the method, to a tenth for what stands beside it. It has at most 1,200 words."""
    rows = re.findall(r"^\| (\[.*?) \| ([\d,]+) \|", README, re.M)
    assert len(README.split()) <= 1200 and len(rows) >= 12
    for number, (row, lines) in enumerate(rows):
        paths = [ROOT / path for path in re.findall(r"\]\(([^)]+)\)", row) if not path.endswith(".md")]
        files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
        counted = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert abs(int(lines.replace(",", "")) - counted) <= (0 if number < 6 else counted / 10), row


@pytest.mark.parametrize("page", PAGES, ids=("README", "RESULTS", "REAL_WEIGHTS"))
def test_every_link_and_picture_of_a_page_is_there(page):
    text = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]
