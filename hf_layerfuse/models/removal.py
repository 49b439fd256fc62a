"""A layer that computes without one of its parts inside a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .architectures import part_at


@contextmanager
def replaced(layer: nn.Module, skip: Mapping[str, Callable[[], nn.Module]]) -> Iterator[None]:
    """Replace modules of a layer inside the `with` block.

    Args:
        layer: Layer to change.
        skip: Path -> placeholder, as in `LayerArchitecture.skip`. Modules that the layer lacks are left out.
    """
    before = {path: part for path in skip if (part := part_at(layer, path)) is not None}
    try:
        for path in before:
            layer.set_submodule(path, skip[path]())
        yield
    finally:
        for path, module in before.items():
            layer.set_submodule(path, module)


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Replace the output of a module, or the first of its outputs, by zeros inside the `with` block.

    Args:
        module: Module that returns a tensor, or a tuple or list that begins with one.
    """

    def zero(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([torch.zeros_like(output[0]), *output[1:]])
        return torch.zeros_like(output)

    handle = module.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()
