"""Checks of a discovered table on the batch, with hooks and replaced modules that are always restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.divergence import prediction
from .blocks import DiscoveredBlock, LayerTable
from .stacks import Stack, first_tensor, near

_RAISED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def check_table(
    model: PreTrainedModel, batch: Mapping[str, Tensor], stack: Stack, table: LayerTable
) -> dict[str, str | None]:
    """Check a table numerically: claim -> None if it holds, else the difference.

    Args:
        model: Model in eval mode.
        batch: Model inputs, on its device.
        stack: Stack of the model that the table describes.
        table: Table to check.
    """
    found: dict[str, str | None] = {"the layers one by one are the model": _one_by_one(stack)}
    whole = prediction(model(**batch))
    last = len(stack.layers) - 1
    for index in dict.fromkeys([last // 2 + 1, 0, last]):
        found[f"layer {index}: its blocks and residual sums are the layer"] = _sums(stack, index, table)
        for block in table.blocks:
            claim = f"layer {index}: the placeholders of {block.kind} equal a zero output"
            found[claim] = _placeholders(model, batch, stack, index, block, whole)
    return found


def _one_by_one(stack: Stack) -> str | None:
    states = stack.calls[0].states
    for layer, call in zip(stack.layers, stack.calls, strict=True):
        states = first_tensor(call.run(layer, states))
    return _difference(states, stack.calls[-1].output)


def _sums(stack: Stack, index: int, table: LayerTable) -> str | None:
    """Recompute a layer from the outputs of its blocks."""
    layer, call, seen = stack.layers[index], stack.calls[index], {}
    if any(block.opaque for block in table.blocks):
        return None
    with ExitStack() as hooks:
        for block in table.blocks:

            def after(_: nn.Module, args: Any, output: Tensor, out: str = block.roles["out"]) -> None:
                seen[out] = output.clone()

            hooks.callback(layer.get_submodule(block.roles["out"]).register_forward_hook(after).remove)
        expected = first_tensor(call.run(layer))
    states = call.states
    for block in table.blocks:
        added = seen[block.roles["out"]].reshape(states.shape)
        for path in block.between:
            part = _attribute(layer, path)
            added = part(added) if isinstance(part, nn.Module) else added * part
        states = states + added
        if block.norm_after:
            states = layer.get_submodule(block.roles["norm"])(states)
    return _difference(states, expected)


def _placeholders(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    stack: Stack,
    index: int,
    block: DiscoveredBlock,
    whole: Tensor,
) -> str | None:
    layer = stack.layers[index]
    if block.opaque:
        last = [path for path in block.skip if path != block.roles.get("norm")][-1]
    else:
        modules = [path for path in block.between if isinstance(_attribute(layer, path), nn.Module)]
        last = modules[-1] if modules else block.roles["out"]

    def zero(_: nn.Module, args: Any, output: Any) -> Any:
        first = torch.zeros_like(first_tensor(output))
        return (first, *output[1:]) if isinstance(output, tuple) else first

    hook = layer.get_submodule(last).register_forward_hook(zero)
    try:
        silent = prediction(model(**batch))
    finally:
        hook.remove()
    if near(silent, whole):
        return "a zero output has no effect on this batch"
    try:
        with replaced(layer, block.skip):
            removed = prediction(model(**batch))
    except _RAISED as error:
        return f"{type(error).__name__}: {error}"
    return _difference(removed, silent)


@contextmanager
def replaced(layer: nn.Module, skip: Mapping[str, type[nn.Module]]) -> Iterator[None]:
    """Replace modules of a layer inside the `with` block."""
    before = {path: layer.get_submodule(path) for path in skip}
    try:
        for path, placeholder in skip.items():
            layer.set_submodule(path, placeholder())
        yield
    finally:
        for path, module in before.items():
            layer.set_submodule(path, module)


def _attribute(layer: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(layer.get_submodule(parent), name)


def _difference(ours: Tensor, theirs: Tensor) -> str | None:
    if near(ours, theirs):
        return None
    if ours.shape != theirs.shape:
        return f"the shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ"
    apart = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-12)
    return f"the outputs differ by {apart:.2g} of the largest value"
