"""The interval of a change takes both models on the same rows."""

import numpy as np
import pytest

from hf_layerfuse.evaluation.paired import change_intervals, interval_name


def test_the_same_rows_make_a_narrow_interval() -> None:
    """Windows differ by far more than models do: the interval of the change holds its true value, and excludes 0."""
    generator = np.random.default_rng(0)
    tokens = np.full(60, 100.0)
    before = generator.normal(3.0, 0.5, 60) * tokens
    after = before + (0.05 + generator.normal(0, 0.02, 60)) * tokens
    scores = [np.stack([losses, tokens], axis=1) for losses in (before, after)]
    [(name, (low, high))] = change_intervals(["token_perplexity", "word_perplexity"], *scores).items()
    assert name == interval_name("token_perplexity")
    assert 0 < low < np.expm1(0.05) < high < 0.07


@pytest.mark.parametrize("wrong", [0, 20])
def test_an_accuracy_changes_by_its_difference(wrong: int) -> None:
    """Without any changed prediction there is no change at all."""
    before = [(1.0, 1.0)] * 80 + [(0.0, 1.0)] * 20
    after = [(0.0, 1.0)] * wrong + before[wrong:]
    low, high = change_intervals(["accuracy"], before, after)["accuracy_change_interval"]
    assert low <= -wrong / 100 <= high
    assert (high < 0) == (wrong > 0)
