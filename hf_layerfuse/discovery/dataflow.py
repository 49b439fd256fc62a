"""The dataflow of one layer: its tensor operations, and the calls of its modules, from one run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedModelError
from .behaviour import Behaviour, behaviour_of
from .stacks import LayerCall, first_tensor

_RESHAPES = frozenset(
    {
        *("_reshape_alias", "_to_copy", "_unsafe_view", "alias", "clone", "constant_pad_nd", "contiguous", "detach"),
        *("dropout", "expand", "index", "lift_fresh", "native_dropout", "permute", "reshape", "roll", "select"),
        *("slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unfold", "unsqueeze", "view"),
    }
)
"""Operations that move values and do not change them."""

_WEIGHT, _ARGUMENT, _CONSTANT, _STREAM = "weight", "argument", "constant", "stream"
"""Operations of nodes that no operation gave."""


@dataclass(frozen=True)
class Node:
    """A tensor in a layer.

    Attributes:
        operation: Name of the operation that gave it; or `stream`, `weight`, `argument` or `constant`.
        inputs: Nodes that the operation read.
        shape: Shape of the tensor.
        numbers: Numbers among the arguments of the operation.
        ancestors: Bit set of the nodes that it depends on, itself included.
        name: Name of a weight in the layer; empty for other nodes.
    """

    operation: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    numbers: tuple[float, ...]
    ancestors: int
    name: str = ""


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """A call of a module inside a layer.

    Attributes:
        path: Path of the module, relative to the layer.
        module: The module.
        start: First node that was made after the call began.
        end: First node that was made after the call ended.
        inputs: Nodes of the tensors among its arguments.
        outputs: Nodes of the tensors that it returned.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: The value that it returned.
        known: Behaviours that were found already, by path and structure of the module. Layers of a stack share them.
    """

    path: str
    module: nn.Module
    start: int
    end: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    known: dict[Hashable, Behaviour]

    @cached_property
    def behaviour(self) -> Behaviour:
        """Behaviour of the module, found when it is first read."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in self.module.named_parameters())
        key = self.path, type(self.module), shapes
        if key not in self.known:
            self.known[key] = behaviour_of(self.module, self.args, self.kwargs, self.output)
        return self.known[key]


class LayerGraph:
    """Dataflow of a layer.

    Attributes:
        layer: The layer.
        nodes: Tensors, in the order in which they were made.
        calls: Calls of the modules inside the layer, in the order in which they ended.
        source: Node of the stream that the layer read.
        end: Node of the stream that it returned.
    """

    def __init__(self, layer: nn.Module, nodes: list[Node], calls: list[ModuleCall], source: int, end: int) -> None:
        self.layer, self.nodes, self.calls, self.source, self.end = layer, nodes, calls, source, end
        self._givers: dict[int, list[ModuleCall]] = {}
        for call in calls:
            for node in call.outputs:
                self._givers.setdefault(node, []).append(call)
        self._uses: dict[int, int] = {}
        for node in nodes:
            for read in set(node.inputs):
                self._uses[read] = self._uses.get(read, 0) + 1

    def depends(self, node: int, on: int) -> bool:
        """Whether a node depends on another one, or is the same."""
        return bool(self.nodes[node].ancestors >> on & 1)

    def on_stream(self, node: int) -> bool:
        """Whether a node depends on the stream that the layer read."""
        return self.depends(node, self.source)

    def uses(self, node: int) -> int:
        """Number of operations that read a node."""
        return self._uses.get(node, 0)

    def givers(self, node: int) -> list[ModuleCall]:
        """Calls that returned a node; inner calls come first."""
        return self._givers.get(node, [])

    def giver(self, node: int, *behaviours: Behaviour) -> ModuleCall | None:
        """Innermost call of these behaviours that returned a node."""
        return next((call for call in self.givers(node) if call.behaviour in behaviours), None)

    def unmoved(self, node: int) -> int:
        """The node that holds the same values as `node` before any reshaping, dropout or other inert module."""
        while (before := self.one_back(node)) is not None:
            node = before
        return node

    def one_back(self, node: int) -> int | None:
        """The input of the inert module or reshaping that gave a node; None if it was given by anything else."""
        call = self.giver(node, "inert")
        if call is not None and call.inputs and call.inputs[0] != node:
            return call.inputs[0]
        if self.nodes[node].operation in _RESHAPES and self.nodes[node].inputs:
            return self.nodes[node].inputs[0]
        return None

    def weight_of(self, node: int) -> str | None:
        """Name of the weight that a node is made of, or None if it also depends on an input of the layer."""
        names = [each.name for each in self._ancestors(node) if each.operation == _WEIGHT]
        given = any(each.operation in (_STREAM, _ARGUMENT) for each in self._ancestors(node))
        return names[0] if names and not given else None

    def weights_of(self, nodes: int) -> set[str]:
        """Names of the weights in a bit set of nodes."""
        return {node.name for at, node in enumerate(self.nodes) if nodes >> at & 1 and node.operation == _WEIGHT}

    def body(self, call: ModuleCall) -> int:
        """Bit set of the nodes of a call that depend on the stream and reach the end of the layer."""
        found = 0
        for node in range(call.start, call.end):
            if self.on_stream(node) and self.depends(self.end, node):
                found |= 1 << node
        return found

    def _ancestors(self, node: int) -> Iterator[Node]:
        return (each for at, each in enumerate(self.nodes) if self.depends(node, at))


