"""What the target of a recipe means for a model: how many blocks, of which rank, and whether a plan meets it."""

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
    """The kinds of block that are grouped, each on its own.

    Raises:
        RecipeError: layers of this architecture have one block only, and the recipe asks for parts of them.
    """
    kinds = architecture_for(model).kinds
    if len(kinds) == 1:
        if recipe.blocks != "layer":
            raise RecipeError(
                f"blocks={recipe.blocks!r}: layers of {model.config.model_type!r} have {kinds[0]} blocks only; use "
                "'layer'."
            )
        return kinds
    return kinds if recipe.blocks == "separate" else (recipe.blocks,)


def settled(model: PreTrainedModel, recipe: FusionRecipe) -> FusionRecipe:
    """A recipe with rank `auto` as one with a number of blocks and a rank; another one as it is.

    Raises:
        RecipeError: the target is a latency; or it is out of reach although all layers of a shape share one set of
            weights, or the model meets it as it is.
    """
    if recipe.is_timed:
        raise RecipeError("what a latency budget leads to is measured: use search or fuse, with batches=.")
    if recipe.rank != "auto":
        return recipe
    asked = next(f"{name}={value:.12g}" for name in TARGETS if (value := getattr(recipe, name)) is not None)
    architecture, runs = architecture_for(model), _runs_of_one_shape(model)
    layers = architecture.layer_list(model)

    def shared(rank: int) -> Plan:
        return _plan_of_runs(model, replace(recipe, rank=rank), runs)

    # no group may have a rank that none of its maps can use
    ties = shared(sys.maxsize).layout().ties
    maps = [relaxed_maps(layers[tie.source.layers[0]], architecture, tie).values() for tie in ties]
    ranks = range(1, 1 + min((max(rank for _, rank in found) for found in maps), default=0))
    met = bisect.bisect_left(ranks, True, key=lambda rank: not _meets(model, recipe, shared(rank)))
    if _meets(model, recipe, replace(shared(1), edits=())):
        raise RecipeError(f"{asked} fuses nothing, the model is as small as that: use less.")
    if not met:
        raise RecipeError(
            f"{asked} is out of reach with rank='auto': where all blocks of a shape share their weights, and each "
            "depth adds rank 1, more than that is left. Let more be left, or use rank=0."
        )
    return replace(recipe, **dict.fromkeys(TARGETS) | {"keep_layers": len(runs)}, rank=ranks[met - 1])


def counts_of(model: PreTrainedModel, recipe: FusionRecipe) -> Sequence[int]:
    """How many blocks of each kind may stay distinct, the best first; the first whose plan fits is taken.

    Raises `RecipeError` where none can, before minutes of calibration are spent.
    """
    depth = len(architecture_for(model).layer_list(model))
    if depth < 2:
        raise RecipeError(f"the model has {depth} layer: there is nothing to fuse.")
    if recipe.keep_layers is not None:
        if recipe.keep_layers >= depth:
            raise RecipeError(
                f"keep_layers={recipe.keep_layers} of the model's {depth} fuses nothing: use 1 to {depth - 1}."
            )
        return [recipe.keep_layers]
    if recipe.ratio is not None and are_unlike(model):
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

    # one group of everything of one shape is the least, whatever the distances will be
    least = _plan_of_runs(model, recipe, _runs_of_one_shape(model))
    smallest, whole = (planned_size(model, plan) for plan in (least, replace(least, edits=())))
    kinds = " and ".join(kinds_of(model, recipe))
    for name, unit, most in _limits(recipe):
        if whole[unit] <= most:
            raise RecipeError(
                f"{name}={most:.12g} fuses nothing, the model has {whole[unit]} {unit}: use less, down to "
                f"{smallest[unit]}."
            )
        if smallest[unit] > most:
            raise RecipeError(
                f"{name}={most:.12g} is out of reach: with all {depth} {kinds} blocks as one "
                f"in mode {recipe.mode!r}, {smallest[unit]} {unit} remain. Use that or more, or other blocks or mode."
            )
    return range(depth - 1, 0, -1)


def _runs_of_one_shape(model: PreTrainedModel) -> list[tuple[int, ...]]:
    shapes = [shapes_of(layer) for layer in architecture_for(model).layer_list(model)]
    return [tuple(run) for _, run in itertools.groupby(range(len(shapes)), key=shapes.__getitem__)]


def _plan_of_runs(model: PreTrainedModel, recipe: FusionRecipe, runs: list[tuple[int, ...]]) -> Plan:
    """One block of each run of layers. How their weights become one does not matter here."""
    architecture = architecture_for(model)
    groups = [run for run in runs if len(run) > 1]
    edits = [Fuse(kind, run, recipe.mode, rank=recipe.rank) for kind in kinds_of(model, recipe) for run in groups]
    return Plan(architecture.model_type, sum(map(len, runs)), edits, kinds=architecture.kinds)


def _limits(recipe: FusionRecipe) -> list[tuple[str, str, float]]:
    """Name, unit and value of each target that limits the size of the whole model."""
    limits = [("max_parameters", "parameters", recipe.max_parameters), ("max_bytes", "bytes", recipe.max_bytes)]
    return [limit for limit in limits if limit[2] is not None]


def fits(model: PreTrainedModel, recipe: FusionRecipe, plan: Plan) -> bool:
    """Whether what a plan leads to is as small as the recipe asks for, and no group holds layers that cannot be one."""
    shapes = [shapes_of(layer) for layer in architecture_for(model).layer_list(model)]
    if any(shapes[layer] != shapes[edit.layers[0]] for edit in plan.edits for layer in edit.layers):
        return False
    as_close_as_possible = recipe.ratio is not None and len(set(shapes)) == 1
    return as_close_as_possible or _meets(model, recipe, plan)


def _meets(model: PreTrainedModel, recipe: FusionRecipe, plan: Plan) -> bool:
    """Whether what a plan leads to is no larger than the target, norms and biases included."""
    size = planned_size(model, plan)
    if recipe.ratio is not None:
        whole = sum(parameter.numel() for parameter in model.parameters())
        return size["parameters"] <= whole - recipe.ratio * size_of_blocks(model, recipe)
    return all(size[unit] <= most for _, unit, most in _limits(recipe))
