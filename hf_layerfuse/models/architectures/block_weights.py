"""Linear maps of a block in one orientation, independent of how the architecture stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError
from .base import ATTENDING, Block
from .layouts import Rows, parts_of

HEAD_NORMS = ("q_norm", "k_norm")
"""Roles of the norms inside an attention block."""

POSITIONS = ("q_position", "k_position")
"""Roles of the maps from position embeddings to vectors that keys and queries are multiplied with."""

READERS = ("qkv", "q", "k", "v", "kv", "gate_in", "gate", "in")
"""Roles of the maps that read the input of a block, or the states of an encoder."""

_OF_MEMORY = ("k", "v", "kv")
"""Roles of the maps of cross-attention that read the states of an encoder."""

MAPS = (*READERS, *POSITIONS, "out")
"""Roles of linear maps and convolutions. Parts with other roles are not fitted, aligned or relaxed."""

_NEEDED = {
    **dict.fromkeys(ATTENDING, ({"q", "k", "v", "out"},)),
    "mlp": ({"in", "out"}, {"in", "gate", "out"}),
}


def reads_stream(kind: str, role: str) -> bool:
    """Whether a part of a kind of block is a map that reads the input of the block."""
    return role in READERS and not (kind == "cross" and role in _OF_MEMORY)


@dataclass(frozen=True)
class LinearMap:
    """x -> x W^T + b, one map of a block or a part of a joint map."""

    _weight: Tensor
    _bias: Tensor | None
    _rows: Rows = ...

    @property
    def weight(self) -> Tensor:
        """Weight of shape (out, in), also for a `Conv1D`. Use `write` to change the model."""
        return self._weight[self._rows]

    @property
    def bias(self) -> Tensor | None:
        """Bias of shape (out,), or None."""
        return None if self._bias is None else self._bias[self._rows]

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write a weight, and a bias unless it is None, to the model."""
        self._weight[self._rows] = weight.to(self._weight)
        if bias is not None:
            self._bias[self._rows] = bias.to(self._bias)


def linear_maps(root: nn.Module, block: Block) -> dict[str, LinearMap]:
    """Role -> map, for all linear maps of a block. The paths of the block are relative to `root`.

    A joint map is returned as its parts: queries, keys and values, or a gate and its units. Parts whose role is not
    that of a map are left out. An opaque block, which has no `out`, has no maps.

    Raises:
        UnsupportedModelError: A joint map does not fit the heads of the block.
    """
    if "out" not in block.modules:
        return {}
    found = {}
    for role in filter(MAPS.__contains__, block.modules):
        module = root.get_submodule(block.modules[role])
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        if role in ("qkv", "kv", "gate_in"):
            parts = parts_of(role, block.joint.get(role, "parts"), len(weight), block.heads)
            found |= {part: LinearMap(weight, bias, rows) for part, rows in parts.items()}
        else:
            found[role] = LinearMap(weight, bias)
    return found


def rows_of(root: nn.Module, block: Block) -> dict[str, Tensor]:
    """Role -> map of a block as rows by head, (groups, heads in a group, width of a head, features) float64.

    The features of a row are its input weights, followed by its bias. The features of a row of `out` are its output
    weights. Keys and values have one head in a group. The units of an MLP are heads of width one, in one group. So are
    the channels between two convolutions; the features of `in_norm` are gain, bias, mean and variance. A norm of
    queries or keys with its own gain for each head has one row per coordinate, with the feature gain, and bias if it
    has one. A norm with the width of one head is the same for all heads and has no rows.

    Args:
        root: Module that the block's paths are relative to.
        block: Block to read.

    Raises:
        UnsupportedModelError: The maps have unknown roles, the config states no number of heads, a joint map does not
            fit the heads, or a norm spans some of the heads.
    """
    if block.kind == "conv":
        return {role: _by_channel(root, block, role).double()[None, :, None] for role in ("in", "in_norm", "out")}
    maps = linear_maps(root, block)
    if maps.keys() - POSITIONS not in _NEEDED[block.kind]:
        raise UnsupportedModelError(
            f"the {block.kind} block of layer {block.layer} has the parts {', '.join(block.modules)}; needed are "
            "'qkv' (or 'q', 'k', 'v', or 'q' and 'kv') and 'out' of attention, and 'in' (with 'gate', or 'gate_in' for "
            "both) and 'out' of an MLP. Use these names in the architecture's table, or use align='none' and an "
            "operator other than 'select'."
        )
    groups, dim = _shape(block)
    rows = {}
    for role, part in maps.items():
        values = part.weight.T if role == "out" else part.weight
        if role != "out" and part.bias is not None:
            values = torch.cat([values, part.bias[:, None]], 1)
        rows[role] = values.to(torch.float64, copy=True).reshape(groups, -1, dim, values.shape[1])
    for role, tensors in _norms_by_head(root, block).items():
        values = torch.stack([tensor.double().flatten() for tensor in tensors], -1)
        rows[role] = values.reshape(groups, -1, dim, len(tensors))
    return rows


