"""Layouts of the maps of a block, found by trial: changes that leave the function of a block by its layout."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from ..evaluation.divergence import near
from ..models.architectures import ATTENDING, Block
from ..models.architectures.layouts import JointLayout, Pairing, heads_in
from ..models.symmetries import disguise
from .blocks import DiscoveredBlock
from .stacks import LayerCall, first_tensor

_JOINT: Mapping[str, tuple[JointLayout, ...]] = {"qkv": ("parts", "groups"), "gate_in": ("gate_first", "gate_last")}
_PAIRINGS: tuple[Pairing, ...] = ("halves", "neighbours")


@dataclass(frozen=True)
class BlockLayout:
    """Layout of the maps of a block, see `TransformerArchitecture`.

    Attributes:
        joint: Role of a joint map -> layout of its rows.
        pairing: Coordinates of a head that rotate together.
        bound_heads: Whether heads cannot change places.
    """

    joint: Mapping[str, JointLayout] = field(default_factory=dict)
    pairing: Pairing = "halves"
    bound_heads: bool = False


@torch.no_grad()
def block_layout(
    layer: nn.Module, call: LayerCall, block: DiscoveredBlock, config: PreTrainedConfig, index: int
) -> BlockLayout | str:
    """The first layout by which another order of heads or units, and rotations of heads, change nothing.

    Args:
        layer: Layer of the block. Each trial changes a copy of it.
        call: Call of the layer.
        block: Block with the role `out`.
        config: Config that states the heads.
        index: Index of the layer.

    Returns:
        The layout, or the reason why none is known.
    """
    expected, why = first_tensor(call.run(layer)), None
    for layout in _layouts(block):
        heads = None
        if block.kind in ATTENDING:
            heads = heads_in(config, index, layout.pairing, layout.bound_heads)
        changed = copy.deepcopy(layer)
        try:
            disguise(
                changed, Block(index, block.kind, block.roles, layout.joint, heads), torch.Generator().manual_seed(0)
            )
        except UnsupportedModelError as error:
            why = why or str(error)
            continue
        if near(first_tensor(call.run(changed)), expected):
            return layout
    return why or "no known layout leaves the output of the layer as it is"


def _layouts(block: DiscoveredBlock) -> list[BlockLayout]:
    """Layouts that a block can have, those with the strictest check first."""
    joints = [{role: layout} for role, layouts in _JOINT.items() if role in block.roles for layout in layouts] or [{}]
    if block.kind not in ATTENDING:
        return [BlockLayout(joint) for joint in joints]
    return [BlockLayout(joint, pairing, bound) for bound, joint, pairing in product((False, True), joints, _PAIRINGS)]
