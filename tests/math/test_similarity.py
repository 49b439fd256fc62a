"""Distances between blocks: each equals its definition, and has the required invariances."""

import itertools

import pytest
import scipy.linalg
import torch

from hf_layerfuse import DataError
from hf_layerfuse.math.similarity import (
    CKA,
    ON_ACTIVATIONS,
    ON_WEIGHTS,
    Angular,
    BlockInfluence,
    UnbiasedCKA,
    cosine,
    covariance,
    euclidean,
    kl,
    wasserstein,
)

BLOCKS = 5
PAIRS = list(itertools.combinations(range(BLOCKS), 2))
ON_DISTRIBUTIONS = {"covariance", "kl", "wasserstein"}


@pytest.fixture
def maps():
    """Two maps in five blocks: one with more units than coordinates, one with fewer; neither has mean zero."""
    generator = torch.Generator().manual_seed(0)
    tall, wide = (torch.randn(BLOCKS, units, 6, generator=generator, dtype=torch.float64) for units in (40, 4))
    mix = torch.randn(BLOCKS, 6, 6, generator=generator, dtype=torch.float64)
    shift = torch.randn(BLOCKS, 1, 6, generator=generator, dtype=torch.float64)
    return [tall @ mix + shift, wide @ mix]


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BLOCKS, 40, 7, generator=generator, dtype=torch.float64).cumsum(0)


def compare(distance, expected):
    """Check that `expected(i, j)` is the distance, and that it is symmetric and zero between a block and itself."""
    assert distance.dtype == torch.float64
    assert torch.equal(distance, distance.T)
    assert torch.equal(distance.diagonal(), torch.zeros(len(distance), dtype=torch.float64))
    for i, j in PAIRS:
        torch.testing.assert_close(distance[i, j], torch.as_tensor(expected(i, j), dtype=torch.float64))


def measured(measure, states, sizes=None):
    for part in states.split(sizes or states.shape[1], dim=1):
        measure.update(part)
    return measure.distance()


def test_euclidean(maps):
    """The norm of the difference over all matrices together."""
    compare(euclidean(maps), lambda i, j: sum((w[i] - w[j]).square().sum() for w in maps).sqrt())


def test_cosine(maps):
    """One minus the cosine of the vectorised matrices, averaged over the maps."""
    rows = [w.flatten(1) for w in maps]
    compare(cosine(maps), lambda i, j: 1 - sum(torch.cosine_similarity(r[i], r[j], 0) for r in rows) / len(rows))


def test_covariance(maps):
    """One minus tr(S_i S_j) / (||S_i|| ||S_j||) of the covariances of the columns."""

    def alignment(a, b):
        a, b = a.T.cov(), b.T.cov()
        return (a @ b).trace() / (a.norm() * b.norm())

    compare(covariance(maps), lambda i, j: 1 - sum(alignment(w[i], w[j]) for w in maps) / len(maps))


def gaussian(rows):
    """The mean of rows, and their covariance after the shrinkage of Ledoit & Wolf (2004), written as in the paper."""
    units, width = rows.shape
    centred = rows - rows.mean(0)
    sample = centred.T @ centred / units
    eye = torch.eye(width, dtype=torch.float64)

    def square(matrix):
        return (matrix @ matrix.T).trace() / width

    scale = sample.trace() / width
    far = square(sample - scale * eye)
    spread = min(sum(square(torch.outer(row, row) - sample) for row in centred) / units**2, far)
    return torch.distributions.MultivariateNormal(
        rows.mean(0), spread / far * scale * eye + (far - spread) / far * sample
    )


def test_kl(maps):
    """The mean of the two divergences between the Gaussians, as torch computes it, summed over the maps."""

    def divergence(a, b):
        a, b = gaussian(a), gaussian(b)
        return sum(torch.distributions.kl_divergence(*pair) for pair in ((a, b), (b, a))) / 2

    compare(kl(maps), lambda i, j: sum(divergence(w[i], w[j]) for w in maps))


