"""The tutorial runs as it is printed, shows its pictures, and what it says of them is so."""

import ast
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"


def test_the_file_has_no_outputs():
    cells = nbformat.read(PATH, as_version=4).cells
    assert len(cells) < 20
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)
    for cell in code:
        ast.parse(cell.source)
    assert "metadata" in json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The cells after a run, and what the last one, which is the test's, has printed."""
    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(repr((chi, chance, losses)))"))
    folder = tmp_path_factory.mktemp("tutorial")
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    *cells, last = notebook.cells
    return cells, ast.literal_eval(last.outputs[0].text)


def output_of(cells, source):
    """What a notebook shows of the cell that ends in a line, by kind."""
    (cell,) = [cell for cell in cells if cell.source.splitlines()[-1] == source]
    assert cell.cell_type == "code"
    (output,) = cell.outputs
    return output


def test_it_says_nothing_but_what_it_prints_and_shows(executed):
    """No warning, above all."""
    cells, _ = executed
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}


def test_the_picture_is_shown_without_pyplot(executed):
    output = output_of(executed[0], "monitor.plot()")
    assert {"image/png", "text/plain"} <= output.data.keys()
    assert output.metadata["image/png"].keys() == {"width", "height"}


def test_monitor_and_subspace_are_tables(executed):
    cells, _ = executed
    monitor = output_of(cells, "monitor").data
    assert "<table>" in monitor["text/html"]
    assert "chi_gradient" in monitor["text/html"]
    assert monitor["text/plain"].startswith("Monitor(rows=10, steps 0 to 180, every=20, ")
    subspace = output_of(cells, "subspace").data
    assert '<th style="text-align: left">eigenvalues</th>' in subspace["text/html"]
    assert subspace["text/plain"].startswith("DominantSubspace(k=9, eigenvalues=[")


def test_what_it_says_of_the_two_subspaces_is_so(executed):
    chi, chance, losses = executed[1]
    assert chi > 0.5 > 5 * chance
    learned = {name: losses["where they begin"] - loss for name, loss in losses.items()}
    assert learned["SGD"] > 0
    assert learned["BulkSGD"] > 0.7 * learned["SGD"]
    assert learned["DomSGD"] < 0.3 * learned["SGD"]
