"""Pictures of a run, readable on light and dark pages and by colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...models.families import CONV_GRAPH, LAYERS, family_of
from ...plan import Kind, Plan
from ...training.heal import HealReport
from .candidates import decided, loss_panels
from .figure import COLOURS as _COLOURS
from .figure import GREY as _GREY
from .figure import picture as _picture
from .losses import plot_losses


def draw(plan: Plan, healed: HealReport | None, folder: Path) -> dict[str, str]:
    """Write the pictures of a run.

    Args:
        plan: Plan that was carried out.
        healed: Report of the last healing; None without healing.
        folder: Folder to write to.

    Returns:
        Captions by the name of the file.
    """
    plot_plan(plan, folder / "plan.png")
    drawn = {"plan.png": "Blocks of the original, and the blocks of the result that they became"}
    if panels := loss_panels(decided(plan)):
        plot_losses(panels, folder / "candidates.png")
        drawn["candidates.png"] = "Calibration loss of the candidates, further left is better: filled dots were taken"
    if plan.notes.distances and (not panels or _contrast(plan.notes.distances) >= _LEAST_CONTRAST):
        plot_distances(plan.notes.distances, plan, folder / "distances.png")
        drawn["distances.png"] = (
            "Distances between blocks of the original: dark pairs are similar, marked pairs are grouped"
        )
    if healed and healed.train_loss:
        plot_training(healed.train_loss, healed.validation_loss, folder / "training.png")
        drawn["training.png"] = "Loss during healing"
    if healed and healed.homotopy:
        plot_homotopy(healed.homotopy, folder / "homotopy.png")
        drawn["homotopy.png"] = "Progress of each activation from its original form (0) to a line (1)"
    return drawn


_LEAST_CONTRAST = 0.1
"""Least difference between the distances of blocks, as a share of the largest, that says more than the losses do."""


def _contrast(distances: Mapping[Kind, Sequence[Sequence[float | None]]]) -> float:
    """Largest difference between two distances of one kind, as a share of the larger one."""
    found = [0.0]
    for matrix in distances.values():
        known = _off_diagonal(matrix)
        known = known[np.isfinite(known)]
        if len(known) and known.max() > 0:
            found.append((known.max() - known.min()) / known.max())
    return max(found)


def _off_diagonal(matrix: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Distances between different blocks, (blocks, blocks), NaN on the diagonal and between those that never fuse."""
    known = np.array(matrix, dtype=float)
    np.fill_diagonal(known, np.nan)  # zeros on the diagonal would take up half of the colours
    return known


class Quality(NamedTuple):
    """Curves of one model for a panel of `plot_quality`.

    Attributes:
        title: Title of the panel.
        metric: Name of the metric.
        removed: Share of the block parameters removed at each point, from 0 on.
        curves: Values by the name of the curve.
        knee: Index of the marked point; None marks none.
        log: Logarithmic axis, for perplexities.
    """

    title: str
    metric: str
    removed: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    knee: int | None = None
    log: bool = False


def plot_quality(panels: Sequence[Quality], path: str | Path) -> None:
    """Write a picture of quality against size.

    Args:
        panels: Panels, one for each model.
        path: Path of a PNG file.
    """
    with _picture(path, 4.3 * len(panels), 3.6, ncols=len(panels)) as [axes]:
        for axis, panel in zip(axes, panels, strict=True):
            shares = [100 * share for share in panel.removed]
            for (label, values), marker in zip(panel.curves.items(), cycle("osD^")):
                axis.plot(shares, values, marker=marker, markersize=5, label=label)
            if panel.knee is not None:
                axis.axvline(shares[panel.knee], color=_GREY, linewidth=1, linestyle="--", label="knee")
            axis.set(title=panel.title, xlabel="block parameters removed (%)", ylabel=panel.metric)
            if panel.log:
                axis.set_yscale("log")
                for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    formatter("{x:.0f}")
            axis.legend(framealpha=0)


