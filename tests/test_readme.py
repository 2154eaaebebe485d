"""Tests: what the pages say is so: their commands, through the real command line, in a copy of the project; their code,
their lengths, their links.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import random_lama
from test_paint_by_example import (
    folder as example,  # noqa: F401 (a fixture, and what it needs)
    pbe,  # noqa: F401
)

from rivals.lama import LAMA_FILE
from support.images import open_image
from support.options import Parser
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


def test_commands_with_placeholders_are_ones_that_their_programs_take(monkeypatch):
    class Taken(Exception):
        pass

    def parse(parser, arguments):
        argparse.ArgumentParser.parse_args(parser, arguments)
        raise Taken

    monkeypatch.setattr(Parser, "parse_args", parse)
    code = "".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ").replace("$seed", "1")
    commands = [line.strip() for line in code.splitlines() if line.strip().startswith("python ")]
    assert len(commands) > 10
    for command in commands:
        _, program, *arguments = shlex.split(command, comments=True)
        with pytest.raises(Taken):
            import_module(program.removesuffix(".py").replace("/", ".")).main(arguments)


def test_the_eleven_lines_of_python_paint_a_picture(tmp_path, monkeypatch):
    """The toy's page's, from the project's root, with two steps instead of fifty."""
    code, = blocks((ROOT / "toy/README.md").read_text(encoding="utf-8"), "python")
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


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_readme_is_short_and_counts_lines():
    """To the line for the method, to a tenth for what stands around it. It has at most 900 words."""
    rows, counted = re.findall(r"^\| (\[.*?) \| ([\d,]+) \|", README, re.M), []
    assert len(README.split()) <= 900 and len(rows) == 12
    for row, _ in rows:
        paths = [ROOT / path for path in re.findall(r"\]\(([^)]+)\)", row)]
        files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
        counted.append(sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files))
    said = [number(lines) for _, lines in rows]
    method, around = map(number, re.search(r"The method in ([\d,]+) lines.* in ([\d,]+)\.", README).groups())
    assert said[:6] == counted[:6] and method == sum(counted[:6])
    assert [*said, around] == pytest.approx([*counted, sum(counted[6:])], rel=0.1)


@pytest.mark.parametrize("name, lines", [("PAPER.md", 130), ("RESULTS.md", 180), ("toy/README.md", 150)])
def test_the_pages_beside_it_are_short_too(name, lines):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= lines


LINKED = ("README.md", "PAPER.md", "RESULTS.md", "REAL_WEIGHTS.md", "toy/README.md")


def headings(page: Path) -> set[str]:
    """A page's anchors, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", LINKED)
def test_every_link_and_picture_of_a_page_is_there(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    links = [link for link in map("".join, links) if "://" not in link]
    for path, _, anchor in (link.partition("#") for link in links):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert target.suffix != ".md" or not anchor or anchor in headings(target), f"{path}#{anchor}"
    assert links


@pytest.mark.parametrize("name", LINKED)
def test_every_link_to_code_names_what_stands_there(name):
    """[`a.b`](file.py) where the file defines a and b, and [Eq. 3](file.py#L7) where line 7 holds its words."""
    page = (ROOT / name).read_text(encoding="utf-8")
    for words, path, number in re.findall(r"\[([^\]]+)\]\(([\w/]+\.py)(?:#L(\d+))?\)", page):
        source = ((ROOT / name).parent / path).read_text(encoding="utf-8")
        if number:
            lines = [n for n, line in enumerate(source.splitlines(), 1) if words.strip("`") in line]
            assert int(number) in lines, f"{path}: {words} stands in {lines}, not in {number}"
        elif words.startswith("`"):
            for part in words.strip("`").split("."):
                assert re.search(rf'(^|def |class |"){part}\b', source, re.M), f"{path} lacks {part}"
