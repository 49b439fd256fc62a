"""The class that describes a discovered architecture, as attributes and as Python source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from ..models.architectures import Placeholder, TransformerArchitecture, ZeroAttention, ZeroBlock
from ..plan import DECODER, TRANSFORMER

if TYPE_CHECKING:
    from .discovery import Discovery

_SUPPORTED = (TRANSFORMER, ("attention",), DECODER)
"""Kinds of the blocks of a layer that a `TransformerArchitecture` describes."""

_IMPORTS = {"TransformerArchitecture", "register_architecture"}
"""Names that the source of every table imports."""

_WIDTH = 120
"""Characters in a line of source."""


def class_name(model_type: str) -> str:
    """Name of the class of a table: `Gemma2Architecture` for `gemma2`, `_4MArchitecture` for `4-m`."""
    name = "".join(part[:1].upper() + part[1:] for part in re.split(r"[\W_]+", model_type)) + "Architecture"
    return f"_{name}" if name[0].isdigit() else name


def fields_of(found: Discovery) -> dict[str, Any]:
    """Attributes of the class, without those that equal their default.

    Raises:
        UnsupportedModelError: `TransformerArchitecture` cannot describe the architecture.
    """
    _check_describable(found)
    blocks = {block.table: block for block in found.blocks}
    mlp = blocks.get("mlp")
    config, _, depth = found.depth_field.rpartition(".")
    usual = TransformerArchitecture.joint
    every: dict[str, Any] = {
        "model_type": found.model_type,
        "stack": found.name,
        "layers": found.layers,
        "mask": found.mask,
        "config": config,
        "depth": depth,
        "kinds": tuple(blocks),
        **{kind: dict(block.roles) for kind, block in blocks.items()},
        "activation": mlp and mlp.activation,
        "adds": mlp and mlp.adds,
        "also_positions": tuple(role for block in blocks.values() for role in block.also_positions),
        "parallel": found.parallel,
        "between": {kind: block.between[0] for kind, block in blocks.items() if block.between},
        "joint": usual if found.joint.items() <= usual.items() else dict(found.joint),
        "pairing": found.pairing,
        "bound_heads": found.bound_heads,
        "silent": {kind: block.silent for kind, block in blocks.items() if block.silent},
        "post_norm": found.post_norm,
        "per_layer_config": found.per_layer_config,
        "other_lists": found.other_lists,
        "fixed": {kind: found.fixed[block.kind] for kind, block in blocks.items() if block.kind in found.fixed},
        "skip": {kind: dict(block.skip) for kind, block in blocks.items()},
    }
    return {name: value for name, value in every.items() if _is_own(name, value)}


def _is_own(name: str, value: Any) -> bool:
    """Whether an attribute differs from that of `TransformerArchitecture`."""
    return not hasattr(TransformerArchitecture, name) or value != getattr(TransformerArchitecture, name)


def _check_describable(found: Discovery) -> None:
    kinds = tuple(block.table for block in found.blocks)
    where = f"the layers at {found.stack!r} of {found.model_type!r} are known, but cannot be fused"
    if kinds not in _SUPPORTED:
        raise UnsupportedModelError(
            f"{where}: each has the blocks {', '.join(kinds)}; supported are one attention block and one MLP, with or "
            "without cross-attention between them, or a single attention block or mixer."
        )
    if len({block.norm_after for block in found.blocks}) > 1:
        raise UnsupportedModelError(
            f"{where}: the norm follows the residual sum of one block and precedes another; supported is one position "
            "for all."
        )
    if found.depth_field.count(".") > 1:
        raise UnsupportedModelError(
            f"{where}: their number is config.{found.depth_field}; supported is a field of the config or of one that "
            "is nested in it."
        )
    for block in found.blocks:
        if len(block.between) > 1:
            raise UnsupportedModelError(
                f"{where}: {' and '.join(block.between)} lie between {block.roles.get('out')!r} and the residual sum; "
                "supported is one norm, parameter or number."
            )


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