@torch.no_grad()
def record_layer(layer: nn.Module, call: LayerCall, known: dict[Hashable, Behaviour]) -> LayerGraph:
    """Run a layer once with the arguments that the model gives it, and record its dataflow.

    Args:
        layer: Layer to run.
        call: Call of the layer in the model.
        known: Behaviours of modules in other layers of the stack, to which those of this layer are added.

    Raises:
        UnsupportedModelError: The output of the layer does not come from an operation of torch.
    """
    names = {id(tensor): name for name, tensor in chain(layer.named_parameters(), layer.named_buffers())}
    recorder, calls, entered = _Recorder(names), [], []
    states = call.states.clone()
    source = recorder.leaf(states, _STREAM)
    for tensor in _tensors((call.args, dict(call.kwargs))):
        recorder.leaf(tensor, _ARGUMENT)

    def watch(path: str, module: nn.Module, hooks: ExitStack) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = tuple(map(recorder.index, _tensors((args, kwargs))))
            entered.append((len(recorder.nodes), inputs))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            (start, inputs), outputs = entered.pop(), tuple(map(recorder.index, _tensors(output)))
            end = len(recorder.nodes)
            calls.append(ModuleCall(path, module, start, end, inputs, outputs, args, kwargs, output, known))

        hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            if path:
                watch(path, module, hooks)
        with recorder:
            output = first_tensor(call.run(layer, states))
    end = recorder.known(output)
    if end is None or end == source:
        raise UnsupportedModelError("its output does not come from an operation of torch.")
    return LayerGraph(layer, recorder.nodes, calls, source, end)


class _Recorder(TorchDispatchMode):
    """Records every operation of torch inside the `with` block as a node."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._names, self._at = names, {}
        self._alive: list[Tensor] = []  # keeps the tensors, so that their ids stay theirs

    def known(self, tensor: Tensor) -> int | None:
        """Node of a tensor, or None if it has none."""
        return self._at.get(id(tensor))

    def index(self, tensor: Tensor) -> int:
        """Node of a tensor. A tensor that no operation gave is a weight or a constant."""
        if id(tensor) not in self._at:
            self.leaf(tensor, _WEIGHT if id(tensor) in self._names else _CONSTANT)
        return self._at[id(tensor)]

    def leaf(self, tensor: Tensor, operation: str) -> int:
        """Add a node that no operation gave."""
        return self._add(tensor, operation, (), (), 0, self._names.get(id(tensor), ""))

    def _add(
        self,
        tensor: Tensor,
        operation: str,
        inputs: tuple[int, ...],
        numbers: tuple[float, ...],
        ancestors: int,
        name: str = "",
    ) -> int:
        at = len(self.nodes)
        self.nodes.append(Node(operation, inputs, tuple(tensor.shape), numbers, ancestors | 1 << at, name))
        self._at[id(tensor)] = at
        self._alive.append(tensor)
        return at

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = (args, kwargs or {})
        inputs = tuple(map(self.index, _tensors(given)))
        numbers = tuple(
            leaf for leaf in tree_leaves(given) if isinstance(leaf, int | float) and not isinstance(leaf, bool)
        )
        output = func(*args, **(kwargs or {}))
        ancestors = 0
        for node in inputs:
            ancestors |= self.nodes[node].ancestors
        name = func._schema.name.split("::")[1].rstrip("_")
        for tensor in _tensors(output):
            self._add(tensor, name, inputs, numbers, ancestors)
        return output


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
