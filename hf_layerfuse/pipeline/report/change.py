"""Change of quality from the original to a result, with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...evaluation.paired import interval_name
from ..results import Measurement, RunResults


class _Scale(NamedTuple):
    """How the change of a metric is given.

    Attributes:
        relative: Whether the change is a share of the original's value, instead of a difference.
        lower_is_better: Whether a smaller value is the better one.
    """

    relative: bool
    lower_is_better: bool


_SCALES = {
    "token_perplexity": _Scale(relative=True, lower_is_better=True),
    "word_perplexity": _Scale(relative=True, lower_is_better=True),
    "accuracy": _Scale(relative=False, lower_is_better=False),
    "cross_entropy": _Scale(relative=True, lower_is_better=True),
}


@dataclass(frozen=True)
class Change:
    """Change of a metric from the original to another model.

    Attributes:
        value: Change as a share of the original's value; for accuracies, the difference.
        interval: 95% interval of the change over the same rows of test data; None where it was not measured.
        relative: Whether `value` is a share.
        lower_is_better: Whether a smaller value of the metric is the better one.
    """

    value: float
    interval: tuple[float, float] | None
    relative: bool
    lower_is_better: bool

    def __str__(self) -> str:
        return _shown(self.value, self.relative)

    @property
    def bounds(self) -> str:
        """The interval in words; empty without one."""
        if self.interval is None:
            return ""
        low, high = (_shown(bound, self.relative, unit=False) for bound in self.interval)
        return f"{low} to {high}{'%' if self.relative else ''}"

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no clear change` where the interval contains 0; empty without an interval."""
        if self.interval is None:
            return ""
        low, high = self.interval
        if low <= 0 <= high:
            return "no clear change"
        return "worse" if (low > 0) == self.lower_is_better else "better"


def change_of(metric: str, before: Measurement, after: Measurement) -> Change | None:
    """Return the change of a metric; None for a metric that compares with the original already, or without a value.

    Args:
        metric: Name of the metric.
        before: Measurement of the original.
        after: Measurement of another model on the same data.
    """
    if metric not in _SCALES or not {metric} <= before.metrics.keys() & after.metrics.keys():
        return None
    scale, old, new = _SCALES[metric], before.metrics[metric], after.metrics[metric]
    if not math.isfinite(old) or (scale.relative and old == 0):
        return None
    value = new / old - 1 if scale.relative else new - old
    return Change(value, _interval(metric, after.metrics), scale.relative, scale.lower_is_better)


def interval_notes(results: RunResults) -> list[str]:
    """Sentences about the intervals of the results; empty without any change."""
    before, after = results.before, results.last
    changed = [metric for metric in _SCALES if change_of(metric, before, after) is not None]
    if not changed:
        return []
    if not any(interval_name(metric) in after.metrics for metric in changed):
        return ["Changes have no interval, because this run was made by a release that did not measure one."]
    rows = "windows of text" if "token_perplexity" in changed else "rows"
    said = "Intervals hold with a probability of 95%."
    said += f" The interval of a change is a bootstrap over the same {rows} of both models, which is narrower than the "
    said += "intervals of the two values suggest. Where it contains 0, these data show no clear change."
    if "accuracy" in changed:
        said += " Changes of accuracies are in percentage points."
    return [said]


def _interval(metric: str, metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    bounds = metrics.get(interval_name(metric))
    return None if bounds is None else (bounds[0], bounds[1])


def _shown(value: float, relative: bool, *, unit: bool = True) -> str:
    """A change in percent, or in percentage points."""
    scaled = 100 * value
    text = f"{scaled:+,.1f}" if abs(scaled) < 99.95 else f"{scaled:+,.0f}"
    text = text.replace("-0.0", "0.0").replace("+0.0", "0.0") if abs(scaled) < 0.05 else text
    return text + (("%" if relative else " points") if unit else "")
