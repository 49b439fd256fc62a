"""The `Method` entry of LayerMerge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ...models.architectures import ConvGraphArchitecture
from ...models.finalize import closed, merge_convs
from ...plan import Plan
from ...recipe import MERGE_TARGETS, MergeRecipe
from ..base import Finish, Method
from .search import search_merge


def _needs_training(recipe: MergeRecipe) -> bool:
    """Return whether segments stay open, so that they are trained before they are merged."""
    return recipe.method == "open"


def _finish(recipe: MergeRecipe) -> Finish | None:
    """Return the step that merges each open segment into one convolution."""
    return Finish("merging convolutions", _merge_segments, plan=closed) if _needs_training(recipe) else None


def _merge_segments(model: PreTrainedModel, plan: Plan, batches: Sequence[Any]) -> tuple[PreTrainedModel, Plan]:
    model, merged = merge_convs(model)
    return model, replace(merged, notes=plan.notes)


MERGE = Method(
    name="merge",
    recipe_type=MergeRecipe,
    targets=MERGE_TARGETS,
    architecture_type=ConvGraphArchitecture,
    doing="merging",
    done="merged",
    tag="layer-merge",
    search=search_merge,
    needs_training=_needs_training,
    finish=_finish,
)
