"""The residual sums of a layer, followed from its end back to its start, and the part of each block in them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedModelError
from .dataflow import LayerGraph, ModuleCall


@dataclass(frozen=True, eq=False)
class ResidualSum:
    """A sum of the stream and the outputs of one or more blocks.

    Attributes:
        total: Node of the sum.
        residual: Node of the stream that it adds to.
        branches: Nodes of the outputs of the blocks that it adds.
        norm: Norm that follows the sum, or None.
    """

    total: int
    residual: int
    branches: tuple[int, ...]
    norm: ModuleCall | None


@dataclass(frozen=True, eq=False)
class Branch:
    """The path of one block from the stream to its residual sum.

    Attributes:
        sum: The sum.
        end: Node that the block adds to the stream.
        start: Node of the stream that it reads, with the norm of the block before it.
        nodes: Bit set of its nodes.
        calls: Calls of modules that gave some of these nodes.
        parts: Largest modules that serve this block alone and do not add the residual, in execution order.
        adder: Largest module that serves this block alone and adds the residual itself, or None.
    """

    sum: ResidualSum
    end: int
    start: int
    nodes: int
    calls: tuple[ModuleCall, ...]
    parts: tuple[ModuleCall, ...]
    adder: ModuleCall | None


def residual_sums(graph: LayerGraph) -> list[ResidualSum]:
    """Residual sums of a layer, in execution order.

    Args:
        graph: Dataflow of the layer.

    Raises:
        UnsupportedModelError: The output of the layer is not a chain of residual sums that starts at its input.
    """
    found: list[ResidualSum] = []
    node, norm = graph.end, None
    while (node := graph.unmoved(node)) != graph.source:
        call = graph.giver(node, "norm")
        if call is not None and norm is None:
            norm, node = call, call.inputs[0]
            continue
        if not _is_sum(graph, node):
            raise UnsupportedModelError(f"its stream passes {_name_of(graph, node)}, which is not a residual sum.")
        terms = _terms(graph, node)
        # every other term is computed from the residual
        residuals = [
            term for term in terms if all(other == term or graph.depends(other, graph.unmoved(term)) for other in terms)
        ]
        if len(residuals) != 1:
            raise UnsupportedModelError(
                f"one of its sums adds {len(terms)} tensors, of which {len(residuals)} can be the residual stream; "
                "supported is one from which the others are computed."
            )
        branches = tuple(term for term in terms if term != residuals[0])
        found.append(ResidualSum(node, residuals[0], branches, norm))
        node, norm = residuals[0], None
    if norm is not None:
        raise UnsupportedModelError(f"its residual stream passes the norm {norm.path!r} before the first block.")
    return found[::-1]


def branches_of(graph: LayerGraph, total: ResidualSum) -> list[Branch]:
    """The branches of a residual sum, in execution order.

    Args:
        graph: Dataflow of the layer.
        total: One of its residual sums.
    """
    before = graph.nodes[total.residual].ancestors
    reached = [graph.nodes[end].ancestors & ~before | 1 << end for end in total.branches]
    found = []
    for place, (end, nodes) in enumerate(zip(total.branches, reached, strict=True)):
        own = nodes
        for other, theirs in enumerate(reached):
            if other != place:
                own &= ~theirs
        calls = tuple(call for call in graph.calls if any(nodes >> node & 1 for node in call.outputs))
        alone = [call for call in graph.calls if (body := graph.body(call)) and not body & ~own]
        adders = [
            call
            for call in graph.calls
            if len(reached) == 1
            and call.outputs
            and call.outputs[0] == total.total
            and total.residual in call.inputs
            and not graph.body(call) & ~(own | 1 << total.total)
        ]
        parts, adder = _largest(alone), next(iter(_largest(adders)), None)
        found.append(Branch(total, end, graph.unmoved(total.residual), nodes, calls, parts, adder))
    return sorted(found, key=lambda branch: min((part.start for part in branch.parts), default=branch.end))


def _largest(calls: list[ModuleCall]) -> tuple[ModuleCall, ...]:
    """The calls that are not inside another one, in execution order."""
    paths = {call.path for call in calls}
    outer = [call for call in calls if not any(call.path.startswith(f"{path}.") for path in paths)]
    return tuple(sorted(outer, key=lambda call: call.end))


def _is_sum(graph: LayerGraph, node: int) -> bool:
    made = graph.nodes[node]
    return (
        made.operation == "add"
        and len(made.inputs) == 2
        and not made.numbers
        and all(graph.on_stream(term) and graph.nodes[term].shape == made.shape for term in made.inputs)
    )


def _terms(graph: LayerGraph, node: int, top: bool = True) -> list[int]:
    """Terms of a sum of two or more tensors. A sum that is the output of a module is one term."""

    def inner(each: int) -> bool:
        return _is_sum(graph, each) and graph.uses(each) == 1 and not _whole(graph, each)

    if top or inner(node):
        return [term for each in graph.nodes[node].inputs for term in _terms(graph, each, False)]
    before = node
    while graph.uses(before) == 1 and (earlier := graph.one_back(before)) is not None and not _whole(graph, before):
        before = earlier
    if before != node and inner(before):
        return _terms(graph, before, False)
    return [node]


def _whole(graph: LayerGraph, node: int) -> bool:
    """Whether a node is the output of a module with several steps."""
    return any(call.behaviour == "other" for call in graph.givers(node))


def _name_of(graph: LayerGraph, node: int) -> str:
    givers = [f"{call.path} ({type(call.module).__name__})" for call in graph.givers(node)]
    return f"the output of {givers[0]}" if givers else f"the operation {graph.nodes[node].operation!r}"
