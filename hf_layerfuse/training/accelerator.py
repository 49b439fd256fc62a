"""The Accelerator of a training: made as a recipe wants it, and set up for it."""

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
    """An accelerator with the precision, the compilation and the tracker of a recipe.

    Raises:
        RecipeError: the tracker is not installed, or the precision cannot be had here.
    """
    handlers = []
    if getattr(student, "base_model", None) is student:
        # A body without a head may have parts that its hidden states do not depend on, such as the pooler of BERT.
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    # DeepSpeed has to be told at once, and is where its configuration says "auto"
    options: dict[str, Any] = {"gradient_accumulation_steps": recipe.gradient_accumulation_steps}
    if recipe.log_with:
        known = sorted(str(tracker) for tracker in get_available_trackers())
        if recipe.log_with not in known:
            raise RecipeError(
                f"heal.log_with={recipe.log_with!r} is not installed, or no tracker that Accelerate knows; at hand "
                f"are: {', '.join(known) or 'none'}. Install it, or leave heal.log_with out."
            )
        options |= {"log_with": recipe.log_with, "project_dir": recipe.log_dir}
    try:
        accelerator = Accelerator(mixed_precision=_mixed_precision(recipe), kwargs_handlers=handlers, **options)
    except ValueError as error:
        raise RecipeError(f"heal.mixed_precision={recipe.mixed_precision!r} cannot be had here: {error}") from error
    # all accelerators of a process share one state, and what the first one was told holds for those that follow
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(**({"backend": "inductor"} if recipe.compile else {}))
    return accelerator


@contextlib.contextmanager
def one_training(accelerator: Accelerator, recipe: HealRecipe, seed: int) -> Iterator[None]:
    """Set an accelerator up for one training, and let it forget what is prepared inside the `with` block.

    That would be part of all later checkpoints.
    """
    accelerator.gradient_accumulation_steps, accelerator.step = recipe.gradient_accumulation_steps, 0
    # A step always averages the same number of batches, also where an epoch ends in the middle of it.
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    accelerator.dataloader_config.use_seedable_sampler, accelerator.dataloader_config.data_seed = True, seed
    # each process reads what is streamed by itself: one that reads for all cannot pad their batches alike
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
    """DeepSpeed clips gradients by itself: by its own configuration, or where that says "auto", as a recipe does."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    settings = accelerator.state.deepspeed_plugin.deepspeed_config if deepspeed else {}
    own = settings.get("gradient_clipping", "auto")
    settings["gradient_clipping"] = norm if own == "auto" else own
    try:
        yield
    finally:
        settings["gradient_clipping"] = own


def finish_trackers(accelerator: Accelerator) -> None:
    """Let trackers write what they hold.

    `Accelerator.end_training` would also part the processes, which have more to do together.
    """
    for tracker in accelerator.trackers:
        tracker.finish()


def _mixed_precision(recipe: HealRecipe) -> str | None:
    """What the recipe names; for `auto`, None (what Accelerate was told), else what the device is fast in.

    `accelerate launch` says "no" also where the user said nothing, so only another word of it counts.
    """
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if is_initialized() or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    device = process_state().device
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        flags = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
        return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "no"
    return "no"
