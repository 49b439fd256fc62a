"""Segments of convolutions compete for a latency budget: which of them become one, and of which kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from ...calibration.refit.conv_graph import refit_chain
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
    """Merge convolutions of a model by a recipe: measure segments, choose them by the exact program, apply, fit.

    An entry, a segment with a kernel, costs the milliseconds of its one convolution, and the calibration loss of the
    model in which nothing else was changed. The program takes the entries of the least sum of losses that keep the
    budget, and where the result takes longer than that when it is timed, a smaller one. Batch norms of all other
    convolutions are folded.

    Args:
        model: a stock model whose architecture knows its chain of convolutions; never changed.
        recipe: what is asked for.
        batches: calibration batches, read once.

    Returns:
        The new `model`, its `plan`, and as `report` what the refit did, which is None where nothing was fitted.

    Raises:
        RecipeError: the budget cannot be met, or there are no batches.
        UnsupportedModelError: an unknown architecture, a model that cannot be merged, or one in which no
            two convolutions can become one.
        LayerFuseError: the tables are of another device, other weights or other data.
    """
    architecture = architecture_for(model, ConvGraphArchitecture)
    check_model(model, architecture)
    architecture.check_chain(model)
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
        "frontier": {  # of those that round to the same share, the best
            f"{(latencies.rest + sum(map(latencies.of, chain))) / whole:.0%}": sum(map(losses.of, chain))
            for chain in frontier(entries, latencies, losses, whole, length, published=published)
        },
    }
    if recipe.method == "open":
        plan = replace(plan, edits=tuple(replace(edit, merged=False) for edit in plan.edits), notes=notes)
        return SearchResult(applied(model, plan), plan, None)
    student = applied(model, plan)
    report = refit_chain(student, model, plan, sample, fitted=fitted)
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
    """The entries of the least sum of losses that together take no more than some milliseconds.

    Args:
        entries: what is chosen from.
        latencies: of them.
        losses: of them.
        limit: in milliseconds.
        length: the last boundary of the chain.
        published: the most of a sum of exp(-loss) in place of the least of losses.

    Raises:
        RecipeError: none take so little.
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
    """What `choose` would choose for each limit of up to so many milliseconds, the fastest first; from one program."""
    chains = Frontier(length, _options(entries, latencies, losses, published), most).chains()
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
    """Those that are faster than the convolutions that they stand for: nothing else is ever chosen."""
    ones = {entry.end: latencies.of(entry) for entry in entries if not entry.changes}
    return [
        entry
        for entry in entries
        if not entry.changes or latencies.of(entry) < sum(ones[place] for place in entry.edit.layers)
    ]


def _entries(model: PreTrainedModel, recipe: MergeRecipe) -> list[Entry]:
    """What is chosen from."""
    if recipe.choose in ("convolutions", "magnitude"):
        return removals_of(model)
    entries = entries_of(model, recipe.max_kernel)
    return [entry for entry in entries if recipe.choose == "all" or len(entry.keep) == entry.end - entry.start]
