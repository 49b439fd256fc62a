"""Layouts of a block's maps: heads, joint maps, and the coordinates of a head that rotate with the position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...errors import UnsupportedModelError
from ...math.turn import Planes, Turn

JointLayout = Literal["parts", "groups", "gate_first", "gate_last"]
Pairing = Literal["halves", "neighbours"]
Rows = slice | Tensor | EllipsisType
"""Indices of some rows of a map, or of all of them."""


@dataclass(frozen=True)
class Heads:
    """Heads of an attention block.

    Attributes:
        count: Number of query heads.
        groups: Number of key-value heads; each serves `count / groups` query heads.
        dim: Width of a head.
        rotary: Number of coordinates of a query or key, the first ones of its head, that rotate with the position.
        pairing: Coordinates that rotate together: j and j + rotary/2 ("halves"), or 2j and 2j + 1 ("neighbours").
        bound: Whether each head has its own position bias, so that heads cannot change places.
    """

    count: int
    groups: int
    dim: int
    rotary: int = 0
    pairing: Pairing = "halves"
    bound: bool = False

    @property
    def turn(self) -> Turn:
        """Rotations of the coordinates that queries share with keys.

        Those of a pair commute with the rotation by position; coordinates without a position rotate freely.
        """
        half = self.rotary // 2
        if self.pairing == "neighbours":
            return Planes(tuple(range(0, 2 * half, 2)), tuple(range(1, 2 * half, 2))) if half else "any"
        return Planes(tuple(range(half)), tuple(range(half, 2 * half))) if half else "any"


def heads_in(config: PreTrainedConfig, layer: int, pairing: Pairing, bound: bool) -> Heads | None:
    """Heads that a config states; None if it states no number of heads.

    Args:
        config: Config of the model.
        layer: Index of the layer. Layers of different types may rotate a different part of their heads.
        pairing: See `Heads`.
        bound: See `Heads`.
    """
    if getattr(config, "is_heterogeneous", False):  # layers may have heads of different widths, as in Gemma 4
        config = config.per_layer_config[layer]
    count, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    dim = getattr(config, "head_dim", None) or (width // count if count and width else None)
    if not isinstance(count, int) or dim is None:
        return None
    rope = _rope_of(config, layer)
    rotary = 0 if rope is None else int(dim * rope.get("partial_rotary_factor", 1.0))
    return Heads(count, getattr(config, "num_key_value_heads", None) or count, dim, rotary, pairing, bound)


def _rope_of(config: PreTrainedConfig, layer: int) -> Mapping[str, Any] | None:
    """Parameters of a layer's rotary positions; None without them. A config may state them for each type of layer."""
    rope, types = (getattr(config, name, None) for name in ("rope_parameters", "layer_types"))
    if rope is None:
        return {} if hasattr(config, "rope_theta") else None  # DINOv3
    return rope[types[layer]] if types and types[layer] in rope else rope


def parts_of(role: str, layout: JointLayout, rows: int, heads: Heads | None) -> dict[str, Rows]:
    """Part -> its rows, for a joint map.

    Args:
        role: `qkv`, `kv` or `gate_in`.
        layout: Layout of the rows, see `TransformerArchitecture.joint`.
        rows: Number of rows.
        heads: Heads of the block; without them, the parts of `qkv` and `kv` are equal.

    Raises:
        UnsupportedModelError: The rows do not fit the heads.
    """
    if role == "gate_in":
        halves = slice(0, rows // 2), slice(rows // 2, rows)
        return dict(zip(("gate", "in") if layout == "gate_first" else ("in", "gate"), halves, strict=True))
    sizes = (
        [rows // len(role)] * 3 if heads is None else [n * heads.dim for n in (heads.count, heads.groups, heads.groups)]
    )
    if role == "kv":
        sizes[0] = 0
    if sum(sizes) != rows or (layout == "groups" and heads is None):
        raise UnsupportedModelError(
            f"a joint map of {rows} rows does not fit {heads}: in the architecture's table, override heads(config, "
            "layer), or name separate maps."
        )
    if layout == "groups":
        index = torch.arange(rows).view(heads.groups, -1, heads.dim)
        return {"q": index[:, :-2].flatten(), "k": index[:, -2].flatten(), "v": index[:, -1].flatten()}
    starts = (0, sizes[0], sizes[0] + sizes[1])
    found = {part: slice(start, start + size) for part, start, size in zip("qkv", starts, sizes, strict=True)}
    return {part: found[part] for part in role}
