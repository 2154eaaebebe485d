"""Tests: the lectures run from top to bottom, and are committed with outputs, small enough for a code host to show."""

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LECTURES = sorted(FOLDER.glob("0*.ipynb"))
SHORTER = {  # lecture 3 trains for fewer steps, lecture 6 paints fewer pictures, all paint in fewer steps
    "STEPS, BATCH = 120, 8": "STEPS, BATCH = 12, 8",
    "n = 64": "n = 24",
    "steps=15": "steps=2",
    "HOW = SamplerSettings(steps=10)": "HOW = SamplerSettings(steps=2)",
    "SamplerSettings(steps=25": "SamplerSettings(steps=2",
}


def pictures(output) -> set[str]:
    """The kinds of picture in which an output is stored: pages of pictures, and plots."""
    return {"image/jpeg", "image/png"} & {*output.get("data", {})}


each_notebook = pytest.mark.parametrize("path", [*LECTURES, FOLDER / "solutions.ipynb"], ids=lambda path: path.stem)
each_lecture = pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.stem)


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_without_error(path):
    """From notebooks/, as an editor starts it, with fewer steps; outputs are thrown away."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for whole, short in SHORTER.items():
            cell.source = cell.source.replace(whole, short)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()


@each_notebook
def test_a_notebook_is_committed_as_it_ran_from_top_to_bottom(path):
    """Without an error, a warning, or a path of the machine that ran it, and with pictures, each stored once."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [text for text in texts if re.search(r"/(home|root|tmp|work|Users)/|Warning", text)]
    kinds = [len(pictures(output)) for output in outputs]
    assert kinds.count(1) >= 4 and max(kinds) == 1


@each_lecture
def test_a_lecture_states_its_question_and_ends_with_exercises_that_have_times_and_solutions(path):
    first, *_, last = (cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert all(word in first.lower() for word in ("the question.", "time:", "minute", "prerequisites:", "section"))
    assert last.startswith("## Exercises") and "solutions.ipynb" in last
    exercises = re.split(r"^\d\. ", last, flags=re.M)[1:]
    assert len(exercises) >= 3 and all("minute" in text for text in exercises)


@each_lecture
def test_a_lecture_asks_for_a_prediction_before_each_picture(path):
    asked = False
    for cell in nbformat.read(path, as_version=4).cells:
        asked |= cell.cell_type == "markdown" and "**Predict first:**" in cell.source
        if cell.cell_type == "code" and any(map(pictures, cell.outputs)):
            assert asked, cell.source
            asked = False


def test_the_notebooks_are_six_lectures_and_the_solutions_small_enough_for_a_code_host():
    assert len(LECTURES) == 6
    files = [*FOLDER.glob("*.*"), *(FOLDER / "pictures").iterdir()]
    assert sum(file.stat().st_size for file in files) < 8e6
