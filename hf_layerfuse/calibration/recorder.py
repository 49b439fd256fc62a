"""The residual stream after every block, in one pass over the calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

    def record(key: tuple[Kind, int, bool], tokens: Tensor) -> None:
        kind, _, added = key
        if added:
            states[kind][-1] = states[kind][-1] + tokens
        else:
            states[kind].append(tokens)

    def show() -> None:
        for kind, found in states.items():
            observers[kind](torch.stack([tokens.float() for tokens in found]))
            found.clear()

    modules = {key: place for kind in observers for key, place in _stream(model, architecture, kind).items()}
    watch_tokens(model, batches, modules, record, show)


def _stream(
    model: PreTrainedModel, architecture: LayerArchitecture, kind: Kind
) -> dict[tuple[Kind, int, bool], tuple[nn.Module, When]]:
    """Modules that show the stream after every block, with the side to watch, by (kind, layer, is the tensor added)."""
    if kind == "layer":
        return {(kind, index, False): (layer, "after") for index, layer in enumerate(architecture.layer_list(model))}
    found: dict[tuple[Kind, int, bool], tuple[nn.Module, When]] = {}
    for block in architecture.blocks(model):
        if block.kind == kind:
            norm = model.get_submodule(block.modules["norm"])
            if architecture.post_norm:
                found[kind, block.layer, False] = norm, "after"
            else:
                # the norm reads the stream before the block; adding the block's output gives the stream after it
                found[kind, block.layer, False] = norm, "before"
                found[kind, block.layer, True] = model.get_submodule(block.modules["out"]), "after"
    return found
