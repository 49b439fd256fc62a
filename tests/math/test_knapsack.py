"""The dynamic program compared with all possible chains."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerfuse import LayerFuseError
from hf_layerfuse.math.knapsack import Frontier, Option

UNITS = 100
BUDGET = 10.0


@st.composite
def problems(draw):
    """Up to 8 parts in a row, with options between some boundaries, and always between neighbours."""
    length = draw(st.integers(1, 8))
    pairs = [(i, j) for i in range(length) for j in range(i + 1, length + 1)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=10))
    chosen = sorted({*chosen, *((i, i + 1) for i in range(length))})
    # in whole units, and of few values, so that there are ties
    option = st.builds(Option, st.integers(0, 40).map(lambda units: units * BUDGET / UNITS), st.integers(-3, 3))
    return length, {pair: draw(st.lists(option, min_size=1, max_size=3)) for pair in chosen}


def every_path(length, options):
    """All paths of a small problem, as (value, cost)."""
    for inner in itertools.product([False, True], repeat=length - 1):
        stops = [0, *(i + 1 for i, stops in enumerate(inner) if stops), length]
        parts = list(itertools.pairwise(stops))
        if all(part in options for part in parts):
            for ways in itertools.product(*(options[part] for part in parts)):
                yield sum(way.value for way in ways), sum(way.cost for way in ways)


def totals(steps):
    return sum(way.value for _, _, way in steps), sum(way.cost for _, _, way in steps)


@settings(deadline=None, max_examples=60)
@given(problems(), st.floats(0.05, 1))
def test_it_is_the_best_of_all_paths(problem, share):
    """For any budget, no path within it has a higher value, and none with the same value is cheaper."""
    length, options = problem
    frontier = Frontier(length, options, BUDGET, UNITS)
    budget = math.floor(share * UNITS) * BUDGET / UNITS
    known = list(every_path(length, options))
    within = [(value, -cost) for value, cost in known if cost <= budget + 1e-9]
    assert frontier.cheapest == pytest.approx(min(cost for _, cost in known))
    if not within:
        with pytest.raises(LayerFuseError, match="the cheapest one costs"):
            frontier.best(budget)
        return
    steps = frontier.best(budget)
    value, cost = totals(steps)
    assert (value, -cost) == (max(within)[0], pytest.approx(max(within)[1]))
    assert [0, *(end for _, end, _ in steps)] == [*(start for start, _, _ in steps), length]
    assert all(way in options[start, end] for start, end, way in steps)


@settings(deadline=None, max_examples=30)
@given(problems())
def test_the_frontier_holds_every_best_path(problem):
    """Each chain of the frontier has a higher cost and value than the one before. No path with the same value is
    cheaper."""
    length, options = problem
    found = [totals(steps) for steps in Frontier(length, options, BUDGET, UNITS).paths()]
    assert found == sorted(found)
    assert all(one[0] < other[0] and one[1] < other[1] for one, other in itertools.pairwise(found))
    for value, cost in every_path(length, options):
        if cost <= BUDGET + 1e-9:
            assert any(better >= value and price <= cost + 1e-9 for better, price in found)


@settings(deadline=None, max_examples=30)
@given(problems(), st.floats(0.01, 1.0))
def test_costs_that_are_no_whole_units_stay_within_the_budget(problem, scale):
    """Costs are rounded up: a choice may leave some of the budget unused, but never exceeds it."""
    length, options = problem
    options = {pair: [Option(way.cost * scale, way.value) for way in ways] for pair, ways in options.items()}
    frontier = Frontier(length, options, BUDGET, 17)
    for steps in frontier.paths():
        assert totals(steps)[1] <= BUDGET + 1e-9


@pytest.mark.parametrize(
    "wrong", [Option(-1.0, 0.0), Option(math.nan, 0.0), Option(1.0, math.nan), Option(1.0, math.inf)]
)
def test_costs_that_mean_nothing_are_refused(wrong):
    with pytest.raises(LayerFuseError, match="costs of 0 or more"):
        Frontier(1, {(0, 1): [wrong]}, 1.0)
    with pytest.raises(LayerFuseError, match="lead forward"):
        Frontier(1, {(1, 1): [Option(1.0, 1.0)]}, 1.0)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_budgets_that_limit_nothing_are_refused(budget):
    with pytest.raises(LayerFuseError, match="use a finite number above 0"):
        Frontier(1, {(0, 1): [Option(1.0, 1.0)]}, budget)
