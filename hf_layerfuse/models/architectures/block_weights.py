"""Linear maps of a block in one orientation, independent of how the architecture stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError
from .base import Block, architecture_for

HEAD_NORMS = ("q_norm", "k_norm")
"""Roles of the norms inside an attention block."""

_ROLES = {"attention": ({"q", "k", "v", "out"},), "mlp": ({"in", "out"}, {"in", "gate", "out"})}

READERS = ("qkv", "q", "k", "v", "gate", "in")
"""Roles of the maps that read the input of a block."""


MAPS = (*READERS, "out")
"""Roles of linear maps and convolutions. Parts with other roles are not fitted, aligned or relaxed."""


@dataclass(frozen=True)
class LinearMap:
    """x -> x W^T + b. Both tensors are views: writing to them in place writes to the model.

    Attributes:
        weight: Weight of shape (out, in), also for a `Conv1D`.
        bias: Bias of shape (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Heads:
    """Heads of an attention block.

    Attributes:
        count: Number of query heads.
        groups: Number of key-value heads; each serves `count / groups` query heads.
        dim: Width of a head.
        rotary: Whether queries and keys are rotated by their position. Only rotations inside a frequency pair, the
            coordinates j and j + dim/2, commute with that.
    """

    count: int
    groups: int
    dim: int
    rotary: bool


def linear_maps(root: nn.Module, block: Block) -> dict[str, LinearMap]:
    """Role -> map, for all linear maps of a block. The paths of the block are relative to `root`.

    A joint map of queries, keys and values is returned as three maps.
    """
    found = {}
    for role, path in block.modules.items():
        if role not in MAPS:
            continue
        module = root.get_submodule(path)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        if role == "qkv":
            biases = [None] * 3 if bias is None else bias.chunk(3)
            found |= {part: LinearMap(w, b) for part, w, b in zip("qkv", weight.chunk(3), biases, strict=True)}
        else:
            found[role] = LinearMap(weight, bias)
    return found


def heads_of(model: PreTrainedModel) -> Heads:
    """Heads of the attention blocks of a model.

    Raises:
        UnsupportedModelError: The config does not state the number of heads.
    """
    config = architecture_for(model).config_of(model.config)
    count = getattr(config, "num_attention_heads", None)
    if count is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} has no num_attention_heads, so heads cannot be aligned: add the field to "
            "the config, or use align='none'."
        )
    return Heads(
        count=count,
        groups=getattr(config, "num_key_value_heads", None) or count,
        dim=getattr(config, "head_dim", None) or config.hidden_size // count,
        rotary=getattr(config, "rope_parameters", None) is not None,
    )


def rows_of(root: nn.Module, block: Block, heads: Heads | None = None) -> dict[str, Tensor]:
    """Role -> map of a block as rows by head, (groups, heads in a group, width of a head, features) float64.

    The features of a row are its input weights, followed by its bias. The features of a row of `out` are its output
    weights. Keys and values have one head in a group. The units of an MLP are heads of width one, in one group. So are
    the channels between two convolutions; the features of `in_norm` are gain, bias, mean and variance.

    Args:
        root: Module that the block's paths are relative to.
        block: Block to read.
        heads: Heads of an attention block; None for other blocks.

    Raises:
        UnsupportedModelError: The maps have unknown roles, or a norm spans several heads.
    """
    if block.kind == "conv":
        return {role: _by_channel(root, block, role).double()[None, :, None] for role in ("in", "in_norm", "out")}
    maps = linear_maps(root, block)
    groups, dim = (1, 1) if heads is None else (heads.groups, heads.dim)
    norms = [root.get_submodule(path) for role, path in block.modules.items() if role in HEAD_NORMS]
    if any(norm.weight.numel() != dim for norm in norms) or maps.keys() not in _ROLES[block.kind]:
        raise UnsupportedModelError(
            f"the {block.kind} block of layer {block.layer} has the parts {', '.join(block.modules)}; allowed are "
            "'qkv' (or 'q', 'k', 'v') and 'out' of attention with norms of one head's width, and 'in', 'out' and "
            "'gate' of an MLP. Use these names in the architecture's table, or use align='none' and an operator other "
            "than 'select'."
        )
    rows = {}
    for role, part in maps.items():
        values = part.weight.T if role == "out" else part.weight
        if role != "out" and part.bias is not None:
            values = torch.cat([values, part.bias[:, None]], 1)
        rows[role] = values.to(torch.float64, copy=True).reshape(groups, -1, dim, values.shape[1])
    return rows


def write_rows(root: nn.Module, block: Block, rows: Mapping[str, Tensor]) -> None:
    """Write rows as returned by `rows_of` to the block, in place. The bias of `out` stays."""
    if block.kind == "conv":
        for role, values in rows.items():
            _by_channel(root, block, role, values[0, :, 0])
        return
    for role, part in linear_maps(root, block).items():
        values = rows[role].flatten(0, 2)
        if role == "out":
            part.weight.copy_(values.T)
        else:
            part.weight.copy_(values[:, : part.weight.shape[1]])
            if part.bias is not None:
                part.bias.copy_(values[:, -1])


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
