"""LayerCollapse, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ...models.finalize import straighten
from ...plan import Plan
from ...recipe import COLLAPSE_TARGETS, CollapseRecipe, HealRecipe
from ..base import Finish, Method
from .search import search_collapse


def _needs_training(recipe: CollapseRecipe) -> bool:
    """Whether activations become lines by training: until then, the result is the original, and nothing is gone."""
    return recipe.method == "homotopy"


def _healing(recipe: CollapseRecipe, heal: HealRecipe) -> HealRecipe:
    """Settings that pull activations to lines, however the user leaves that open."""
    return replace(heal, straighten=heal.straighten or "auto") if _needs_training(recipe) else heal


def _finish(recipe: CollapseRecipe) -> Finish | None:
    """Merge the two maps around each activation that has become a line."""
    if not (_needs_training(recipe) and recipe.merge):
        return None

    def merge_maps(model: PreTrainedModel, plan: Plan, batches: Sequence[Any]) -> tuple[PreTrainedModel, Plan]:
        model, straight = straighten(model, threshold=recipe.threshold, fold=recipe.fold, batches=batches)
        return model, replace(straight, notes={**plan.notes, **straight.notes})

    return Finish("merging the maps whose activation has become a line", merge_maps, recipe.threshold)


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
