"""One table for all layers of a stack, whose layers may differ in small parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from ..errors import UnsupportedModelError
from .blocks import MEANINGS, DiscoveredBlock, LayerTable, layer_table
from .dataflow import record_layer
from .stacks import Stack


def stack_table(stack: Stack) -> tuple[LayerTable, tuple[str, ...]]:
    """The table of the layers of a stack.

    Where layers differ in a part that nothing fits, the table leaves it out. Where they differ in the maps of a block,
    the block becomes opaque.

    Returns:
        The table, and a sentence for each difference between the layers.

    Raises:
        UnsupportedModelError: A layer is not a chain of residual sums, or the layers have different blocks.
    """
    tables = [_table_of(stack, index) for index in range(len(stack.layers))]
    shapes = [_outline(table) for table in tables]
    if len(set(shapes)) > 1:
        kinds = {shape: [i for i, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)}
        each = "; ".join(f"layers {_numbers(at)}: {_words(tables[at[0]])}" for at in kinds.values())
        raise UnsupportedModelError(
            f"the layers of {stack.path} have different blocks, which no single table describes. {each}."
        )
    notes: list[str] = []
    blocks = tuple(
        _merged(stack, [table.blocks[place] for table in tables], notes) for place in range(len(tables[0].blocks))
    )
    leftover = sorted({name for table in tables for name in table.leftover})
    if leftover:
        notes.append(f"the parameters {', '.join(leftover)} of a layer belong to no block")
    return replace(tables[0], blocks=blocks, leftover=tuple(leftover)), tuple(dict.fromkeys(notes))


def _table_of(stack: Stack, index: int) -> LayerTable:
    layer = stack.layers[index]
    try:
        return layer_table(record_layer(layer, stack.calls[index]))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"layer {index} of {stack.path} ({type(layer).__name__}): {error}") from error


def _outline(table: LayerTable) -> tuple:
    """The part of a table in which all layers must be alike."""
    return table.parallel, tuple((block.kind, block.norm_after, block.between, tuple(block.skip)) for block in table.blocks)


def _merged(stack: Stack, blocks: list[DiscoveredBlock], notes: list[str]) -> DiscoveredBlock:
    """One block for all layers; differences are added to `notes`."""
    count = Counter(map(_key, blocks))
    usual = next(block for block in blocks if _key(block) == count.most_common(1)[0][0])
    roles, skip = dict(usual.roles), dict(usual.skip)
    opaque = False
    for index, block in enumerate(blocks):
        for role in {**roles, **block.roles}:
            ours, theirs = roles.get(role), block.roles.get(role)
            if ours == theirs:
                continue
            if role == "norm" and theirs is None and type(stack.layers[index].get_submodule(ours)) is nn.Identity:
                notes.append(f"layer {index} has no norm in front of its {usual.kind} block")
            elif role in MEANINGS:
                opaque = True
            else:
                notes.append(f"{role} ({ours or theirs}) is not a part of every {usual.kind} block")
                roles.pop(role, None)
        if block.skip != usual.skip:
            notes.append(f"layer {index} needs other placeholders for its {usual.kind} block")
    if opaque:
        notes.append(f"the {usual.kind} blocks of the layers have different maps, so they are opaque")
        roles = {role: path for role, path in roles.items() if role == "norm"}
        roles |= {path.rpartition(".")[2]: path for path in skip if path != roles.get("norm")}
        return replace(usual, roles=roles, activation=None, adds=None)
    return replace(usual, roles=roles, skip=skip)


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
