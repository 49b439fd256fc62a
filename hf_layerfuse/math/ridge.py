"""Linear least squares from streaming moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 4

_BLOCK = 256
"""Columns of a block of the moments. For many inputs, only blocks on and above the diagonal are computed."""

_WIDE = 4096
"""Number of inputs up to which sums are float64. For more inputs they take too much memory, and sums of float32
products gain little from it."""

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)


class Moments:
    """Sums over rows x, y of inputs and targets: sufficient statistics for linear fits of y by x, and for their errors.

    Inputs get a last column of ones, so that every fit has a free constant. Memory does not grow with the rows.

    Attributes:
        xx: Sum of [x, 1]^T [x, 1], (in + 1, in + 1) float64, or float32 if there are many inputs.
        xy: Sum of [x, 1]^T y, (in + 1, out).
        yy: Sum of y^T y, (out, out).
    """

    def __init__(self, xx: Tensor, xy: Tensor, yy: Tensor) -> None:
        self.xx, self.xy, self.yy = xx, xy, yy

    @classmethod
    def empty(
        cls, inputs: int, outputs: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Moments:
        """Return moments of zero rows, for `inputs` and `outputs` columns.

        Args:
            inputs: Number of inputs.
            outputs: Number of targets.
            device: Device of the sums.
            dtype: Data type of the sums; by default, that of the class. float32 is enough to rank inputs.
        """
        dtype = dtype or (torch.float64 if inputs <= _WIDE else torch.float32)
        shapes = ((inputs + 1, inputs + 1), (inputs + 1, outputs), (outputs, outputs))
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    @property
    def rows(self) -> float:
        """Number of rows, or the sum of the squares of their scales."""
        return self.xx[-1, -1].item()

    def add(self, x: Tensor, y: Tensor, scale: Tensor | None = None) -> None:
        """Add rows x (rows, in) and y (rows, out): products in their data type, sums in that of the moments.

        `scale`, (rows, 1), multiplies the error of each row, so that sums are weighted by its square.
        """
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        if scale is not None:
            x, y = scale * x, scale * y
        parts = [slice(start, start + _BLOCK) for start in range(0, x.shape[1], _BLOCK)]
        for place, rows in enumerate(parts):
            for columns in parts[place:]:
                product = x[:, rows].T @ x[:, columns]
                self.xx[rows, columns] += product
                if rows != columns:  # the matrix is symmetric
                    self.xx[columns, rows] += product.T
        self.xy += x.T @ y
        self.yy += y.T @ y

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def error(self, theta: Tensor) -> float:
        """Return the mean of ||[x, 1] theta - y||^2 over the rows; 0 without rows, so that all maps are equal there.

        Args:
            theta: Map, (in + 1, out) float64, with the constant in its last row.
        """
        total = left = self.yy.double().trace()
        for start in range(0, len(theta), _WIDE):
            rows = slice(start, start + _WIDE)
            left = left + (theta[rows] * (self.xx[rows].double() @ theta - 2 * self.xy[rows])).sum()
        # less is a rounding error; scales below one give fewer than one row
        return torch.where(left < 1e-12 * total, 0, left).item() / (self.rows or 1.0)

    def ridge(self, start: Tensor, strength: float) -> Tensor:
        """Return the theta that minimises sum ||[x, 1] theta - y||^2 + strength tr(x^T x)/in ||theta - start||^2.

        The constant is not penalised. If the system is singular despite the penalty, the result is `start`.

        Args:
            start: Map that the fit is pulled towards, (in + 1, out) float64.
            strength: Penalty, relative to the mean square of the inputs.
        """
        left = self.xy - torch.cat([rows.double() @ start for rows in self.xx.split(_WIDE)])
        system = self._penalised(strength)
        failed = _factorise(system)
        return start if failed else start + torch.cholesky_solve(left, system)

    def inverse(self, strength: float) -> Tensor:
        """Return the inverse of the system that `ridge` solves, (in + 1, in + 1), or its pseudoinverse if singular."""
        system = self._penalised(strength, self.xx.dtype)
        if _factorise(system):
            return torch.linalg.pinv(self._penalised(strength, self.xx.dtype), hermitian=True)
        return torch.cholesky_inverse(system, out=system)

    def _penalised(self, strength: float, dtype: torch.dtype = torch.float64) -> Tensor:
        system = self.xx.to(dtype, copy=True)
        diagonal = system.diagonal()
        diagonal[:-1] += strength * diagonal[:-1].mean()
        return system

    def only(self, inputs: Tensor) -> Moments:
        """Return the moments of the same rows with only the inputs at some indices."""
        chosen = torch.cat([inputs, inputs.new_tensor([len(self.xx) - 1])])
        return Moments(self.xx[chosen][:, chosen], self.xy[chosen], self.yy)

    def single(self) -> Moments:
        """Return the moments in float32, without a copy if they are float32 already."""
        return Moments(self.xx.float(), self.xy.float(), self.yy.float())

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred sums of products: inputs (in, in), inputs and targets (in, out), targets (out, out)."""
        mean, x, y = self.xx[-1:, :-1] / self.rows, self.xx[-1:, :-1], self.xy[-1:]
        return self.xx[:-1, :-1] - mean.T @ x, self.xy[:-1] - mean.T @ y, self.yy - y.T @ y / self.rows

    def linear(self) -> Moments:
        """Remove the correlation of inputs and targets with the constant, so that fits from 0 keep a constant of 0."""
        xx, xy = self.xx.clone(), self.xy.clone()
        xx[-1, :-1] = xx[:-1, -1] = xy[-1] = 0
        return Moments(xx, xy, self.yy)

    def through(self, theta: Tensor) -> Moments:
        """Return the moments of the same rows with the inputs [x, 1] @ theta, theta (in + 1, width), instead of x."""
        full = _with_one(theta)
        return Moments(full.T @ self.xx @ full, full.T @ self.xy, self.yy)

    def towards(self, theta: Tensor) -> Moments:
        """Return the moments of the same rows with the targets [y, 1] @ theta, theta (out + 1, width), instead of y."""
        total = self.xy[-1:]
        yy = torch.cat([torch.cat([self.yy, total.T], dim=1), torch.cat([total, self.xx[-1:, -1:]], dim=1)])
        return Moments(self.xx, torch.cat([self.xy, self.xx[:, -1:]], dim=1) @ theta, theta.T @ yy @ theta)


