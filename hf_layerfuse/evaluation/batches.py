"""Batches of model inputs: their type, and their preparation for a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

_Value = TypeVar("_Value")

Batches = Iterable[Mapping[str, Any]]
"""Iterable of dicts of model inputs. It is read more than once, so it must not be a generator."""


def without_labels(batch: Mapping[str, _Value]) -> dict[str, _Value]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def model_inputs(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a batch on the device of a model, without labels."""
    inputs = without_labels(batch)
    return {name: value.to(model.device) for name, value in inputs.items() if isinstance(value, Tensor)}


def output_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Mask of the tokens that the outputs of a model belong to: those of the decoder, if the inputs hold any."""
    return inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")


def take(batch: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """The chosen sequences of a batch. Tensors without one row per sequence stay whole.

    Args:
        batch: Model inputs.
        chosen: Mask of the sequences, (batch,).
    """
    return {k: v[chosen.to(v.device)] if v.ndim and len(v) == len(chosen) else v for k, v in batch.items()}


def first_rows(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first sequences of a batch, of which at least one tensor has an axis."""
    rows = next(len(value) for value in batch.values() if value.ndim)
    return take(batch, torch.arange(rows) < count)


def tokens_of(states: Tensor) -> Tensor:
    """States as (batch, tokens, width). The pixels of states (batch, channels, height, width) become tokens."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
