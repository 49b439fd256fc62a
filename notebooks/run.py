"""Run notebooks from top to bottom, and store their outputs.

    python notebooks/run.py [NOTEBOOK ...]

By default, this runs all notebooks. Each runs in its own kernel and in an empty directory.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def executed(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """The notebook with new outputs; files that it writes go to the folder."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=resources)
    client.execute(env={**os.environ, "DS_ACCELERATOR": "cpu"})  # or DeepSpeed, if installed, prints the device
    notebook.metadata.language_info = {"name": "python"}  # without the version of Python
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(map(str, Path(__file__).parent.glob("*.ipynb")))):
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, folder)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
