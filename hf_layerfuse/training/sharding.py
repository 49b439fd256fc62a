"""Support for launchers that manage parameters: FSDP2 with shared weights, and parameter values under DeepSpeed."""

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

from ..evaluation.limits import token_embeddings


@contextlib.contextmanager
def one_unit_for_shared(model: PreTrainedModel, plugin: Any) -> Iterator[None]:
    """Let Accelerate shard a model by layers inside the `with` block only if no layers share weights.

    FSDP2 gathers and frees the parameters of a unit together, and refuses a parameter in two units. Accelerate makes a
    unit of each layer; if layers share weights, all of them stay in the unit of the model. Shared weights are few, so
    this costs little memory.

    Args:
        model: Model to prepare.
        plugin: `FullyShardedDataParallelPlugin` of the accelerator, or None without sharding.
    """
    if plugin is None or not shares_layers(model):
        yield
        return
    named = plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = []  # no class is a unit; None would select the classes named by transformers
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = named


@contextlib.contextmanager
def unshard_after(model: PreTrainedModel, sharded: bool) -> Iterator[None]:
    """Make a model that is sharded inside the `with` block a plain one again after it, on every process.

    The plain model has the trained weights and the same sharing, so that one process alone can save or measure it.
    After an exception the model stays sharded, because the other processes may have ended.

    Args:
        model: Model before sharding.
        sharded: Whether the model will be sharded; False does nothing.
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
    for name, _ in list(plain.named_buffers()):  # statistics, and buffers moved to the device
        path, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(path), leaf, model.get_buffer(name).clone())
    model.__class__, model.__dict__ = type(plain), plain.__dict__


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the value of a parameter between steps, also in the copy of DeepSpeed's optimiser."""
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())
    parameter.copy_(value)


def shares_layers(model: PreTrainedModel) -> bool:
    """Whether modules share a parameter, apart from input and output embeddings."""
    tokens = token_embeddings(model)
    embeddings = set() if tokens is None else {id(parameter) for parameter in tokens.parameters()}
    places = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    inner = [place for place in places if place not in embeddings]
    return len(inner) > len(set(inner))
