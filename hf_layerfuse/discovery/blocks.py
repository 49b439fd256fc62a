"""The blocks of a layer: kind, roles, norm, the parts between `out` and the residual sum, and placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.architectures import ATTENDING
from .behaviour import mixes_tokens
from .dataflow import LayerGraph, ModuleCall
from .placeholders import placeholders
from .roles import MEANINGS, Operands, attention_operands, attention_roles, memory_roles, mlp_roles, output_of
from .sums import Branch, branches_of, residual_sums

BlockKind = Literal["attention", "cross", "mixer", "mlp"]

_EXPERTS = frozenset({"topk", "_grouped_mm", "one_hot", "index_add", "scatter_reduce"})
"""Operations that send tokens to different weights."""


@dataclass(frozen=True)
class DiscoveredBlock:
    """One block of a layer. All paths are relative to the layer.

    Attributes:
        kind: `attention`; `cross`, attention to the states of an encoder; `mixer`, any other block that mixes tokens;
            or `mlp`.
        roles: Role -> path. Roles without a meaning name the other parts of the block that have parameters.
        norm_after: Whether `norm` follows the residual sum instead of preceding the block.
        between: Paths of norms, parameters and numbers between `out` and the residual sum, in this order.
        skip: Path -> placeholder, which together remove the block.
        activation: Path of the module between the maps of an MLP, or None.
        adds: Path of a module of only `out` and `norm` that adds the residual itself, or None.
        also_positions: Roles of maps that also read other inputs than the stream, such as position embeddings.
        silent: Parameters that are zero if an opaque block adds nothing.
    """

    kind: BlockKind
    roles: Mapping[str, str]
    norm_after: bool
    between: tuple[str, ...]
    skip: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    activation: str | None = None
    adds: str | None = None
    also_positions: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def table(self) -> str:
        """Kind of block whose table describes it. A mixer takes the place of attention."""
        return "attention" if self.kind == "mixer" else self.kind

    @property
    def opaque(self) -> bool:
        """Whether the block has no output projection, so that it can only be kept, shared or dropped."""
        return "out" not in self.roles

    @property
    def has_known_maps(self) -> bool:
        """Whether all its maps have a role with a meaning, so that alignment can change them."""
        needed = ({"in"}, {"gate_in"}) if self.kind == "mlp" else ({"q", "k", "v"}, {"q", "kv"}, {"qkv"})
        return not self.opaque and any(roles <= self.roles.keys() for roles in needed)


@dataclass(frozen=True)
class LayerTable:
    """The blocks of a layer, and their sums.

    Attributes:
        blocks: Blocks in execution order.
        parallel: Whether all blocks read the input of the layer and are added in one sum.
        leftover: Parameters that belong to no block.
        idle: Parameters that belong to no block because no operation reads them.
    """

    blocks: tuple[DiscoveredBlock, ...]
    parallel: bool
    leftover: tuple[str, ...]
    idle: tuple[str, ...]


def layer_table(graph: LayerGraph) -> LayerTable:
    """Find the blocks of a layer.

    Args:
        graph: Dataflow of the layer.

    Returns:
        The blocks, and the parameters that belong to none of them.

    Raises:
        UnsupportedModelError: The layer is not a chain of residual sums, or attends inside windows.
    """
    sums = residual_sums(graph)
    if len(sums) > 1 and any(len(total.branches) > 1 for total in sums):
        raise UnsupportedModelError("some of its residual sums add one block and others several.")
    branches = [branch for total in sums for branch in branches_of(graph, total)]
    blocks = [_block(graph, branch) for branch in branches]
    owned = {path for block in blocks for path in (*block.roles.values(), *block.between, *block.skip)}
    leftover, idle = [], []
    used = {node.name for node in graph.nodes}
    for name, _ in graph.layer.named_parameters():
        if _is_in(name, owned):
            continue
        users = [at for at, branch in enumerate(branches) if name in graph.weights_of(branch.nodes)]
        if len(users) == 1 and not blocks[users[0]].opaque:
            roles = dict(blocks[users[0]].roles)
            _name_parts(roles, [name.rpartition(".")[0] or name])
            blocks[users[0]] = replace(blocks[users[0]], roles=roles)
        else:
            (leftover if name in used else idle).append(name)
    return LayerTable(tuple(blocks), len(branches) > len(sums), tuple(leftover), tuple(idle))


def _block(graph: LayerGraph, branch: Branch) -> DiscoveredBlock:
    out, between = output_of(graph, branch)
    norm = _norm_before(graph, branch)
    starts = {branch.start, *([graph.unmoved(norm.outputs[0])] if norm else [])}
    maps = [call for call in branch.calls if call.behaviour == "linear"]
    readers = [call for call in maps if call is not out and graph.unmoved(call.inputs[0]) in starts]
    small = [
        call for call in branch.calls if call.behaviour == "norm" and call is not norm and call.path not in between
    ]
    operands = attention_operands(graph, branch)
    kind = _kind(graph, branch, operands)
    roles: dict[str, str] = {}
    if norm is not None:
        roles["norm"] = norm.path
    elif branch.sum.norm is not None:
        roles["norm"] = branch.sum.norm.path
    activation = None
    if kind in ATTENDING and out is not None:
        roles |= attention_roles(graph, branch, operands, readers, small)
        roles |= memory_roles(graph, operands) if kind == "cross" else {}
    elif kind == "mlp" and out is not None:
        found, activation = mlp_roles(graph, branch, out, readers)
        roles |= found
    if out is not None:
        roles["out"] = out.path
    skip = placeholders(graph, branch, _holds_kernel(graph, branch, operands))
    _name_parts(roles, _other_parts(graph, roles, between, skip))
    adds = _adder(graph, branch, out, readers) if kind == "mlp" else None
    norm_after = norm is None and branch.sum.norm is not None
    again = {call.path for call in graph.calls if call.inputs and not graph.on_stream(call.inputs[0])}
    also = tuple(role for role, path in roles.items() if path in again and kind != "cross")
    block = DiscoveredBlock(kind, roles, norm_after, tuple(between), skip, activation, adds, also)
    return opaque(block) if kind == "mixer" else block


def opaque(block: DiscoveredBlock) -> DiscoveredBlock:
    """Make a block opaque, so that it can only be kept, shared or dropped.

    Args:
        block: Block with or without roles of maps.

    Returns:
        The block, whose roles are its norm and one for each other module of `skip` that has parameters.
    """
    norm = block.roles.get("norm")
    roles = {} if norm is None else {"norm": norm}
    _name_parts(roles, [path for path, each in block.skip.items() if path != norm and each is not nn.Identity])
    return replace(block, roles=roles, activation=None, adds=None, also_positions=())


def _kind(graph: LayerGraph, branch: Branch, operands: Operands | None) -> BlockKind:
    mixing = [
        part
        for part in (*branch.parts, *filter(None, [branch.adder]))
        if mixes_tokens(part.module, part.args, part.kwargs)
    ]
    for part in mixing:
        _check_windows(graph, part)
    experts = _EXPERTS & {node.operation for at, node in enumerate(graph.nodes) if branch.nodes >> at & 1}
    if operands is not None and (mixing or not experts):
        return "attention" if graph.on_stream(operands.k) else "cross"
    return "mixer" if mixing else "mlp"


def _check_windows(graph: LayerGraph, part: ModuleCall) -> None:
    """Raise `UnsupportedModelError` if a module that mixes tokens reads more rows than the layer."""
    states = graph.nodes[graph.source].shape
    read = next((graph.nodes[at].shape for at in part.inputs if graph.on_stream(at)), states)
    if len(read) == len(states) and read[0] != states[0]:
        raise UnsupportedModelError(
            f"{part.path!r} attends inside windows: it reads {read[0]} rows where the layer reads {states[0]}."
        )


def _norm_before(graph: LayerGraph, branch: Branch) -> ModuleCall | None:
    """The norm that reads the stream in front of a block."""
    for call in graph.calls:
        if call.behaviour != "norm" or graph.unmoved(call.inputs[0]) != branch.start:
            continue
        if any(graph.depends(branch.end, node) for node in call.outputs) and call is not branch.sum.norm:
            return call
    return None


def _holds_kernel(graph: LayerGraph, branch: Branch, operands: Operands | None) -> bool:
    """Whether the parts of a branch hold all its maps, and its attention kernel if it has one."""
    held = 0
    for part in branch.parts:
        held |= graph.body(part)
    paths = [part.path for part in branch.parts]
    outside = [name for name in graph.weights_of(branch.nodes) if not _is_in(name, paths)]
    maps = [call.path for call in graph.calls if call.behaviour == "linear"]
    if any(_is_in(name, maps) for name in outside):
        return False
    return operands is None or bool(held >> operands.q & 1)


def _other_parts(graph: LayerGraph, roles: Mapping[str, str], between: list[str], skip: Mapping[str, Any]) -> list[str]:
    """Paths of the parts of a block that have parameters and no role."""
    if "out" not in roles:
        return [path for path in skip if path != roles.get("norm") and _parameters(graph, path)]
    named = {*roles.values(), *between}
    names = [name for path in skip for name in _parameters(graph, path) if not _is_in(name, named)]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _name_parts(roles: dict[str, str], paths: list[str]) -> None:
    """Add parts that nothing fits to the roles of a block, in place. The role is the name of the module."""
    for path in paths:
        if path in roles.values():
            continue
        name = path.rpartition(".")[2]
        name = name if name not in MEANINGS and not name.isdigit() else f"part_{name}"
        while name in roles:
            name += "_"
        roles[name] = path


def _parameters(graph: LayerGraph, path: str) -> list[str]:
    module = graph.layer.get_submodule(path)
    return [f"{path}.{name}" for name, _ in module.named_parameters()]


def _is_in(name: str, paths: Any) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _adder(graph: LayerGraph, branch: Branch, out: ModuleCall | None, readers: list[ModuleCall]) -> str | None:
    """Path of the module that returns norm(out(a) + b), where b is the input of the MLP."""
    norm = branch.sum.norm
    if out is None or norm is None:
        return None
    for call in graph.calls:
        given = [leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, Tensor)]
        owned = {name.rpartition(".")[0] for name in _parameters(graph, call.path)}
        if (
            owned == {out.path, norm.path}
            and len(given) == len(call.inputs) == 2
            and call.outputs == norm.outputs
            and graph.unmoved(call.inputs[0]) == graph.unmoved(out.inputs[0])
            and graph.unmoved(call.inputs[1]) == branch.start
            and all(graph.unmoved(reader.inputs[0]) == branch.start for reader in readers)
        ):
            return call.path
    return None
