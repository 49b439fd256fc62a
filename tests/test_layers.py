"""Rooms of the package import only rooms below them, so that each can be read, tested and replaced on its own."""

import ast
import re
from pathlib import Path

import pytest

import hf_layerfuse

PACKAGE = Path(hf_layerfuse.__file__).parent
TESTS = Path(__file__).parent

# from top to bottom; a room may import those of lower rows, and nothing of its own row
ROOMS = (
    ("__main__", "__init__"),
    ("cli",),
    ("cli_options",),
    ("api", "pipeline"),
    ("methods", "discovery"),
    ("calibration", "training"),
    ("models", "data"),
    ("math", "plan", "recipe", "evaluation"),
    ("errors",),
)
RANK = {name: rank for rank, row in enumerate(ROOMS) for name in row}


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, anywhere in the file; `from a import b` counts as `a.b`."""
    package = ["hf_layerfuse", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


def room_of(name: str) -> str:
    """The room that an absolute name belongs to: `hf_layerfuse.math.cluster` is in `math`."""
    first = [*name.split("."), "__init__"][1]
    return first if first in RANK else "__init__"


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_every_file_is_in_a_room():
    """ROOMS names every folder and file at the top of the package."""
    assert {file.split("/")[0].removesuffix(".py") for file in FILES} == RANK.keys()


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    """No file imports from another room of its own row or from a higher row; `training` imports only the modules of
    `models`."""
    room = file.split("/")[0].removesuffix(".py")
    names = {name for name in imports_of(PACKAGE / file) if name.split(".")[0] == "hf_layerfuse"}
    wrong = {name for name in names if room_of(name) != room and RANK[room_of(name)] <= RANK[room]}
    if room == "training":
        wrong |= {name for name in names if room_of(name) == "models" and ".modules." not in name}
    assert not wrong, f"{file} imports {sorted(wrong)}, which are not below it"


def test_light_rooms_do_without_heavy_libraries():
    """`math` does not need transformers; `plan` and `errors` do not need torch either."""
    top: dict[str, set[str]] = {}
    for file in FILES:
        room = file.split("/")[0].removesuffix(".py")
        top.setdefault(room, set()).update(name.split(".")[0] for name in imports_of(PACKAGE / file))
    assert not top["math"] & {"transformers", "accelerate", "datasets", "huggingface_hub"}
    assert not (top["plan"] | top["errors"] | top["recipe"]) & {"torch", "transformers", "numpy", "scipy"}
    assert "torch" in top["math"], "nothing found where something is: this test is blind"


def test_no_public_name_is_a_module():
    """`import hf_layerfuse.x as x` gives a module, never a function of that name."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(hf_layerfuse.__all__)


def test_no_test_imports_another():
    """A test module imports shared code from `helpers`, `runs`, `trainings` and `hub`, never from another test module.
    The same holds for programs that tests start, which are strings."""
    modules = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest"}
    wrong, imported = {}, set()
    for path in sorted(TESTS.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        names |= set(re.findall(r"^(?:from|import) (\w+)", "\n".join(texts), flags=re.MULTILINE))
        imported |= names
        if taken := {name for name in names if name.split(".")[0] in modules}:
            wrong[path.relative_to(TESTS).as_posix()] = sorted(taken)
    assert not wrong, f"these test modules import others: {wrong}"
    assert {"helpers", "trainings"} <= imported, "nothing found where something is: this test is blind"


def test_names_of_test_modules_differ():
    """Test folders are not packages, so pytest needs a unique name for each file."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))
