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
"""Number of inputs up to which sums and solutions are float64. For more inputs they take too much memory, and sums of
float32 products gain little from it."""

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

    def include(self, other: Moments) -> Moments:
        """Add the rows of other moments to these, in place."""
        for own, more in ((self.xx, other.xx), (self.xy, other.xy), (self.yy, other.yy)):
            own += more
        return self

    def error(self, theta: Tensor) -> float:
        """Return the mean of ||[x, 1] theta - y||^2 over the rows; 0 without rows, so that all maps are equal there.

        Args:
            theta: Map, (in + 1, out) float64, with the constant in its last row.
        """
        total = left = self.yy.double().trace()
        for start in range(0, len(theta), _WIDE):
            rows = slice(start, start + _WIDE)
            product = self.xx[rows] @ theta.to(self.xx) - 2 * self.xy[rows]
            left = left + (theta[rows].double() * product).sum()
            del product
        # less is a rounding error; scales below one give fewer than one row
        return torch.where(left < 1e-12 * total, 0, left).item() / (self.rows or 1.0)

    def ridge(self, start: Tensor, strength: float) -> Tensor:
        """Return the theta that minimises sum ||[x, 1] theta - y||^2 + strength tr(x^T x)/in ||theta - start||^2.

        The constant is not penalised. If the system is singular despite the penalty, the result is `start`.

        Args:
            start: Map that the fit is pulled towards, (in + 1, out) float64.
            strength: Penalty, relative to the mean square of the inputs.
        """
        system = self._penalised(strength)
        if _factorise(system):
            return start
        left = self.xy - self.xx @ start.to(self.xx)
        return start + torch.cholesky_solve(left, system)

    def inverse(self, strength: float) -> Tensor:
        """Return the inverse of the system that `ridge` solves, (in + 1, in + 1), or its pseudoinverse if singular."""
        system = self._penalised(strength)
        if _factorise(system):
            return torch.linalg.pinv(self._penalised(strength), hermitian=True)
        return torch.cholesky_inverse(system, out=system)

    def _penalised(self, strength: float) -> Tensor:
        system = self.xx.clone()
        diagonal = system.diagonal()
        diagonal[:-1] += strength * diagonal[:-1].mean()
        return system

    def only(self, inputs: Tensor) -> Moments:
        """Return the moments of the same rows with only the inputs at some indices."""
        chosen = torch.cat([inputs, inputs.new_tensor([len(self.xx) - 1])])
        return Moments(self.xx[chosen.unsqueeze(1), chosen], self.xy[chosen], self.yy)

    def single(self) -> Moments:
        """Return the moments in float32, without a copy if they are float32 already."""
        return Moments(self.xx.float(), self.xy.float(), self.yy.float())

    def double(self) -> Moments:
        """Return the moments in float64, without a copy if they are float64 already."""
        return Moments(self.xx.double(), self.xy.double(), self.yy.double())

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred sums of products: inputs (in, in), inputs and targets (in, out), targets (out, out)."""
        own = self.double()
        mean, x, y = own.xx[-1:, :-1] / own.rows, own.xx[-1:, :-1], own.xy[-1:]
        return own.xx[:-1, :-1] - mean.T @ x, own.xy[:-1] - mean.T @ y, own.yy - y.T @ y / own.rows

    def linear(self, *, consume: bool = False) -> Moments:
        """Remove the correlation of inputs and targets with the constant, so that fits from 0 keep a constant of 0.

        Args:
            consume: Whether these moments may change, which saves the memory of a copy.
        """
        found = self if consume else Moments(self.xx.clone(), self.xy.clone(), self.yy)
        found.xx[-1, :-1] = found.xx[:-1, -1] = found.xy[-1] = 0
        return found

    def through(self, theta: Tensor) -> Moments:
        """Return the moments of the same rows with the inputs [x, 1] @ theta, theta (in + 1, width), instead of x."""
        full, own = _with_one(theta), self.double()
        return Moments(full.T @ own.xx @ full, full.T @ own.xy, own.yy)

    def towards(self, theta: Tensor) -> Moments:
        """Return the moments of the same rows with the targets [y, 1] @ theta, theta (out + 1, width), instead of y."""
        own = self.double()
        total = own.xy[-1:]
        yy = torch.cat([torch.cat([own.yy, total.T], dim=1), torch.cat([total, own.xx[-1:, -1:]], dim=1)])
        return Moments(own.xx, torch.cat([own.xy, own.xx[:, -1:]], dim=1) @ theta, theta.T @ yy @ theta)


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
    part, begin = moments.single(), start.float()
    del moments  # with the last reference, the moments of all inputs go as soon as fewer are left
    for step in range(1, ROUNDS + 1):
        right = part.xy - part.xx @ begin
        inverse = part.inverse(strength)
        theta = (begin + inverse @ right)[:-1].unflatten(0, (len(left), size))
        within = inverse[:-1, :-1].unflatten(0, (len(left), size)).unflatten(2, (len(left), size))
        own = within.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        cost = (theta * torch.linalg.solve_ex(own, theta).result).sum((1, 2)).nan_to_num(0)  # dead units: 0 / 0
        kept = cost.topk(round(total * (keep / total) ** (step / ROUNDS))).indices.sort().values
        del inverse, within, own  # the largest tensors of a refit must not exist twice
        left = left[kept]
        inputs = (kept[:, None] * size + torch.arange(size, device=left.device)).flatten()
        if step < ROUNDS:
            part, begin = part.only(inputs), torch.cat([begin[inputs], begin[-1:]])
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


def fit(
    train: Moments, selection: Moments, start: Tensor, strengths: Sequence[float] = STRENGTHS, *, consume: bool = False
) -> Fit:
    """Return the ridge fit with the best strength on the selection split; `start` itself is a candidate.

    The returned map is fitted to all rows with the chosen strength.

    Args:
        train: Moments of the rows for fitting.
        selection: Moments of the selection split, for choosing the strength.
        start: Original map, (in + 1, out) float64.
        strengths: Candidate penalties, relative to the mean square of the inputs.
        consume: Whether `train` may change, which saves the memory of a copy.
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
    every = train.include(selection) if consume else train + selection
    return Fit(every.ridge(start, strengths[best]), before, after, strengths[best])
