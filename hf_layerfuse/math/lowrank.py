"""Low-rank factors of weight matrices that minimise the error of the outputs.

A map takes inputs X (tokens, in) to X W^T, so an error E of its weight W (out, in) costs ||X E^T||_F. This depends on
the inputs only by their Gram matrix X^T X (in, in): tr(E X^T X E^T). Without one, all inputs count equally: ||E||_F.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LayerFuseError

# Share of the mean eigenvalue of the Gram matrix that is added to every direction. It selects the plain norm in
# directions without calibration data, and is too small to matter in the others.
RIDGE = 1e-6


def low_rank(delta: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the product B A of rank `rank` nearest to a matrix: least ||X (delta - B A)^T||_F.

    Without a Gram matrix, it is the truncated singular value decomposition B = U_r S_r, A = V_r^T with which Relaxed
    Recursive Transformers (Bae et al. 2024) start their residuals. In both cases, the rows of A are orthonormal, and B
    carries the scale.

    Args:
        delta: Matrix to approximate, (out, in).
        rank: Rank of the product, from 1 to min(out, in).
        gram: Gram matrix X^T X of the inputs, (in, in), summed over tokens or averaged; it may be singular.

    Returns:
        Factors B (out, rank) and A (rank, in), float64.

    Raises:
        LayerFuseError: Rank out of range, or Gram matrix of another size or with values that are not finite.
    """
    delta = delta.detach().double()
    left = _left_vectors(delta, rank, gram)
    turn, scale, right = torch.linalg.svd(left.T @ delta, full_matrices=False)
    return left @ turn * scale, right


def shared_basis(
    weights: Sequence[Tensor], rank: int, grams: Tensor | Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Compute one basis B, and coefficients C_l per map, so that C_l B is near W_l: Basis Sharing (Wang et al. 2024).

    The paper stores W_l^T side by side and uses S^T S = X^T X, U S_k V^T = svd(S [W_1^T .. W_n^T]), the basis
    S^-1 U_k S_k and the coefficients V_k^T. This is the same in the orientation of `nn.Linear`, without an
    inverse: the stacked coefficients have orthonormal columns, and the basis carries the scale. It minimises the sum
    over the maps of ||X (W_l - C_l B)^T||_F^2.

    With one Gram matrix per map, the basis is the one for their sum, as in the paper, and the coefficients of a map
    are the best ones for its own inputs.

    Args:
        weights: Weights of the maps, (out, in) each.
        rank: Number of basis vectors, from 1 to min(in, sum of out).
        grams: Gram matrices X^T X of the inputs, (in, in): one for all maps or one per map; they may be singular.

    Returns:
        The basis (rank, in), and the coefficients (out, rank) of each map, float64.

    Raises:
        LayerFuseError: Rank out of range, or Gram matrix that is missing, of another size, or not finite.
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
        # least squares for the remaining error: directions without inputs of this map keep the common solution
        normal = torch.linalg.pinv(basis @ gram @ basis.T, hermitian=True)
        coefficients.append(start + (weight - start @ basis) @ gram @ basis.T @ normal)
    return basis, coefficients


def _left_vectors(matrix: Tensor, rank: int, gram: Tensor | None) -> Tensor:
    """Compute U (out, rank), the leading left singular vectors of `matrix` R, where R R^T is the Gram matrix.

    U U^T `matrix` is the nearest matrix of that rank. This form needs no inverse of R, which makes the textbook formula
    fail on nearly singular Gram matrices (COALA, Parkina and Rakhuba 2025).
    """
    outs, ins = matrix.shape
    if not 1 <= rank <= min(outs, ins):
        raise LayerFuseError(f"rank is {rank}: a matrix of {(outs, ins)} allows 1 to {min(outs, ins)}.")
    gram = None if gram is None else _prepare(gram, matrix)
    # Eigenvectors on the smaller side are many times faster than the singular value decomposition, and as accurate:
    # they are orthonormal up to rounding, so that full rank is exact.
    if outs <= ins:
        return _leading(matrix @ matrix.T if gram is None else matrix @ gram @ matrix.T, rank)
    if gram is not None:
        values, vectors = torch.linalg.eigh(gram)
        matrix = matrix @ (vectors * values.clamp_min(RIDGE).sqrt())
    return torch.linalg.qr(matrix @ _leading(matrix.T @ matrix, rank)).Q


def _leading(symmetric: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(1)


def _prepare(gram: Tensor, matrix: Tensor) -> Tensor:
    """Scale a Gram matrix for the inputs of `matrix` to mean eigenvalue one, and add the ridge."""
    size = matrix.shape[1]
    if gram.shape != (size, size) or not torch.isfinite(gram).all():
        raise LayerFuseError(
            f"a Gram matrix of {tuple(gram.shape)} for a map of {size} inputs: give X^T X of finite inputs of this map."
        )
    gram = gram.detach().to(matrix)
    scale = gram.trace().clamp_min(torch.finfo(gram.dtype).tiny) / size
    return gram / scale + RIDGE * torch.eye(size, dtype=gram.dtype, device=gram.device)
