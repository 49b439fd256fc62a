"""Picture of the calibration losses of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from .candidates import Panel
from .figure import COLOURS, GREY, picture


def plot_losses(panels: Sequence[Panel], path: str | Path) -> None:
    """Write a picture of the calibration losses of candidates, one row each.

    A filled dot is the loss of the taken candidate, a hollow one that of another; a grey ring is the loss before the
    refit, with a line to the loss after it.

    Args:
        panels: Panels, from top to bottom.
        path: Path of a PNG file.
    """
    heights = [len(panel.rows) + 3.4 for panel in panels]
    grid = {"nrows": len(panels), "gridspec_kw": {"height_ratios": heights}}
    with picture(path, 7.4, 0.23 * sum(heights), **grid) as axes:
        for [axis], panel, colour in zip(axes, panels, cycle(COLOURS)):
            for place, row in enumerate(panel.rows):
                for each in row.candidates:
                    fill = colour if each.taken else "none"
                    if each.before is not None:
                        axis.plot([each.before, each.loss], [place, place], color=GREY, linewidth=0.8, zorder=1)
                        axis.plot(each.before, place, "o", color=GREY, markersize=4.5, fillstyle="none", zorder=2)
                    size = 7.5 if each.taken else 6
                    axis.plot(each.loss, place, "o", color=colour, markerfacecolor=fill, markersize=size, zorder=3)
            losses = [loss for row in panel.rows for each in row.candidates for loss in (each.loss, each.before)]
            losses = [loss for loss in losses if loss is not None]
            if min(losses) > 0 and max(losses) > 10 * min(losses):
                axis.set_xscale("log")
            axis.set_yticks(range(len(panel.rows)), [row.blocks for row in panel.rows])
            axis.set_title(panel.title, loc="left")  # in sight where a phone shows the left part
            axis.set(xlabel="calibration loss", ylim=(len(panel.rows) - 0.4, -0.6))
            axis.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
            axis.tick_params(axis="y", length=0)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
