"""Alignment of two blocks: match their heads, and rotate each head towards its match.

A block is given as `Rows`: role -> (groups, heads, dim, features) float64, one row for each coordinate of each head.
A group shares its keys and values, whose second axis is 1. An MLP is one group whose heads, of width 1, are its units.

Permuting and rotating heads preserves norms, so ||a - P b||^2 = ||a||^2 + ||b||^2 - 2 <a, P b>, and the closest
alignment has the largest inner product. All functions here maximise this inner product, or a correlation instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import RecipeError
from .turn import Planes, Turn

Rows = Mapping[str, Tensor]

# roles that must be rotated together -> allowed maps
Turns = Mapping[tuple[str, ...], Turn]
Solver = Callable[[Tensor], Tensor]


def assignment(score: Tensor) -> Tensor:
    """Match rows with columns for the largest total score: (n, n) -> column of each row, (n,)."""
    return torch.from_numpy(linear_sum_assignment(score.cpu().numpy(), maximize=True)[1])


def in_place(score: Tensor) -> Tensor:
    """Match each row with the column of its own index: (n, n) -> (n,)."""
    return torch.arange(len(score))


def transport(score: Tensor) -> Tensor:
    """Match like `assignment`, by optimal transport, as in OT fusion (Singh & Jaggi 2020, section 3): (n, n) -> (n,).

    Raises:
        RecipeError: Missing package POT.
    """
    try:
        import ot
    except ImportError as error:
        raise RecipeError(
            "align='transport' needs POT, which is not installed: `pip install \"hf-layerfuse[transport]\"`, or use "
            "align='permutation', which needs no extra package."
        ) from error
    # A constant added to the cost changes no plan, so for cosines this is the squared Euclidean ground cost 2 - 2 cos.
    cost = (score.max() - score).cpu().numpy()
    mass = np.ones(len(cost))
    plan = ot.emd(mass, mass, cost, numItermax=10**9)
    # With n equal masses on both sides the vertices of the polytope of plans are the permutations (Birkhoff), and emd
    # returns a vertex. A soft plan would mix units, and mixing does not commute with a nonlinearity.
    order = plan.argmax(1)
    assert np.array_equal(plan, np.eye(len(plan))[order]), "the transport plan is not a permutation"
    return torch.from_numpy(order)


def products(a: Rows, b: Rows, roles: Sequence[str]) -> Tensor:
    """Compute S = sum over roles of A B^T for each pair of heads. Rows that m heads share have weight 1/m in each.

    Returns:
        Products (groups of a, groups of b, heads of a, heads of b, dim, dim).
    """
    heads = max(a[role].shape[1] for role in roles)
    return sum(torch.einsum("gidf,hjef->ghijde", a[role], b[role]) * (a[role].shape[1] / heads) for role in roles)


def gain(cross: Tensor, turn: Turn) -> Tensor:
    """Compute the largest <R, S> over the maps R that `turn` allows: (..., dim, dim) -> (...).

    It is the inner product of the matched rows after rotating the second: <A, R B> = <R, A B^T>.
    """
    if turn == "none":
        return cross.diagonal(dim1=-2, dim2=-1).sum(-1)
    if isinstance(turn, Planes):
        planes, free = torch.hypot(*_along_across(cross, turn)).sum(-1), _free(cross, turn)
        return planes + torch.linalg.matrix_norm(free, "nuc") if free.numel() else planes
    return torch.linalg.matrix_norm(cross, "nuc")


def rotation(cross: Tensor, turn: Turn) -> Tensor:
    """Compute the R that reaches `gain` for S = A B^T, to be applied as R B: (..., dim, dim) -> (..., dim, dim).

    Among all orthogonal maps, it is U V^T of S = U s V^T (orthogonal Procrustes, Schoenemann 1966).
    """
    if isinstance(turn, Planes):
        along, across = _along_across(cross, turn)
        angle = torch.atan2(across, along)
        turned, (i, j), free = torch.zeros_like(cross), (list(turn.first), list(turn.second)), _free(cross, turn)
        turned[..., i, i] = turned[..., j, j] = angle.cos()
        turned[..., i, j], turned[..., j, i] = -angle.sin(), angle.sin()
        if free.numel():
            rest = torch.tensor(turn.free(cross.shape[-1]))
            turned[..., rest[:, None], rest] = rotation(free, "any")
        return turned
    if turn == "any":
        u, _, vh = torch.linalg.svd(cross)
        return u @ vh
    return torch.eye(cross.shape[-1], dtype=cross.dtype, device=cross.device).expand_as(cross)


def _along_across(cross: Tensor, turn: Planes) -> tuple[Tensor, Tensor]:
    """Return x and y, (..., planes): a rotation by t in a plane has <R, S> = cos(t) x + sin(t) y."""
    i, j = list(turn.first), list(turn.second)
    return cross[..., i, i] + cross[..., j, j], cross[..., j, i] - cross[..., i, j]


def _free(cross: Tensor, turn: Planes) -> Tensor:
    """The part of S between coordinates that are in no plane."""
    rest = torch.tensor(turn.free(cross.shape[-1]), dtype=torch.long)
    return cross[..., rest[:, None], rest]


def scores(a: Rows, b: Rows, turns: Turns, *, cosine: bool = False) -> Tensor:
    """Compute the inner product of each pair of heads after rotation: (groups of a, groups of b, heads, heads).

    Args:
        a: Rows of the first block.
        b: Rows of the second block.
        turns: Allowed maps of the roles.
        cosine: Whether to scale heads to norm one.
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
        score: Scores of pairs of heads, (groups, groups, heads, heads).
        solve: Solver of one assignment problem.

    Returns:
        The matching group of the second block for each group of the first, (groups,), and the matching head in that
        group for each head, (groups, heads).
    """
    score = score.cpu()
    inner = torch.stack([torch.stack([solve(pair) for pair in row]) for row in score])
    groups = solve(score.gather(3, inner[..., None]).sum((2, 3)))
    return groups, inner[torch.arange(len(groups)), groups]


def fit(a: Rows, b: Rows, score: Tensor, turns: Turns, solve: Solver = assignment) -> dict[str, Tensor]:
    """Return the second block with its heads in the order of `match`, rotated towards those of the first."""
    groups, heads = match(score, solve)
    ordered = {
        role: rows[groups] if rows.shape[1] == 1 else rows[groups[:, None], heads]  # shared rows move with their group
        for role, rows in b.items()
    }
    for roles, turn in turns.items():
        if turn != "none":
            turned = rotation(sum(torch.einsum("gidf,gief->gde", a[role], ordered[role]) for role in roles), turn)
            ordered |= {role: torch.einsum("gde,gief->gidf", turned, ordered[role]) for role in roles}
    return ordered


def inner_product(a: Rows, b: Rows) -> float:
    """Compute <a, b> over all roles."""
    return float(sum((rows * b[role]).sum() for role, rows in a.items()))


class CrossCorrelation:
    """Correlation of two sets of coordinates over batches of tokens; memory does not grow with the tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.moments: tuple[Tensor, ...] = ()

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the values of both sets for the same tokens: (tokens, n) and (tokens, m)."""
        x, y = x.double(), y.double()
        fresh = (x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y)
        self.moments = tuple(old + new for old, new in zip(self.moments, fresh, strict=True)) if self.count else fresh
        self.count += len(x)

    def value(self) -> Tensor:
        """Return the correlations, (n, m) float64 in [-1, 1]; 0 for constant coordinates."""
        x, y, xx, yy, xy = (moment / self.count for moment in self.moments)
        spread = [(square - mean**2).clamp_min(0).sqrt() for mean, square in ((x, xx), (y, yy))]
        # rounding errors of a constant are not a variance
        floor = [1e-7 * square.sqrt() for square in (xx, yy)]
        inverse = [torch.where(s > f, 1 / s, 0) for s, f in zip(spread, floor, strict=True)]
        return (xy - torch.outer(x, y)) * torch.outer(*inverse)
