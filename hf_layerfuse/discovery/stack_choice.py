"""The stack of layers to describe: the inputs to find it with, its name, and the input that masks its tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError, UnsupportedModelError
from ..evaluation.batches import first_rows, model_inputs
from ..evaluation.dummy_inputs import dummy_inputs
from ..evaluation.hooks import StopForward, watch
from ..models.architectures.base import root_of
from .config_fields import depth_field
from .stacks import RAISED, Stack, find_stacks

_ROWS = 2
"""Rows of a batch that are used."""

_ASK_FOR_BATCH = "Pass a representative batch of its inputs."


def inputs_for(model: PreTrainedModel, batch: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Two rows of a batch on the device of a model, or random inputs if there is none.

    Args:
        model: Model that reads the inputs.
        batch: Batch of the user, or None.

    Raises:
        DataError: The batch is not a dict of tensors.
        UnsupportedModelError: There is no batch, and random inputs cannot be made for this model.
    """
    if batch is not None:
        inputs = model_inputs(batch, model) if isinstance(batch, Mapping) else {}
        if not any(value.ndim for value in inputs.values()):
            raise DataError(
                f"the batch is a {type(batch).__name__} without tensors: pass a dict of model inputs, such as "
                "`tokenizer(texts, padding=True, return_tensors='pt')` returns."
            )
        return first_rows(inputs, _ROWS)
    try:
        return dummy_inputs(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"random inputs cannot be made for {type(model).__name__}, whose main input is {model.main_input_name!r}. "
            f"{_ASK_FOR_BATCH}"
        ) from error
    except RAISED as error:
        raise UnsupportedModelError(
            f"random inputs cannot be made for {type(model).__name__}: {_one_line(error)} {_ASK_FOR_BATCH}"
        ) from error


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
        raise UnsupportedModelError(
            f"{type(model).__name__} does not accept random inputs: {_one_line(error)} {_ASK_FOR_BATCH}"
        ) from error


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
        UnsupportedModelError: There is no stack with a depth field, there are several and none is chosen, or the model
            has no stack of this name.
    """
    name = type(model).__name__
    if not stacks:
        each = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "it has no nn.ModuleList"
        raise UnsupportedModelError(f"{name} does not run a stack of layers once, in order. What was found: {each}.")
    fields = {path: depth_field(model, path) for path in stacks}
    depths = {path: field for path, field in fields.items() if field is not None}
    if not depths:
        raise _without_depth(model, stacks)
    if wanted is None:
        if len(depths) > 1:
            raise UnsupportedModelError(
                f"{name} has several stacks of layers: pass stack= with one of {_listed(stacks, depths)}."
            )
        return stacks[next(iter(depths))], depths
    named = {**{stack_name(path, depths): path for path in depths}, **{path: path for path in stacks}}
    path = named.get(wanted) or named.get(f"{root_of(model)}{wanted}")
    if path is None:
        why = f" It is a list, but {refused[wanted]}." if wanted in refused else ""
        has = f"It has {_listed(stacks, depths)}" if len(depths) > 1 else f"It has one, {_listed(stacks, depths)}"
        without = "" if len(depths) > 1 else ": leave stack= out"
        raise UnsupportedModelError(f"{name} has no stack {wanted!r}.{why} {has}{without}.")
    if path not in depths:
        raise _without_depth(model, {path: stacks[path]})
    return stacks[path], depths


def check_tokens(stack: Stack) -> None:
    """Raise `DataError` if a stack reads one token per row, which cannot show which blocks mix tokens."""
    shape = stack.calls[0].states.shape
    if shape[1] < 2:
        raise DataError(
            f"the states at {stack.path} have the shape {tuple(shape)}, one token per row: pass a batch with at least "
            "two, because one token cannot show which blocks mix tokens."
        )


def _listed(stacks: Mapping[str, Stack], depths: Mapping[str, str]) -> str:
    """Name, path, length and depth field of each stack."""
    return ", ".join(
        f"{stack_name(path, depths)!r} ({path}, {len(stacks[path].layers)} layers, config.{depth})"
        for path, depth in depths.items()
    )


def _without_depth(model: PreTrainedModel, stacks: Mapping[str, Stack]) -> UnsupportedModelError:
    each = ", ".join(f"{path} ({len(stack.layers)} layers)" for path, stack in stacks.items())
    return UnsupportedModelError(
        f"no field of {type(model.config).__name__} sets the number of layers of {each}, so a model with fewer layers "
        "cannot be built."
    )


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
