"""Launchers that have parameters of their own: FSDP2 of models whose layers share weights, values under DeepSpeed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
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


@contextlib.contextmanager
def whole_again(model: PreTrainedModel, sharded: bool) -> Iterator[None]:
    """Let a model that is sharded inside the `with` block be a plain one again behind it, on every process.

    It has all that it learnt, shares what it shared, and knows nothing of other processes, so that one of them can save
    or measure it by itself. After an exception it stays sharded: the other processes may not be there any more.

    Args:
        model: not sharded yet.
        sharded: false does nothing.
    """
    if not sharded:
        yield
        return
    memo = {id(tensor): nn.Parameter(tensor.to("meta"), tensor.requires_grad) for tensor in model.parameters()}
    plain = copy.deepcopy(model, memo)
    yield
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    made: dict[int, nn.Parameter] = {}
    for name, empty in list(plain.named_parameters(remove_duplicate=False)):
        if id(empty) not in made:
            made[id(empty)] = nn.Parameter(weights[name], empty.requires_grad)
        path, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(path), leaf, made[id(empty)])
    for name, _ in list(plain.named_buffers()):  # statistics, and what has moved to the device
        path, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(path), leaf, model.get_buffer(name).clone())
    model.__class__, model.__dict__ = type(plain), plain.__dict__


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, with what all processes have of it; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Put a value in the place of a parameter between steps, also in the copy that DeepSpeed's optimiser steps."""
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())
    parameter.copy_(value)


def shares_layers(model: PreTrainedModel) -> bool:
    """Whether a parameter is in several places, other than that of input and output embeddings."""
    embeddings = set()
    with contextlib.suppress(NotImplementedError):  # models that read no tokens have none
        embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    places = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    inner = [place for place in places if place not in embeddings]
    return len(inner) > len(set(inner))
