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
from ...evaluation.modes import outside_inference_mode
from ...math.knapsack import Frontier, Option
from ...models.apply import applied
from ...models.architectures import ConvGraphArchitecture, architecture_for
from ...models.surgery.checks import check_model
from ...plan import FrontierPoint, Plan, PlanLatency, PlanNotes, SegmentLoss
from ...recipe import MergeRecipe
from ..base import SearchResult
from ..candidates import edits_of, options_of
from ..latency_budget import affordable, within
from .candidates import (
    Importance,
    LossImportance,
    MagnitudeImportance,
    Segment,
    folded_plan,
    removal_candidates,
    segment_candidates,
)
from .segment_latency import SegmentLatencies


@outside_inference_mode
def search_merge(model: PreTrainedModel, recipe: MergeRecipe, batches: Batches | None) -> SearchResult:
    """Merge convolutions of a model with a recipe: measure segments, choose by an exact program, apply, fit.

    A candidate is a segment with a kernel. It has the latency of its single convolution, and the calibration loss of
    the model with only this change. The program chooses the candidates of least total loss within the budget. If the
    measured latency of the result exceeds the budget, the program runs with a smaller one. Batch norms of all other
    convolutions are folded.

    Args:
        model: Stock model whose architecture table has a conv graph; it is not changed.
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
    candidates = _candidates(model, recipe)
    if not any(candidate.changes for candidate in candidates):
        raise UnsupportedModelError(
            f"no two convolutions of this {type(model).__name__} can be merged with kernels of {recipe.max_kernel} or "
            "less: a stride, a pooling or a shortcut separates any two. Raise max_kernel, or fuse another model."
        )
    folder = None if recipe.tables is None else Path(recipe.tables)
    images = sample.batches[0][model.main_input_name][:1]
    images = images.expand(recipe.latency_batch_size, *images.shape[1:]).contiguous()
    latencies = SegmentLatencies(model, images, folder and folder / "latency.json", repeats=recipe.latency_repeats)
    latencies.measure(candidates)
    whole = latencies.original
    allowed = recipe.latency_ms or recipe.latency_budget * whole
    candidates = _useful(candidates, latencies)
    fitted = recipe.refit != "none"
    importance = _importance(model, sample, recipe, folder, candidates)
    length = len(architecture.convolutions(model).units) - 1
    published = recipe.importance == "published"

    def plan_of(chosen: Sequence[Segment]) -> Plan:
        return folded_plan(model, edits_of(chosen))

    chosen, _ = within(
        lambda limit: choose(candidates, latencies, importance, limit, length, published=published),
        lambda chosen: latencies.model_of(plan_of(chosen)),
        allowed - latencies.rest,
        allowed,
    )
    plan = plan_of(chosen)
    predicted = latencies.rest + sum(map(latencies.of, chosen))
    best = {  # loss of the best path for each share of the latency, in percent
        round(100 * ((latencies.rest + sum(map(latencies.of, path))) / whole)): sum(map(importance.of, path))
        for path in frontier(candidates, latencies, importance, whole, length, published=published)
    }
    notes = PlanNotes(
        recipe=asdict(recipe),
        calibration=f"{sum(map(len, sample.held_out))} images",
        latency_ms=PlanLatency(whole, predicted, latencies.model_of(plan), latencies.rest),
        losses=tuple(
            SegmentLoss(each.start, each.end, each.merged.kernel, each.merged.depthwise, importance.of(each))
            for each in chosen
            if each.changes
        ),
        frontier=tuple(FrontierPoint(percent / 100, loss) for percent, loss in best.items()),
    )
    if recipe.method == "open":
        plan = replace(plan, edits=tuple(replace(edit, merged=False) for edit in plan.edits), notes=notes)
        return SearchResult(applied(model, plan), plan, None)
    student = applied(model, plan)
    report = refit_conv_graph(student, model, plan, sample, fitted=fitted)
    return SearchResult(student, replace(plan, notes=replace(notes, refit=report)), report)


def choose(
    candidates: Sequence[Segment],
    latencies: SegmentLatencies,
    importance: Importance,
    limit: float,
    length: int,
    *,
    published: bool = False,
) -> list[Segment]:
    """Return the candidates of least total importance within a latency limit.

    Args:
        candidates: All candidates.
        latencies: Latencies of the candidates.
        importance: Importance of what the candidates remove.
        limit: Latency limit, in milliseconds.
        length: Last boundary of the conv graph.
        published: Whether to maximise the sum of exp(-loss), as published, instead of minimising the sum of losses.

    Raises:
        RecipeError: Limit below the fastest combination.
    """
    return affordable(length, _options(candidates, latencies, importance, published), limit, latencies)


def frontier(
    candidates: Sequence[Segment],
    latencies: SegmentLatencies,
    importance: Importance,
    most: float,
    length: int,
    *,
    published: bool = False,
) -> list[list[Segment]]:
    """Return the results of `choose` for all limits up to `most` milliseconds, fastest first, from one program."""
    paths = Frontier(length, _options(candidates, latencies, importance, published), most).paths()
    return [[option.label for _, _, option in path] for path in paths]


def _options(
    candidates: Sequence[Segment], latencies: SegmentLatencies, importance: Importance, published: bool
) -> dict[tuple[int, int], list[Option]]:
    losses = {candidate: importance.of(candidate) for candidate in candidates}
    values = {candidate: math.exp(-loss) if published else -loss for candidate, loss in losses.items()}
    return options_of(values, latencies.of)


def _importance(
    model: PreTrainedModel,
    sample: Sample,
    recipe: MergeRecipe,
    folder: Path | None,
    candidates: Sequence[Segment],
) -> Importance:
    if recipe.choose == "magnitude":
        return MagnitudeImportance(model)
    fitted = recipe.refit != "none"
    name = f"losses{'' if fitted else '-unfitted'}{f'-{recipe.tune_steps}' if recipe.tune_steps else ''}.json"
    importance = LossImportance(model, sample, folder and folder / name, fitted=fitted, tuned=recipe.tune_steps)
    importance.measure(candidates)
    return importance


def _useful(candidates: Sequence[Segment], latencies: SegmentLatencies) -> list[Segment]:
    """Return the candidates that are faster than the convolutions they replace. Others are never chosen."""
    ones = {candidate.end: latencies.of(candidate) for candidate in candidates if not candidate.changes}
    return [
        candidate
        for candidate in candidates
        if not candidate.changes or latencies.of(candidate) < sum(ones[place] for place in candidate.edit.layers)
    ]


def _candidates(model: PreTrainedModel, recipe: MergeRecipe) -> list[Segment]:
    if recipe.choose in ("convolutions", "magnitude"):
        return removal_candidates(model)
    found = segment_candidates(model, recipe.max_kernel)
    return [each for each in found if recipe.choose == "all" or len(each.edit.keep) == each.end - each.start]
