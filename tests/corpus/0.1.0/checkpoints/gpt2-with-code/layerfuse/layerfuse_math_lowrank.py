# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of weight matrices, as near as they can be in the outputs that the weights give.

A map takes inputs X (tokens, in) to X W^T, so an error E of its weight W (out, in) costs ||X E^T||_F, which depends on
the inputs by their Gram matrix X^T X (in, in) alone: tr(E X^T X E^T). Without one, all inputs count alike: ||E||_F.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layerfuse_errors import LayerFuseError

# Share of the Gram matrix's mean eigenvalue that every direction gets. It decides what calibration leaves open, in
# favour of the plain norm, and is too small to cost anything where calibration does decide.
RIDGE = 1e-6


def low_rank(delta: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product B A of rank `rank` nearest to a matrix: least ||X (delta - B A)^T||_F.

    Without a Gram matrix that is the truncated singular value decomposition B = U_r S_r, A = V_r^T with which Relaxed
    Recursive Transformers (Bae et al. 2024) start their residuals. With one, the rows of A are orthonormal all the
    same, and B carries the scale.

    Args:
        delta: (out, in).
        rank: from 1 to min(out, in).
        gram: X^T X of the map's inputs, (in, in), summed over tokens or averaged; it may be singular.

    Returns:
        B (out, rank) and A (rank, in), float64.

    Raises:
        LayerFuseError: the rank is out of reach, or the Gram matrix is of another size or not finite.
    """
    delta = delta.detach().double()
    left = _left_vectors(delta, rank, gram)
    turn, scale, right = torch.linalg.svd(left.T @ delta, full_matrices=False)
    return left @ turn * scale, right


def shared_basis(
    weights: Sequence[Tensor], rank: int, grams: Tensor | Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One basis B and coefficients C_l per map, so that C_l B is near W_l: Basis Sharing (Wang et al. 2024).

    The paper stores W_l^T side by side and takes S^T S = X^T X, U S_k V^T = svd(S [W_1^T .. W_n^T]), the basis
    S^-1 U_k S_k and the coefficients V_k^T. This is the same in the orientation of `nn.Linear`, and needs no inverse:
    the coefficients, one below the other, have orthonormal columns, and the basis carries the scale. It minimises
    the sum over the maps of ||X (W_l - C_l B)^T||_F^2.

    With one Gram matrix per map, the basis is the one for their sum, as in the paper, and the coefficients of a map
    are those that are best for its own inputs.

    Args:
        weights: (out, in) each.
        rank: number of basis vectors, from 1 to min(in, sum of out).
        grams: X^T X of the inputs, (in, in), of all maps together or one per map; they may be singular.

    Returns:
        The basis (rank, in) and per map its coefficients (out, rank), float64.

    Raises:
        LayerFuseError: the rank is out of reach, or a Gram matrix is missing, of another size, or not finite.
    """
    weights = [weight.detach().double() for weight in weights]
    stack = torch.cat(weights)
    if grams is None or isinstance(grams, Tensor):
        left = _left_vectors(stack, rank, grams)
        return left.T @ stack, list(left.split([len(weight) for weight in weights]))
    if len(grams) != len(weights):
        raise LayerFuseError(f"{len(grams)} Gram matrices for {len(weights)} maps: give one for each, or one for all.")
    prepared = [_prepare(gram, stack) for gram in grams]
    left = _left_vectors(stack, rank, sum(gram.double() for gram in grams))
    basis = left.T @ stack
    coefficients = []
    for weight, gram, start in zip(weights, prepared, left.split([len(weight) for weight in weights]), strict=True):
        # least squares for what remains, so that what this map's inputs leave open stays as it is for all of them
        normal = torch.linalg.pinv(basis @ gram @ basis.T, hermitian=True)
        coefficients.append(start + (weight - start @ basis) @ gram @ basis.T @ normal)
    return basis, coefficients


def _left_vectors(matrix: Tensor, rank: int, gram: Tensor | None) -> Tensor:
    """U (out, rank): the leading left singular vectors of `matrix` R, where R R^T is the Gram matrix.

    U U^T `matrix` is the nearest matrix of that rank. Written so, it takes no inverse of R, which is what makes the
    textbook formula fail on Gram matrices that are nearly singular (COALA, Parkina and Rakhuba 2025).
    """
    outs, ins = matrix.shape
    if not 1 <= rank <= min(outs, ins):
        raise LayerFuseError(f"rank is {rank}: a matrix of {(outs, ins)} allows 1 to {min(outs, ins)}.")
    gram = None if gram is None else _prepare(gram, matrix)
    # Eigenvectors on the smaller side are many times faster than the singular value decomposition, and as good: they
    # are orthonormal to rounding, so that at full rank nothing is lost.
    if outs <= ins:
        return _leading(matrix @ matrix.T if gram is None else matrix @ gram @ matrix.T, rank)
    if gram is not None:
        values, vectors = torch.linalg.eigh(gram)
        matrix = matrix @ (vectors * values.clamp_min(RIDGE).sqrt())
    return torch.linalg.qr(matrix @ _leading(matrix.T @ matrix, rank)).Q


def _leading(symmetric: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(1)


def _prepare(gram: Tensor, matrix: Tensor) -> Tensor:
    """A Gram matrix for the inputs of `matrix`, scaled to mean eigenvalue one, plus the ridge."""
    size = matrix.shape[1]
    if gram.shape != (size, size) or not torch.isfinite(gram).all():
        raise LayerFuseError(
            f"a Gram matrix of {tuple(gram.shape)} for a map of {size} inputs: give X^T X of finite inputs of this map."
        )
    gram = gram.detach().to(matrix)
    scale = gram.trace().clamp_min(torch.finfo(gram.dtype).tiny) / size
    return gram / scale + RIDGE * torch.eye(size, dtype=gram.dtype, device=gram.device)
