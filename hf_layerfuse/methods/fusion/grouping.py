"""Groups of layers: runs of about equal length, those of a plan, and the nonlinearity of each run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from ...calibration.teacher_states import TeacherStates
from ...math.ridge import Moments, identity
from ...models.surgery.checks import shapes_of
from ...plan import Kind, Plan

TOKENS_PER_STATE = 16
"""Tokens per dimension of the stream that are needed to measure how nonlinear a run of layers is."""

Groups = Sequence[tuple[int, ...]]


def even(layers: int, groups: int) -> list[tuple[int, ...]]:
    """Return runs of nearly equal length. Longer ones are in the middle, where layers are most alike."""
    size, longer = divmod(layers, groups)
    before = (groups - longer) // 2
    sizes = [size + (before <= i < before + longer) for i in range(groups)]
    ends = np.cumsum(sizes)
    return [tuple(range(end - size, end)) for end, size in zip(ends.tolist(), sizes, strict=True)]


def groups_of(plan: Plan, kind: Kind) -> list[tuple[int, ...]]:
    """Return the groups of a plan, single blocks included, in order of their first layer."""
    groups = [edit.layers for edit in plan.edits if edit.kind == kind]
    alone = set(range(plan.num_layers)).difference(*groups)
    return sorted([*groups, *((layer,) for layer in alone)])


def longest(layers: int, groups: int) -> int:
    """Return the most layers of a group: two more than an even one, so that comparisons grow linearly with depth."""
    return min(layers - groups + 1, math.ceil(layers / groups) + 2)


def unexplained(teacher_states: TeacherStates, size: int, *, forget: bool = False) -> np.ndarray:
    """Estimate the cost of fusing each run of layers, from the nonlinearity of the run.

    The states after a run are fitted linearly to the states before it. The cost is the unexplained share of their
    variance, which needs nonlinear maps, times the number of layers that are lost: all but one.

    Args:
        teacher_states: States of the original.
        size: Largest number of layers of a run.
        forget: Whether to delete states that no run to come begins at.

    Returns:
        Cost of the run i .. j-1 at [i, j], (layers + 1, layers + 1); infinite where there is no such run, or where it
        is longer than `size`.
    """
    depth, first = len(teacher_states.layers), teacher_states.states(0)[0]
    width = first.shape[-1]
    batches = teacher_states.layerwise.spread(TOKENS_PER_STATE * width)
    cost = np.full((depth + 1, depth + 1), np.inf)
    cost[range(depth), range(1, depth + 1)] = 0
    for end in range(2, depth + 1):
        after = teacher_states.states(end)
        for start in range(max(0, end - size), end - 1):
            before, moments = teacher_states.states(start), Moments.empty(width, width, first.device)
            for index in batches:
                moments.add(*(teacher_states.layerwise.rows(index, states[index]) for states in (before, after)))
            left = moments.error(moments.ridge(identity(moments), 1e-2)) * moments.rows
            cost[start, end] = (end - start - 1) * left / max(moments.centred()[2].trace().item(), 1e-30)
        if forget:
            teacher_states.forget(max(0, end + 1 - size))
    return cost


def of_one_shape(layers: Sequence[nn.Module], cost: np.ndarray) -> np.ndarray:
    """Costs of runs, (layers + 1, layers + 1), infinite for runs whose layers differ in shape."""
    shapes = [shapes_of(layer) for layer in layers]
    found = cost.copy()
    for start, end in itertools.combinations(range(len(shapes) + 1), 2):
        if any(shape != shapes[start] for shape in shapes[start:end]):
            found[start, end] = np.inf
    return found
