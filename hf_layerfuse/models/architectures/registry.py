"""The registered architectures by `model_type`."""

from __future__ import annotations

import difflib
import os
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ...plan import Plan
from .base import Architecture, LayerArchitecture

FUSED_PREFIX = "fused_"

ARCHITECTURES: dict[str, Architecture] = {}

_Kind = TypeVar("_Kind", bound=Architecture)


def architecture_for(model: Any, kind: type[_Kind] = LayerArchitecture, stack: str | None = None) -> _Kind:
    """Look up the architecture of a model or config.

    Args:
        model: Model, or its config.
        kind: Kind of architecture: `LayerArchitecture` (layers to fuse) or `ConvGraphArchitecture` (a graph of
            convolutions to merge).
        stack: Name of a stack, in models that have several; by default, the stack of the table that is registered.

    Returns:
        The architecture that is registered for the `model_type`.

    Raises:
        UnsupportedModelError: No architecture of this kind is registered for the `model_type`, the models have no such
            stack, or `model` is neither a model nor a config.
    """
    if not isinstance(model, PreTrainedModel | PreTrainedConfig):
        raise UnsupportedModelError(f"{_name_of(model)} is not a transformers model: {_instead_of(model)}.")
    config = getattr(model, "config", model)
    model_type = config.model_type.removeprefix(FUSED_PREFIX)
    architecture = ARCHITECTURES.get(model_type)
    if isinstance(architecture, kind):
        return (_of_stack(architecture, stack) if stack else architecture).variant(config)
    if architecture is not None:
        what = "layers to fuse, drop or make linear" if kind is LayerArchitecture else "convolutions to merge"
        raise UnsupportedModelError(
            f"the architecture of {model_type!r} has no {what}: choose another method, or a model of another "
            f"architecture. {known_architectures(model_type, kind)}"
        )
    raise UnsupportedModelError(
        f"unknown architecture {model_type!r}: `hf-layerfuse adapt MODEL` finds and prints a table for it; see 'Add an "
        f"architecture' in CONTRIBUTING.md. {known_architectures(model_type, kind)}"
    )


def known_architectures(model_type: str, kind: type[Architecture]) -> str:
    """Sentence for messages: the registered names closest to another one, and the page that lists all."""
    names = sorted(name for name, architecture in ARCHITECTURES.items() if isinstance(architecture, kind))
    if len(names) <= 3:  # those with convolutions to merge
        return f"Known: {', '.join(names)}."
    close = difflib.get_close_matches(model_type, names, n=3)
    start = f"The closest of the {len(names)} known architectures: {', '.join(close)}. " if close else ""
    return f"{start}docs/architectures.md lists all known architectures."


def architecture_of(plan: Plan, model: Any) -> LayerArchitecture:
    """Look up the architecture of the stack and the kinds of blocks of a plan, as `architecture_for`."""
    return architecture_for(model, stack=plan.stack).with_kinds(plan.kinds)


def _of_stack(architecture: _Kind, stack: str) -> _Kind:
    tables = (architecture, *(other() for other in getattr(architecture, "other_stacks", ())))
    named = {getattr(table, "stack", ""): table for table in tables}
    if stack not in named:
        known = ", ".join(filter(None, named)) or "one stack, which needs no name"
        raise UnsupportedModelError(f"{architecture.model_type!r} has no stack {stack!r}. It has: {known}.")
    return named[stack]


def _name_of(value: Any) -> str:
    return repr(value) if isinstance(value, str | os.PathLike) else type(value).__name__


def _instead_of(value: Any) -> str:
    """What to pass in place of a value that is not a model."""
    if isinstance(value, str | os.PathLike):
        return f"load it first, with AutoFusedModel.from_pretrained({str(value)!r})"
    if hasattr(value, "merge_and_unload"):
        return "pass model.merge_and_unload(), which keeps the adapters, or model.unload(), which drops them"
    for attribute in ("module", "_orig_mod", "model"):  # DataParallel, torch.compile, pipelines
        if isinstance(getattr(value, attribute, None), PreTrainedModel):
            return f"pass the model inside it, .{attribute}"
    if isinstance(value, nn.Module):
        inside = [name for name, module in value.named_modules() if isinstance(module, PreTrainedModel)]
        if inside:
            return f"pass the model inside it, .get_submodule({inside[0]!r})"
    return "pass a model as from_pretrained returns it"
