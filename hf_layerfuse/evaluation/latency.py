"""Latency of a forward pass, alone and side by side with other models."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .dummy_inputs import dummy_inputs, running
from .metrics import evaluating
from .timing import interleaved

_DEFAULT_SEQUENCE_LENGTH = 128  # typical sentence length of encoders


def latency(
    model: PreTrainedModel,
    batch_sizes: Iterable[int] = (1, 8),
    *,
    sequence_length: int | None = None,
    repeats: int = 10,
    warmup: int = 3,
) -> dict[int, dict[str, Any]]:
    """Time the forward pass of one model; see `latency_side_by_side`."""
    timed = latency_side_by_side(
        {"model": model}, batch_sizes, sequence_length=sequence_length, repeats=repeats, warmup=warmup
    )
    return timed["model"]


def latency_side_by_side(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Iterable[int] = (1, 8),
    *,
    sequence_length: int | None = None,
    repeats: int = 10,
    warmup: int = 3,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Time the forward passes of several models in turn, so that other load on the machine slows all of them alike.

    Args:
        models: Models by name.
        batch_sizes: Numbers of rows or images per pass.
        sequence_length: Tokens per row, at most the positions of the model; 128 when None.
        repeats: Number of timed passes of each model and batch size.
        warmup: Number of untimed passes before those.

    Returns:
        Results by model and batch size: `median_ms`; `spread_ms`, the distance between the quartiles; `repeats`,
        `warmup`, `threads`, `device`, `dtype` and `input_shape`.

    Raises:
        UnsupportedModelError: A model cannot run.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
            stack.enter_context(running(model))
        for batch_size in batch_sizes:
            length = sequence_length or _DEFAULT_SEQUENCE_LENGTH
            inputs = {name: dummy_inputs(model, batch_size, length) for name, model in models.items()}
            runs = {name: partial(model, **inputs[name]) for name, model in models.items()}
            [device] = {model.device for model in models.values()}
            timed = interleaved(runs, device, repeats=repeats, warmup=warmup)
            for name, model in models.items():
                results[name][batch_size] = {
                    "median_ms": timed[name].median,
                    "spread_ms": timed[name].spread,
                    "repeats": repeats,
                    "warmup": warmup,
                    "threads": torch.get_num_threads(),
                    "device": str(model.device),
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "input_shape": list(inputs[name][model.main_input_name].shape),
                }
    return results