@torch.no_grad()
def write_rows(root: nn.Module, block: Block, rows: Mapping[str, Tensor]) -> None:
    """Write rows as returned by `rows_of` to the block, in place. The bias of `out` stays."""
    if block.kind == "conv":
        for role, values in rows.items():
            _by_channel(root, block, role, values[0, :, 0])
        return
    for role, part in linear_maps(root, block).items():
        values = rows[role].flatten(0, 2)
        if role == "out":
            part.write(values.T)
        else:
            inputs = part.weight.shape[1]
            part.write(values[:, :inputs], None if part.bias is None else values[:, inputs])
    for role, tensors in _norms_by_head(root, block).items():
        for tensor, values in zip(tensors, rows[role].unbind(-1), strict=True):
            tensor.copy_(values.reshape(tensor.shape))


def _shape(block: Block) -> tuple[int, int]:
    """Number of groups of a block, and width of its heads."""
    if block.kind == "mlp":
        return 1, 1
    if block.heads is None:
        raise UnsupportedModelError(
            f"the config states no num_attention_heads, so that the heads of layer {block.layer} cannot be told apart: "
            "add the field to the config, or override heads(config, layer) in the architecture's table, or use "
            "align='none' and an operator other than 'select'."
        )
    return block.heads.groups, block.heads.dim


def _norms_by_head(root: nn.Module, block: Block) -> dict[str, list[Tensor]]:
    """Role -> weight, and bias if there is one, of each norm that has its own gains for every head of a block."""
    found = {}
    for role in HEAD_NORMS:
        module = root.get_submodule(block.modules[role]) if role in block.modules else None
        tensors = [getattr(module, name, None) for name in ("weight", "bias")]
        if tensors[0] is None:  # a norm without weights treats all heads alike
            continue
        heads, width = block.heads, tensors[0].numel()
        if width == (heads.count if role == "q_norm" else heads.groups) * heads.dim:
            found[role] = [tensor.detach() for tensor in tensors if tensor is not None]
        elif width != heads.dim:
            raise UnsupportedModelError(
                f"{role} of layer {block.layer} has {width} gains, neither one for each coordinate of a head "
                f"({heads.dim}) nor one for each coordinate of all heads: use align='none' and an operator other than "
                "'select'."
            )
    return found


def batch_norm_gain(weight: Tensor, variance: Tensor) -> Tensor:
    """Factor of a batch norm in eval mode, except for its eps. `weight` and `variance` have the same shape."""
    return weight / variance.clamp_min(1e-5).sqrt()


def _by_channel(root: nn.Module, block: Block, role: str, values: Tensor | None = None) -> Tensor:
    """Weights of one part of a convolutional block per channel between the convolutions, (channels, features).

    If `values` are given, they are written first.
    """
    module = root.get_submodule(block.modules[role])
    if role == "in_norm":
        tensors = [module.weight, module.bias, module.running_mean, module.running_var]
    elif role == "out":
        tensors = [module.weight.transpose(0, 1)]
    else:
        tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    tensors = [tensor.detach() for tensor in tensors]  # views: writing to them writes to the module
    if values is not None:
        sizes = [tensor[0].numel() for tensor in tensors]
        for tensor, part in zip(tensors, values.split(sizes, dim=1), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
    return torch.cat([tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors], dim=1)
