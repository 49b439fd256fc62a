"""Confidence intervals of measured figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
"""Probability that an interval covers the true value."""

_Z = 1.959963984540054  # the normal quantile of LEVEL
_RESAMPLES = 2000
_AT_ONCE = 1_000_000  # rows that are drawn together, which bounds the memory


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson score interval of a probability, such as an accuracy (Wilson 1927).

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.
    """
    share, weight = successes / trials, _Z**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(
    samples: Sequence[Sequence[float]], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent samples (Efron 1979).

    Args:
        samples: Rows of numbers, (samples, numbers), such as a loss in nats and its number of tokens.
        statistic: Function of means over samples, (resamples, numbers), that returns (resamples,).
        seed: Seed of the resamples.
    """
    rows = np.asarray(samples, dtype=np.float64)
    generator = np.random.default_rng(seed)
    part = min(max(_AT_ONCE // len(rows), 1), _RESAMPLES)
    means = [
        rows[generator.integers(len(rows), size=(min(part, _RESAMPLES - done), len(rows)))].mean(1)
        for done in range(0, _RESAMPLES, part)
    ]
    low, high = np.quantile(statistic(np.concatenate(means)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
