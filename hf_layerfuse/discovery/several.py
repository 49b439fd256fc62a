"""Models with several stacks of layers: the name of a stack, and the input that masks its tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.hooks import StopForward, watch
from .stacks import RAISED, Stack


def stack_name(path: str, paths: Collection[str]) -> str:
    """Short name of a stack: the part of its path that differs, such as `encoder`, or `vision` for `vision_tower`.

    Args:
        path: Path of the stack.
        paths: Paths of all stacks of the model.
    """
    parts = path.split(".")
    others = [other.split(".") for other in paths if other != path]
    at = next(
        (at for at, part in enumerate(parts) if any(len(other) <= at or other[at] != part for other in others)), 0
    )
    return parts[at].removesuffix("_model").removesuffix("_tower")


@torch.no_grad()
def stack_mask(model: PreTrainedModel, batch: Mapping[str, Tensor], stack: Stack) -> str:
    """Input of a model that masks the tokens of a stack; empty for tokens without padding.

    Args:
        model: Model in eval mode.
        batch: Model inputs, on its device.
        stack: Stack of the model.
    """
    read = {name for name, value in batch.items() if _is_read(model, {**batch, name: _other(value)}, stack)}
    if read <= {"pixel_values"}:
        return ""
    return "decoder_attention_mask" if "decoder_input_ids" in read else "attention_mask"


def _other(value: Tensor) -> Tensor:
    """Other values of an input, which are still valid: its rows or tokens in reverse order."""
    return value.flip(0, -1) if value.ndim > 1 else value


def _is_read(model: PreTrainedModel, batch: Mapping[str, Tensor], stack: Stack) -> bool:
    """Whether the states that enter a stack differ for a batch."""
    seen: list[Tensor] = []

    def record(_: str, states: Any) -> None:
        seen.append(states)
        raise StopForward

    modules: dict[str, tuple[nn.Module, Any]] = {"": (stack.layers[0], "before")}
    try:
        with watch(modules, record):
            model(**batch)
    except RAISED:
        return True  # the input decides on the shapes inside the model
    return not seen or not torch.equal(seen[0], stack.calls[0].states)
