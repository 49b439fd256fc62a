"""Code of fused classes in a checkpoint, for users who have Transformers but not this library."""

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
"""Folder of the code in a checkpoint. It is flat, because Transformers does not follow imports into other folders."""


def save_code(module: str, directory: str | os.PathLike) -> str:
    """Write a module of this package, and all modules of the package that it imports, to a checkpoint.

    Saved code can be saved again, by a process with the library or with the saved code only.

    Args:
        module: Full name of an imported module.
        directory: Directory of the checkpoint.

    Returns:
        The name of the module in `auto_map` of `config.json`; the caller appends `.Class`.
    """
    package = sys.modules[module].__package__
    root = "hf_layerfuse" if package.startswith("hf_layerfuse.") else package
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in _needed(module):
        text = _source(name)
        for line, target in _imports(name):
            flat = re.sub(r"from\s+\.\S*\s+import", f"from .{_flat(target, root)} import", line, count=1)
            text = text.replace(line, flat, 1)
        if not text.startswith("#"):  # code that was saved before has this line already
            text = f"# From hf_layerfuse {version('hf-layerfuse')}; SPDX-License-Identifier: Apache-2.0\n{text}"
        (folder / f"{_flat(name, root)}.py").write_text(text, encoding="utf-8")
    return f"{FOLDER}/{_flat(module, root)}"


def _needed(module: str) -> list[str]:
    found = [module]
    for name in found:  # the list grows during the loop
        found += {target: None for _, target in _imports(name) if target not in found}
    return found


def _imports(name: str) -> Iterator[tuple[str, str]]:
    """First line of each relative import of a module, and the full name of the imported module."""
    text, package = _source(name), sys.modules[name].__package__
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield lines[node.lineno - 1], resolve_name("." * node.level + (node.module or ""), package)


def _source(name: str) -> str:
    return Path(sys.modules[name].__file__).read_text(encoding="utf-8")


def _flat(name: str, root: str) -> str:
    """Flat name of a module: `hf_layerfuse.math.conv` becomes `layerfuse_math_conv`."""
    flat = name.removeprefix(f"{root}.").replace(".", "_")
    return flat if flat.startswith("layerfuse_") else f"layerfuse_{flat}"
