"""The notebooks run in a kernel, and their stored outputs are up to date."""

import importlib.util
import re
from itertools import zip_longest

import nbformat
import pytest
from helpers import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# a sign belongs to a number at the start of a word, or after a bracket
NUMBER = re.compile(r"(?:(?<!\S)[-+]|(?<=\()[-+])?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?")

# Where a training ends depends on the processor and on the versions of Python and torch: perplexities by some percent.
RELATIVE, POINTS = 0.25, 4.0


def runner():
    """`notebooks/run.py`, which stores the outputs."""
    spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell) -> list[tuple[str, str]]:
    """Outputs of a cell as (kind, text); pictures have no text, and text printed in parts is joined."""
    found: list[tuple[str, str]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            before = found.pop()[1] if found and found[-1][0] == output.name else ""
            found.append((output.name, before + output.text))
        elif output.output_type == "error":
            found.append(("error", output.ename))
        elif "image/png" in output.data:
            found.append(("picture", ""))
        else:
            found.append(("text", output.data["text/plain"]))
    return found


def form_of(text: str) -> str:
    """A text without numbers, and without the whitespace and rules that align columns."""
    return re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip()


def same_number(kept: str, now: str) -> bool:
    """Whether two numbers match: whole numbers are counts and must be equal; shares and measurements must be close."""
    before, after = (float(text.rstrip("%").replace(",", "")) for text in (kept, now))
    if kept.endswith("%"):
        return abs(before - after) <= POINTS
    return before == after if "." not in kept else after == pytest.approx(before, rel=RELATIVE, abs=0.005)


def difference(kept, now) -> str:
    """Difference between the stored and the new outputs of a cell, in words; empty if there is none.

    In a cell with the tag `varies`, the numbers depend on the machine; with the tag `free`, the words do too.
    """
    tags = kept.metadata.get("tags", [])
    for (kind, before), (kind_now, after) in zip_longest(shown(kept), shown(now), fillvalue=("nothing", "")):
        if kind != kind_now:
            return f"{kind} is kept, and {kind_now} is shown: {before or after}"
        if "free" in tags:
            continue
        if form_of(before) != form_of(after):
            return f"the text is another one:\n{before}\nand now:\n{after}"
        if "varies" in tags:
            continue
        pairs = zip(NUMBER.findall(before), NUMBER.findall(after), strict=True)
        if other := [pair for pair in pairs if not same_number(*pair)]:
            return f"the numbers {other} differ:\n{before}\nand now:\n{after}"
    return ""


def test_there_are_notebooks():
    """There is one notebook for each method, and one for the choice of a target."""
    expected = ["01_fuse_gpt2", "02_collapse_bert", "03_merge_resnet", "04_sweep_and_knee"]
    assert [path.stem for path in NOTEBOOKS] == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_as_it_ran(path):
    """A notebook was run from top to bottom, without errors, noise or paths of a machine, and is small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    kinds = [kind for cell in code(notebook) for kind, _ in shown(cell)]
    assert {"stdout", "picture"} <= set(kinds) <= {"stdout", "picture", "text"}
    for cell in code(notebook):
        asks = "print(" in cell.source or "plt.show()" in cell.source
        assert shown(cell) or not asks, cell.source
        for _, text in shown(cell):
            assert not re.search(r"(?<![\w.])(/\w+){2}|[A-Z]:\\| at 0x", text), text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_is_kept(path, tmp_path):
    """In its own kernel and an empty directory, a notebook shows the same text, and numbers close to the stored
    ones."""
    kept = nbformat.read(path, as_version=4)
    now = runner().executed(path, tmp_path)
    for before, after in zip(code(kept), code(now), strict=True):
        assert not difference(before, after), f"{difference(before, after)}\n\nof the cell\n{before.source}"


def cell(text: str, *tags: str):
    made = nbformat.v4.new_code_cell(metadata={"tags": list(tags)})
    made.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return made


@pytest.mark.parametrize(
    ("kept", "now", "differ"),
    [
        ("perplexity 41.2", "perplexity 43.0", False),
        ("perplexity 41.2", "perplexity 71.2", True),
        ("a   9.9", "a  10.1", False),
        ("accuracy 88.0%", "accuracy 89.5%", False),
        ("accuracy 88.0%", "accuracy 78.0%", True),
        ("+0.3% (-0.1% to +0.7%)", "-0.2% (-0.5% to +0.1%)", False),
        ("x-3", "x+3", True),
        ("1,024 parameters", "1,025 parameters", True),
        ("same logits: True", "same logits: False", True),
        ("one line", "one line\nand another", True),
    ],
)
def test_differences_are_seen(kept, now, differ):
    """Words and counts are compared exactly, and measurements approximately; tags relax only what they say."""
    assert bool(difference(cell(kept), cell(now))) == differ
    assert bool(difference(cell(kept, "varies"), cell(now, "varies"))) == (form_of(kept) != form_of(now))
    assert not difference(cell(kept, "free"), cell(now, "free"))
    assert difference(cell(kept, "free"), nbformat.v4.new_code_cell())
