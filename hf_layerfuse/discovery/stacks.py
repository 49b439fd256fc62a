"""Stacks of layers: module lists whose members run once, in order, each reading the output of the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..evaluation.hooks import uncached

_MAIN_ARGUMENT = "hidden_states"
"""Name of the stream among the keyword arguments of a layer."""

RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,  # configs refuse values
)
"""Errors of the code of a model that is run in a way it was not written for, or that lacks a package."""


@dataclass(frozen=True)
class LayerCall:
    """The only call of a layer in a forward pass.

    Attributes:
        states: Residual stream that the layer read, a copy: (batch, tokens, width), or with more axes between.
        args: Its other positional arguments. None replaces a cache.
        kwargs: Its other keyword arguments. None replaces a cache.
        name: Name of the argument that held the stream; None for the first positional argument.
        output: Stream that the layer returned, a copy, of the same shape.
    """

    states: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None
    output: Tensor

    def run(self, layer: Callable[..., Any], states: Tensor | None = None) -> Any:
        """Run a layer with these arguments.

        Args:
            layer: The layer, a copy of it, or a function with its arguments.
            states: Stream to read in place of `self.states`, of the same shape.

        Returns:
            The whole output of the layer.
        """
        states = self.states if states is None else states
        if self.name is None:
            return layer(states, *self.args, **self.kwargs)
        return layer(*self.args, **self.kwargs, **{self.name: states})


@dataclass(frozen=True)
class Stack:
    """A module list that is a stack of layers.

    Attributes:
        path: Path of the list in the model.
        layers: The list.
        calls: Call of each layer.
    """

    path: str
    layers: nn.ModuleList
    calls: tuple[LayerCall, ...]


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of the output of a module, which is the stream if the module is a layer."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


@torch.no_grad()
def find_stacks(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[dict[str, Stack], dict[str, str]]:
    """Find the stacks of a model by one forward pass.

    Args:
        model: Model in eval mode.
        batch: Model inputs, on its device.

    Returns:
        The stacks by path, and for every other module list the reason why it is not a stack. A stack inside a layer
        of another stack is left out.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    log = _Log()
    with ExitStack() as hooks:
        for path, layers in lists.items():
            for index, layer in enumerate(layers):
                log.watch(layer, (path, index), hooks)
        model(**batch)
    found, refused = {}, {}
    for path, layers in lists.items():
        why = _why_not(log, path, len(layers))
        if why is None:
            found[path] = Stack(path, layers, tuple(log.calls[path, index][0] for index in range(len(layers))))
        else:
            refused[path] = why
    inner = [path for path in found if any(path.startswith(f"{other}.") for other in found)]
    return {path: stack for path, stack in found.items() if path not in inner}, refused


class _Log:
    """Calls of the members of module lists, in the order in which they end.

    Attributes:
        calls: Calls of a member, by path of its list and index. None stands for a call without a stream.
        order: Path and index of each call.
    """

    def __init__(self) -> None:
        self.calls: dict[tuple[str, int], list[LayerCall | None]] = {}
        self.order: list[tuple[str, int]] = []
        self._entered: list[Tensor | None] = []

    def watch(self, layer: nn.Module, key: tuple[str, int], hooks: ExitStack) -> None:
        """Record every call of a layer while `hooks` is open."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.get(_MAIN_ARGUMENT)
            # a copy, because a layer may change its input in place
            self._entered.append(states.clone() if isinstance(states, Tensor) else None)

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states, given = self._entered.pop(), first_tensor(output)
            call = None
            if states is not None and given is not None:
                rest = tuple(uncached(value) for value in args[1:])
                named = {k: uncached(v) for k, v in kwargs.items() if args or k != _MAIN_ARGUMENT}
                call = LayerCall(states, rest, named, None if args else _MAIN_ARGUMENT, given.clone())
            self.calls.setdefault(key, []).append(call)
            self.order.append(key)

        hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)


def _why_not(log: _Log, path: str, length: int) -> str | None:
    """Reason why a module list is not a stack, or None."""
    calls = [log.calls.get((path, index), []) for index in range(length)]
    if not any(calls):
        return "its members do not run as modules"
    if any(len(of) > 1 for of in calls):
        return f"its members run {', '.join(str(len(of)) for of in calls)} times, so weights serve several depths"
    if length < 2:
        return "it has one member"
    if not all(calls):
        idle = [index for index, of in enumerate(calls) if not of]
        return f"the members {', '.join(map(str, idle))} do not run"
    order = [index for of, index in log.order if of == path]
    if order != list(range(length)):
        return f"its members run in the order {', '.join(map(str, order))}"
    each = [of[0] for of in calls]
    if any(call is None or call.states.ndim < 3 or not call.states.is_floating_point() for call in each):
        return "its members read no states of shape (batch, tokens, width)"
    if any(call.states.shape != call.output.shape for call in each):
        return "a member changes the shape of the states"
    for index, call in enumerate(each):
        if not call.output.isfinite().all():
            return f"member {index} returns states that are not finite"
    for index in range(1, length):
        if not torch.equal(each[index - 1].output, each[index].states):
            return f"member {index} does not read the output of member {index - 1}"
    return None
