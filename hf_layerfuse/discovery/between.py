"""The output projection of a block, and the norms, parameters and numbers between it and the residual sum."""

from __future__ import annotations

from torch import nn

from .dataflow import LayerGraph, ModuleCall
from .sums import Branch


def output_of(graph: LayerGraph, branch: Branch) -> tuple[ModuleCall | None, list[str]]:
    """The output projection of a branch, or None; and the paths between it and the residual sum, in this order."""
    between: list[str] = []
    node = branch.end
    while True:
        call = graph.giver(node, "linear", "norm")
        if call is not None and call.behaviour == "linear":
            return call, between[::-1]
        factor = _factor(graph, node)
        if call is not None:
            between.append(call.path)
            node = call.inputs[0]
        elif factor is not None:
            between.append(factor[0])
            node = factor[1]
        elif (before := graph.one_back(node)) is not None:
            node = before
        else:
            return None, between[::-1]


def _factor(graph: LayerGraph, node: int) -> tuple[str, int] | None:
    """Path of the number or parameter that a product multiplies the stream with, and the node of the stream."""
    made = graph.nodes[node]
    if made.operation != "mul":
        return None
    if len(made.inputs) == 1 and len(made.numbers) == 1:
        path = _attribute(graph.layer, made.numbers[0])
        return None if path is None else (path, made.inputs[0])
    states = [at for at in made.inputs if graph.on_stream(at)]
    weights = [name for at in made.inputs if not graph.on_stream(at) and (name := graph.weight_behind(at))]
    return (weights[0], states[0]) if len(states) == len(weights) == 1 else None


def _attribute(layer: nn.Module, number: float) -> str | None:
    """Path of the attribute of a layer that holds a number, or None."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and value == number:
                return f"{path}.{name}" if path else name
    return None
