"""Groups of blocks from a matrix of distances."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

Groups = list[tuple[int, ...]]


def inside_runs(distance: Tensor) -> np.ndarray:
    """Compute the sum of the distances between all pairs of the run i .. j-1 at [i, j], (n + 1, n + 1).

    Args:
        distance: Symmetric distances, (n, n).
    """
    matrix = distance.cpu().numpy()
    count = len(matrix)
    inside = np.zeros((count + 1, count + 1))
    for end in range(1, count + 1):
        for start in range(end - 1, -1, -1):
            inside[start, end] = inside[start + 1, end] + matrix[start, start:end].sum()
    return inside


def partition(inside: np.ndarray, groups: int) -> Groups | None:
    """Find the partition of 0 .. n-1 into `groups` runs of least total cost, by dynamic programming: O(n^2 groups).

    Args:
        inside: Cost of the run i .. j-1 at [i, j], (n + 1, n + 1); infinite where the run is not allowed.
        groups: Number of runs, from 1 to n.

    Returns:
        Runs in order, which together are 0 .. n-1, or None if no partition is allowed.
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

    if not np.isfinite(cost[groups, count]):
        return None
    runs: Groups = []
    end = count
    for used in range(groups, 0, -1):
        start = int(cut[used, end])
        runs.insert(0, tuple(range(start, end)))
        end = start
    return runs


def partition_within(inside: np.ndarray, sizes: np.ndarray, most: float) -> Groups | None:
    """Find the partition of 0 .. n-1 into runs of least total cost with a total size of at most `most`.

    The result is exact: for each end of a run, all Pareto-optimal partitions in cost and size are kept.

    Args:
        inside: Cost of the run i .. j-1 at [i, j], (n + 1, n + 1); infinite where the run is not allowed.
        sizes: Size of the run i .. j-1 at [i, j], (n + 1, n + 1).
        most: Largest total size.

    Returns:
        Runs in order, or None if no partition is that small.
    """
    fronts: list[list[tuple[int, float, Groups]]] = [[(0, 0.0, [])]]
    for end in range(1, len(inside)):
        options = [
            (size + sizes[start, end], cost + inside[start, end], [*runs, tuple(range(start, end))])
            for start, front in enumerate(fronts)
            if np.isfinite(inside[start, end])
            for size, cost, runs in front
            if size + sizes[start, end] <= most
        ]
        fronts.append([])
        for option in sorted(options, key=lambda option: option[:2]):
            if not fronts[end] or option[1] < fronts[end][-1][1]:
                fronts[end].append(option)
    return fronts[-1][-1][2] if fronts[-1] else None


def connected(distance: Tensor, groups: int) -> Groups:
    """Connect the closest pairs, adjacent or not, until `groups` connected components remain.

    This is the clustering of O'Neill et al. (2021), alg. 1, which is single linkage.

    Args:
        distance: Symmetric distances, (n, n).
        groups: Number of groups, from 1 to n.

    Returns:
        Groups in order of their first member.
    """
    return agglomerative(distance, groups, "single")


def agglomerative(
    distance: Tensor, groups: int, method: Literal["single", "average", "complete"] = "average"
) -> Groups:
    """Merge the two closest groups, adjacent or not, until `groups` remain.

    Args:
        distance: Symmetric distances, (n, n).
        groups: Number of groups, from 1 to n.
        method: Distance between two groups: the mean distance of their members (`average`), the smallest (`single`) or
            the largest (`complete`).

    Returns:
        Groups in order of their first member.
    """
    if len(distance) == 1:
        return [(0,)]
    tree = linkage(squareform(distance.cpu().numpy(), checks=False), method=method)
    # maxclust of fcluster merges ties together and may return fewer groups, so the tree is cut by number of merges
    members: dict[int, list[int]] = {i: [i] for i in range(len(distance))}
    for step, (left, right) in enumerate(tree[: len(distance) - groups, :2].astype(int)):
        members[len(distance) + step] = sorted(members.pop(int(left)) + members.pop(int(right)))
    return sorted(tuple(group) for group in members.values())
