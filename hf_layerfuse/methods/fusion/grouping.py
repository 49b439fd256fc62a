"""Which layers of a model are grouped: runs of even length, of a plan, or by how far they are from a linear map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ...calibration.layerwise import TeacherStates
from ...math.ridge import Moments, identity
from ...plan import Kind, Plan

TOKENS_PER_STATE = 16
"""For each dimension of the stream, so many tokens tell how far a run of layers is from a linear map."""

Groups = Sequence[tuple[int, ...]]


def even(layers: int, groups: int) -> list[tuple[int, ...]]:
    """Runs of as equal length as can be; the longer ones in the middle, where layers are most alike."""
    size, longer = divmod(layers, groups)
    before = (groups - longer) // 2
    sizes = [size + (before <= i < before + longer) for i in range(groups)]
    ends = np.cumsum(sizes)
    return [tuple(range(end - size, end)) for end, size in zip(ends.tolist(), sizes, strict=True)]


def groups_of(plan: Plan, kind: Kind) -> list[tuple[int, ...]]:
    """The groups of a plan, blocks that are alone among them, in order of their first layer."""
    groups = [edit.layers for edit in plan.edits if edit.kind == kind]
    alone = set(range(plan.num_layers)).difference(*groups)
    return sorted([*groups, *((layer,) for layer in alone)])


def longest(layers: int, groups: int) -> int:
    """The most layers that a group may have: two more than an even one, so that what is compared is linear in depth."""
    return min(layers - groups + 1, math.ceil(layers / groups) + 2)


def unexplained(trace: TeacherStates, size: int) -> np.ndarray:
    """What runs of layers do to the stream that one layer would leave undone, as far as a linear map tells.

    The states behind a run are fitted by those in front of it. The share of their variance that the fit leaves is what
    nonlinear maps have to make, and all layers of the run but one are lost.

    Args:
        trace: of the original.
        size: the most layers of a run.

    Returns:
        (layers + 1, layers + 1), for the run i .. j-1 at [i, j], infinite where that is no run or a longer one.
    """
    depth = len(trace.layers)
    states = [trace.states(layer) for layer in range(depth + 1)]
    width = states[0][0].shape[-1]
    batches = trace.walk.spread(TOKENS_PER_STATE * width)
    cost = np.full((depth + 1, depth + 1), np.inf)
    cost[range(depth), range(1, depth + 1)] = 0
    for start, end in itertools.combinations(range(depth + 1), 2):
        if 2 <= end - start <= size:
            moments = Moments.empty(width, width, states[0][0].device)
            for index in batches:
                moments.add(*(trace.walk.rows(index, states[layer][index]) for layer in (start, end)))
            left = moments.error(moments.ridge(identity(moments), 1e-2)) * moments.rows
            cost[start, end] = (end - start - 1) * left / max(moments.centred()[2].trace().item(), 1e-30)
    return cost
