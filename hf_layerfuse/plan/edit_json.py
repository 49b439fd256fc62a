"""The JSON form of edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args

from ..errors import PlanError
from .edit import Edit

_EDITS: Mapping[str, type[Edit]] = {kind.edit: kind for kind in get_args(Edit)}

_RARE = frozenset({"weights", "align", "rank", "faithful", "fold", "merged"})


def write_edit(edit: Edit) -> dict[str, Any]:
    """Convert an edit to JSON types. Rare fields, such as `rank`, are omitted at their defaults."""
    rare = {f.name: f.default for f in fields(edit) if f.name in _RARE or f.default is None}
    values = {k: v for k, v in asdict(edit).items() if k not in rare or v != rare[k]}
    return {"edit": edit.edit, **values}


def read_edit(tree: Mapping[str, Any]) -> Edit:
    """Read an edit from the JSON types that `write_edit` returns.

    Raises:
        PlanError: This release does not know the edit, or its values contradict each other.
    """
    values = dict(tree)
    name = values.pop("edit")
    if name not in _EDITS:
        raise PlanError(f"unknown edit {name!r}; this release knows: {', '.join(_EDITS)}.")
    return _EDITS[name](**values)
