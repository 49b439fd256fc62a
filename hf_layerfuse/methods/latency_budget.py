"""The best combination within a latency budget, by the latencies of the parts and then of the whole model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import LayerFuseError, RecipeError
from ..math.knapsack import Frontier, Option
from .latency_table import LatencyTable

_Chosen = TypeVar("_Chosen")

UNITS = 10_000
"""Number of units of the budget. The cost of each candidate is rounded up to whole units."""

NEAR = 1.02
"""Measured latency, relative to the budget, up to which a model counts as within it: timing noise is 2%."""

TRIES = 3
"""Number of further searches, each with a smaller budget, when a chosen model is slower than predicted."""


def affordable(
    length: int, options: Mapping[tuple[int, int], Sequence[Option]], limit: float, latencies: LatencyTable
) -> list[Any]:
    """Return the labels of the options with the largest total value within a latency limit.

    Args:
        length: Number of blocks in a row.
        options: Options between each pair of boundaries (i, j); costs are milliseconds.
        limit: Milliseconds for all options together, without the rest.
        latencies: Latencies of the model, for the error message.

    Raises:
        RecipeError: Limit below the cheapest combination.
    """
    try:
        steps = Frontier(length, options, max(limit, 1e-9), UNITS).best()
    except LayerFuseError as error:
        least = Frontier(length, options, 1e9).cheapest + latencies.rest
        raise RecipeError(
            f"no plan takes {limit + latencies.rest:.3g} ms or less: the fastest available plan takes {least:.3g} ms, "
            f"{least / latencies.original:.0%} of the original's {latencies.original:.3g} ms. Use a larger budget."
        ) from error
    return [option.label for _, _, option in steps]


def within(
    choose: Callable[[float], _Chosen], measure: Callable[[_Chosen], float], limit: float, allowed: float
) -> tuple[_Chosen, float]:
    """Choose within a limit, and again within smaller limits while the whole model is slower than its parts predict.

    Args:
        choose: Function of a limit in milliseconds that returns the best combination within it.
        measure: Function of a combination that returns the latency of its model, in milliseconds.
        limit: First limit, in milliseconds.
        allowed: Latency budget of the model, in milliseconds.

    Returns:
        The combination, and the limit that it was chosen for. If the model still exceeds the budget, a warning is
        logged.

    Raises:
        RecipeError: First limit that no combination keeps.
    """
    chosen = choose(limit)
    took, tries = measure(chosen), 0
    while took > NEAR * allowed and tries < TRIES:
        smaller, tries = limit * allowed / took, tries + 1
        try:
            chosen = choose(smaller)
        except RecipeError:  # no combination is that fast
            break
        limit, took = smaller, measure(chosen)
    if took > NEAR * allowed:
        logging.getLogger(__name__).warning(
            "the chosen model takes %.3g ms, above the budget of %.3g ms: its parts are slower together than alone. "
            "Use a smaller budget, or more timed rounds.",
            took,
            allowed,
        )
    return chosen, limit
