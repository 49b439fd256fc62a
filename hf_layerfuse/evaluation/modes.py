"""Modes of a model: evaluation, outputs, dropout, activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

outside_inference_mode = torch.inference_mode(False)
"""Decorator of functions that return weights: those made in a caller's inference mode could not be trained."""

_OUTPUTS = {"return_dict": True, "output_hidden_states": False}
"""Flags of a config that change the outputs of a model, and their values here."""


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Use eval mode and plain outputs inside the `with` block, then restore the mode of every submodule."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    with plain_outputs(*models):
        for model in models:
            model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def plain_outputs(*models: nn.Module) -> Iterator[None]:
    """Make models return outputs with named fields inside the `with` block, and only those of their class.

    People leave flags such as `return_dict=False` in a config, from tracing a model for example.
    """
    configs = {id(model.config): model.config for model in models if hasattr(model, "config")}.values()
    before = [(config, name, getattr(config, name)) for config in configs for name in _OUTPUTS if hasattr(config, name)]
    try:
        for config, name, given in before:
            if given != _OUTPUTS[name]:
                setattr(config, name, _OUTPUTS[name])
        yield
    finally:
        for config, name, given in before:
            if given != getattr(config, name):
                setattr(config, name, given)


def take_modes(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Set the training mode and the output flags of a model made inside `eval_mode` to those of the original."""
    model.train(original.training)
    for name in _OUTPUTS:
        if getattr(model.config, name, None) != getattr(original.config, name, None):
            setattr(model.config, name, getattr(original.config, name))


@contextmanager
def dropout_of(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Set every dropout of a model to one probability inside the `with` block; None changes nothing.

    Some modules store theirs as a number, such as `attention_dropout`, because a kernel or a function applies it.
    """
    places = [
        (module, name)
        for module in (model.modules() if probability is not None else ())
        for name, value in vars(module).items()
        if ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout))) and isinstance(value, float)
    ]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, probability)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def checkpoint_activations(model: PreTrainedModel, on: bool) -> None:
    """Switch activation checkpointing, which earlier releases of Transformers call gradient checkpointing."""
    word = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
        model, f"gradient_checkpointing_{word}"
    )
    method(*([{"use_reentrant": False}] if on else []))
