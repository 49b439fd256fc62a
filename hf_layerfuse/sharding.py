"""Sharded training (FSDP2) of models whose layers share weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


@contextlib.contextmanager
def one_unit_for_shared(model: PreTrainedModel, plugin: Any) -> Iterator[None]:
    """Let Accelerate shard a model by layers only where no layers share weights, inside the `with` block.

    FSDP2 gathers and frees the parameters of a unit together, and refuses one that is in two units. Accelerate makes a
    unit of each layer; where layers share, all of them stay in the unit of the model. What they have between them is
    what sharing left, so that little memory is lost by it.

    Args:
        model: about to be prepared.
        plugin: the `FullyShardedDataParallelPlugin` of the accelerator, or None where nothing is sharded.
    """
    if plugin is None or not shares_layers(model):
        yield
        return
    named = plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = []  # no class is a unit; None would mean those that transformers names
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = named


def shares_layers(model: PreTrainedModel) -> bool:
    """Whether a parameter is in several places, other than that of input and output embeddings."""
    embeddings = set()
    with contextlib.suppress(NotImplementedError):  # models that read no tokens have none
        embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    places = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    inner = [place for place in places if place not in embeddings]
    return len(inner) > len(set(inner))
