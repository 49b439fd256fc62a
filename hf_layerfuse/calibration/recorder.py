"""The residual stream after every block, in one pass over the calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.batches import Batches
from ..evaluation.hooks import When, watch_tokens
from ..models.architectures import LayerArchitecture
from ..plan import Kind


def observe(
    model: PreTrainedModel,
    architecture: LayerArchitecture,
    batches: Batches,
    observers: Mapping[Kind, Callable[[Tensor], None]],
) -> None:
    """Run the batches once, and pass the residual stream after every block to the observer of its kind.

    This function keeps no states, so its memory depends only on the largest batch.

    Args:
        model: Model to run.
        architecture: Architecture table of the model.
        batches: Calibration batches, dicts of model inputs such as `{"input_ids", "attention_mask"}`. Padding is
            skipped.
        observers: Functions by kind of block. Each is called once per batch with a tensor (blocks, tokens, stream),
            float32 on the model's device, with the same tokens for every block.

    Raises:
        DataError: No batches, or no tokens but padding.
    """
    states: dict[Kind, list[Tensor]] = {kind: [] for kind in observers}
    inputs: dict[int, Tensor] = {}

    def record(key: tuple[Kind | Literal["input"], int], tokens: Tensor) -> None:
        kind, layer = key
        if kind == "input":
            inputs[layer] = tokens
        else:
            states[kind].append(inputs[layer] + tokens if kind in added else tokens)

    def show() -> None:
        inputs.clear()
        for kind, found in states.items():
            observers[kind](torch.stack([tokens.float() for tokens in found]))
            found.clear()

    added = {kind for kind in observers if kind != "layer" and architecture.place(kind, "sum").when == "added"}
    modules = {key: place for kind in observers for key, place in _stream(model, architecture, kind).items()}
    watch_tokens(model, batches, modules, record, show, architecture.mask)


def _stream(
    model: PreTrainedModel, architecture: LayerArchitecture, kind: Kind
) -> dict[tuple[Kind | Literal["input"], int], tuple[nn.Module, When]]:
    """Modules that show the stream after every block, with the side to watch, by (kind, layer).

    Where a block's output is added to the input of its layer, the key of that input is ("input", layer).
    """
    found: dict[tuple[Kind | Literal["input"], int], tuple[nn.Module, When]] = {}
    for index, layer in enumerate(architecture.layer_list(model)):
        if kind == "layer":
            found[kind, index] = layer, "after"
            continue
        if architecture.post_norm:  # the stream after a block is the output of its norm
            found[kind, index] = layer.get_submodule(architecture.table(kind)["norm"]), "after"
            continue
        place = architecture.place(kind, "sum")
        found[kind, index] = layer.get_submodule(place.module), "before" if place.when == "before" else "after"
        if place.when == "added":
            found["input", index] = layer, "before"
    return found
