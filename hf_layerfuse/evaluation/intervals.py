"""Confidence intervals of measured figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
"""Probability that an interval covers the true value."""

_Z = 1.959963984540054  # the normal quantile of LEVEL
_RESAMPLES = 2000


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
        samples: One row of numbers per sample, such as a loss and its number of tokens.
        statistic: Function of means, (resamples, numbers per row), that returns one value per resample.
        seed: Seed of the resamples.
    """
    rows = np.asarray(samples, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.stack([rows[generator.integers(len(rows), size=len(rows))].mean(0) for _ in range(_RESAMPLES)])
    low, high = np.quantile(statistic(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
