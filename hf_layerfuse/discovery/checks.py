"""Checks of a discovered table on the batch. Hooks and replaced modules are always restored."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..evaluation.divergence import near, prediction
from ..models.architectures import part_at
from ..models.removal import replaced, silenced
from .blocks import DiscoveredBlock
from .stacks import RAISED, LayerCall, Stack, first_tensor


@torch.no_grad()
def check_removal(
    model: PreTrainedModel, batch: Mapping[str, Tensor], stack: Stack, block: DiscoveredBlock, index: int
) -> str | None:
    """Compare the output of a model without a block with its output if the block adds zero.

    A layer alone does not show what later layers take from a block, such as a position bias.

    Args:
        model: Model in eval mode.
        batch: Model inputs, on its device.
        stack: Stack of the block.
        block: Block to remove.
        index: Index of its layer.

    Returns:
        The difference, or None if there is none.
    """
    layer = stack.layers[index]
    try:
        with silenced(_last_module(layer, block)):
            silent = prediction(model(**batch))
        with replaced(layer, block.skip):
            removed = prediction(model(**batch))
    except RAISED as error:
        return f"{type(error).__name__}: {error}"
    if near(removed, silent):
        return None
    if removed.shape != silent.shape:
        return f"the outputs have the shapes {tuple(removed.shape)} and {tuple(silent.shape)}"
    return f"the outputs differ by {(removed - silent).abs().max() / silent.abs().max():.2g} of the largest value"


@torch.no_grad()
def adds_nothing(
    model: PreTrainedModel, batch: Mapping[str, Tensor], whole: Tensor, layer: nn.Module, block: DiscoveredBlock
) -> bool:
    """Whether a block adds exactly zero on a batch, as blocks with zero weights do before training.

    Args:
        model: Model in eval mode.
        batch: Model inputs, on its device.
        whole: Prediction of the model, of any shape.
        layer: Layer of the block.
        block: Block of the layer.
    """
    with suppress(*RAISED), silenced(_last_module(layer, block)):
        return torch.equal(prediction(model(**batch)), whole)
    return False


@torch.no_grad()
def silent_parameters(layer: nn.Module, call: LayerCall, block: DiscoveredBlock) -> tuple[str, ...]:
    """The last parameters of an opaque block that make it add nothing if they are zero; empty if they are not found.

    Args:
        layer: Layer of the block.
        call: Call of the layer.
        block: Opaque block.
    """
    try:
        with replaced(layer, block.skip):
            without = first_tensor(call.run(layer))
    except RAISED:
        return ()  # `check_removal` says why
    own = [path for path in block.skip if path != block.roles.get("norm")]
    weights = {n: p for n, p in layer.named_parameters() if any(n.startswith(f"{path}.") for path in own)}
    order = _order_of_calls(layer, call)

    def is_silent(names: list[str]) -> bool:
        zeros = {name: torch.zeros_like(weights[name]) for name in names}
        output = call.run(lambda *args, **kwargs: functional_call(layer, zeros, args, kwargs))
        return near(first_tensor(output), without)

    chosen = list(weights)
    if not chosen or not is_silent(chosen):
        return ()
    for name in sorted(weights, key=lambda name: order.get(name.rpartition(".")[0], -1)):  # the last ones remain
        rest = [other for other in chosen if other != name]
        if rest and is_silent(rest):
            chosen = rest
    return tuple(chosen)


def _order_of_calls(layer: nn.Module, call: LayerCall) -> dict[str, int]:
    """Path of each module of a layer that runs -> its place in the order of calls."""
    order: dict[str, int] = {}
    with ExitStack() as hooks:
        for path, module in layer.named_modules():

            def before(_: nn.Module, args: Any, path: str = path) -> None:
                order.setdefault(path, len(order))

            hooks.callback(module.register_forward_pre_hook(before).remove)
        call.run(layer)
    return order


def _last_module(layer: nn.Module, block: DiscoveredBlock) -> nn.Module:
    """The last module of a block in front of the residual sum."""
    paths = [*block.skip] if block.opaque else [block.roles["out"], *block.between]
    return [part for path in paths if (part := part_at(layer, path)) is not None][-1]


def with_needed_norm(layer: nn.Module, call: LayerCall, block: DiscoveredBlock) -> DiscoveredBlock:
    """Keep the norm of a removed block, if its layer reads an attribute of the norm.

    Args:
        layer: Layer of the block.
        call: Call of the layer.
        block: Block with its placeholders.

    Returns:
        The block, without a placeholder for its norm if the layer cannot run with it.
    """
    try:
        with replaced(layer, block.skip):
            call.run(layer)
    except AttributeError:
        return replace(block, skip={path: each for path, each in block.skip.items() if path != block.roles.get("norm")})
    except RAISED:
        pass  # `check_removal` says why
    return block
