"""The README and the pages show the measurements of the benchmarks, and name everything that exists."""

import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT, TINY

import hf_layerfuse

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_come_from_the_results():
    """`python benchmarks/readme.py` would change no page, and every table that it can make is on one."""
    benchmark = load(ROOT / "benchmarks" / "readme.py")
    pages = [path.read_text(encoding="utf-8") for path in benchmark.PAGES]
    assert [benchmark.filled(page) for page in pages] == pages
    assert set(re.findall("<!-- table: (.+?) -->", "".join(pages))) == benchmark.tables().keys()


def test_a_changed_figure_is_written_anew():
    """A number typed by hand is overwritten, and an unknown table is an error."""
    benchmark = load(ROOT / "benchmarks" / "readme.py")
    [place] = re.findall("<!-- table: headlines -->.*?<!-- end -->", README, flags=re.DOTALL)
    assert benchmark.filled(re.sub(r"\d", "7", place)) == place
    with pytest.raises(KeyError, match="of nothing"):
        benchmark.filled("<!-- table: of nothing -->\n<!-- end -->")


def test_names_everything_that_is_there():
    """Each architecture and recipe is in the README; each recipe is also on the page about running."""
    for name in TINY:
        assert name in README
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"(recipes/{path.name})" in README
        assert f"(../recipes/{path.name})" in RUNNING


def folders(parent: Path) -> set[Path]:
    """Folders directly inside a folder of the checkout, without hidden and ignored ones."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").replace("/", "").split()
    found = {path for path in parent.iterdir() if path.is_dir() and path.name not in ignored}
    return {path for path in found if not path.name.startswith((".", "__")) and not path.name.endswith(".egg-info")}


def test_the_tree_is_that_of_the_checkout():
    """The tree in CONTRIBUTING.md names every top-level folder and every room, and nothing else."""
    section = CONTRIBUTING[CONTRIBUTING.index("## Where things are") :]
    parents, named = [ROOT], set()
    for line in section.split("```")[1].strip().splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        path = parents[len(indent) // 2] / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
        parents[len(indent) // 2 + 1 :] = [path]
        named.add(path)
    package = ROOT / "hf_layerfuse"
    rooms = folders(package).union(*map(folders, folders(package)))
    assert folders(ROOT) | rooms == {path for path in named if path.is_dir()}


def test_public_names_are_documented():
    """Everything in `__all__` has a docstring."""
    for name in hf_layerfuse.__all__:
        assert getattr(hf_layerfuse, name).__doc__


@pytest.mark.parametrize(
    "name", ["fuse", "plan_fusion", "apply", "verify", "register_architecture", "architecture_for"]
)
def test_docstrings_name_their_errors(name):
    """A public function that can raise has a Raises section."""
    assert "Raises:" in getattr(hf_layerfuse, name).__doc__
