"""The public entry points: `fuse`, `collapse` and `merge` take a model, `AutoFusedModel` loads a checkpoint."""

from __future__ import annotations

import os
import time
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from .calibration.samples import read
from .discovery import ensure_architecture, is_unknown
from .discovery.stacks import RAISED
from .errors import RecipeError
from .evaluation.batches import Batches, first_rows, model_inputs
from .evaluation.dummy_inputs import dummy_inputs
from .evaluation.metrics import bytes_in_memory
from .evaluation.modes import eval_mode
from .evaluation.precision import batch_for, in_float32
from .methods.base import Method
from .methods.collapse.method import COLLAPSE
from .methods.fusion.method import FUSION
from .methods.merge.method import MERGE
from .methods.report import FusionReport
from .models.architectures import architecture_for
from .models.loading import load_checkpoint
from .models.verify import verify, warn_if_useless
from .recipe import CollapseRecipe, FusionRecipe, MergeRecipe, current_names

_Recipe = TypeVar("_Recipe", FusionRecipe, CollapseRecipe, MergeRecipe)


def fuse(
    model: PreTrainedModel,
    recipe: FusionRecipe | None = None,
    *,
    batches: Batches | None = None,
    check: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Fuse layers of a model into fewer: plan, apply, refit, verify.

    With calibration `batches`, the candidate that stays closest to the original wins, and the result is refitted in
    closed form. Without `batches`, the weights alone decide and nothing is refitted. Heal such a model before use.

    Args:
        model: Stock model with any head; it is not changed.
        recipe: Settings of the fusion, such as `FusionRecipe(keep_layers=6)`.
        batches: Calibration data, as an iterable of dicts of model inputs or a tokenised `datasets.Dataset`. A few
            hundred sequences like those in use are enough. Labels are not needed.
        check: Whether to save, reload and compare the result before returning it, as `verify` does.
        overrides: Fields of `FusionRecipe` that replace those of `recipe`, or form the recipe if there is none.

    Returns:
        A new model. It has the stock class if whole layers were fused in depth, and its fused counterpart otherwise.
        Its `fusion_report` is a `FusionReport`.

    Raises:
        RecipeError: Unknown field or impossible target.
        UnsupportedModelError: Unknown architecture, or a model that cannot be fused.
        VerificationError: Result whose outputs change after saving and loading, or when decoding with a cache.

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
    """Replace MLPs of a model with linear maps: choose, apply, fit, verify.

    With method `homotopy`, the returned model still computes the same outputs as `model`. Its activations can become
    linear during training. Train it with `heal`, `HealRecipe(homotopy_strength="auto")` and
    `HealScope(threshold=0.05)`, then call `linearize_mlps(result)` to get the smaller model.

    Args:
        model: Stock model with any head; it is not changed.
        recipe: Settings of the collapse, such as `CollapseRecipe(count=4)`.
        batches: Calibration data, as for `fuse`. Without them, nothing is fitted, and the recipe must have
            `order='deepest'`, which starts at the last layer.
        check: Whether to save, reload and compare the result before returning it, as `verify` does.
        overrides: Fields of `CollapseRecipe` that replace those of `recipe`, or form the recipe if there is none.

    Returns:
        A new model, whose class is the fused counterpart of the class of `model`. Its
        `fusion_report` is a `FusionReport`.

    Raises:
        RecipeError: Unknown field or impossible target.
        UnsupportedModelError: Unknown architecture, or a model whose MLPs cannot become linear.
        VerificationError: Result whose outputs change after saving and loading, or when decoding with a cache.

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
    """Merge convolutions of a model within a latency budget: measure segments, choose, fit, verify.

    Latency is measured on the device of the model, with the current number of torch threads.

    Args:
        model: Stock model with any head; it is not changed.
        recipe: Settings of the merge, such as `MergeRecipe(latency_budget=0.6)`.
        batches: Calibration images, as for `fuse`.
        check: Whether to save, reload and compare the result before returning it, as `verify` does.
        overrides: Fields of `MergeRecipe` that replace those of `recipe`, or form the recipe if there is none.

    Returns:
        A new model, whose class is the fused counterpart of the class of `model`. With method `open`, its segments are
        still to be trained. `merge_convs` then turns the trained model into the fast one. Its `fusion_report` is a
        `FusionReport`.

    Raises:
        RecipeError: Unknown field, latency budget that cannot be met, or missing batches.
        UnsupportedModelError: Unknown architecture, or a model without convolutions that can be merged.
        VerificationError: Result whose outputs change after saving and loading.

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
    """Run the search of a method, then check its result, as `fuse`, `collapse` and `merge` do."""
    recipe = _asked(method, recipe, overrides)
    if not is_unknown(model):
        architecture_for(model, method.architecture_type)  # a value that is not a model is refused first
    sequences = None if batches is None else read(batches, model)
    ensure_architecture(model, method.architecture_type, sequences, getattr(recipe, "stack", None), stacklevel=4)
    with torch.inference_mode(False):  # weights made in inference mode could not be trained
        start = time.perf_counter()
        wide = in_float32(model)
        if wide is not model and sequences is not None:
            sequences = [batch_for(wide, batch) for batch in sequences]
        found = method.search(wide, recipe, sequences)
        result = found.model.to(model.dtype)
        result.fusion_report = FusionReport(
            method=method.name,
            plan=found.plan,
            parameters=(model.num_parameters(), result.num_parameters()),
            bytes=(bytes_in_memory(model), bytes_in_memory(result)),
            seconds=time.perf_counter() - start,
        )
        if check:
            verify(result, inputs=_inputs_to_verify(result, sequences))
        if not method.needs_training(recipe):  # the quality of other results shows only after training
            warn_if_useless(wide, in_float32(result), sequences)
    return result


def _inputs_to_verify(model: PreTrainedModel, batches: Batches | None) -> dict[str, Any] | None:
    """Two rows of the calibration data, for models that random inputs do not fit; None for others."""
    if not batches:
        return None
    try:
        with eval_mode(model), torch.inference_mode():
            model(**dummy_inputs(model, 1))
    except RAISED:
        first = next(iter(batches))
        return batch_for(model, first_rows(model_inputs(first, model), 2))
    return None


def _asked(method: Method[_Recipe], recipe: _Recipe | None, overrides: dict[str, Any]) -> _Recipe:
    """Apply overrides to a recipe. A target among the overrides replaces the target of the recipe."""
    kind = method.recipe_type
    if recipe is None:
        return kind(**overrides)
    if not isinstance(recipe, kind):
        raise RecipeError(f"recipe is {type(recipe).__name__}: pass a {kind.__name__}, or its fields as keywords.")
    if not overrides:
        return recipe
    overrides = current_names(kind, overrides)
    target = dict.fromkeys(method.targets) if overrides.keys() & set(method.targets) else {}
    return kind(**{**vars(recipe), **target, **overrides})


class AutoFusedModel:
    """Loader for any checkpoint that hf_layerfuse or transformers saved, with its head."""

    def __init__(self) -> None:
        raise TypeError("AutoFusedModel cannot be instantiated: call AutoFusedModel.from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        recipe: FusionRecipe | None = None,
        batches: Batches | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a fused or stock checkpoint, and fuse it if a recipe is given.

        A `fusion_report.json` in the directory becomes `fusion_report` of the model.

        Args:
            path: Directory or Hub name.
            recipe: Recipe to fuse the loaded model with, as `fuse` does; None loads the model unchanged.
            batches: Calibration batches for the recipe.
            kwargs: Options of `PreTrainedModel.from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...

        Raises:
            CheckpointError: Checkpoint that does not exist, is not a model, is damaged or lacks weights.
            PlanError: Plan that has a newer format, or does not fit the config.
        """
        if recipe is None:
            if batches is not None:
                raise RecipeError(
                    "batches= without recipe=: they are used only to fuse while loading. Pass recipe= too."
                )
            loaded = load_checkpoint(path, **kwargs)
            if (report := FusionReport.load(os.path.expanduser(path))) is not None:
                (loaded[0] if kwargs.get("output_loading_info") else loaded).fusion_report = report
            return loaded
        if kwargs.get("output_loading_info"):
            raise RecipeError("output_loading_info=True describes a file, not a fused model: leave it out.")
        return fuse(load_checkpoint(path, **kwargs), recipe, batches=batches)
