"""Accelerator of a training, created and configured from a recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, TorchDynamoPlugin
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..recipe import HealRecipe
from .distributed import process_state


def accelerator_of(student: PreTrainedModel, recipe: HealRecipe) -> Accelerator:
    """Create an accelerator with the precision, the compilation and the tracker of a recipe.

    Raises:
        RecipeError: The tracker is not installed, or this device does not support the precision.
    """
    handlers = []
    if getattr(student, "base_model", None) is student:
        # Hidden states of a body without a head may not depend on all its parts, such as the pooler of BERT.
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    # DeepSpeed needs this from the start, and uses it where its configuration says "auto"
    options: dict[str, Any] = {"gradient_accumulation_steps": recipe.gradient_accumulation_steps}
    if recipe.log_with:
        known = sorted(str(tracker) for tracker in get_available_trackers())
        if recipe.log_with not in known:
            raise RecipeError(
                f"heal.log_with={recipe.log_with!r} is not installed, or is not a tracker that Accelerate supports. "
                f"Available: {', '.join(known) or 'none'}. Install it, or leave heal.log_with out."
            )
        options |= {"log_with": recipe.log_with, "project_dir": recipe.log_dir}
    try:
        accelerator = Accelerator(mixed_precision=_mixed_precision(recipe), kwargs_handlers=handlers, **options)
    except ValueError as error:
        raise RecipeError(f"heal.mixed_precision={recipe.mixed_precision!r} is not supported here: {error}") from error
    # all accelerators of a process share one state, so the settings of the first apply to later ones
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(**({"backend": "inductor"} if recipe.compile else {}))
    return accelerator


@contextlib.contextmanager
def one_training(accelerator: Accelerator, recipe: HealRecipe, seed: int) -> Iterator[None]:
    """Configure an accelerator for one training, and remove from it objects prepared inside the `with` block.

    Otherwise they would be part of all later checkpoints.
    """
    accelerator.gradient_accumulation_steps, accelerator.step = recipe.gradient_accumulation_steps, 0
    # A step always averages the same number of batches, even if an epoch ends in the middle of it.
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    accelerator.dataloader_config.use_seedable_sampler, accelerator.dataloader_config.data_seed = True, seed
    # each process reads streamed rows itself: one process reading for all cannot pad their batches alike
    accelerator.dataloader_config.dispatch_batches = False
    lists = [getattr(accelerator, f"_{kind}") for kind in ("models", "optimizers", "schedulers", "dataloaders")]
    before = [len(prepared) for prepared in lists]
    try:
        with _clipped_by_deepspeed(accelerator, recipe.max_grad_norm):
            yield
    finally:
        for prepared, count in zip(lists, before, strict=True):
            del prepared[count:]


@contextlib.contextmanager
def _clipped_by_deepspeed(accelerator: Accelerator, norm: float) -> Iterator[None]:
    """Let DeepSpeed clip gradients by its own configuration, or, where that says "auto", by the recipe."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    settings = accelerator.state.deepspeed_plugin.deepspeed_config if deepspeed else {}
    own = settings.get("gradient_clipping", "auto")
    settings["gradient_clipping"] = norm if own == "auto" else own
    try:
        yield
    finally:
        settings["gradient_clipping"] = own


def finish_trackers(accelerator: Accelerator) -> None:
    """Let trackers write their pending data.

    `Accelerator.end_training` would also end the process group, which is still needed.
    """
    for tracker in accelerator.trackers:
        tracker.finish()


def _mixed_precision(recipe: HealRecipe) -> str | None:
    """Precision of the recipe; for `auto`, None (Accelerate's own setting), else the fast one of the device.

    `accelerate launch` sets "no" even if the user set nothing, so only other values count.
    """
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if is_initialized() or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    device = process_state().device
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        flags = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
        return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "no"
    return "no"
