"""Run notebooks from top to bottom, and keep in them what they show.

    python notebooks/run.py [NOTEBOOK ...]

All of them, if none is named; each in a kernel of its own and in an empty directory.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def executed(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """The notebook with what it shows now; what it writes goes to the folder."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=resources)
    client.execute(env={**os.environ, "DS_ACCELERATOR": "cpu"})  # or DeepSpeed, where it is, prints what it has found
    notebook.metadata.language_info = {"name": "python"}  # and not the version that it was run with
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(map(str, Path(__file__).parent.glob("*.ipynb")))):
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, folder)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
