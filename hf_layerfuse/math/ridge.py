"""Linear least squares from streaming moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)


class Moments:
    """Sums over rows x, y of inputs and targets: sufficient for every linear fit of y by x, and for its error.

    Inputs get a last column of ones, so that every fit has a free constant. Memory does not grow with the rows.

    Attributes:
        xx: sum of [x, 1]^T [x, 1], (in + 1, in + 1) float64.
        xy: sum of [x, 1]^T y, (in + 1, out) float64.
        yy: sum of y^T y, (out, out) float64.
    """

    def __init__(self, xx: Tensor, xy: Tensor, yy: Tensor) -> None:
        self.xx, self.xy, self.yy = xx, xy, yy

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Moments:
        """No rows yet, of `inputs` and `outputs` columns."""
        shapes = ((inputs + 1, inputs + 1), (inputs + 1, outputs), (outputs, outputs))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def rows(self) -> float:
        return self.xx[-1, -1].item()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (rows, in) and y (rows, out): products in their data type, sums in float64."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.T @ y

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def error(self, theta: Tensor) -> float:
        """Mean over the rows of ||[x, 1] theta - y||^2.

        Args:
            theta: (in + 1, out) float64, the constant in its last row.
        """
        fitted = (theta * (self.xx @ theta - 2 * self.xy)).sum() + self.yy.trace()
        return max(fitted.item(), 0.0) / self.rows

    def ridge(self, start: Tensor, strength: float) -> Tensor:
        """The theta that minimises sum ||[x, 1] theta - y||^2 + strength tr(x^T x)/in ||theta - start||^2.

        The constant is not held back. Where not even the penalty makes the system regular, that is `start`.

        Args:
            start: (in + 1, out) float64.
            strength: relative to the mean square of the inputs.
        """
        system = self.xx.clone()
        diagonal = system.diagonal()
        diagonal[:-1] += strength * diagonal[:-1].mean()
        factor, failed = torch.linalg.cholesky_ex(system)
        return start if failed else start + torch.cholesky_solve(self.xy - self.xx @ start, factor)

    def centred(self) -> Tensor:
        """Sum of squares and products of the inputs about their mean, (in, in)."""
        total = self.xx[-1:, :-1]
        return self.xx[:-1, :-1] - total.T @ total / self.rows

    def through(self, theta: Tensor) -> Moments:
        """The moments of the same rows with [x, 1] @ theta, theta (in + 1, width), in place of x."""
        full = _with_one(theta)
        return Moments(full.T @ self.xx @ full, full.T @ self.xy, self.yy)

    def towards(self, theta: Tensor) -> Moments:
        """The moments of the same rows with the targets [y, 1] @ theta, (out + 1, width), in place of y."""
        total = self.xy[-1:]
        yy = torch.cat([torch.cat([self.yy, total.T], dim=1), torch.cat([total, self.xx[-1:, -1:]], dim=1)])
        return Moments(self.xx, torch.cat([self.xy, self.xx[:, -1:]], dim=1) @ theta, theta.T @ yy @ theta)


def chain(first: Tensor, then: Tensor) -> Tensor:
    """The one theta, (in + 1, out), that does [[x, 1] @ first, 1] @ then."""
    return _with_one(first) @ then


def _with_one(theta: Tensor) -> Tensor:
    """(in + 1, width + 1): the same map, which passes the constant on."""
    one = torch.zeros(len(theta), 1, dtype=theta.dtype, device=theta.device)
    one[-1] = 1
    return torch.cat([theta, one], dim=1)


@dataclass(frozen=True)
class Fit:
    """A linear map fitted to moments.

    Attributes:
        theta: (in + 1, out) float64, the constant in its last row.
        before: mean squared error on held-out rows of the map as it was.
        after: that of the map that the other rows gave, at the chosen strength.
        strength: the penalty that was chosen; None where leaving the map as it was is best.
    """

    theta: Tensor
    before: float
    after: float
    strength: float | None


def fit(train: Moments, held_out: Moments, start: Tensor, strengths: Sequence[float] = STRENGTHS) -> Fit:
    """The ridge fit whose strength does best on held-out rows; `start` itself is among the candidates.

    Once the strength is chosen, all rows are fitted.

    Args:
        train: what the map is fitted to.
        held_out: moments of other rows, which choose the strength.
        start: (in + 1, out) float64, the map as it is.
        strengths: candidates, relative to the mean square of the inputs.
    """
    before = held_out.error(start)
    best = Fit(start, before, before * (1 - 1e-6), None)  # rounding is no reason to change a map
    for strength in sorted(strengths, reverse=True):
        theta = train.ridge(start, strength)
        error = held_out.error(theta)
        if error < best.after:
            best = Fit(theta, before, error, strength)
        elif best.strength is not None:
            break  # once weaker penalties fit the rows they were not given worse, they go on doing so
    if best.strength is None:
        return Fit(start, before, before, None)
    return replace(best, theta=(train + held_out).ridge(start, best.strength))