def plot_homotopy(rows: Sequence[tuple[int, Mapping[str, float]]], path: str | Path) -> None:
    """Write a picture of activations as they become lines: the a of each at every validation.

    Args:
        rows: Rows of `HealReport.homotopy`.
        path: Path of a PNG file.
    """
    with _picture(path, 6, 3.6) as [[axis]]:
        steps = [step for step, _ in rows]
        # there are as many colours as markers: after both, the line style changes
        looks = cycle(product(("-", "--", ":"), "osD^vP*X"))
        for name, (line, marker) in zip(rows[-1][1], looks, strict=False):
            style = {"linestyle": line, "marker": marker, "markersize": 4}
            axis.plot(steps, [values[name] for _, values in rows], label=name, **style)
        axis.set(xlabel="step", ylabel="a (0: activation, 1: line)", ylim=(-0.03, 1.03))
        axis.legend(fontsize=7, framealpha=0)


def plot_training(
    train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], path: str | Path
) -> None:
    """Write a picture of a training: the loss of each step, its running mean, and the validations.

    Args:
        train: Pairs of `HealReport.train_loss`.
        validation: Pairs of `HealReport.validation_loss`.
        path: Path of a PNG file.
    """
    with _picture(path, 6, 3.2, ncols=2 if validation else 1) as [axes]:
        steps, losses = zip(*train, strict=True)
        window = max(1, len(losses) // 40)
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axes[0].plot(steps, losses, linewidth=0.6, alpha=0.45)
        axes[0].plot(steps, means, color=_COLOURS[0], linewidth=1.8)
        axes[0].set(xlabel="step", title="training loss")
        if validation:
            steps, losses = zip(*validation, strict=True)
            axes[1].plot(steps, losses, marker="o", markersize=4, color=_COLOURS[1])
            best = min(range(len(losses)), key=losses.__getitem__)
            axes[1].plot(steps[best], losses[best], marker="o", markersize=10, color=_COLOURS[1], fillstyle="none")
            axes[1].set(xlabel="step", title="validation loss (ring: kept)")


def plot_distances(distances: Mapping[Kind, Sequence[Sequence[float | None]]], plan: Plan, path: str | Path) -> None:
    """Write a picture of the distances between the blocks of each kind, with the groups of a plan marked.

    Args:
        distances: Matrices of `plan.notes.distances`; None between blocks that can never become one.
        plan: Plan whose groups are marked.
        path: Path of a PNG file.
    """
    from matplotlib.patches import Rectangle

    dot = {"color": _COLOURS[4], "markersize": 7, "markeredgecolor": "white", "clip_on": False}
    with _picture(path, 4.2 * len(distances), 3.4, ncols=len(distances)) as [axes]:
        for axis, (kind, matrix) in zip(axes, distances.items(), strict=True):
            known = _off_diagonal(matrix)
            image = axis.imshow(known, cmap="viridis")  # its colours span the distances, NaN left out
            # after several rounds, distances are between the layers that the last one began with
            whole = len(known) == plan.num_layers
            groups = [edit.layers for edit in plan.edits if whole and edit.kind == kind and len(edit.layers) > 1]
            for group in groups:
                first, size = min(group), len(group)
                if max(group) - first == size - 1:
                    # clipping would remove half of the line at the border
                    style = {"fill": False, "edgecolor": _COLOURS[4], "linewidth": 2, "clip_on": False}
                    axis.add_patch(Rectangle((first - 0.5, first - 0.5), size, size, **style))
                else:  # with others in between
                    axis.plot(*zip(*permutations(group, 2), strict=True), "o", **dot)
            axis.set(
                title=f"{kind} (marked: grouped)" if groups else kind,
                xlabel="layer of the original" if whole else "layer before the last round",
                ylabel="layer of the original" if whole else "layer before the last round",
            )
            axis.figure.colorbar(image, ax=axis, shrink=0.8, label="distance (dark: alike)", format="%.3g")


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Write a picture of a plan: blocks of the original above, blocks of the result below, and lines between them.

    Args:
        plan: Plan of any method.
        path: Path of a PNG file.
    """
    width = max(6.0, min(12.0, 0.45 * plan.num_layers))
    height = 1.6 if plan.layout().ties else 1.2
    with _picture(path, width, 0.3 + height * len(plan.kinds), nrows=len(plan.kinds)) as axes:
        for [axis], kind, colour in zip(axes, plan.kinds, _COLOURS, strict=False):
            _draw_flow(axis, plan, kind, colour)


def _draw_flow(axis: Any, plan: Plan, kind: str, colour: str) -> None:
    every = range(plan.num_layers)
    made = _made_of(plan, kind)
    numbered = 1 if plan.num_layers <= 32 else 5
    text = 8 * max(1, axis.figure.get_figwidth() / 7)  # a wide picture is made smaller to fit in a card
    for number, (layers, linear) in enumerate(made):
        place = sum(layers) / len(layers)
        changed = len(layers) > 1 or linear
        line = {"color": colour, "linewidth": 2.2} if changed else {"color": _GREY, "linewidth": 1.0}
        for layer in layers:
            axis.plot([layer, place], [1, 0], zorder=1, **line)
        mark = {"marker": "_", "markersize": 13, "markeredgewidth": 3.5} if linear else {"marker": "o", "markersize": 8}
        axis.plot(place, 0, color=colour, zorder=2, **mark)
        if number % numbered == 0:
            axis.text(place, -0.28, str(number), ha="center", va="top", fontsize=text)
    used = {layer for layers, _ in made for layer in layers}
    gone = [layer for layer in every if layer not in used]
    axis.plot(sorted(used), [1] * len(used), "o", color=colour, markersize=8, zorder=2)
    axis.plot(gone, [1] * len(gone), "x", color=_GREY, markersize=7, markeredgewidth=1.8)
    for layer in every[::numbered]:
        axis.text(layer, 1.28, str(layer), ha="center", va="bottom", fontsize=text)
    ties = plan.layout().ties
    for tie in ties:
        if tie.kind == kind:
            axis.plot(tie.source.layers, [-0.85] * len(tie.source.layers), color=colour, linewidth=1.5, marker="|")
            middle = sum(tie.source.layers) / len(tie.source.layers)
            shared = "one basis" if tie.mode == "basis" else "one set of weights"
            axis.text(middle, -1.0, shared, ha="center", va="top", fontsize=text)
    linear = sum(linear for _, linear in made)
    bars = f", {linear} linear (bars)" if linear else ""
    crosses = f", {len(gone)} dropped (crosses)" if gone else ""
    axis.set_title(f"{kind}: {len(every)} to {len(made)}{crosses}{bars}", fontsize=text + 1, loc="left")
    axis.set(ylim=(-1.6 if ties else -0.7, 1.7), xlim=(-0.8, plan.num_layers - 0.2), yticks=(0, 1), xticks=[])
    axis.set_yticklabels(("result", "original"), fontsize=text + 1)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _made_of(plan: Plan, kind: str) -> list[tuple[tuple[int, ...], bool]]:
    """For each block of the result, its original blocks and whether it is linear."""
    return _MADE_OF[family_of(plan)](plan, kind)


def _layers_made_of(plan: Plan, kind: str) -> list[tuple[tuple[int, ...], bool]]:
    sources = [slot.blocks[kind] for slot in plan.layout().slots]
    return [(source.layers, source.linear is not None) for source in sources if source is not None]


def _convolutions_made_of(plan: Plan, kind: str) -> list[tuple[tuple[int, ...], bool]]:
    edits = {edit.layers: edit for edit in plan.edits}
    taken = {layer for layers in edits for layer in layers}
    alone = [(layer,) for layer in range(plan.num_layers) if layer not in taken]
    return [(layers, False) for layers in sorted([*edits, *alone]) if layers not in edits or edits[layers].keep]


_MADE_OF = {LAYERS: _layers_made_of, CONV_GRAPH: _convolutions_made_of}
