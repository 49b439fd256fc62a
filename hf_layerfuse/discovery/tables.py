"""One table for all layers of a stack, whose layers may differ in small parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace

from torch import nn

from ..errors import UnsupportedModelError
from ..models.architectures import part_at
from .behaviour import Behaviour
from .blocks import DiscoveredBlock, LayerTable, layer_table, opaque
from .dataflow import record_layer
from .roles import MEANINGS
from .stacks import RAISED, Stack


def stack_table(stack: Stack) -> tuple[LayerTable, tuple[str, ...]]:
    """The table of the layers of a stack.

    A part without a meaning that some layers lack is left out of the table. A block becomes opaque if its maps differ
    between layers.

    Args:
        stack: Stack of the model.

    Returns:
        The table, and a sentence for each difference between the layers.

    Raises:
        UnsupportedModelError: A layer is not a chain of residual sums, or the layers have different blocks.
    """
    known: dict[Hashable, Behaviour] = {}
    tables = [_table_of(stack, index, known) for index in range(len(stack.layers))]
    shapes = [_outline(table) for table in tables]
    if len(set(shapes)) > 1:
        kinds = {shape: [i for i, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)}
        each = "; ".join(f"layers {_numbers(at)}: {_words(tables[at[0]])}" for at in kinds.values())
        raise UnsupportedModelError(
            f"the layers at {stack.path!r} have different blocks, and one table describes all layers of a stack. "
            f"{each[0].upper()}{each[1:]}."
        )
    notes: list[str] = []
    blocks = tuple(
        _merged(stack, [table.blocks[place] for table in tables], notes) for place in range(len(tables[0].blocks))
    )
    leftover, idle = (
        tuple(sorted({name for table in tables for name in getattr(table, kind)})) for kind in ("leftover", "idle")
    )
    if leftover:
        notes.append(f"the parameters {', '.join(leftover)} of a layer belong to no block")
    return replace(tables[0], blocks=blocks, leftover=leftover, idle=idle), tuple(dict.fromkeys(notes))


def _table_of(stack: Stack, index: int, known: dict[Hashable, Behaviour]) -> LayerTable:
    layer = stack.layers[index]
    where = f"layer {index} of {stack.path} ({type(layer).__name__})"
    try:
        return layer_table(record_layer(layer, stack.calls[index], known))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{where}: {error}") from error
    except RAISED as error:
        raise UnsupportedModelError(f"{where} does not run alone: {type(error).__name__}: {error}") from error


def _outline(table: LayerTable) -> tuple:
    """The part of a table in which all layers must be alike. Attention and other mixers may take turns."""
    return table.parallel, tuple((block.table, block.norm_after, block.between) for block in table.blocks)


def _merged(stack: Stack, blocks: list[DiscoveredBlock], notes: list[str]) -> DiscoveredBlock:
    """One block for all layers; differences are added to `notes`."""
    common = Counter(map(_key, blocks)).most_common(1)[0][0]
    usual = next(block for block in blocks if _key(block) == common)
    blocks = [_with_missing_norm(layer, block, usual) for layer, block in zip(stack.layers, blocks, strict=True)]
    meanings = [{role: path for role, path in block.roles.items() if role in MEANINGS} for block in blocks]
    unlike = any(each != meanings[0] for each in meanings) or len({block.kind for block in blocks}) > 1
    if unlike or any(block.skip.keys() != usual.skip.keys() for block in blocks):
        notes.append(f"the {usual.kind} blocks of the layers have different maps, so the table treats them as opaque")
        skip = {path: each for block in blocks for path, each in block.skip.items()}
        return opaque(replace(usual, skip=skip))
    for index, block in enumerate(blocks):
        if block.skip != usual.skip:
            notes.append(f"the {usual.kind} block of layer {index} returns other values than in most layers")
    roles = dict(usual.roles)
    for role in {role: path for block in blocks for role, path in block.roles.items()}:
        if any(block.roles.get(role) != usual.roles.get(role) for block in blocks):
            notes.append(f"{role} is not a part of the {usual.kind} block of every layer, so the table leaves it out")
            roles.pop(role, None)
    return replace(usual, roles=roles)


def _with_missing_norm(layer: nn.Module, block: DiscoveredBlock, usual: DiscoveredBlock) -> DiscoveredBlock:
    """A block with the norm that most layers have, if it is `nn.Identity` in this layer."""
    norm = usual.roles.get("norm")
    if norm is None or "norm" in block.roles or type(part_at(layer, norm)) is not nn.Identity:
        return block
    return replace(block, roles={"norm": norm, **block.roles}, skip={norm: nn.Identity, **block.skip})


def _key(block: DiscoveredBlock) -> tuple:
    return tuple(block.roles.items()), tuple(block.skip.items()), block.activation, block.adds


def _words(table: LayerTable) -> str:
    words = [
        f"{block.kind} ({', '.join(block.skip)}"
        + (f"; {', '.join(block.between)} before the sum" if block.between else "")
        + (", norm after the sum" if block.norm_after else "")
        + ")"
        for block in table.blocks
    ]
    return ("parallel " if table.parallel else "") + " and ".join(words)


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
