"""The front doors: `fuse`, `collapse`, `merge` for a model in memory, `AutoFusedModel` for one on disk or the Hub."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from transformers import PreTrainedModel

from .calibration.samples import read
from .errors import RecipeError
from .evaluation.batches import Batches
from .methods.base import Method
from .methods.collapse.method import COLLAPSE
from .methods.fusion.method import FUSION
from .methods.merge.method import MERGE
from .models.loading import load_checkpoint
from .models.verify import verify, warn_if_useless
from .recipe import CollapseRecipe, FusionRecipe, MergeRecipe

_Recipe = TypeVar("_Recipe", FusionRecipe, CollapseRecipe, MergeRecipe)


def fuse(
    model: PreTrainedModel,
    recipe: FusionRecipe | None = None,
    *,
    batches: Batches | None = None,
    check: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Make a model smaller: plan, apply, refit, verify.

    With calibration `batches`, candidates compete on how near they stay to the original, and the result is repaired in
    closed form. Without, everything is decided from the weights alone, and nothing is repaired: heal such a model
    before use.

    Args:
        model: a stock model with any head; never changed.
        recipe: what is asked for; `FusionRecipe(keep_layers=6)`, say.
        batches: calibration data: any iterable of dicts of model inputs, or a tokenised `datasets.Dataset`. A few
            hundred sequences like those the model will see; labels are not needed.
        check: save, reload and compare the result before it is returned, as `verify` does.
        overrides: fields of `FusionRecipe`, in place of the recipe or on top of it.

    Returns:
        A new model: of the stock class where whole layers were fused in depth, else of its fused counterpart.

    Raises:
        RecipeError: unknown field or impossible target.
        UnsupportedModelError: an unknown architecture, or a model that cannot be fused.
        VerificationError: the result does not survive saving and loading, or caching.

    Examples:
        >>> small = fuse(model, keep_layers=8, batches=batches)  # doctest: +SKIP
    """
    return _compress(FUSION, model, recipe, batches, check, overrides)


def collapse(
    model: PreTrainedModel,
    recipe: CollapseRecipe | None = None,
    *,
    batches: Batches | None = None,
    check: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Make MLPs of a model linear: choose them, apply, fit, verify.

    With method `homotopy`, what is returned computes what `model` does, with activations that can become lines: train
    it by `heal` with `HealRecipe(straighten="auto")` and `threshold=0.05`; `straighten(result)` is the smaller one.

    Args:
        model: a stock model with any head; never changed.
        recipe: what is asked for; `CollapseRecipe(count=4)`, say.
        batches: calibration data, as for `fuse`. Without them, MLPs are taken from the last layer on, if the recipe
            says `order='deepest'`, and nothing is fitted.
        check: save, reload and compare the result before it is returned, as `verify` does.
        overrides: fields of `CollapseRecipe`, in place of the recipe or on top of it.

    Returns:
        A new model, of the fused counterpart of the class of `model`.

    Raises:
        RecipeError: unknown field or impossible target.
        UnsupportedModelError: an unknown architecture, or a model whose MLPs cannot become linear.
        VerificationError: the result does not survive saving and loading, or caching.

    Examples:
        >>> small = collapse(model, count=4, batches=batches)  # doctest: +SKIP
    """
    return _compress(COLLAPSE, model, recipe, batches, check, overrides)


def merge(
    model: PreTrainedModel,
    recipe: MergeRecipe | None = None,
    *,
    batches: Batches | None = None,
    check: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Make convolutions of a model one: measure segments, choose those that keep a latency budget, fit, verify.

    Latency is measured on the device that the model is on, with the number of threads that torch has.

    Args:
        model: a stock model with any head; never changed.
        recipe: what is asked for; `MergeRecipe(latency_budget=0.6)`, say.
        batches: calibration images, as for `fuse`.
        check: save, reload and compare the result before it is returned, as `verify` does.
        overrides: fields of `MergeRecipe`, in place of the recipe or on top of it.

    Returns:
        A new model, of the fused counterpart of the class of `model`. With method `open`, one to be trained, of which
        `merge_convs` makes the fast one.

    Raises:
        RecipeError: unknown field, a budget that cannot be met, or no batches.
        UnsupportedModelError: an unknown architecture, or nothing in it that can be merged.
        VerificationError: the result does not survive saving and loading.

    Examples:
        >>> fast = merge(model, latency_budget=0.6, batches=batches)  # doctest: +SKIP
    """
    return _compress(MERGE, model, recipe, batches, check, overrides)


def _compress(
    method: Method[_Recipe],
    model: PreTrainedModel,
    recipe: _Recipe | None,
    batches: Batches | None,
    check: bool,
    overrides: dict[str, Any],
) -> PreTrainedModel:
    """What `fuse`, `collapse` and `merge` do, each with its method."""
    recipe = _asked(method, recipe, overrides)
    sequences = None if batches is None else read(batches, model)
    result = method.search(model, recipe, sequences).model
    if check:
        verify(result)
    if not method.needs_training(recipe):  # otherwise how good it is shows after the training
        warn_if_useless(model, result, sequences)
    return result


def _asked(method: Method[_Recipe], recipe: _Recipe | None, overrides: dict[str, Any]) -> _Recipe:
    """The recipe, with overrides; one of its targets replaces the one that the recipe has."""
    kind = method.recipe_type
    if recipe is None:
        return kind(**overrides)
    if not isinstance(recipe, kind):
        raise RecipeError(f"recipe is {type(recipe).__name__}: pass a {kind.__name__}, or its fields as keywords.")
    if not overrides:
        return recipe
    target = dict.fromkeys(method.targets) if overrides.keys() & set(method.targets) else {}
    return kind(**{**vars(recipe), **target, **overrides})


class AutoFusedModel:
    """Loads any checkpoint that hf_layerfuse or transformers saved, with the head it was saved with."""

    def __init__(self) -> None:
        raise TypeError("AutoFusedModel is not instantiated: call AutoFusedModel.from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        recipe: FusionRecipe | None = None,
        batches: Batches | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a fused or stock checkpoint, and fuse it on the way when there is a recipe.

        Args:
            path: directory or Hub name.
            recipe: fuse the loaded model by this recipe, as `fuse` does.
            batches: calibration batches for the recipe.
            kwargs: as for `PreTrainedModel.from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...

        Raises:
            CheckpointError: nothing there, not a model, damaged, or with weights missing.
            PlanError: a plan of a newer format, or one that does not fit the config.
        """
        if recipe is None:
            if batches is not None:
                raise RecipeError("batches= without recipe=: calibration batches are only used to fuse at load.")
            return load_checkpoint(path, **kwargs)
        if kwargs.get("output_loading_info"):
            raise RecipeError("output_loading_info=True describes a file, not a model fused at load: leave it out.")
        return fuse(load_checkpoint(path, **kwargs), recipe, batches=batches)
