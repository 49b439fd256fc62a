"""A table as Python source, to review and commit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..models.architectures import Placeholder, ZeroAttention, ZeroBlock

_WIDTH = 120


def source_of(name: str, fields: Mapping[str, Any]) -> str:
    """Source of a `TransformerArchitecture`, with the placeholders that it needs.

    Args:
        name: Name of the class.
        fields: Its attributes. `skip` holds classes: kind -> path -> placeholder.
    """
    classes = list(dict.fromkeys(each for parts in fields["skip"].values() for each in parts.values()))
    own = [each for each in classes if issubclass(each, Placeholder)]
    library = sorted({each.__name__ for each in classes if each in (ZeroAttention, ZeroBlock)} | _IMPORTS)
    library = sorted([*library, "Placeholder"]) if own else library
    lines = ["from torch import nn", ""] if nn.Identity in classes else []
    lines += [f"from hf_layerfuse import {', '.join(library)}", "", ""]
    for each in own:
        lines += [f"class {each.__name__}(Placeholder):"]
        lines += [f"    outputs = {each.outputs}"] if each.outputs is not None else []
        lines += [f"    passed = {_text(each.passed, 4)}"] if each.passed else []
        lines += ["    pass"] if each.outputs is None and not each.passed else []
        lines += ["", ""]
    lines += ["@register_architecture", f"class {name}(TransformerArchitecture):"]
    lines += [f"    {field} = {_text(value, 4, len(field) + 3)}" for field, value in fields.items()]
    return "\n".join(lines) + "\n"


_IMPORTS = {"TransformerArchitecture", "register_architecture"}


def _text(value: Any, indent: int, before: int = 0) -> str:
    """A value as Python source, on one line if it fits."""
    line = _line(value)
    if not isinstance(value, Mapping) or indent + before + len(line) <= _WIDTH:
        return line
    inner = " " * (indent + 4)
    entries = [f"{inner}{_line(key)}: {_text(entry, indent + 4, len(_line(key)) + 3)}," for key, entry in value.items()]
    return "\n".join(["{", *entries, " " * indent + "}"])


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_line(key)}: {_line(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_line, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, type):
        return "nn.Identity" if value is nn.Identity else value.__name__
    return f'"{value}"' if isinstance(value, str) else repr(value)
