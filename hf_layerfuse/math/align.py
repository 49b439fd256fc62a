"""Which heads of two blocks belong together, and how a head may be turned to lie closest to another.

A block is given as `Rows`: role -> (groups, heads, dim, features) float64, one row for each coordinate of each head.
A group shares its keys and values, whose second axis is 1. An MLP is one group of heads of width 1, its units.

Permuting heads and turning them keeps lengths, so ||a - P b||^2 = ||a||^2 + ||b||^2 - 2 <a, P b>, and the closest is
what has the largest inner product. Everything here maximises that, or a correlation in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import RecipeError

Rows = Mapping[str, Tensor]
# maps of a head's coordinates: only the identity; a rotation in each plane (j, j + dim/2); all orthogonal maps
Turn = Literal["none", "pairs", "any"]
# the roles that have to turn together, and how they may
Turns = Mapping[tuple[str, ...], Turn]
Solver = Callable[[Tensor], Tensor]


def assignment(score: Tensor) -> Tensor:
    """The matching of rows with columns that has the largest total score: (n, n) -> column of each row, (n,)."""
    return torch.from_numpy(linear_sum_assignment(score.cpu().numpy(), maximize=True)[1])


def transport(score: Tensor) -> Tensor:
    """The same by optimal transport, as OT fusion finds it (Singh & Jaggi 2020, section 3): (n, n) -> (n,).

    Raises:
        RecipeError: POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise RecipeError(
            "align='transport' needs POT, which is not installed: `pip install \"hf-layerfuse[transport]\"`, or use "
            "align='permutation', which needs nothing more."
        ) from error
    # Adding a constant to the cost moves no plan, so for cosines this is the squared Euclidean ground cost 2 - 2 cos.
    cost = (score.max() - score).cpu().numpy()
    mass = np.ones(len(cost))
    plan = ot.emd(mass, mass, cost, numItermax=10**9)
    # With n equal masses on both sides the vertices of the polytope of plans are the permutations (Birkhoff), and emd
    # returns a vertex. A soft plan would mix units, which a nonlinearity does not commute with.
    order = plan.argmax(1)
    assert np.array_equal(plan, np.eye(len(plan))[order]), "the transport plan is not a permutation"
    return torch.from_numpy(order)


def products(a: Rows, b: Rows, roles: Sequence[str]) -> Tensor:
    """S = sum over roles of A B^T for each pair of heads; rows that m heads share count 1/m in each.

    Returns:
        (groups of a, groups of b, heads of a, heads of b, dim, dim).
    """
    heads = max(a[role].shape[1] for role in roles)
    return sum(torch.einsum("gidf,hjef->ghijde", a[role], b[role]) * (a[role].shape[1] / heads) for role in roles)


def gain(cross: Tensor, turn: Turn) -> Tensor:
    """The largest <R, S> over the maps R that `turn` allows: (..., dim, dim) -> (...).

    That is the inner product of the matched rows once the second are turned: <A, R B> = <R, A B^T>.
    """
    if turn == "none":
        return cross.diagonal(dim1=-2, dim2=-1).sum(-1)
    if turn == "pairs":
        return torch.hypot(*_plane(cross)).sum(-1)
    return torch.linalg.matrix_norm(cross, "nuc")


def rotation(cross: Tensor, turn: Turn) -> Tensor:
    """The R that reaches `gain`, for S = A B^T to be applied as R B: (..., dim, dim) -> (..., dim, dim).

    Of all orthogonal maps this is U V^T of S = U s V^T (orthogonal Procrustes, Schoenemann 1966).
    """
    if turn == "pairs":
        along, across = _plane(cross)
        angle = torch.atan2(across, along)
        cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
        return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)
    if turn == "any":
        u, _, vh = torch.linalg.svd(cross)
        return u @ vh
    return torch.eye(cross.shape[-1], dtype=cross.dtype, device=cross.device).expand_as(cross)


