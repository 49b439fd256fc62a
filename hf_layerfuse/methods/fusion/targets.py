"""Targets of a recipe, applied to a model: number of blocks, rank, and whether a plan meets the target."""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from ...errors import RecipeError
from ...models.architectures import architecture_for
from ...models.surgery.checks import shapes_of
from ...models.surgery.layers import relaxed_maps
from ...models.surgery.size import are_unlike, planned_size, removed_by_even_runs, size_of_blocks
from ...plan import Fuse, Kind, Plan
from ...recipe import TARGETS, FusionRecipe
from .grouping import even


def kinds_of(model: PreTrainedModel, recipe: FusionRecipe) -> tuple[Kind, ...]:
    """Return the kinds of block that are grouped, each independently.

    Raises:
        RecipeError: Recipe for parts of layers, where layers have a single kind of block, or lack this kind.
    """
    kinds = architecture_for(model, stack=recipe.stack).kinds
    if len(kinds) == 1:
        if recipe.blocks != "layer":
            raise RecipeError(
                f"blocks={recipe.blocks!r}: layers of {model.config.model_type!r} have only {kinds[0]} blocks; use "
                "'layer'."
            )
        return kinds
    if recipe.blocks not in ("layer", "separate", *kinds):
        raise RecipeError(
            f"blocks={recipe.blocks!r}: layers of {model.config.model_type!r} have {' and '.join(kinds)} blocks; use "
            "one of these, 'layer' or 'separate'."
        )
    return kinds if recipe.blocks == "separate" else (recipe.blocks,)


def settled(model: PreTrainedModel, recipe: FusionRecipe) -> FusionRecipe:
    """Replace rank `auto` of a recipe with a number of blocks and a rank. Other recipes are returned unchanged.

    Raises:
        RecipeError: Latency target; or target that the model already meets, or that is out of reach even if all layers
            of a shape share one set of weights.
    """
    if recipe.is_timed:
        raise RecipeError("a plan for a latency budget needs measurements: use search or fuse, with batches=.")
    if recipe.rank != "auto":
        return recipe
    asked = next(f"{name}={value:.12g}" for name in TARGETS if (value := getattr(recipe, name)) is not None)
    architecture, runs = architecture_for(model, stack=recipe.stack), _runs_of_one_shape(model, recipe)
    layers = architecture.layer_list(model)

    def shared(rank: int) -> Plan:
        return _plan_of_runs(model, replace(recipe, rank=rank), runs)

    # the rank of a group must be usable by at least one of its maps
    ties = shared(sys.maxsize).layout().ties
    maps = [relaxed_maps(layers[tie.source.layers[0]], architecture, tie).values() for tie in ties]
    ranks = range(1, 1 + min((max(rank for _, rank in found) for found in maps), default=0))
    met = bisect.bisect_left(ranks, True, key=lambda rank: not _meets(model, recipe, shared(rank)))
    if _meets(model, recipe, replace(shared(1), edits=())):
        raise RecipeError(f"{asked} fuses nothing, because the model already meets it: ask for a smaller model.")
    if not met:
        raise RecipeError(
            f"{asked} is out of reach with rank='auto': even if all blocks of a shape share their weights and each "
            "depth adds rank 1, the model is larger. Ask for a larger model, or use rank=0."
        )
    return replace(recipe, **dict.fromkeys(TARGETS) | {"keep_layers": len(runs)}, rank=ranks[met - 1])


