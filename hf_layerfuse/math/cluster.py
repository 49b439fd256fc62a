"""From a matrix of distances to groups of blocks."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

Groups = list[tuple[int, ...]]


def adjacent(distance: Tensor, groups: int) -> Groups:
    """The partition into `groups` runs of neighbours with the least total distance inside the runs.

    Exact, by dynamic programming over run ends: O(n^2 groups).

    Args:
        distance: (n, n), symmetric.
        groups: from 1 to n.

    Returns:
        Runs in order, which together are 0 .. n-1.
    """
    matrix = distance.cpu().numpy()
    count = len(matrix)
    inside = np.zeros((count + 1, count + 1))  # inside[i, j]: sum over pairs of the run i .. j-1
    for end in range(1, count + 1):
        for start in range(end - 1, -1, -1):
            inside[start, end] = inside[start + 1, end] + matrix[start, start:end].sum()

    return partition(inside, groups)


def partition(inside: np.ndarray, groups: int) -> Groups:
    """The partition of 0 .. n-1 into `groups` runs with the least total cost, by dynamic programming: O(n^2 groups).

    Args:
        inside: (n + 1, n + 1), the cost of the run i .. j-1 at [i, j]; infinite where it is not allowed.
        groups: from 1 to n.
    """
    count = len(inside) - 1
    cost = np.full((groups + 1, count + 1), np.inf)
    cost[0, 0] = 0
    cut = np.zeros((groups + 1, count + 1), dtype=int)
    for used in range(1, groups + 1):
        for end in range(used, count + 1):
            options = cost[used - 1, :end] + inside[:end, end]
            cut[used, end] = int(options.argmin())
            cost[used, end] = options[cut[used, end]]

    runs: Groups = []
    end = count
    for used in range(groups, 0, -1):
        start = int(cut[used, end])
        runs.insert(0, tuple(range(start, end)))
        end = start
    return runs


def connected(distance: Tensor, groups: int) -> Groups:
    """Connect the closest pairs, wherever they are, until `groups` connected components remain.

    This is the clustering of O'Neill et al. (2021), alg. 1, which is single linkage.

    Args:
        distance: (n, n), symmetric.
        groups: from 1 to n.

    Returns:
        Groups in order of their first member.
    """
    return agglomerative(distance, groups, "single")


def agglomerative(
    distance: Tensor, groups: int, method: Literal["single", "average", "complete"] = "average"
) -> Groups:
    """Merge the two closest groups, wherever they are, until `groups` remain.

    Args:
        distance: (n, n), symmetric.
        groups: from 1 to n.
        method: the distance between two groups is the mean distance of their members, that of the closest (`single`),
            or that of the farthest (`complete`).

    Returns:
        Groups in order of their first member.
    """
    if len(distance) == 1:
        return [(0,)]
    tree = linkage(squareform(distance.cpu().numpy(), checks=False), method=method)
    # fcluster's maxclust merges ties together and may fall short, so the tree is cut by number of merges
    members: dict[int, list[int]] = {i: [i] for i in range(len(distance))}
    for step, (left, right) in enumerate(tree[: len(distance) - groups, :2].astype(int)):
        members[len(distance) + step] = sorted(members.pop(int(left)) + members.pop(int(right)))
    return sorted(tuple(group) for group in members.values())