def _plane(cross: Tensor) -> tuple[Tensor, Tensor]:
    """<R, S> of a rotation by t in the plane (j, j + dim/2) is cos(t) x + sin(t) y; returns x and y, (..., dim/2)."""
    half = cross.shape[-1] // 2
    blocks = cross.unflatten(-1, (2, half)).unflatten(-3, (2, half)).diagonal(dim1=-3, dim2=-1)  # (..., 2, 2, dim/2)
    return blocks[..., 0, 0, :] + blocks[..., 1, 1, :], blocks[..., 1, 0, :] - blocks[..., 0, 1, :]


def scores(a: Rows, b: Rows, turns: Turns, *, cosine: bool = False) -> Tensor:
    """Inner product of each pair of heads, each turned to its best: (groups of a, groups of b, heads, heads).

    Args:
        cosine: of heads scaled to length one.
    """
    total = sum(gain(products(a, b, roles), turn) for roles, turn in turns.items())
    if cosine:
        tiny = torch.finfo(total.dtype).tiny
        left, right = (_lengths(rows).clamp_min(tiny) for rows in (a, b))
        total = total / (left[:, None, :, None] * right[None, :, None, :])
    return total


def _lengths(rows: Rows) -> Tensor:
    heads = max(values.shape[1] for values in rows.values())
    return sum(v.square().sum((2, 3)) * (v.shape[1] / heads) for v in rows.values()).sqrt()


def match(score: Tensor, solve: Solver = assignment) -> tuple[Tensor, Tensor]:
    """Match groups with groups, and in them heads with heads, for the largest total score.

    Heads cannot leave their group, so the score of two groups is that of the best matching of their heads.

    Args:
        score: (groups, groups, heads, heads).

    Returns:
        For each group of the first block the group of the second, (groups,), and for each of its heads the head in
        that group, (groups, heads).
    """
    score = score.cpu()
    inner = torch.stack([torch.stack([solve(pair) for pair in row]) for row in score])
    groups = solve(score.gather(3, inner[..., None]).sum((2, 3)))
    return groups, inner[torch.arange(len(groups)), groups]


def fit(a: Rows, b: Rows, score: Tensor, turns: Turns, solve: Solver = assignment) -> dict[str, Tensor]:
    """The second block with its heads in the order that `match` finds, then turned towards those of the first."""
    groups, heads = match(score, solve)
    ordered = {
        role: rows[groups] if rows.shape[1] == 1 else rows[groups[:, None], heads]  # shared rows go with their group
        for role, rows in b.items()
    }
    for roles, turn in turns.items():
        if turn != "none":
            turned = rotation(sum(torch.einsum("gidf,gief->gde", a[role], ordered[role]) for role in roles), turn)
            ordered |= {role: torch.einsum("gde,gief->gidf", turned, ordered[role]) for role in roles}
    return ordered


def inner_product(a: Rows, b: Rows) -> float:
    """<a, b> over all roles."""
    return float(sum((rows * b[role]).sum() for role, rows in a.items()))


class CrossCorrelation:
    """Correlation of two sets of coordinates over tokens that come in batches; memory does not grow with them."""

    def __init__(self) -> None:
        self.count = 0
        self.moments: tuple[Tensor, ...] = ()

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the same tokens seen by both: (tokens, n) and (tokens, m)."""
        x, y = x.double(), y.double()
        fresh = (x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y)
        self.moments = tuple(old + new for old, new in zip(self.moments, fresh, strict=True)) if self.count else fresh
        self.count += len(x)

    def value(self) -> Tensor:
        """(n, m) float64 in [-1, 1]; a coordinate that never changes correlates with nothing, 0."""
        x, y, xx, yy, xy = (moment / self.count for moment in self.moments)
        spread = [(square - mean**2).clamp_min(0).sqrt() for mean, square in ((x, xx), (y, yy))]
        # what rounding leaves of a constant is no variance
        floor = [1e-7 * square.sqrt() for square in (xx, yy)]
        inverse = [torch.where(s > f, 1 / s, 0) for s, f in zip(spread, floor, strict=True)]
        return (xy - torch.outer(x, y)) * torch.outer(*inverse)
