"""Tests: the README's commands do what it says, through the real command line, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_lama import random_lama
from test_paint_by_example import (
    folder as example,  # noqa: F401 (a fixture, and what it needs)
    pbe,  # noqa: F401
)

from rivals.lama import LAMA_FILE
from support.files import read_json, write_json
from weights import save_module

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)  # sh: with placeholders for files of one's own
BLOCKS = [block.replace("\\\n", " ") for kind, block in FENCES if not kind]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python ")]
# Options that make each program's run short, added at the end of its command: the last one counts
SHORT = {"generate.py": "--steps 2", "train.py": "--steps 2 --batch 4",
         "toy/world.py": "--base 8 --ads 8 --bg1k 8 --pairs 9",
         "evaluate.py": "--steps 1 --controlnet toy/cg --cg-plain toy/cg-plain --guide-clip toy/clip --lama toy/lama "
                        "--paint-by-example toy/example",
         "study.py": "--steps 1"}


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_order(example, tmp_path):  # noqa: F811
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("support", "rivals", "toy"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("data", "__pycache__"))
    # stand-ins for networks that are trained on first use
    plain = shutil.copytree(ROOT / "toy" / "cg", tmp_path / "toy" / "cg-plain")
    write_json(read_json(plain / "config.json") | {"attention": "plain"}, plain / "config.json")
    shutil.copytree(example, tmp_path / "toy" / "example")
    save_module(random_lama(), tmp_path / "toy" / "lama", LAMA_FILE)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert {command.split()[1] for command in COMMANDS} == {*SHORT}
    for command in COMMANDS:
        program = command.split()[1]
        done = subprocess.run(["bash", "-c", f"{command} {SHORT[program]}"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        for line in done.stdout.splitlines() if program == "generate.py" else ():
            if line.startswith("out"):
                assert (tmp_path / re.split(": | ", line)[0]).exists(), f"{command} says that it wrote {line}"


def test_every_link_and_picture_of_the_readme_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]
