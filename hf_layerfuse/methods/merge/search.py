"""Segments of convolutions compete for a latency budget: merged segments, and their kernel sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from ...calibration.refit.conv_graph import refit_conv_graph
from ...calibration.samples import Sample
from ...errors import RecipeError, UnsupportedModelError
from ...evaluation.batches import Batches
from ...math.knapsack import Frontier, Option
from ...models.apply import applied
from ...models.architectures import ConvGraphArchitecture, architecture_for
from ...models.surgery.checks import check_model
from ...plan import Plan
from ...recipe import MergeRecipe
from ..base import SearchResult
from ..latency_budget import affordable, within
from .segments import Entry, Latencies, Losses, Magnitudes, entries_of, folded_plan, removals_of


def search_merge(model: PreTrainedModel, recipe: MergeRecipe, batches: Batches | None) -> SearchResult:
    """Merge convolutions of a model with a recipe: measure segments, choose by an exact program, apply, fit.

    An entry is a segment with a kernel. It has the latency of its single convolution, and the calibration loss of the
    model with only this change. The program chooses the entries of least total loss within the budget. If the measured
    latency of the result exceeds the budget, the program runs with a smaller one. Batch norms of all other convolutions
    are folded.

    Args:
        model: Stock model whose architecture table has a chain of convolutions; it is not changed.
        recipe: Settings of the merge.
        batches: Calibration batches, read once.

    Returns:
        The new `model`, its `plan`, and the `report` of the refit, which is None with method `open`.

    Raises:
        RecipeError: Latency budget that cannot be met, or missing batches.
        UnsupportedModelError: Unknown architecture, model that cannot be merged, or model in which no two convolutions
            can be merged.
        LayerFuseError: Measurement cache of another device, other weights or other data.
    """
    architecture = architecture_for(model, ConvGraphArchitecture)
    check_model(model, architecture)
    architecture.check_conv_graph(model)
    if batches is None:
        raise RecipeError("merging needs calibration batches to measure the segments: pass batches=.")
    sample = Sample.of(batches)
    entries = _entries(model, recipe)
    if not any(entry.changes for entry in entries):
        raise UnsupportedModelError(
            f"no two convolutions of this {type(model).__name__} can be merged with kernels of {recipe.max_kernel} or "
            "less: a stride, a pooling or a shortcut separates any two. Raise max_kernel, or fuse another model."
        )
    folder = None if recipe.tables is None else Path(recipe.tables)
    images = sample.batches[0][model.main_input_name][:1]
    images = images.expand(recipe.latency_batch_size, *images.shape[1:]).contiguous()
    latencies = Latencies(model, images, folder and folder / "latency.json", repeats=recipe.latency_repeats)
    latencies.measure(entries)
    whole = latencies.original
    allowed = recipe.latency_ms or recipe.latency_budget * whole
    entries = _useful(entries, latencies)
    fitted = recipe.refit != "none"
    losses = _losses(model, sample, recipe, folder, entries)
    length = len(architecture.convolutions(model).units) - 1
    published = recipe.importance == "published"

    def plan_of(chosen: Sequence[Entry]) -> Plan:
        return folded_plan(model, [entry.edit for entry in chosen if entry.changes])

    chosen, _ = within(
        lambda limit: choose(entries, latencies, losses, limit, length, published=published),
        lambda chosen: latencies.model_of(plan_of(chosen)),
        allowed - latencies.rest,
        allowed,
    )
    plan = plan_of(chosen)
    predicted = latencies.rest + sum(map(latencies.of, chosen))
    notes = {
        "recipe": asdict(recipe),
        "calibration": f"{sum(map(len, sample.held_out))} images",
        "latency_ms": {
            "original": whole,
            "predicted": predicted,
            "measured": latencies.model_of(plan),
            "rest": latencies.rest,
        },
        "losses": {entry.key: losses.of(entry) for entry in chosen if entry.changes},
        "frontier": {  # the best chain for each rounded share
            f"{(latencies.rest + sum(map(latencies.of, chain))) / whole:.0%}": sum(map(losses.of, chain))
            for chain in frontier(entries, latencies, losses, whole, length, published=published)
        },
    }
    if recipe.method == "open":
        plan = replace(plan, edits=tuple(replace(edit, merged=False) for edit in plan.edits), notes=notes)
        return SearchResult(applied(model, plan), plan, None)
    student = applied(model, plan)
    report = refit_conv_graph(student, model, plan, sample, fitted=fitted)
    return SearchResult(student, replace(plan, notes=notes | {"refit": asdict(report)}), report)


def choose(
    entries: Sequence[Entry],
    latencies: Latencies,
    losses: Losses | Magnitudes,
    limit: float,
    length: int,
    *,
    published: bool = False,
) -> list[Entry]:
    """Return the entries of least total loss within a latency limit.

    Args:
        entries: Candidate entries.
        latencies: Latencies of the entries.
        losses: Losses of the entries.
        limit: Latency limit, in milliseconds.
        length: Last boundary of the chain.
        published: Whether to maximise the sum of exp(-loss), as published, instead of minimising the sum of losses.

    Raises:
        RecipeError: Limit below the fastest combination.
    """
    return affordable(length, _options(entries, latencies, losses, published), limit, latencies)


def frontier(
    entries: Sequence[Entry],
    latencies: Latencies,
    losses: Losses | Magnitudes,
    most: float,
    length: int,
    *,
    published: bool = False,
) -> list[list[Entry]]:
    """Return the results of `choose` for all limits up to `most` milliseconds, fastest first, from one program."""
    chains = Frontier(length, _options(entries, latencies, losses, published), most).paths()
    return [[option.label for _, _, option in chain] for chain in chains]


def _options(
    entries: Sequence[Entry], latencies: Latencies, losses: Losses | Magnitudes, published: bool
) -> dict[tuple[int, int], list[Option]]:
    options: dict[tuple[int, int], list[Option]] = {}
    for entry in entries:
        loss = losses.of(entry)
        option = Option(latencies.of(entry), math.exp(-loss) if published else -loss, entry)
        options.setdefault((entry.start, entry.end), []).append(option)
    return options


def _losses(
    model: PreTrainedModel, sample: Sample, recipe: MergeRecipe, folder: Path | None, entries: Sequence[Entry]
) -> Losses | Magnitudes:
    if recipe.choose == "magnitude":
        return Magnitudes(model)
    fitted = recipe.refit != "none"
    name = f"losses{'' if fitted else '-unfitted'}{f'-{recipe.tune_steps}' if recipe.tune_steps else ''}.json"
    losses = Losses(model, sample, folder and folder / name, fitted=fitted, tuned=recipe.tune_steps)
    losses.measure(entries)
    return losses


def _useful(entries: Sequence[Entry], latencies: Latencies) -> list[Entry]:
    """Return the entries that are faster than the convolutions they replace. Others are never chosen."""
    ones = {entry.end: latencies.of(entry) for entry in entries if not entry.changes}
    return [
        entry
        for entry in entries
        if not entry.changes or latencies.of(entry) < sum(ones[place] for place in entry.edit.layers)
    ]


def _entries(model: PreTrainedModel, recipe: MergeRecipe) -> list[Entry]:
    """Return the candidate entries."""
    if recipe.choose in ("convolutions", "magnitude"):
        return removals_of(model)
    entries = entries_of(model, recipe.max_kernel)
    return [entry for entry in entries if recipe.choose == "all" or len(entry.keep) == entry.end - entry.start]
