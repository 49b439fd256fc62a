"""Imports point down only, so that each part can be read, tested and replaced without those above it."""

import ast
from pathlib import Path

import pytest

import hf_layerfuse

PACKAGE = Path(hf_layerfuse.__file__).parent

# from top to bottom; a module may import those of lower rows, a folder counts as one module
RANKS = (
    ("console", "__main__"),
    ("cli",),
    ("job",),
    ("rounds",),
    ("rundata",),
    ("__init__",),
    ("card", "page", "overview", "publish"),
    ("report", "plots", "heal", "latency", "layermap", "data", "teacher"),
    ("loop", "splits"),
    ("labels",),
    ("evaluate", "objective", "checkpoint", "output"),
    ("auto",),
    ("collapse", "merge"),
    ("verify", "search", "chaintables"),
    ("budget", "loading", "straighten"),
    ("worth",),
    ("blocktimes", "trials"),
    ("tune", "limits"),
    ("apply", "refit"),
    ("chainfit",),
    ("methods", "align", "modeling"),
    ("chainedits",),
    ("targets",),
    ("convfit", "distances", "grouping", "select", "sizes"),
    ("found",),
    ("repair",),
    ("walk",),
    ("taps", "lines"),
    ("edits", "calibration", "mapfit"),
    ("forms",),
    ("inputs", "operators", "parts", "relaxed"),
    ("accelerators", "schedule"),
    ("adapters", "recipe"),
    ("math", "plan", "prediction", "collate"),
    ("pull", "lora", "timing"),
    ("table", "homotopy"),
    (
        "errors",
        "fingerprint",
        "mixture",
        "modes",
        "processes",
        "sampling",
        "segments",
        "sharding",
        "shipping",
        "states",
        "tasks",
    ),
)
RANK = {name: rank for rank, row in enumerate(RANKS) for name in row}


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, wherever in the file; `from a import b` counts as `a.b`."""
    package = ["hf_layerfuse", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


def module_of(name: str) -> str:
    """The module of this package that an absolute name belongs to: `hf_layerfuse.math.cluster` is `math`."""
    first = [*name.split("."), "__init__"][1]
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file() else "__init__"


def graph() -> dict[str, set[str]]:
    """Module -> all absolute names that it imports."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(name, set()).update(imports_of(path))
    return found


def inside(names: set[str]) -> set[str]:
    return {module_of(name) for name in names if name.split(".")[0] == "hf_layerfuse"}


GRAPH = graph()


def test_every_module_has_a_rank():
    """A new module has to say where it belongs: add it to RANKS."""
    assert GRAPH.keys() == RANK.keys()


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_down(module):
    """No module imports one of its own row or above."""
    wrong = {other for other in inside(GRAPH[module]) - {module} if RANK[other] <= RANK[module]}
    assert not wrong, f"{module} imports {wrong}, which are not below it"


@pytest.mark.parametrize("module", ["heal", "evaluate"])
def test_training_and_measuring_take_any_module(module):
    """`heal` and `evaluate` know nothing of blocks, not even through what they import."""
    reached, todo = set(), {module}
    while todo:
        reached |= todo
        todo = set().union(*(inside(GRAPH[name]) for name in todo)) - reached
    assert not reached & {"methods", "adapters", "edits", "calibration", "modeling", "auto"}


def test_what_the_light_modules_do_without():
    """`math` needs no transformers, `plan` and `errors` need no torch either."""
    top = {module: {name.split(".")[0] for name in names} for module, names in GRAPH.items()}
    assert not top["math"] & {"transformers", "accelerate", "datasets", "huggingface_hub"}
    assert not (top["plan"] | top["errors"]) & {"torch", "transformers", "numpy", "scipy"}
    assert "torch" in top["math"], "nothing found where something is: this test is blind"
