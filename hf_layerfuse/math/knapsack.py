"""Options for each part of a path with the largest total value within a budget, by one dynamic program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import LayerFuseError

UNITS = 2000
"""Number of units of a budget. The cost of each choice is rounded up to whole units."""


@dataclass(frozen=True)
class Option:
    """One way to do a part of a path.

    Attributes:
        cost: Cost, 0 or more, such as milliseconds.
        value: Value, whose sum is maximised.
        label: Object of the caller.
    """

    cost: float
    value: float
    label: Any = None


Step = tuple[int, int, Option]
"""A part of the path, from one boundary to a later one, and its chosen option."""


class Frontier:
    """The paths of largest value for every budget up to a maximum (LayerMerge, Kim et al. 2024, section 3.3).

    M[j, t] = max over i < j and the options of (i, j) of M[i, t - cost] + value, M[0, t] = 0. Costs are rounded up to
    units of the budget, so that no path exceeds its budget. Among paths of equal value, the cheapest wins.

    Args:
        length: Last boundary; a path leads from 0 to it.
        options: Options between each pair of boundaries (i, j), 0 <= i < j <= length.
        budget: Largest cost of a path, above 0.
        units: Number of units of the budget. Rounding loses at most steps / units of the budget.

    Attributes:
        cheapest: Least cost of any path, without rounding; infinite if no path reaches the end.

    Raises:
        LayerFuseError: Budget that is not above 0, negative cost, cost or value that is not finite, or part that does
            not lead forward.
    """

    def __init__(
        self, length: int, options: Mapping[tuple[int, int], Sequence[Option]], budget: float, units: int = UNITS
    ) -> None:
        if not 0 < budget < math.inf:
            raise LayerFuseError(f"the budget is {budget}: use a finite number above 0.")
        for (i, j), ways in options.items():
            wrong = [way for way in ways if not (0 <= way.cost < math.inf and math.isfinite(way.value))]
            if wrong or not 0 <= i < j <= length:
                raise LayerFuseError(
                    f"the options between boundaries {i} and {j} of {length} are {list(ways)}: use costs of 0 or more, "
                    "finite values, and boundaries that lead forward."
                )
        self.length, self.options, self.budget, self.unit = length, options, budget, budget / units
        self.value = np.full((length + 1, units + 1), -np.inf)
        self.value[0] = 0.0
        self._cost = np.full_like(self.value, np.inf)  # unrounded costs break ties between equal values
        self._cost[0] = 0.0
        self._last: dict[int, list[Step]] = {}
        self._chosen = np.full(self.value.shape, -1)
        for end in range(1, length + 1):
            self._reach(end)

    def _units(self, cost: float) -> int:
        return math.ceil(cost / self.unit * (1 - 1e-12))  # rounding errors do not add a unit to a cost of whole units

    def _reach(self, end: int) -> None:
        ways = [(i, j, way) for (i, j), found in sorted(self.options.items()) if j == end for way in found]
        self._last[end] = ways
        value, cost, chosen = self.value[end], self._cost[end], self._chosen[end]
        for place, (start, _, way) in enumerate(ways):
            shift = self._units(way.cost)
            if shift >= len(value):
                continue
            left = slice(None, len(value) - shift)
            total, price = self.value[start, left] + way.value, self._cost[start, left] + way.cost
            better = (total > value[shift:]) | ((total == value[shift:]) & (price < cost[shift:]))
            value[shift:][better], cost[shift:][better], chosen[shift:][better] = total[better], price[better], place

    def best(self, budget: float | None = None) -> list[Step]:
        """Return the path of largest value within a budget, as steps in order.

        Args:
            budget: Budget, up to that of the frontier, which is the default.

        Raises:
            LayerFuseError: Budget below the cheapest path.
        """
        budget = self.budget if budget is None else budget
        at = min(math.floor(budget / self.unit * (1 + 1e-12)), self.value.shape[1] - 1)
        if at < 0 or self.value[self.length, at] == -np.inf:
            raise LayerFuseError(
                f"no path costs {budget:.6g} or less: the cheapest one costs {self.cheapest:.6g}. Use a budget that "
                "is larger than that."
            )
        steps: list[Step] = []
        end = self.length
        while end:
            start, _, way = self._last[end][self._chosen[end, at]]
            steps.append((start, end, way))
            end, at = start, at - self._units(way.cost)
        return steps[::-1]

    @cached_property
    def cheapest(self) -> float:
        least = [0.0] + [math.inf] * self.length
        for end in range(1, self.length + 1):
            least[end] = min((least[start] + way.cost for start, _, way in self._last[end]), default=math.inf)
        return least[-1]

    def paths(self) -> list[list[Step]]:
        """Return every path that is the best one for some budget, the cheapest first."""
        found, before = [], -np.inf
        for at, value in enumerate(self.value[self.length]):
            if value > before:
                found.append(self.best(at * self.unit))
                before = value
        return found