def counts_of(model: PreTrainedModel, recipe: FusionRecipe) -> Sequence[int]:
    """Return the candidate numbers of distinct blocks of each kind, the best first. The first whose plan fits is used.

    Raises:
        RecipeError: Target that no number meets. It is raised before minutes of calibration are spent.
    """
    depth, kinds = len(architecture_for(model, stack=recipe.stack).layer_list(model)), kinds_of(model, recipe)
    if depth < 2:
        raise RecipeError(f"the model has {depth} layer: there is nothing to fuse. Use a model with 2 layers or more.")
    if recipe.keep_layers is not None:
        if recipe.keep_layers >= depth:
            raise RecipeError(
                f"keep_layers={recipe.keep_layers} of the model's {depth} fuses nothing: use 1 to {depth - 1}."
            )
        return [recipe.keep_layers]
    if recipe.ratio is not None and are_unlike(model, recipe.stack):
        return range(depth - 1, 0, -1)
    if recipe.ratio is not None:
        removed = {keep: removed_by_even_runs(model, recipe, even(depth, keep)) for keep in range(1, depth)}
        keep = min(removed, key=lambda keep: abs(removed[keep] - recipe.ratio))
        if not abs(removed[keep] - recipe.ratio) <= 0.5 / depth:
            raise RecipeError(
                f"ratio={recipe.ratio} is out of reach with {depth} {recipe.blocks} blocks"
                f"{f' and rank={recipe.rank}' if recipe.rank else ''}: whole blocks allow {min(removed.values()):.3f} "
                f"to {max(removed.values()):.3f}."
            )
        return [keep]

    # one group per shape is the smallest result, whatever the distances are
    least = _plan_of_runs(model, recipe, _runs_of_one_shape(model, recipe))
    smallest, whole = (planned_size(model, plan) for plan in (least, replace(least, edits=())))
    for name, unit, most in _limits(recipe):
        if whole[unit] <= most:
            raise RecipeError(
                f"{name}={most:.12g} fuses nothing, because the model has {whole[unit]} {unit}: use less, down to "
                f"{smallest[unit]}."
            )
        if smallest[unit] > most:
            raise RecipeError(
                f"{name}={most:.12g} is out of reach: with all {depth} {' and '.join(kinds)} blocks fused "
                f"in mode {recipe.mode!r}, {smallest[unit]} {unit} remain. Use that or more, or other blocks or mode."
            )
    return range(depth - 1, 0, -1)


def _runs_of_one_shape(model: PreTrainedModel, recipe: FusionRecipe) -> list[tuple[int, ...]]:
    shapes = [shapes_of(layer) for layer in architecture_for(model, stack=recipe.stack).layer_list(model)]
    return [tuple(run) for _, run in itertools.groupby(range(len(shapes)), key=shapes.__getitem__)]


def _plan_of_runs(model: PreTrainedModel, recipe: FusionRecipe, runs: list[tuple[int, ...]]) -> Plan:
    """Return a plan that fuses each run of layers. The operator does not affect the size."""
    architecture = architecture_for(model, stack=recipe.stack)
    groups = [run for run in runs if len(run) > 1]
    edits = [Fuse(kind, run, recipe.mode, rank=recipe.rank) for kind in kinds_of(model, recipe) for run in groups]
    return architecture.plan(sum(map(len, runs)), edits)


def _limits(recipe: FusionRecipe) -> list[tuple[str, str, float]]:
    """Return name, unit and value of each target that limits the size of the whole model."""
    limits = [("max_parameters", "parameters", recipe.max_parameters), ("max_bytes", "bytes", recipe.max_bytes)]
    return [limit for limit in limits if limit[2] is not None]


def fits(model: PreTrainedModel, recipe: FusionRecipe, plan: Plan) -> bool:
    """Return whether the result of a plan meets the target, and each group has layers of a single shape."""
    shapes = [shapes_of(layer) for layer in architecture_for(model, stack=recipe.stack).layer_list(model)]
    if any(shapes[layer] != shapes[edit.layers[0]] for edit in plan.edits for layer in edit.layers):
        return False
    as_close_as_possible = recipe.ratio is not None and len(set(shapes)) == 1
    return as_close_as_possible or _meets(model, recipe, plan)


def _meets(model: PreTrainedModel, recipe: FusionRecipe, plan: Plan) -> bool:
    """Return whether the result of a plan is no larger than the target, norms and biases included."""
    size = planned_size(model, plan)
    if recipe.ratio is not None:
        whole = sum(parameter.numel() for parameter in model.parameters())
        return size["parameters"] <= whole - recipe.ratio * size_of_blocks(model, recipe)
    return all(size[unit] <= most for _, unit, most in _limits(recipe))
