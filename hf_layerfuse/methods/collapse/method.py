"""The `Method` entry of LayerCollapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ...models.finalize import linearize_mlps, linearized
from ...plan import Plan
from ...recipe import COLLAPSE_TARGETS, CollapseRecipe, HealRecipe
from ..base import Finish, Method
from .search import search_collapse


def _needs_training(recipe: CollapseRecipe) -> bool:
    """Return whether activations become linear by training. Until then, the result equals the original."""
    return recipe.method == "homotopy"


def _healing(recipe: CollapseRecipe, heal: HealRecipe) -> HealRecipe:
    """Return heal settings that make activations linear, unless the user set `homotopy_strength`."""
    return replace(heal, homotopy_strength=heal.homotopy_strength or "auto") if _needs_training(recipe) else heal


def _finish(recipe: CollapseRecipe) -> Finish | None:
    """Return the step that merges the two maps around each activation that has become linear."""
    if not (_needs_training(recipe) and recipe.merge):
        return None

    def merge_maps(model: PreTrainedModel, plan: Plan, batches: Sequence[Any]) -> tuple[PreTrainedModel, Plan]:
        model, straight = linearize_mlps(model, threshold=recipe.threshold, fold=recipe.fold, batches=batches)
        return model, replace(straight, notes=replace(plan.notes, homotopy=straight.notes.homotopy))

    return Finish(
        "merging the maps around activations that have become linear",
        merge_maps,
        recipe.threshold,
        partial(linearized, fold=recipe.fold),
    )


COLLAPSE = Method(
    name="collapse",
    recipe_type=CollapseRecipe,
    targets=COLLAPSE_TARGETS,
    doing="collapsing",
    done="collapsed",
    tag="layer-collapse",
    search=search_collapse,
    needs_training=_needs_training,
    healing=_healing,
    finish=_finish,
)
