"""Half precision: models that compute in float32 and are stored in the data type of their file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

_Model = TypeVar("_Model", bound=PreTrainedModel)

_DTYPE = "_layerfuse_dtype"


def store_as(model: _Model, dtype: torch.dtype) -> _Model:
    """Record the data type that the weights of a model are stored in, where it differs from that of the model.

    Targets in bytes, and predicted sizes, are for that type.
    """
    setattr(model, _DTYPE, dtype)
    return model


def dtype_in_file(model: PreTrainedModel) -> torch.dtype:
    """Data type that the weights of a model are stored in."""
    return getattr(model, _DTYPE, model.dtype)


def in_float32(model: _Model) -> _Model:
    """The model itself, or a float32 copy of a model in half precision on a CPU.

    CPUs compute in float16 many times slower than in float32, and a search computes most of the time.
    """
    if not isinstance(model, PreTrainedModel):
        return model  # a search refuses it by name
    if model.device.type != "cpu" or model.dtype not in (torch.float16, torch.bfloat16):
        return model
    return store_as(copy.deepcopy(model).float(), model.dtype)


def batch_for(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its half-precision tensors, such as images, in the data type of a float32 model."""
    half = (torch.float16, torch.bfloat16)
    return {
        name: value.to(model.dtype) if getattr(value, "dtype", None) in half else value for name, value in batch.items()
    }
