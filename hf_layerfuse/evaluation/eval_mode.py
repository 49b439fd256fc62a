"""Temporary eval mode and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Use eval mode inside the `with` block, then restore the mode of every submodule."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def dropout_of(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Set every dropout of a model to one probability inside the `with` block; None changes nothing.

    Attention modules store theirs as a number, because a kernel applies it.
    """
    attributes = [
        (module, "p" if isinstance(module, nn.Dropout) else "attention_dropout")
        for module in model.modules()
        if probability is not None
    ]
    places = [place for place in attributes if isinstance(getattr(*place, None), float)]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, probability)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
