"""Confidence intervals cover the true value as often as they state."""

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_layerfuse.evaluation.intervals import LEVEL, bootstrap, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (781, 872), (872, 872), (3, 10)])
def test_wilson_is_that_of_scipy(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_covers_the_true_ratio() -> None:
    """The ratio of means, as of a loss per token, lies inside in about 95% of 200 draws."""
    generator, inside = np.random.default_rng(0), 0
    for seed in range(200):
        tokens = generator.integers(50, 150, 80)
        losses = generator.normal(3.0 * tokens, 20.0)
        low, high = bootstrap(np.stack([losses, tokens], axis=1), lambda means: means[:, 0] / means[:, 1], seed)
        inside += low <= 3.0 <= high
    assert 180 <= inside <= 199


def test_one_sample_has_no_width() -> None:
    assert bootstrap([[2.0]], lambda means: means[:, 0]) == (2.0, 2.0)
