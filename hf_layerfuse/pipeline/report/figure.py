"""A figure in the style of all pictures, readable on light and dark pages and by colour-blind readers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GREY = "#7d7d7d"
"""Visible on white and on black."""

COLOURS = ("#2f87c8", "#cf7a00", "#009e73", "#b86ba8", "#d4552f", "#5b6fd6", "#8a8a00", "#00a3a3")
"""Colours after Okabe and Ito, adjusted for light and dark pages."""


@contextmanager
def picture(path: str | Path, width: float, height: float, **grid: Any) -> Iterator[Any]:
    """Axes of a figure of this size in inches, which is written as a PNG file when the block ends."""
    # imported here, because the import is slow and most runs draw nothing else; Agg needs no window
    from matplotlib import cycler, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color")
    style = dict.fromkeys(names, GREY) | {"axes.prop_cycle": cycler(color=COLOURS), "font.size": 9}
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(squeeze=False, **grid)
        for axis in figure.axes:
            axis.set_facecolor("none")
        figure.savefig(path, dpi=130, transparent=True)
