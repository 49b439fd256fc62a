"""Predictions of a model, and their divergence from those of another."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError, UnsupportedModelError
from .batches import model_inputs, output_mask
from .modes import eval_mode

_VALUES = 1 << 22
"""Number of values to compare at a time: float64 over a large vocabulary takes much memory."""


def prediction(output: Mapping[str, Any]) -> Tensor:
    """The main output of any head: the logits, or the hidden states of a model without a head.

    Raises:
        UnsupportedModelError: No output is a tensor, as in a backbone, which returns states of several layers; or the
            outputs have no names.
    """
    if not isinstance(output, Mapping):
        raise UnsupportedModelError(
            f"the model returns a {type(output).__name__}: results are compared by name, so return a ModelOutput, such "
            "as BaseModelOutput(last_hidden_state=...), from its forward()."
        )
    found = next((value for value in output.values() if isinstance(value, Tensor) and value.ndim > 0), None)
    if found is None:
        raise UnsupportedModelError(
            f"the model returns {', '.join(output) or 'nothing'}, none of which is a tensor: results are compared by "
            "one tensor, such as logits or hidden states. Fuse the model with another head, or without one."
        )
    return found


def near(ours: Tensor, theirs: Tensor, tolerance: float | None = None) -> bool:
    """Whether two results of the same computation are equal up to rounding.

    Args:
        ours: One result, of any shape.
        theirs: The other result.
        tolerance: Largest difference as a share of the largest value; by default 2e-4, or 5e-2 in half precision.
    """
    if ours.shape != theirs.shape:
        return False
    if tolerance is None:
        tolerance = 2e-4 if theirs.dtype in (torch.float32, torch.float64) else 5e-2
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).abs().max().item() <= tolerance * (1e-6 + theirs.abs().max().item())


def divergence(ours: Mapping[str, Any], theirs: Mapping[str, Any], mask: Tensor | None = None) -> tuple[float, float]:
    """Divergence of one model output from another, as a sum and its divisor.

    For logits of classes or tokens: the sum of KL(theirs || ours) in nats, and the number of distributions. For other
    outputs, such as hidden states: the sum of squared differences, and the sum of squares of `theirs`.

    Args:
        ours: Output of the model under test.
        theirs: Output of the reference for the same inputs.
        mask: Mask of shape (batch, tokens), False on padding; ignored if the output has no such dimensions. Padding is
            excluded where tokens are the classes, such as starts and ends of answers.
    """
    p, q = prediction(theirs), prediction(ours)
    name = next(key for key, value in theirs.items() if value is p)
    mask = None if mask is None else mask.to(p.device).bool()
    if mask is not None and p.ndim > mask.ndim and p.shape[: mask.ndim] == mask.shape:
        p, q = p[mask], q[mask]
    elif mask is not None and name == "start_logits" and p.shape == mask.shape:
        p, q = (logits.masked_fill(~mask, -1e9) for logits in (p, q))
    if "logits" in name and p.shape[-1] > 1:
        p, q = p.flatten(0, -2), q.flatten(0, -2)
        rows = max(1, _VALUES // p.shape[-1])
        return sum(_kl(*parts) for parts in zip(p.split(rows), q.split(rows), strict=True)), len(p)
    p, q = p.double(), q.double()
    return (p - q).square().sum().item(), p.square().sum().item()


def _kl(p: Tensor, q: Tensor) -> float:
    """Sum over the rows of KL(p || q) of logits in nats."""
    p, q = p.double(), q.double()
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True).item()


@torch.inference_mode()
def calibration_loss(model: nn.Module, reference: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean divergence of a model from its reference over batches of inputs: see `divergence`.

    Raises:
        DataError: No batches.
    """
    total = count = 0.0
    with eval_mode(model, reference):
        for batch in batches:
            inputs = model_inputs(batch, reference)
            found = divergence(model(**inputs), reference(**inputs), output_mask(inputs))
            total, count = total + found[0], count + found[1]
    if not count:
        raise DataError("the calibration batches hold nothing to compare: give `batches` with at least one batch.")
    return total / count


def decode(model: nn.Module, ids: Tensor, cache: Any = None, **encoded: Tensor) -> tuple[Tensor, Any]:
    """Logits of tokens (batch, tokens) that follow those in a key-value cache, and the cache with them in it.

    Args:
        model: Model that generates text.
        ids: Tokens; of the decoder, if the model has an encoder.
        cache: Cache from an earlier call; None starts afresh.
        encoded: Inputs of the encoder, if the model has one, or the states that its cross-attention reads.
    """
    # transformers 5.24 renames it, in what a model is given and in what it gives
    renamed = "cache" in inspect.signature(model.forward).parameters
    name = "cache" if renamed else "past_key_values"
    tokens = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    output = model(**encoded, **{tokens: ids}, use_cache=True, **{name: cache})
    return output.logits, output[name]
