"""The notebooks run, and show what they print."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_prints_what_it_shows(path, monkeypatch, tmp_path, capsys):
    """The code cells run in order in an empty directory, and print the text that is kept in the notebook."""
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    names: dict = {}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    for cell in cells:
        source = "".join(cell["source"]).replace("plt.show()", "plt.close('all')")  # agg shows nothing, and says so
        exec(compile(source, path.name, "exec"), names)
        shown = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
        assert capsys.readouterr().out == shown
