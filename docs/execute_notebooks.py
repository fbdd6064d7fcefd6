"""Executes the notebooks of docs/notebooks into build/notebooks, from where the site takes their outputs: `make notebooks`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

NOTEBOOKS = Path(__file__).with_name("notebooks")
OUT = Path(__file__).parents[1] / "build" / "notebooks"
LONGEST_CELL_S = 1800


def execute(source: Path, out: Path, folder: Path) -> None:
    """Writes a notebook with its outputs; its cells run in `folder`. A cell that raises ends it with nbclient's error."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(notebook, timeout=LONGEST_CELL_S, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore"})  # tqdm would ask for widgets
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            execute(NOTEBOOKS / f"{name}.ipynb", OUT / f"{name}.ipynb", Path(folder))
