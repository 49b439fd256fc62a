"""The two front doors: `fuse` for a model in memory, `AutoFusedModel` for one on disk or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from .calibration import Batches
from .errors import RecipeError
from .methods.fusion import plan_fusion
from .modeling import apply, load_checkpoint
from .recipe import FusionRecipe
from .verify import verify, warn_if_useless


def fuse(
    model: PreTrainedModel,
    recipe: FusionRecipe | None = None,
    *,
    batches: Batches | None = None,
    check: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Make a model smaller: plan, apply, verify.

    Args:
        model: a stock model with any head; never changed.
        recipe: what is asked for; `FusionRecipe(keep_layers=6)`, say.
        batches: calibration batches, an iterable of dicts of model inputs. Needed by the similarities `cka` and
            `block_influence`; with any other, used to say when the result is worthless.
        check: save, reload and compare the result before it is returned, as `verify` does.
        overrides: fields of `FusionRecipe`, in place of the recipe or on top of it.

    Returns:
        A new model: of the stock class where whole layers were fused in depth, else of its fused counterpart.

    Raises:
        RecipeError: unknown field or impossible target.
        UnsupportedModelError: no adapter for the architecture, or a model that cannot be fused.
        VerificationError: the result does not survive saving and loading, or caching.

    Example:
        >>> small = fuse(model, keep_layers=8, mode="share")  # doctest: +SKIP
    """
    if recipe is None:
        recipe = FusionRecipe(**overrides)
    elif not isinstance(recipe, FusionRecipe):
        raise RecipeError(f"recipe is {type(recipe).__name__}: pass a FusionRecipe, or its fields as keywords.")
    elif overrides:
        target = {"keep_layers": None, "ratio": None} if overrides.keys() & {"keep_layers", "ratio"} else {}
        recipe = FusionRecipe(**{**vars(recipe), **target, **overrides})
    if isinstance(batches, Iterator):
        batches = list(batches)  # read for the plan, and again to judge the result
    plan = plan_fusion(model, recipe, batches)
    fused = apply(model, plan)
    if check:
        verify(fused)
    warn_if_useless(model, fused, batches)
    return fused


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
