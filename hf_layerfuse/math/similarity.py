"""Distances between blocks, from their weights or from their activations.

Weights are compared map by map. For each linear map, a measure takes the matrices of this map in all blocks. Rows are
units (hidden units, coordinates of heads). Columns are coordinates of the residual stream, which all blocks of a model
share. Measures of distributions use each unit as a sample, so they do not depend on the order of the units, which does
not change the outputs of a block.

Activations are accumulated batch by batch, so memory does not grow with their number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

from ..errors import DataError

Maps = Iterable[Tensor]
"""Matrices (blocks, units, stream) of each linear map; computations use float64."""


def euclidean(maps: Maps) -> Tensor:
    """Compute ||W_i - W_j|| over all matrices of a block together (O'Neill et al. 2021).

    Args:
        maps: Matrices of each linear map of a block, (blocks, units, stream).

    Returns:
        Distances, (blocks, blocks) float64, symmetric, zero diagonal.
    """
    # expanding the square would leave rounding noise for equal blocks
    return _total(_pairs(weights, lambda a, b: (a - b).square().sum()) for weights in maps).sqrt()


def cosine(maps: Maps) -> Tensor:
    """Compute 1 - cos(vec W_i, vec W_j), averaged over the matrices of a block.

    Args:
        maps: Matrices of each linear map of a block, (blocks, units, stream).

    Returns:
        Distances, (blocks, blocks) float64 in [0, 2], symmetric, zero diagonal.
    """
    return torch.stack([_from_gram(_gram(weights.double())) for weights in maps]).mean(0)


def covariance(maps: Maps) -> Tensor:
    """Compute 1 - tr(S_i S_j) / (||S_i||_F ||S_j||_F), averaged over the matrices of a block (O'Neill et al. 2021).

    S is the covariance of the columns of a matrix. Its rows are the samples.

    Args:
        maps: Matrices of each linear map of a block, (blocks, units, stream).

    Returns:
        Distances, (blocks, blocks) float64 in [0, 1], symmetric, zero diagonal.
    """
    return torch.stack([_from_gram(_gram(_covariances(_moments(weights)[1]))) for weights in maps]).mean(0)


def kl(maps: Maps) -> Tensor:
    """Compute (KL(i || j) + KL(j || i)) / 2 of the Gaussians of the rows, summed over the matrices of a block.

    KL(i || j) = 1/2 [tr(S_j^-1 S_i) - n - ln(|S_i|/|S_j|) + (m_j - m_i)^T S_j^-1 (m_j - m_i)] (O'Neill et al. 2021),
    whose logarithms cancel in the sum. A matrix may have fewer rows than columns, so its covariance S is shrunk towards
    a multiple of the identity, with the optimal share of Ledoit & Wolf (2004).

    Args:
        maps: Matrices of each linear map of a block, (blocks, units, stream).

    Returns:
        Distances, (blocks, blocks) float64 in nats, symmetric, zero diagonal.
    """
    return _as_distance(_total(_kl(*_moments(weights)) for weights in maps))


def wasserstein(maps: Maps) -> Tensor:
    """Compute the squared 2-Wasserstein distance of the Gaussians of the rows, summed over the matrices of a block.

    ||m_i - m_j||^2 + tr S_i + tr S_j - 2 tr (S_i^1/2 S_j S_i^1/2)^1/2, exact (O'Neill et al. 2021). The last term is
    the sum of the singular values of R_i R_j^T, where S = R^T R, so that no root of a singular matrix is needed. The
    cost is one singular value decomposition of (stream, stream) for each pair of blocks and each map.

    Args:
        maps: Matrices of each linear map of a block, (blocks, units, stream).

    Returns:
        Distances, (blocks, blocks) float64, symmetric, zero diagonal.
    """
    return _as_distance(_total(_bures(*_moments(weights)) for weights in maps))


class ActivationMeasure(ABC):
    """A distance between blocks, accumulated over batches of activations.

    Tokens are processed in chunks of one size, so the result does not depend on the batches.

    Args:
        chunk: Number of tokens per chunk.
    """

    def __init__(self, chunk: int = 512) -> None:
        self.chunk = chunk
        self._rest: Tensor | None = None

    def update(self, states: Tensor) -> None:
        """Add tokens.

        Args:
            states: Residual stream after each block, (blocks, tokens, stream), with the same tokens for every block.
        """
        states = states if self._rest is None else torch.cat([self._rest, states], dim=1)
        *whole, rest = states.split(self.chunk, dim=1)
        for part in whole:
            self._add(part.double())
        self._rest = rest.clone()  # a view would keep the whole batch alive

    def distance(self) -> Tensor:
        """Return the distance over all added tokens. No tokens can be added afterwards.

        Returns:
            Distances, (blocks, blocks) float64, symmetric, zero diagonal.
        """
        if self._rest is not None:
            self._add(self._rest.double())
            self._rest = None
        return self._finish()

    @abstractmethod
    def _add(self, states: Tensor) -> None:
        """Add a chunk, in float64. Only the last one is smaller than `chunk`."""

    @abstractmethod
    def _finish(self) -> Tensor: ...


class BlockInfluence(ActivationMeasure):
    """1 - E cos(h_i, h_j), in [0, 2], of the residual stream h after each of two blocks.

    For neighbours this is the block influence of the later one (ShortGPT, Men et al. 2024, eq. 1).
    """

    def __init__(self, chunk: int = 512) -> None:
        super().__init__(chunk)
        self._tokens = 0
        self._sum: Tensor | float = 0.0

    def _add(self, states: Tensor) -> None:
        unit = torch.nn.functional.normalize(states, dim=-1).transpose(0, 1)
        self._sum = self._sum + self._of(unit @ unit.transpose(1, 2)).sum(0)
        self._tokens += len(unit)

    def _of(self, cosines: Tensor) -> Tensor:
        return 1 - cosines

    def _finish(self) -> Tensor:
        return _as_distance(self._sum / self._tokens)


class Angular(BlockInfluence):
    """E arccos(cos(h_i, h_j)) / pi, in [0, 1], of the residual stream h before and after the blocks i+1 .. j.

    The formula is eq. 6 of Gromov et al. (2024), who use only the last token of each text. Here all tokens count.
    """

    def _of(self, cosines: Tensor) -> Tensor:
        return cosines.clamp(-1, 1).arccos() / torch.pi


class CKA(ActivationMeasure):
    """1 - linear centred kernel alignment (Kornblith et al. 2019, eq. 3), in [0, 1].

    It is exact over all tokens, from the cross moments of all pairs of blocks. Their memory is
    4 blocks (blocks + 1) stream^2 bytes, 0.4 GB for GPT-2. `UnbiasedCKA` needs almost none.
    """

    def __init__(self, chunk: int = 512) -> None:
        super().__init__(chunk)
        self._tokens = 0

    def _add(self, states: Tensor) -> None:
        count, tokens, width = states.shape
        if self._tokens == 0:
            # sums of squares would lose the variation of large, nearly constant coordinates of the stream
            self._origin = states.mean(1, keepdim=True)
            self._sum = states.new_zeros(count, width)
            self._cross = [states.new_zeros(count - i, width, width) for i in range(count)]
        states = states - self._origin
        self._tokens += tokens
        self._sum += states.sum(1)
        for i, cross in enumerate(self._cross):
            cross.baddbmm_(states[i].T.expand(count - i, -1, -1), states[i:])

    def _finish(self) -> Tensor:
        mean = self._sum / self._tokens
        alignment = mean.new_empty(len(mean), len(mean))
        for i, row in enumerate(self._cross):
            for j, cross in enumerate(row, start=i):
                centred = torch.addr(cross, mean[i], mean[j], alpha=-self._tokens)
                alignment[i, j] = alignment[j, i] = centred.square().sum()
        return _from_gram(alignment)


class UnbiasedCKA(ActivationMeasure):
    """1 - linear CKA from the unbiased estimator of HSIC, averaged over chunks of tokens (Nguyen et al. 2021, eq. 2-3).

    Tokens that do not fill a chunk are ignored, unless there are no others. The estimate may slightly exceed 1.
    """

    def __init__(self, chunk: int = 512) -> None:
        super().__init__(chunk)
        self._sum: Tensor | None = None

    def _add(self, states: Tensor) -> None:
        tokens = states.shape[1]
        if tokens < 4 or (self._sum is not None and tokens < self.chunk):
            return
        # the mean does not change the estimator, but without centring, large means would lose precision
        states = states - states.mean(1, keepdim=True)
        kernels = states @ states.transpose(1, 2)
        kernels.diagonal(dim1=1, dim2=2).zero_()
        rows = kernels.sum(2)
        total = rows.sum(1)
        hsic = _gram(kernels) + torch.outer(total, total) / ((tokens - 1) * (tokens - 2))
        hsic = (hsic - 2 / (tokens - 2) * _gram(rows)) / (tokens * (tokens - 3))
        self._sum = hsic if self._sum is None else self._sum + hsic

    def _finish(self) -> Tensor:
        if self._sum is None:
            raise DataError("similarity='cka_unbiased' needs at least 4 tokens in `batches`: pass more, or use 'cka'.")
        return _from_gram(self._sum)


ON_WEIGHTS: Mapping[str, Callable[[Maps], Tensor]] = {
    "euclidean": euclidean,
    "cosine": cosine,
    "covariance": covariance,
    "kl": kl,
    "wasserstein": wasserstein,
}
ON_ACTIVATIONS: Mapping[str, type[ActivationMeasure]] = {
    "cka": CKA,
    "cka_unbiased": UnbiasedCKA,
    "angular": Angular,
    "block_influence": BlockInfluence,
}


def _moments(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (blocks, stream) of the rows of matrices, and the centred rows."""
    mean = weights.double().mean(1)
    return mean, weights - mean.unsqueeze(1)


def _covariances(centred: Tensor) -> Tensor:
    return centred.transpose(1, 2) @ centred / centred.shape[1]


def _kl(mean: Tensor, centred: Tensor) -> Tensor:
    covariances = _shrunk(centred)
    precisions = torch.cholesky_inverse(torch.linalg.cholesky(covariances))
    trace = precisions.flatten(1) @ covariances.flatten(1).T
    gap = mean.unsqueeze(0) - mean.unsqueeze(1)
    shift = torch.einsum("ija,iab,ijb->ij", gap, precisions, gap)
    one_way = (trace + shift - mean.shape[1]) / 2
    return (one_way + one_way.T) / 2


def _shrunk(centred: Tensor) -> Tensor:
    """Return the covariances (1 - a) S + a tr(S)/n I with the share a of Ledoit & Wolf (2004); always invertible."""
    units, width = centred.shape[1:]
    sample = _covariances(centred)
    # the floors are for matrices whose rows are all equal, such as the zero matrices of an emptied block
    variance = centred.square().mean((1, 2)).clamp_min(torch.finfo(sample.dtype).eps)
    norm = sample.square().sum((1, 2))
    spread = (centred.square().sum(2).square().mean(1) - norm) / units
    far = (norm - width * variance.square()).clamp_min(torch.finfo(sample.dtype).tiny)
    share = (spread / far).clamp(1e-6, 1)
    eye = torch.eye(width, dtype=sample.dtype, device=sample.device)
    return (1 - share)[:, None, None] * sample + (share * variance)[:, None, None] * eye


def _bures(mean: Tensor, centred: Tensor) -> Tensor:
    roots = torch.linalg.qr(centred / centred.shape[1] ** 0.5, mode="r").R
    trace = roots.square().sum((1, 2))
    overlap = _pairs(roots, lambda a, b: torch.linalg.svdvals(a @ b.T).sum())
    gap = _pairs(mean, lambda a, b: (a - b).square().sum())
    return gap + trace.unsqueeze(0) + trace.unsqueeze(1) - 2 * overlap


def _pairs(items: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply a symmetric function to all pairs of items, one at a time: (n, n) float64, zero on the diagonal."""
    matrix = torch.zeros(len(items), len(items), dtype=torch.float64, device=items.device)
    for i, j in combinations(range(len(items)), 2):
        matrix[i, j] = matrix[j, i] = of(items[i].double(), items[j].double())
    return matrix


def _gram(items: Tensor) -> Tensor:
    rows = items.flatten(1)
    return rows @ rows.T


def _from_gram(gram: Tensor) -> Tensor:
    """Compute 1 - cosine from inner products; 1 for items whose squared norm is zero, or estimated below zero."""
    norm = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(norm, norm)
    return _as_distance(1 - gram / scale.masked_fill(scale == 0, torch.inf))


def _total(matrices: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).sum(0)


def _as_distance(matrix: Tensor) -> Tensor:
    """Remove rounding errors: the result is symmetric, nonnegative, and zero on the diagonal."""
    return ((matrix + matrix.T) / 2).clamp_min(0).fill_diagonal_(0)