def test_wasserstein(maps):
    """Bures' formula with scipy's matrix roots, summed over the maps that have one."""

    def bures(a, b):
        (m, s), (n, t) = ((w.mean(0), w.T.cov(correction=0).numpy()) for w in (a, b))
        root = scipy.linalg.sqrtm(s)
        return (m - n).square().sum() + (s + t - 2 * scipy.linalg.sqrtm(root @ t @ root).real).trace()

    tall, wide = maps
    compare(wasserstein([tall]), lambda i, j: bures(tall[i], tall[j]))
    # scipy cannot take roots of singular matrices; a small multiple of the identity changes little
    ridge = 1e-4 * torch.eye(6, dtype=torch.float64)
    padded = torch.cat([wide - wide.mean(1, keepdim=True)] + [sign * ridge.expand(BLOCKS, 6, 6) for sign in (1, -1)], 1)
    scale = len(padded[0]) / len(wide[0])
    means = (wide.mean(1).unsqueeze(0) - wide.mean(1).unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(wasserstein([wide]) - means, wasserstein([padded]) * scale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wasserstein(maps), wasserstein([tall]) + wasserstein([wide]))


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_equal_blocks_are_at_no_distance(maps, name):
    """Two blocks with equal weights have distance zero, and all others a positive distance."""
    for weights in maps:
        weights[3] = weights[1]
    distance = ON_WEIGHTS[name](maps)
    scale = distance.max()
    assert distance[1, 3] <= 1e-12 * scale
    assert (distance > 1e-3 * scale).sum() == BLOCKS**2 - BLOCKS - 2


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_order_of_units(maps, name):
    """Measures of distributions ignore the order of units; the others compare unit by unit."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    before = ON_WEIGHTS[name](maps)
    maps[0][2] = maps[0][2][order]
    after = ON_WEIGHTS[name](maps)
    if name in ON_DISTRIBUTIONS:
        torch.testing.assert_close(after, before)
    else:
        assert not torch.allclose(after[2], before[2], rtol=0.05)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_basis_of_the_stream(maps, name):
    """A rotation of the residual stream, common to all blocks, changes no distance."""
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.testing.assert_close(ON_WEIGHTS[name]([w @ turn for w in maps]), ON_WEIGHTS[name](maps))


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_emptied_blocks_are_at_a_finite_distance(maps, name):
    """A block with all weights zero, such as an expanded one, has finite distances, because plans are JSON."""
    for weights in maps:
        weights[2] = 0
    distance = ON_WEIGHTS[name](maps)
    assert distance.isfinite().all()
    assert (distance[2, [0, 1, 3, 4]] > 0).all()


def test_what_scale_changes(maps):
    """`cosine` and `covariance` ignore a factor of two on the weights of a block; all others do not."""
    for weights in maps:
        weights[1] = 2 * weights[0]
    for name, measure in ON_WEIGHTS.items():
        assert (measure(maps)[0, 1] < 1e-9) == (name in ("cosine", "covariance")), name


def test_divergences_see_means(maps):
    """Shifting all units of a block by m changes `wasserstein` by |m|^2, changes `kl`, and does not change
    `covariance`."""
    tall = maps[0]
    tall[1] = tall[0] + 0.5
    assert covariance([tall])[0, 1] < 1e-12
    assert wasserstein([tall])[0, 1] == pytest.approx(6 * 0.25)
    assert kl([tall])[0, 1] > 0.01


def test_block_influence(states):
    """1 - mean cosine between the states after two blocks (ShortGPT, eq. 1)."""
    compare(
        measured(BlockInfluence(), states),
        lambda i, j: 1 - torch.cosine_similarity(states[i], states[j], dim=-1).mean(),
    )


def test_angular(states):
    """Mean angle between the states after two blocks, in half turns: 0 for equal, 1/2 for square, 1 for opposite."""
    compare(
        measured(Angular(), states),
        lambda i, j: torch.cosine_similarity(states[i], states[j], dim=-1).arccos().mean() / torch.pi,
    )
    east, north = torch.eye(2, dtype=torch.float64)
    angles = measured(Angular(), torch.stack([east, 3 * east, north, -east]).unsqueeze(1))
    torch.testing.assert_close(angles[0], torch.tensor([0, 0, 0.5, 1], dtype=torch.float64))


def test_cka(states):
    """CKA equals the published definition with centred Gram matrices, with fewer tokens than coordinates or more."""
    for tokens in (6, 40):
        centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens
        grams = [centre @ block @ block.T @ centre for block in states[:, :tokens]]
        compare(
            measured(CKA(chunk=16), states[:, :tokens]),
            lambda i, j, grams=grams: 1 - (grams[i] * grams[j]).sum() / (grams[i].norm() * grams[j].norm()),
        )


def hsic(one, other):
    """HSIC_1 of Song et al. (2012) as Nguyen et al. (2021), eq. 3, print it."""
    n = len(one)
    k, m = ((block @ block.T).fill_diagonal_(0) for block in (one, other))
    ones = torch.ones(n, dtype=torch.float64)
    third = 2 / (n - 2) * (ones @ k @ m @ ones)
    return ((k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2)) - third) / (n * (n - 3))


def test_unbiased_cka(states):
    """The estimator of Nguyen et al. (2021), eq. 2, over whole chunks, or over all tokens if they fill no chunk."""
    for chunk, parts in ((16, states[:, :32].split(16, 1)), (64, [states])):

        def alignment(i, j, parts=parts):
            return sum(hsic(part[i], part[j]) for part in parts)

        compare(
            measured(UnbiasedCKA(chunk), states),
            lambda i, j, of=alignment: max(1 - of(i, j) / (of(i, i) * of(j, j)) ** 0.5, 0),
        )


def test_unbiased_cka_is_unbiased():
    """Independent states have distance one, although biased CKA finds them similar."""
    noise = torch.randn(2, 2048, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert measured(UnbiasedCKA(32), noise)[0, 1] == pytest.approx(1, abs=0.02)
    assert measured(CKA(), noise[:, :32])[0, 1] < 0.6


def test_unbiased_cka_needs_four_tokens(states):
    """Three tokens are too few for the estimator, and the error says so; four are enough."""
    with pytest.raises(DataError, match="at least 4 tokens in `batches`"):
        measured(UnbiasedCKA(), states[:, :3])
    assert measured(UnbiasedCKA(), states[:, :4]).isfinite().all()


@pytest.mark.parametrize("kind", [CKA, UnbiasedCKA])
def test_cka_is_blind_to_rotation_scale_and_shift(states, kind):
    """Linear CKA is invariant to an orthogonal map, a scale and an offset, even one of a million."""
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    moved = states.clone()
    moved[0] = 3 * states[0] @ turn + 1e6
    torch.testing.assert_close(measured(kind(16), moved), measured(kind(16), states), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_batches_do_not_matter(states, name):
    """Distances are the same for any split of the tokens, in float32 and in float64."""
    kind = ON_ACTIVATIONS[name]
    whole = measured(kind(chunk=8), states)
    assert (whole[0, 1:] > 1e-3).all()
    for sizes in (1, 7, 8, [3, 0, 20, 17], [39, 1]):
        assert torch.equal(measured(kind(chunk=8), states, sizes), whole)
    torch.testing.assert_close(measured(kind(chunk=8), states.float(), 5), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ON_ACTIVATIONS.keys() - {"cka_unbiased"}))
def test_chunks_do_not_matter(states, name):
    """The chunk size changes only rounding, except for the unbiased estimate, which is an average over chunks."""
    kind = ON_ACTIVATIONS[name]
    torch.testing.assert_close(measured(kind(chunk=3), states), measured(kind(), states))


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_memory_does_not_grow_with_tokens(states, name):
    """A measure uses no more memory after a hundred batches than after two."""

    def held():
        tensors = [t for v in vars(measure).values() for t in (v if isinstance(v, list) else [v]) if torch.is_tensor(t)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    measure = ON_ACTIVATIONS[name](chunk=16)
    sizes = []
    for _ in range(100):
        measure.update(states)
        sizes.append(held())
    assert max(sizes[2:]) <= max(sizes[:2])


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_states_that_pass_unchanged_are_at_no_distance(states, name):
    """A block that returns its input has distance zero from the block before it."""
    states[2] = states[1]
    distance = measured(ON_ACTIVATIONS[name](), states)
    assert distance[1, 2] < 1e-7
    assert distance[0, 1] > 1e-2
