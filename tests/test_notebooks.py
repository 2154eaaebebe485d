"""Tests: the notebooks run from top to bottom, and are committed with outputs, small enough for a code host."""

from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
SHORTER = {'"--steps", "120"': '"--steps", "20"', '"--sample-every", "60"': '"--sample-every", "10"'}
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_error(path, tmp_path):
    """From notebooks/, as an editor starts it; outputs are thrown away. Lecture 3 trains for fewer steps."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for whole, short in SHORTER.items():
            cell.source = cell.source.replace(whole, short)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert path.stat().st_size < 1.5e6
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], "run it from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_are_five():
    assert len(NOTEBOOKS) == 5
