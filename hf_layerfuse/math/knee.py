"""The point of a curve past which it bends away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def knee(x: Sequence[float], y: Sequence[float]) -> int:
    """The place of the knee of a rising, convex curve: the point that is farthest below its chord.

    Both axes are scaled to 0 .. 1 first (Satopaa et al. 2011, "Finding a Kneedle in a Haystack"). Of a straight line,
    or one that bends the other way, it is the first point; of one that does not rise, the last.

    Args:
        x: what it costs, such as the share of parameters that are removed; ascending.
        y: what is lost, such as a validation loss.
    """
    x, y = (np.asarray(values, dtype=float) for values in (x, y))
    if y[-1] <= y[0]:
        return len(y) - 1
    x, y = ((values - values[0]) / (values[-1] - values[0]) for values in (x, y))
    below = x - y
    return int(below.argmax()) if below.max() > 1e-9 else 0
