"""The example notebooks run, and keep what they show."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "docs/examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    """What the last cell with code puts on the page, by kind."""
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return [kind for output in last.outputs for kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebooks:
    # The kernel and its client leave sockets and loops to the garbage collector.
    @pytest.mark.filterwarnings("default")
    def test_a_notebook_runs(self, path, tmp_path, monkeypatch):
        """
        Every cell runs in a new kernel, and the last one draws a figure.
        """
        monkeypatch.delenv("MPLBACKEND", raising=False)
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.pop("outputs", None)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()

        assert "image/png" in shown(notebook)

    def test_it_keeps_its_outputs(self, path):
        """
        A reader of the site sees the figure; no cell has failed, and none is out of order.
        """
        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

        assert "image/png" in shown(notebook)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
