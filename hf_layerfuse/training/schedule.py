"""Iterative fusion: the share of each round, and one plan for all rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import PlanError
from ..plan import Drop, Edit, Plan, Slot
from ..recipe import HealRecipe


def shares_of(recipe: HealRecipe) -> list[float]:
    """Cumulative share of the removal after each round.

    The share is t / T after round t of T with schedule `uniform`, and
    (1 - e^(-r t / T)) / (1 - e^-r) with `exponential`, which removes more early.

    Args:
        recipe: Recipe with `schedule`, `rounds` and `curriculum_rate`.
    """
    if recipe.schedule == "one-shot":
        return [1.0]
    rate = recipe.curriculum_rate
    times = [t / recipe.rounds for t in range(1, recipe.rounds + 1)]
    return times if recipe.schedule == "uniform" else [math.expm1(-rate * t) / math.expm1(-rate) for t in times]


def keeps_of(blocks: int, keep: int, recipe: HealRecipe) -> list[int]:
    """Number of distinct blocks after each round, down to `keep`, by `shares_of`; empty rounds are left out.

    Args:
        blocks: Number of blocks of the original.
        keep: Number of distinct blocks of the result.
        recipe: Recipe with the schedule.
    """
    found = [blocks - round((blocks - keep) * share) for share in shares_of(recipe)]
    return [count for before, count in zip([blocks, *found], found, strict=False) if count < before]


def steps_of(recipe: HealRecipe, rounds: int) -> list[int]:
    """Optimiser steps of each round, `recipe.steps` in total; `recipe.last_round` is the share of the last round.

    Args:
        recipe: Recipe with `steps` and `last_round`.
        rounds: Number of rounds, at most `recipe.steps` unless that is 0.
    """
    early = rounds - 1
    before = min(max(round((1 - recipe.last_round) * recipe.steps), early), recipe.steps) if early else 0
    return [*((i + 1) * before // early - i * before // early for i in range(early)), recipe.steps - before]


def compose(first: Plan, second: Plan) -> Plan:
    """Compose two successive plans: the groups are those of the result, in layers of the original.

    The second plan is for the stock model that the first made. If the first made a fused model, the second is for its
    expansion, which has all layers again; then only the second plan matters. `rounds` in the notes records how each
    round combined the weights of a group.

    Raises:
        PlanError: The second plan cannot follow the first.
    """
    before, after = first.layout(), second.layout()
    notes = replace(second.notes, rounds=(*(first.notes.rounds or (first,)), second))
    if not before.is_stock and second.num_layers == first.num_layers:
        return replace(second, notes=notes)
    if not (before.is_stock and after.is_stock and second.num_layers == len(before.slots)):
        raise PlanError(
            f"the first plan leads to {len(before.slots)} layers, the second is for {second.num_layers}: plans follow "
            "each other where whole layers are fused in depth or dropped, or where the second is of the expanded model."
        )
    # the second plan describes the layers that it edits, the first all others
    touched = {i: edit for edit in second.edits for i in edit.layers}
    gone = {layer for i in touched for layer in before.slots[i].layers}
    kept = [edit for edit in first.edits if not gone.intersection(edit.layers)]
    new = [edit for i, edit in touched.items() if i == edit.layers[0]]
    edits = (*kept, *(inner for edit in new for inner in _in_original(edit, before.slots)))
    return replace(first, edits=edits, notes=notes)


def _in_original(edit: Edit, slots: Sequence[Slot]) -> Iterator[Edit]:
    """Translate an edit of layers of the result to layers of the original."""
    layers = tuple(layer for i in edit.layers for layer in slots[i].layers)
    if isinstance(edit, Drop):
        yield from (Drop("layer", layer) for layer in layers)
    else:
        grown = len(layers) > len(edit.layers)
        # the weights belong to layers that are groups now
        operator = "mean" if grown and edit.operator == "weighted" else edit.operator
        weights = edit.weights if operator == "weighted" else None
        keep = None if edit.keep is None else slots[edit.keep].source(None).kept
        yield replace(edit, layers=layers, operator=operator, weights=weights, keep=keep)
