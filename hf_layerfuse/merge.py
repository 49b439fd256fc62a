"""Segments of convolutions compete for a latency budget: which of them become one, and of which kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from .adapters import ChainAdapter, adapter_for
from .calibration import Batches, Sample
from .chainfit import refit_chain
from .edits import check_model
from .errors import LayerFuseError, RecipeError, UnsupportedModelError
from .math.knapsack import Frontier, Option
from .modeling import apply
from .recipe import MergeRecipe
from .search import Found
from .tables import Entry, Latencies, Losses, entries_of, folded_plan, removals_of

UNITS = 10_000
"""Parts of the budget: each segment is rounded up to one of them."""


def search_merge(model: PreTrainedModel, recipe: MergeRecipe, batches: Batches | None) -> Found:
    """Merge convolutions of a model by a recipe: measure segments, choose them by the exact program, apply, fit.

    An entry, a segment with a kernel, costs the milliseconds of its one convolution, and the calibration loss of the
    model in which nothing else was changed. The program takes the entries of the least sum of losses that keep the
    budget. Batch norms of all other convolutions are folded.

    Args:
        model: a stock model whose adapter knows its chain of convolutions; never changed.
        recipe: what is asked for.
        batches: calibration batches, read once.

    Raises:
        RecipeError: the budget cannot be met, or there are no batches.
        UnsupportedModelError: no adapter for the architecture, a model that cannot be merged, or one in which no two
            convolutions can become one.
        LayerFuseError: the tables are of another device, other weights or other data.
    """
    adapter = adapter_for(model, ChainAdapter)
    check_model(model, adapter)
    adapter.check_chain(model)
    if batches is None:
        raise RecipeError("what a segment is worth is measured on calibration batches: pass batches=.")
    sample = Sample.of(batches)
    entries = _entries(model, recipe)
    if not any(entry.changes for entry in entries):
        raise UnsupportedModelError(
            f"no two convolutions of this {type(model).__name__} can become one with kernels of {recipe.max_kernel} or "
            "less: a stride, a pooling or a shortcut is between any two. Raise max_kernel, or fuse another model."
        )
    folder = None if recipe.tables is None else Path(recipe.tables)
    images = sample.batches[0][model.main_input_name][:1]
    images = images.expand(recipe.batch_size, *images.shape[1:]).contiguous()
    latencies = Latencies(model, images, folder and folder / "latency.json", repeats=recipe.repeats)
    latencies.measure(entries)
    whole = latencies.original
    limit = (recipe.budget_ms or recipe.budget * whole) - latencies.rest
    entries = _useful(entries, latencies)
    fitted = recipe.refit != "none"
    name = "losses.json" if fitted else "losses-unfitted.json"
    losses = Losses(model, sample, folder and folder / name, fitted=fitted)
    losses.measure(entries)
    chosen = choose(entries, latencies, losses, limit, len(adapter.convolutions(model).units) - 1)
    edits = [entry.edit for entry in chosen if entry.changes]
    predicted = latencies.rest + sum(map(latencies.of, chosen))
    notes = {
        "recipe": asdict(recipe),
        "calibration": f"{sum(map(len, sample.judges))} images",
        "latency_ms": {"original": whole, "predicted": predicted, "rest": latencies.rest},
        "losses": {entry.key: losses.of(entry) for entry in chosen if entry.changes},
    }
    if recipe.method == "open":
        plan = replace(folded_plan(model, edits), notes=notes)
        plan = replace(plan, edits=tuple(replace(edit, merged=False) for edit in plan.edits))
        return Found(apply(model, plan), plan, None)
    plan = folded_plan(model, edits)
    student = apply(model, plan)
    report = refit_chain(student, model, plan, sample, fitted=fitted)
    return Found(student, replace(plan, notes=notes | {"refit": asdict(report)}), report)


def choose(entries: Sequence[Entry], latencies: Latencies, losses: Losses, limit: float, length: int) -> list[Entry]:
    """The entries of the least sum of losses that together take no more than some milliseconds.

    Raises:
        RecipeError: none take so little.
    """
    options: dict[tuple[int, int], list[Option]] = {}
    for entry in entries:
        option = Option(latencies.of(entry), -losses.of(entry), entry)
        options.setdefault((entry.start, entry.end), []).append(option)
    try:
        steps = Frontier(length, options, max(limit, 1e-9), UNITS).best()
    except LayerFuseError as error:
        least = Frontier(length, options, 1e9).cheapest + latencies.rest
        raise RecipeError(
            f"no choice of segments takes {limit + latencies.rest:.3g} ms or less: the least that can be had is "
            f"{least:.3g} ms, {least / latencies.original:.0%} of the original's {latencies.original:.3g} ms. Use a "
            "larger budget."
        ) from error
    return [option.label for _, _, option in steps]


def _useful(entries: Sequence[Entry], latencies: Latencies) -> list[Entry]:
    """Those that are faster than the convolutions that they stand for: nothing else is ever chosen."""
    ones = {entry.end: latencies.of(entry) for entry in entries if not entry.changes}
    return [
        entry
        for entry in entries
        if not entry.changes or latencies.of(entry) < sum(ones[place] for place in entry.edit.layers)
    ]


def _entries(model: PreTrainedModel, recipe: MergeRecipe) -> list[Entry]:
    """What is chosen from."""
    if recipe.choose == "convolutions":
        return removals_of(model)
    entries = entries_of(model, recipe.max_kernel)
    return [entry for entry in entries if recipe.choose == "all" or len(entry.keep) == entry.end - entry.start]
