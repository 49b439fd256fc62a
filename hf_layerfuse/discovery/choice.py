"""The stack of layers to describe, and the inputs to find it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..evaluation.batches import model_inputs, take
from ..evaluation.dummy_inputs import dummy_inputs
from ..models.architectures.base import root_of
from .config_fields import depth_field
from .several import stack_name
from .stacks import RAISED, Stack, find_stacks

_ROWS = 2
"""Rows of a batch that are used."""


def inputs_for(model: PreTrainedModel, batch: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Two rows of a batch on the device of a model, or random inputs if there is none.

    Raises:
        UnsupportedModelError: There is no batch, and no random inputs for this model.
    """
    if batch is not None:
        inputs = model_inputs(batch, model)
        rows = len(next(iter(inputs.values()), ()))
        return take(inputs, torch.arange(rows) < _ROWS)
    try:
        return dummy_inputs(model)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedModelError(_ask_for_batch(model, error)) from error


def stacks_of(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], given: bool
) -> tuple[dict[str, Stack], dict[str, str]]:
    """`find_stacks`, with errors in words.

    Args:
        model: Model in eval mode.
        inputs: Model inputs, on its device.
        given: Whether the inputs are from the user.

    Raises:
        UnsupportedModelError: The model does not accept the inputs.
    """
    try:
        return find_stacks(model, inputs)
    except RAISED as error:
        if given:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not accept the batch of {', '.join(inputs)}: {_one_line(error)}"
            ) from error
        raise UnsupportedModelError(_ask_for_batch(model, error)) from error


def _ask_for_batch(model: PreTrainedModel, error: Exception) -> str:
    return (
        f"{type(model).__name__} does not accept random inputs: {_one_line(error)} Pass a representative batch of its "
        "inputs."
    )


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if text.endswith(".") else f"{text}."


def chosen_stack(
    model: PreTrainedModel, stacks: Mapping[str, Stack], refused: Mapping[str, str], wanted: str | None
) -> tuple[Stack, dict[str, str]]:
    """Choose the stack to describe.

    Args:
        model: Model of the stacks.
        stacks: Its stacks by path.
        refused: Reason why another module list is not a stack, by path.
        wanted: Path or short name of the stack; None if there is only one.

    Returns:
        The stack, and the depth field of each stack that has one, by path.

    Raises:
        UnsupportedModelError: There is no stack with a depth field, or there are several and none is chosen.
    """
    name = type(model).__name__
    if not stacks:
        each = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "it has no nn.ModuleList"
        raise UnsupportedModelError(f"{name} does not run a stack of layers once, in order. What was found: {each}.")
    fields = {path: depth_field(model, path) for path in stacks}
    depths = {path: field for path, field in fields.items() if field is not None}
    if not depths:
        raise _without_depth(model, stacks)
    if wanted is None and len(depths) == 1:
        return stacks[next(iter(depths))], depths
    each = ", ".join(
        f"{stack_name(path, depths)!r} ({path}, {len(stacks[path].layers)} layers, config.{depth})"
        for path, depth in depths.items()
    )
    if wanted is None:
        raise UnsupportedModelError(f"{name} has several stacks of layers: pass stack= with one of {each}.")
    named = {**{stack_name(path, depths): path for path in depths}, **{path: path for path in stacks}}
    path = named.get(wanted) or named.get(root_of(model) + wanted)
    if path is None:
        why = f" It is a list, but {refused[wanted]}." if wanted in refused else ""
        raise UnsupportedModelError(f"{name} has no stack {wanted!r}.{why} It has {each}.")
    if path not in depths:
        raise _without_depth(model, {path: stacks[path]})
    return stacks[path], depths


def _without_depth(model: PreTrainedModel, stacks: Mapping[str, Stack]) -> UnsupportedModelError:
    each = ", ".join(f"{path} ({len(stack.layers)} layers)" for path, stack in stacks.items())
    return UnsupportedModelError(
        f"no field of {type(model.config).__name__} sets the number of layers of {each}, so a model with fewer layers "
        "cannot be built."
    )
