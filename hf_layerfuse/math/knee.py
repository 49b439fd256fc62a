"""The knee of a curve: the point after which it rises steeply."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def knee(x: Sequence[float], y: Sequence[float]) -> int:
    """Return the index of the knee of a rising, convex curve: the point farthest below its chord.

    Both axes are first scaled to 0 .. 1 (Satopaa et al. 2011, "Finding a Kneedle in a Haystack"). The knee of a
    straight or concave line is its first point. The knee of a line that does not rise is its last point.

    Args:
        x: Ascending values of the horizontal axis, such as the share of removed parameters.
        y: Values of the vertical axis, such as a validation loss.
    """
    x, y = (np.asarray(values, dtype=float) for values in (x, y))
    if y[-1] <= y[0]:
        return len(y) - 1
    x, y = ((values - values[0]) / (values[-1] - values[0]) for values in (x, y))
    below = x - y
    return int(below.argmax()) if below.max() > 1e-9 else 0
