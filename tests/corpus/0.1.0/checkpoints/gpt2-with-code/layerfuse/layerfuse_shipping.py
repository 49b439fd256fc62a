# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""The code of fused classes beside a checkpoint, for those who have Transformers and not this library."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import resolve_name
from pathlib import Path

FOLDER = "layerfuse"
"""Where the code lies in a checkpoint, side by side, because Transformers follows no import into another folder."""


def ship(module: str, directory: str | os.PathLike) -> str:
    """Write a module of this package, and all that it imports of the package, to a checkpoint.

    What was shipped can be shipped again, from a process that has the library or only the shipped code.

    Args:
        module: full name of one that has been imported.
        directory: the checkpoint.

    Returns:
        What `auto_map` in `config.json` calls the module; `.Class` is appended to it.
    """
    root = sys.modules[module].__package__
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in _needed(module):
        text = _source(name)
        for line, target in _imports(name):
            flat = re.sub(r"from\s+\.\S*\s+import", f"from .{_flat(target, root)} import", line, count=1)
            text = text.replace(line, flat, 1)
        if not text.startswith("#"):  # which was shipped before
            text = f"# From hf_layerfuse {version('hf-layerfuse')}; SPDX-License-Identifier: Apache-2.0\n{text}"
        (folder / f"{_flat(name, root)}.py").write_text(text, encoding="utf-8")
    return f"{FOLDER}/{_flat(module, root)}"


def _needed(module: str) -> list[str]:
    found = [module]
    for name in found:  # which grows
        found += {target: None for _, target in _imports(name) if target not in found}
    return found


def _imports(name: str) -> Iterator[tuple[str, str]]:
    """The line in which each relative import of a module begins, and what it imports from."""
    text, package = _source(name), sys.modules[name].__package__
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield lines[node.lineno - 1], resolve_name("." * node.level + (node.module or ""), package)


def _source(name: str) -> str:
    return Path(sys.modules[name].__file__).read_text(encoding="utf-8")


def _flat(name: str, root: str) -> str:
    """`hf_layerfuse.math.conv` is `layerfuse_math_conv`."""
    flat = name.removeprefix(f"{root}.").replace(".", "_")
    return flat if flat.startswith("layerfuse_") else f"layerfuse_{flat}"
