"""What is best within a limit of milliseconds, by the times of the parts and then of the whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ..errors import LayerFuseError, RecipeError
from ..math.knapsack import Frontier, Option

_Chosen = TypeVar("_Chosen")

UNITS = 10_000
"""Parts of the budget: each choice is rounded up to one of them."""

NEAR = 1.02
"""A model that takes so much more than the budget is within what its timing is worth."""

TRIES = 3
"""More programs, with a smaller and smaller budget, where what they choose takes longer than they think."""


class Times(Protocol):
    """What a model takes, in milliseconds, and what of that is no choice."""

    original: float
    rest: float


def affordable(
    length: int, options: Mapping[tuple[int, int], Sequence[Option]], limit: float, times: Times
) -> list[Any]:
    """The labels of the options of most value in sum that together take no more than some milliseconds.

    Args:
        length: of the chain.
        options: (i, j) -> what can be chosen between these boundaries; costs are milliseconds.
        limit: for the options, without the rest.
        times: for the message of the error.

    Raises:
        RecipeError: none take so little.
    """
    try:
        steps = Frontier(length, options, max(limit, 1e-9), UNITS).best()
    except LayerFuseError as error:
        least = Frontier(length, options, 1e9).cheapest + times.rest
        raise RecipeError(
            f"no choice takes {limit + times.rest:.3g} ms or less: the least that can be had is {least:.3g} ms, "
            f"{least / times.original:.0%} of the original's {times.original:.3g} ms. Use a larger budget."
        ) from error
    return [option.label for _, _, option in steps]


def within(
    choose: Callable[[float], _Chosen], measure: Callable[[_Chosen], float], limit: float, allowed: float
) -> tuple[_Chosen, float]:
    """What is chosen for a limit, or where the whole takes longer than its parts, for a smaller one.

    Args:
        choose: for a limit of milliseconds.
        measure: milliseconds of the model that a choice leads to.
        limit: at first.
        allowed: milliseconds of the model.

    Returns:
        The choice, and the limit that it was chosen for. What takes too long all the same is said in the log.

    Raises:
        RecipeError: nothing is chosen for the first limit.
    """
    chosen = choose(limit)
    took, tries = measure(chosen), 0
    while took > NEAR * allowed and tries < TRIES:
        smaller, tries = limit * allowed / took, tries + 1
        try:
            chosen = choose(smaller)
        except RecipeError:  # nothing is that fast
            break
        limit, took = smaller, measure(chosen)
    if took > NEAR * allowed:
        logging.getLogger(__name__).warning(
            "what was chosen takes %.3g ms, and %.3g were asked for: parts together take longer than each alone. Use a "
            "smaller budget, or more timed rounds.",
            took,
            allowed,
        )
    return chosen, limit