def eliminate(moments: Moments, start: Tensor, keep: int, strength: float = 0.1, size: int = 1) -> Tensor:
    """Return the most important units, each of `size` neighbouring inputs, for a ridge fit of the targets.

    Backward elimination in four rounds: each drops the units whose removal, after refitting the others, costs least,
    tr(theta_u^T [(xx + penalty)^-1]_uu^-1 theta_u) (Optimal Brain Surgeon, Hassibi and Stork 1993, eq. 5, for a block
    of weights). float32 is enough to rank units, and halves the memory of these inverses.

    Args:
        moments: Moments of all inputs.
        start: Map that the fits are pulled towards, (in + 1, out) float64.
        keep: Number of kept units.
        strength: Penalty, see `Moments.ridge`.
        size: Number of inputs of a unit.

    Returns:
        The indices of the kept units, ascending.
    """
    total = (len(start) - 1) // size
    left = torch.arange(total, device=start.device)
    moments = moments.single()
    for step in range(1, ROUNDS + 1):
        inputs = (left[:, None] * size + torch.arange(size, device=left.device)).flatten()
        part = moments if step == 1 else moments.only(inputs)
        begin = torch.cat([start[inputs], start[-1:]]).float()
        right = part.xy - part.xx @ begin
        inverse = part.inverse(strength)
        theta = (begin + inverse @ right)[:-1].unflatten(0, (len(left), size))
        within = inverse[:-1, :-1].unflatten(0, (len(left), size)).unflatten(2, (len(left), size))
        own = within.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        cost = (theta * torch.linalg.solve_ex(own, theta).result).sum((1, 2)).nan_to_num(0)  # dead units: 0 / 0
        left = left[cost.topk(round(total * (keep / total) ** (step / ROUNDS))).indices].sort().values
        del part, inverse, within, own  # the largest tensors of a refit must not exist twice
    return left


def compose(first: Tensor, then: Tensor) -> Tensor:
    """Return the single theta, (in + 1, out), that computes [[x, 1] @ first, 1] @ then."""
    return _with_one(first) @ then


def identity(moments: Moments) -> Tensor:
    """Return the map from [x, 1] to x, (in + 1, in)."""
    width = len(moments.xx) - 1
    return torch.eye(width + 1, width, dtype=torch.float64, device=moments.xx.device)


def _factorise(system: Tensor) -> bool:
    """Replace a matrix by its lower Cholesky factor, in its memory; returns whether that failed."""
    failed = torch.zeros((), dtype=torch.int32, device=system.device)
    torch.linalg.cholesky_ex(system, out=(system, failed))
    return bool(failed)


def _with_one(theta: Tensor) -> Tensor:
    """Extend a map to (in + 1, width + 1), so that it also returns the constant."""
    one = torch.zeros(len(theta), 1, dtype=theta.dtype, device=theta.device)
    one[-1] = 1
    return torch.cat([theta, one], dim=1)


@dataclass(frozen=True)
class Fit:
    """A linear map fitted to moments.

    Attributes:
        theta: Map, (in + 1, out) float64, with the constant in its last row.
        before: Mean squared error of the original map on held-out rows.
        after: Mean squared error on held-out rows of the map that was fitted to the other rows, at the best strength.
        strength: Chosen penalty; None if the original map is best.
    """

    theta: Tensor
    before: float
    after: float
    strength: float | None


def fit(train: Moments, selection: Moments, start: Tensor, strengths: Sequence[float] = STRENGTHS) -> Fit:
    """Return the ridge fit with the best strength on the selection split; `start` itself is a candidate.

    The returned map is fitted to all rows with the chosen strength.

    Args:
        train: Moments of the rows for fitting.
        selection: Moments of the selection split, for choosing the strength.
        start: Original map, (in + 1, out) float64.
        strengths: Candidate penalties, relative to the mean square of the inputs.
    """
    before = selection.error(start)
    strengths = sorted(strengths)
    found: dict[int, float] = {}

    def error(place: int) -> float:
        if place not in found:
            found[place] = selection.error(train.ridge(start, strengths[place]))
        return found[place]

    # the error falls and then rises with the penalty, so descent from any start finds the minimum
    best = len(strengths) // 2
    for step in (1, -1):
        while 0 <= best + step < len(strengths) and error(best + step) < error(best):
            best += step
    after = error(best)
    if not after < before * (1 - 1e-6):  # rounding errors do not justify a new map
        return Fit(start, before, before, None)
    return Fit((train + selection).ridge(start, strengths[best]), before, after, strengths[best])
