"""The queries, keys and values of an attention block, and the maps and norms that give them."""

from __future__ import annotations

from dataclasses import dataclass

from .dataflow import LayerGraph, ModuleCall
from .sums import Branch

_FUSED = ("scaled_dot_product", "flash_attn", "flex_attention")
_SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})
_PRODUCT = frozenset({"bmm", "matmul", "baddbmm"})  # maps use mm and addmm


@dataclass(frozen=True)
class Operands:
    """Nodes of the queries, keys and values that an attention kernel reads."""

    q: int
    k: int
    v: int

    def behind(self, graph: LayerGraph, node: int) -> str:
        """Letters of the operands that depend on a node."""
        return "".join(role for role in "qkv" if graph.depends(getattr(self, role), node))


def attention_operands(graph: LayerGraph, branch: Branch) -> Operands | None:
    """Operands of the attention kernel in a branch, or None if the branch has none.

    The kernel is either one fused operation, or a product, a softmax and a second product.
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
    behind = {reader: operands.behind(graph, reader.outputs[0]) for reader in readers}
    if any(_mapped_again(graph, branch, reader) for reader in readers):
        return {}
    if len(readers) == 1 and behind[readers[0]] == "qkv":
        roles = {"qkv": readers[0].path}
    elif all(len(of) == 1 for of in behind.values()) and len(set(behind.values())) == len(readers):
        roles = {of: reader.path for reader, of in behind.items()}
        if operands.behind(graph, graph.source) != "".join(sorted(roles, key="qkv".index)):
            return {}
    else:
        return {}
    for norm in norms:
        of = operands.behind(graph, norm.outputs[0])
        if of in ("q", "k"):
            roles[f"{of}_norm"] = norm.path
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
    """Role -> path, for the maps of a cross-attention block that read the states of an encoder."""
    found = {}
    for call in graph.calls:
        if call.behaviour == "linear" and call.inputs and not graph.on_stream(call.inputs[0]):
            of = operands.behind(graph, call.outputs[0])
            if of in ("k", "v"):
                found[of] = call.path
    return found
