"""The attributes of the class that describes a discovered architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..models.architectures import TransformerArchitecture

if TYPE_CHECKING:
    from .discovery import Discovery

_SUPPORTED = (("attention", "mlp"), ("attention",), ("attention", "cross", "mlp"))
"""Kinds of the blocks of a layer that a `TransformerArchitecture` describes. It leaves cross-attention as it is."""

_TABLE = {"mixer": "attention"}
"""Kind of block -> kind whose table describes it, where they differ."""


def class_name(model_type: str) -> str:
    """Name of the class of a table: `Gemma2Architecture` for `gemma2`."""
    return "".join(part[:1].upper() + part[1:] for part in model_type.replace("-", "_").split("_")) + "Architecture"


def fields_of(found: Discovery) -> dict[str, Any]:
    """Attributes of the class, without those that equal their default.

    Raises:
        UnsupportedModelError: `TransformerArchitecture` cannot describe the architecture.
    """
    _check_describable(found)
    blocks = {_TABLE.get(block.kind, block.kind): block for block in found.blocks if block.kind != "cross"}
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
        "crossed": len(found.blocks) > 2,
        "parallel": found.parallel,
        "between": {kind: block.between[0] for kind, block in blocks.items() if block.between},
        "joint": usual if found.joint.items() <= usual.items() else dict(found.joint),
        "pairing": found.pairing,
        "bound_heads": found.bound_heads,
        "silent": {kind: block.silent for kind, block in blocks.items() if block.silent},
        "post_norm": found.post_norm,
        "per_layer_config": found.per_layer_config,
        "other_lists": found.other_lists,
        "fixed": {_TABLE.get(kind, kind): layers for kind, layers in found.fixed.items()},
        "skip": {kind: dict(block.skip) for kind, block in blocks.items()},
    }
    return {name: value for name, value in every.items() if _is_own(name, value)}


def _is_own(name: str, value: Any) -> bool:
    """Whether an attribute differs from that of `TransformerArchitecture`."""
    return not hasattr(TransformerArchitecture, name) or value != getattr(TransformerArchitecture, name)


def _check_describable(found: Discovery) -> None:
    kinds = tuple(_TABLE.get(block.kind, block.kind) for block in found.blocks)
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
