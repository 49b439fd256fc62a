"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_homotopy(rows: Sequence[tuple[int, Mapping[str, float]]], path: str | Path) -> None:
    """Write a picture of how activations became lines: the a of each, step by step.

    Args:
        rows: `HealReport.homotopy`.
        path: of a PNG file.
    """
    # here, because a picture needs no window, and most runs need no picture
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    steps = [step for step, _ in rows]
    markers = "osD^vP*X"
    for place, name in enumerate(rows[-1][1]):
        style = {"marker": markers[place % len(markers)], "markersize": 4}
        axis.plot(steps, [values[name] for _, values in rows], label=name, color=f"C{place}", **style)
    axis.set(xlabel="step", ylabel="a (0: activation, 1: line)", ylim=(-0.03, 1.03))
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
