"""The quick-start notebook: its cells run, in a kernel of their own, and what it shows came from such a run."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


def said(cell) -> str:
    return "".join(str(output.get("text") or output.get("data", {}).get("text/plain")) for output in cell.outputs)


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_what_is_shown_is_short_and_no_error(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # one run, from top to bottom
    for cell in code:
        assert all(output.output_type == "stream" and output.name == "stdout" for output in cell.outputs)
        assert said(cell).count("\n") <= 20
    assert "recall@10" in said(code[-1])


@pytest.mark.e2e
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shown = [said(cell) for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    ran = [said(cell) for cell in notebook.cells if cell.cell_type == "code"]
    # a command that fails ends its cell, not the notebook: what it should have said is missing
    assert [text.count("\n") for text in ran] == [text.count("\n") for text in shown]
    assert (tmp_path / "quickstart" / "report" / "report.html").is_file()
