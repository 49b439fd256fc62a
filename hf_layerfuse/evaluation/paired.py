"""Change of quality between two models that were scored on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .intervals import bootstrap
from .metrics import Scores

_CHANGES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "token_perplexity": lambda before, after: np.expm1(np.minimum(after - before, 700.0)),
    "accuracy": lambda before, after: after - before,
}
"""Change of a metric by the mean scores of two models, (resamples,): relative for perplexities, else the difference."""


def interval_name(metric: str) -> str:
    """Name of the interval of the change of a metric, among the metrics of a model."""
    return f"{metric}_change_interval"


def change_intervals(metrics: Sequence[str], before: Scores, after: Scores) -> dict[str, list[float]]:
    """Return the 95% intervals of the changes of metrics, by a bootstrap over the rows that both models were scored on.

    Rows differ far more than models do, so that this interval is much narrower than the difference of two intervals.

    Args:
        metrics: Names of the metrics that were measured; those without a known change are left out.
        before: Scores of the original.
        after: Scores of the other model on the same rows.
    """
    found = {}
    for metric in metrics:
        if change := _CHANGES.get(metric):
            pairs = np.concatenate([np.asarray(before, np.float64), np.asarray(after, np.float64)], axis=1)
            bounds = bootstrap(pairs, _between(change))
            found[interval_name(metric)] = list(bounds)
    return found


def _between(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda means: change(means[:, 0] / means[:, 1], means[:, 2] / means[:, 3])
