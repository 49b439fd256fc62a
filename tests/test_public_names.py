"""Everything that a user reads imports public names only: those of `hf_layerfuse.__all__`, from the top level."""

import ast
import re
from collections.abc import Iterator

import nbformat
import pytest
from helpers import ROOT

import hf_layerfuse

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "model_cards").glob("*/README.md"),
]
NOTEBOOKS = list((ROOT / "notebooks").glob("*.ipynb"))


def code_of(path) -> list[str]:
    """Python of a page, block by block, or of a notebook, cell by cell."""
    if path.suffix == ".ipynb":
        return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    blocks = re.findall(r"^( *)```(?:python|py)\n(.*?)^ *```$", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def taken_from(code: str) -> Iterator[str]:
    """Names that code takes from this package, by their full path."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hf_layerfuse")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_layerfuse":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_layerfuse":
            yield f"hf_layerfuse.{node.attr}"


PUBLIC = {"hf_layerfuse", "hf_layerfuse.__version__", *(f"hf_layerfuse.{name}" for name in hf_layerfuse.__all__)}


@pytest.mark.parametrize("path", sorted([*PAGES, *NOTEBOOKS]), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_public_names_are_imported(path):
    internal = {name for code in code_of(path) for name in taken_from(code)} - PUBLIC
    assert not internal, f"import public names only, or make these public: {sorted(internal)}"


def test_public_names_exist():
    for name in hf_layerfuse.__all__:
        assert hasattr(hf_layerfuse, name), name


def test_imports_are_seen():
    """The README, the guide and every notebook import something; each way to reach an internal name is found."""
    for path in (*PAGES[:2], *NOTEBOOKS):
        assert any(name for code in code_of(path) for name in taken_from(code)), path
    code = "import hf_layerfuse.plan as p\nfrom hf_layerfuse.plan import words\nhf_layerfuse.plan.Plan\nimport torch"
    assert set(taken_from(code)) == {"hf_layerfuse.plan", "hf_layerfuse.plan.words"}
