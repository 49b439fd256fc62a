"""The roles of the maps and norms of a block, from the dataflow of its layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .dataflow import LayerGraph, ModuleCall
from .sums import Branch

MEANINGS = frozenset({"norm", "q", "k", "v", "qkv", "kv", "q_norm", "k_norm", "in", "gate", "gate_in", "out"})
"""Roles of maps and norms that alignment and refit know."""

_FUSED = ("scaled_dot_product", "flash_attn", "flex_attention")
_SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})
_PRODUCT = frozenset({"bmm", "matmul", "baddbmm"})  # maps use mm and addmm


@dataclass(frozen=True)
class Operands:
    """Nodes of the queries, keys and values that an attention kernel reads."""

    q: int
    k: int
    v: int

    def fed_by(self, graph: LayerGraph, node: int) -> str:
        """Letters of the operands that depend on a node."""
        return "".join(role for role in "qkv" if graph.depends(getattr(self, role), node))


def attention_operands(graph: LayerGraph, branch: Branch) -> Operands | None:
    """Operands of the attention kernel in a branch.

    Args:
        graph: Dataflow of the layer.
        branch: Branch of the block.

    Returns:
        The operands, or None if the branch has neither a fused kernel nor a softmax between two products.
    """
    inside = [at for at in range(len(graph.nodes)) if branch.nodes >> at & 1]
    for node in inside:
        if any(word in graph.nodes[node].operation for word in _FUSED) and len(graph.nodes[node].inputs) >= 3:
            return Operands(*graph.nodes[node].inputs[:3])
    for node in inside:
        if graph.nodes[node].operation in _SOFTMAX and (found := _around(graph, node)) is not None:
            return found
    return None


def _around(graph: LayerGraph, softmax: int) -> Operands | None:
    """Operands of the products before and after a softmax."""
    products = [at for at, node in enumerate(graph.nodes) if node.operation in _PRODUCT]
    after = next((at for at in products if at > softmax and graph.depends(at, softmax)), None)
    before = [
        at
        for at in products
        if at < softmax and graph.depends(softmax, at) and any(map(graph.on_stream, graph.nodes[at].inputs))
    ]
    if after is None or not before:
        return None
    value = next((at for at in graph.nodes[after].inputs if not graph.depends(at, softmax)), None)
    return None if value is None else Operands(*graph.nodes[before[0]].inputs[-2:], value)


def attention_roles(
    graph: LayerGraph, branch: Branch, operands: Operands, readers: list[ModuleCall], norms: list[ModuleCall]
) -> dict[str, str]:
    """Role -> path, for the maps of an attention block that read the stream, and its small norms.

    Args:
        graph: Dataflow of the layer.
        branch: Branch of the block.
        operands: Operands of its kernel.
        readers: Maps that read the stream.
        norms: Norms inside the block, without the one in front of it.

    Returns:
        `q`, `k` and `v`, or one `qkv`; empty if other maps lie between the readers and the kernel. `q_norm` and
        `k_norm` where they exist.
    """
    feeds = {reader: operands.fed_by(graph, reader.outputs[0]) for reader in readers}
    if any(_mapped_again(graph, branch, reader) for reader in readers):
        return {}
    if len(readers) == 1 and feeds[readers[0]] == "qkv":
        roles = {"qkv": readers[0].path}
    elif all(len(role) == 1 for role in feeds.values()) and len(set(feeds.values())) == len(readers):
        roles = {role: reader.path for reader, role in feeds.items()}
        if operands.fed_by(graph, graph.source) != "".join(sorted(roles, key="qkv".index)):
            return {}
    else:
        return {}
    for norm in norms:
        role = operands.fed_by(graph, norm.outputs[0])
        if role in ("q", "k"):
            roles[f"{role}_norm"] = norm.path
    return roles


def _mapped_again(graph: LayerGraph, branch: Branch, reader: ModuleCall) -> bool:
    """Whether the output of a map passes another map before the kernel, as in low-rank queries."""
    kernel = branch.end
    return any(
        call is not reader
        and call.behaviour == "linear"
        and graph.depends(call.inputs[0], reader.outputs[0])
        and call.outputs
        and graph.depends(kernel, call.outputs[0])
        and not _is_output(graph, branch, call)
        for call in branch.calls
    )


def _is_output(graph: LayerGraph, branch: Branch, call: ModuleCall) -> bool:
    """Whether a map is the last one of a branch."""
    return not any(
        other is not call and other.behaviour == "linear" and graph.depends(other.inputs[0], call.outputs[0])
        for other in branch.calls
    )


def memory_roles(graph: LayerGraph, operands: Operands) -> dict[str, str]:
    """Role -> path, for the maps of a cross-attention block that read the states of an encoder.

    Args:
        graph: Dataflow of the layer.
        operands: Operands of the kernel of the block.
    """
    found = {}
    for call in graph.calls:
        if call.behaviour == "linear" and call.inputs and not graph.on_stream(call.inputs[0]):
            role = operands.fed_by(graph, call.outputs[0])
            if role in ("k", "v", "kv"):
                found[role] = call.path
    return found


def mlp_roles(
    graph: LayerGraph, branch: Branch, out: ModuleCall, readers: list[ModuleCall]
) -> tuple[dict[str, str], str | None]:
    """Role -> path, for the maps of an MLP that read the stream, and the path of its activation.

    Args:
        graph: Dataflow of the layer.
        branch: Branch of the block.
        out: Output projection.
        readers: Maps that read the stream.

    Returns:
        `in`, `gate` and `in`, or one `gate_in`; empty if the maps are others. The activation is None without a role.
    """
    activations = [call for call in branch.calls if call.behaviour == "activation"]
    activation = activations[0] if len(activations) == 1 else None
    width = graph.nodes[out.inputs[0]].shape[-1]
    wide = {reader: graph.nodes[reader.outputs[0]].shape[-1] for reader in readers}
    roles: dict[str, str] = {}
    if len(readers) == 1 and wide[readers[0]] == width:
        roles = {"in": readers[0].path}
    elif len(readers) == 1 and wide[readers[0]] == 2 * width:
        roles = {"gate_in": readers[0].path}
    elif len(readers) == 2 and set(wide.values()) == {width} and activation is not None:
        gates = [reader for reader in readers if graph.depends(activation.inputs[0], reader.outputs[0])]
        if len(gates) == 1:
            roles = {"gate" if reader in gates else "in": reader.path for reader in readers}
    return roles, activation.path if activation is not None and roles else None


def output_of(graph: LayerGraph, branch: Branch) -> tuple[ModuleCall | None, list[str]]:
    """Find the output projection of a branch.

    Args:
        graph: Dataflow of the layer.
        branch: Branch of the block.

    Returns:
        The projection, or None; and the paths of the norms, parameters and numbers between it and the residual sum,
        in this order.
    """
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
    weights = [name for at in made.inputs if not graph.on_stream(at) and (name := graph.weight_of(at))]
    return (weights[0], states[0]) if len(states) == len(weights) == 1 else None


def _attribute(layer: nn.Module, number: float) -> str | None:
    """Path of the attribute of a layer that holds a number, or None."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and value == number:
                return f"{path}.{name}" if path else name
    return None
