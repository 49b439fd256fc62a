"""The verdict on a run: its size, its speed, its quality, and the changes, in a few words each."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ...plan import Plan
from ...plan.words import in_brief
from ..results import Latency, RunResults
from .change import change_of
from .tables import METRIC_NAMES, found_nothing

Tone = Literal["good", "bad", "neutral"]


class Finding(NamedTuple):
    """One part of a verdict.

    Attributes:
        label: Subject, such as "Size".
        value: Result in two or three words.
        details: Sentences or figures behind it.
        tone: Whether the result is an improvement, a loss, or neither.
    """

    label: str
    value: str
    details: tuple[str, ...]
    tone: Tone


def verdict(plan: Plan, results: RunResults) -> list[Finding]:
    """Judge a run by its size, speed and quality, against its original.

    Args:
        plan: Plan that was carried out.
        results: Results of the run.

    Returns:
        The findings on size, speed (where latency was measured), quality (by the first metric), and what was done.
    """
    return [_size(results), *_speed(results), *_quality(results), _done(plan, results)]


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"


def _size(results: RunResults) -> Finding:
    before, after = results.before, results.last
    saved = 1 - after.bytes / before.bytes
    value, tone = "same size", "neutral"
    if abs(saved) >= 0.0005:
        digits = 0 if abs(saved) >= 0.1 else 1
        value = f"{abs(saved):.{digits}%} {'smaller' if saved > 0 else 'larger'}"
        tone = "good" if saved > 0 else "bad"
    details = (
        f"{in_bytes(before.bytes)} to {in_bytes(after.bytes)} on disk",
        f"{after.parameters / before.parameters:.0%} of the parameters",
    )
    return Finding("Size", value, details, tone)


def _speed(results: RunResults) -> list[Finding]:
    before, after = results.before.latency or {}, results.last.latency or {}
    if not after or not before:
        return []
    *others, batch = after
    speedup, span = after[batch].speedup, _span(before[batch], after[batch])
    value, tone = _in_times(speedup), "good" if speedup > 1 else "bad"
    if span is not None and span[0] <= 1 <= span[1]:
        value, tone = "same speed", "neutral"
    details = [f"{_in_ms(before[batch])} to {_in_ms(after[batch])} ms at batch {batch}"]
    if span is not None:
        details.append(f"{span[0]:.2f} to {span[1]:.2f} between the quartiles")
    details += [f"{_in_times(after[other].speedup)} at batch {other}" for other in others]
    return [Finding("Speed", value, tuple(details), tone)]


def _in_times(speedup: float) -> str:
    """A ratio of latencies in a few characters."""
    return f"{speedup:.2f}\u00d7 as fast" if speedup >= 1 else f"{1 / speedup:.2f}\u00d7 slower"


def _in_ms(latency: Latency) -> str:
    return f"{latency.median_ms:,.0f}" if latency.median_ms >= 100 else f"{latency.median_ms:.3g}"


def _span(before: Latency, after: Latency) -> tuple[float, float] | None:
    """Speed-up with the times at their far quartiles; None where the speed-up is not the ratio of these times."""
    if abs(before.median_ms / after.median_ms / after.speedup - 1) > 0.01:
        return None
    slow, fast = (
        (before.median_ms + sign * before.spread_ms / 2) / (after.median_ms - sign * after.spread_ms / 2)
        for sign in (-1, 1)
    )
    return (slow, fast) if slow <= fast else None


def _quality(results: RunResults) -> list[Finding]:
    before, after = results.before, results.last
    for metric, name in METRIC_NAMES.items():
        if metric not in before.metrics:
            continue
        label = name[0].upper() + name[1:]
        value = f"{after.metrics[metric]:.4g}"
        change = change_of(metric, before, after)
        if change is None:
            interval = after.metrics.get(f"{metric}_interval")
            details = () if interval is None else (f"95% interval: {interval[0]:.4g} to {interval[1]:.4g}",)
            return [Finding(label, value, details, "neutral")]
        details = [f"{before.metrics[metric]:.4g} to {value}"]
        if change.interval is not None:
            details.append(f"{change.verdict} (95% interval: {change.bounds})")
        if results.retrained is not None:
            details.append(f"original, retrained: {results.retrained.measurement.metrics[metric]:.4g}")
        tone = {"better": "good", "worse": "bad"}.get(change.verdict, "neutral")
        return [Finding(label, str(change), tuple(details), tone)]
    return []


def _done(plan: Plan, results: RunResults) -> Finding:
    value, *details = in_brief(plan)
    return Finding("What was done", value, (*details, _healing(results)), "neutral")


def _healing(results: RunResults) -> str:
    if not results.rounds:
        return "not healed"
    reports = [each.report for each in results.rounds]
    if len(reports) == 1 and found_nothing(reports[0]):
        return "healing found nothing better"
    steps = f"healed for {sum(report.steps for report in reports):,} steps"
    return steps if len(reports) == 1 else f"{steps} in {len(reports)} rounds"
