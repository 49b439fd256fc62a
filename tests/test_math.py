"""Similarities and clusters: against definitions written out, and against brute force."""

import itertools

import pytest
import torch

from hf_layerfuse.edits import combine
from hf_layerfuse.math import cluster, similarity
from hf_layerfuse.plan import Source


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 40, 7, generator=generator).cumsum(0)


@pytest.fixture
def blocks():
    generator = torch.Generator().manual_seed(0)
    return [
        {"q": torch.randn(4, 6, generator=generator), "in": torch.randn(9, 4, generator=generator)} for _ in range(5)
    ]


def test_weight_distances(blocks):
    """Both weight measures equal their definitions, and are zero between equal blocks only."""
    blocks[3] = {role: weight.clone() for role, weight in blocks[1].items()}
    euclidean, cosine = similarity.euclidean(blocks), similarity.cosine(blocks)
    for i, j in itertools.product(range(5), repeat=2):
        squares = sum((blocks[i][role] - blocks[j][role]).square().sum() for role in blocks[0])
        cosines = [torch.cosine_similarity(blocks[i][r].flatten(), blocks[j][r].flatten(), 0) for r in blocks[0]]
        torch.testing.assert_close(euclidean[i, j].float(), squares.sqrt())
        torch.testing.assert_close(cosine[i, j].float(), 1 - torch.stack(cosines).mean(), atol=1e-6, rtol=1e-5)
    assert euclidean[1, 3] == 0
    assert (euclidean == 0).sum() == 7


def test_cosine_ignores_scale_and_euclidean_does_not(blocks):
    """A block and the same block at twice the weights are one block to `cosine`."""
    twice = [blocks[0], {role: 2 * weight for role, weight in blocks[0].items()}]
    assert similarity.cosine(twice)[0, 1] < 1e-12
    assert similarity.euclidean(twice)[0, 1] > 1


def test_cka(states):
    """CKA equals the published definition with centred Gram matrices, on either side of its shape switch."""
    for tokens in (6, 40):
        part = states[:, :tokens].double()
        centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens
        grams = [centre @ block @ block.T @ centre for block in part]
        got = similarity.cka(states[:, :tokens])
        for i, j in itertools.product(range(5), repeat=2):
            hsic = (grams[i] * grams[j]).sum()
            expected = 1 - hsic / (grams[i].norm() * grams[j].norm())
            torch.testing.assert_close(got[i, j], expected.clamp_min(0), atol=1e-12, rtol=1e-9)


def test_cka_is_blind_to_rotation_scale_and_shift(states):
    """Linear CKA does not change under an orthogonal map, a scale and an offset: it needs the centring for that."""
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))
    pair = torch.stack([states[0], 3 * states[0] @ turn + 5])
    assert similarity.cka(pair)[0, 1] < 1e-6


def test_block_influence(states):
    """1 - mean cosine between the states after two blocks (ShortGPT, eq. 1)."""
    got = similarity.block_influence(states)
    for i, j in itertools.combinations(range(5), 2):
        expected = 1 - torch.cosine_similarity(states[i].double(), states[j].double(), dim=-1).mean()
        torch.testing.assert_close(got[i, j], expected)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_adjacent_is_optimal(count):
    """The dynamic program finds the same least cost as trying every partition into runs."""
    matrix = torch.rand(count, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    matrix = (matrix + matrix.T).fill_diagonal_(0)

    def cost(runs):
        return sum(matrix[i, j].item() for run in runs for i, j in itertools.combinations(run, 2))

    for groups in range(1, count + 1):
        best = min(
            cost([range(a, b) for a, b in itertools.pairwise((0, *cuts, count))])
            for cuts in itertools.combinations(range(1, count), groups - 1)
        )
        runs = cluster.adjacent(matrix, groups)
        assert len(runs) == groups
        assert sum(runs, ()) == tuple(range(count))
        assert cost(runs) == pytest.approx(best)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_connected_merges_the_closest_pairs(count):
    """Components of the graph of the closest pairs, exactly as many as asked for, ties included."""
    matrix = torch.rand(count, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = (matrix + matrix.T).fill_diagonal_(0)
    for distance in (matrix, torch.ones_like(matrix).fill_diagonal_(0)):
        for groups in range(1, count + 1):
            found = cluster.connected(distance, groups)
            assert len(found) == groups
            assert sorted(sum(found, ())) == list(range(count))
    pairs = sorted(itertools.combinations(range(count), 2), key=lambda pair: matrix[pair].item())
    label = list(range(count))
    for i, j in pairs:
        if len(set(label)) == 2:
            break
        label = [label[i] if value == label[j] else value for value in label]
    if count > 2:
        expected = sorted(tuple(k for k in range(count) if label[k] == value) for value in set(label))
        assert cluster.connected(matrix, 2) == expected


def test_connected_joins_what_is_far_apart():
    """Unlike `adjacent`, it groups the first block with the last where these are closest."""
    matrix = torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0)
    matrix[0, 3] = matrix[3, 0] = 0.1
    assert cluster.connected(matrix, 3) == [(0, 3), (1,), (2,)]


def test_operators():
    """mean, freeze (the later of two in the middle) and telescope equal their formulas."""
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
