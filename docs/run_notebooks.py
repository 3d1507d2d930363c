"""Notebooks of the documentation -> the same notebooks, run anew, with their outputs."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))
LIMIT_S = 120


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in a fresh kernel and keep what people read: no progress lines, times or ids.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    private = Config(KernelManager={"transport": "ipc"})  # no port that others could connect to
    client = NotebookClient(
        notebook, config=private, kernel_name="python3", timeout=LIMIT_S, record_timing=False, coalesce_streams=True
    )
    client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # the same picture as the PNG beside it
    notebook.metadata = {"language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("run_notebooks.py takes no arguments; it runs all notebooks of docs/notebooks")
    for path in NOTEBOOKS:
        nbformat.write(run(nbformat.read(path, as_version=4)), path)
