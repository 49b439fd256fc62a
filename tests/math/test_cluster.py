"""Clusters compared with brute force and scipy, and the operators that combine tensors."""

import itertools

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from hf_layerfuse.math import cluster
from hf_layerfuse.math.knee import knee
from hf_layerfuse.models.surgery.weights import combine
from hf_layerfuse.plan import Source


def random_distance(count, seed=0):
    matrix = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T).fill_diagonal_(0)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_adjacent_is_optimal(count):
    """The dynamic program finds the lowest cost of all partitions into runs."""
    matrix = random_distance(count, seed=count)

    def cost(runs):
        return sum(matrix[i, j].item() for run in runs for i, j in itertools.combinations(run, 2))

    for groups in range(1, count + 1):
        best = min(
            cost([range(a, b) for a, b in itertools.pairwise((0, *cuts, count))])
            for cuts in itertools.combinations(range(1, count), groups - 1)
        )
        runs = cluster.partition(cluster.inside_runs(matrix), groups)
        assert len(runs) == groups
        assert sum(runs, ()) == tuple(range(count))
        assert cost(runs) == pytest.approx(best)


@pytest.mark.parametrize("count", [3, 7])
def test_connected_merges_the_closest_pairs(count):
    """Groups are the connected components of the graph of closest pairs."""
    matrix = random_distance(count)
    pairs = sorted(itertools.combinations(range(count), 2), key=lambda pair: matrix[pair].item())
    label = list(range(count))
    for i, j in pairs:
        if len(set(label)) == 2:
            break
        label = [label[i] if value == label[j] else value for value in label]
    expected = sorted(tuple(k for k in range(count) if label[k] == value) for value in set(label))
    assert cluster.connected(matrix, 2) == expected


def test_connected_joins_what_is_far_apart():
    """Unlike `adjacent`, it groups the first block with the last if these are closest."""
    matrix = torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0)
    matrix[0, 3] = matrix[3, 0] = 0.1
    assert cluster.connected(matrix, 3) == [(0, 3), (1,), (2,)]


@pytest.mark.parametrize("method", ["single", "average", "complete"])
@pytest.mark.parametrize("count", [2, 5, 9])
def test_agglomerative_is_that_of_scipy(count, method):
    """Without ties, the groups equal scipy's cut of the same tree."""
    for seed in range(5):
        matrix = random_distance(count, seed)
        tree = linkage(squareform(matrix.numpy()), method=method)
        for groups in range(1, count + 1):
            labels = fcluster(tree, groups, criterion="maxclust")
            expected = {tuple((labels == label).nonzero()[0].tolist()) for label in labels}
            found = cluster.agglomerative(matrix, groups, method)
            assert set(found) == expected
            assert found == sorted(found)


@pytest.mark.parametrize("find", [cluster.connected, cluster.agglomerative])
def test_groups_are_as_many_as_asked_for_whatever_the_ties(find):
    """With all distances equal, the number of groups is still exact, and every block is in one group."""
    for count in (1, 2, 7):
        equal = torch.ones(count, count, dtype=torch.float64).fill_diagonal_(0)
        for groups in range(1, count + 1):
            found = find(equal, groups)
            assert len(found) == groups
            assert sorted(sum(found, ())) == list(range(count))


def test_average_linkage_resists_chains():
    """For blocks in a row with growing distances, closest pairs form one chain and average linkage does not."""
    place = torch.tensor([0.0, 1.0, 2.1, 3.3, 4.6, 6.0], dtype=torch.float64)
    matrix = (place[:, None] - place).abs()
    assert cluster.connected(matrix, 2) == [(0, 1, 2, 3, 4), (5,)]
    assert cluster.agglomerative(matrix, 2) == [(0, 1, 2, 3), (4, 5)]


def test_operators():
    """mean, freeze (the later of the two middle layers) and telescope equal their formulas."""
    a, b, c, d = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    pair, triple, four = (tuple(range(n)) for n in (2, 3, 4))
    torch.testing.assert_close(combine([a, b, c], Source(triple, "mean")), (a + b + c) / 3)
    shares = (0.5, 0.25, 0.25)
    weighted = combine([a, b, c], Source(triple, "weighted", weights=shares))
    torch.testing.assert_close(weighted, a / 2 + b / 4 + c / 4)
    assert torch.equal(combine([a, b, c], Source(triple)), b)
    assert torch.equal(combine([a, b, c, d], Source(four)), c)
    assert torch.equal(combine([a, b, c, d], Source((4, 5, 6, 7), keep=7)), d)
    torch.testing.assert_close(combine([a, b, c], Source(triple, "telescope")), a + (b - a) + (c - a))
    mixed = combine([a, b], Source(pair, "mix"), seed=1)
    assert ((mixed == a) | (mixed == b)).all()
    assert torch.equal(mixed, combine([a, b], Source(pair, "mix"), seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_operators_round_once(dtype):
    """Half-precision weights are averaged in float64 and cast once: no overflow, no drift, equal blocks unchanged."""
    weights = [torch.full((2, 2), 6e4, dtype=dtype), torch.full((2, 2), 6e4, dtype=dtype)]
    assert torch.equal(combine(weights, Source((0, 1), "mean")), weights[0])
    same = [torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)] * 7
    for operator in ("mean", "weighted", "freeze", "mix", "telescope"):
        weights = (0.25, 0.25, 0.5, 0, 0, 0, 0) if operator == "weighted" else None
        fused = combine(same, Source(tuple(range(7)), operator, weights=weights))
        assert torch.equal(fused, same[0])
        assert fused.dtype == dtype


def test_knee_is_where_a_curve_bends():
    """The knee is the corner of two straight lines, in any units. A straight or concave curve has it at the first
    point, and a falling one at the last."""
    x = [0, 10, 20, 30, 40, 50]
    assert knee(x, [2.0, 2.1, 2.2, 2.3, 3.3, 4.3]) == 3
    assert knee([v / 100 for v in x], [200, 210, 220, 230, 330, 430]) == 3
    assert knee(x, [1, 2, 3, 4, 5, 6]) == 0
    assert knee(x, [0, 5, 8, 9, 9.5, 9.6]) == 0
    assert knee(x, [3, 2.5, 2, 2, 1.5, 1]) == 5
