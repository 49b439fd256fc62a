"""The linear maps of a block in one orientation, whatever the architecture stores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .base import Block

_NORMS = ("norm", "q_norm", "k_norm")

READERS = ("qkv", "q", "k", "v", "gate", "in")
"""Roles of the maps that read what enters a block."""


@dataclass(frozen=True)
class LinearMap:
    """x -> x W^T + b. Both tensors are views: writing to them in place writes to the model.

    Attributes:
        weight: (out, in), also where the module is a `Conv1D`.
        bias: (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Heads:
    """How an attention block splits its width.

    Attributes:
        count: query heads.
        groups: heads of keys and values, each of which serves `count / groups` query heads.
        dim: width of a head.
        rotary: queries and keys are rotated by their position, so that only rotations inside a frequency pair, the
            coordinates j and j + dim/2, commute with it.
    """

    count: int
    groups: int
    dim: int
    rotary: bool


def linear_maps(model: PreTrainedModel, block: Block) -> dict[str, LinearMap]:
    """Role -> map, for all linear maps of a block. A joint map of queries, keys and values is given as three."""
    found = {}
    for role, path in block.modules.items():
        if role in _NORMS:
            continue
        module = model.get_submodule(path)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        if role == "qkv":
            biases = [None] * 3 if bias is None else bias.chunk(3)
            found |= {part: LinearMap(w, b) for part, w, b in zip("qkv", weight.chunk(3), biases, strict=True)}
        else:
            found[role] = LinearMap(weight, bias)
    return found


def heads_of(model: PreTrainedModel) -> Heads:
    """How the attention blocks of a model split their width.

    Raises:
        UnsupportedModelError: the config does not say how many heads there are.
    """
    config = model.config
    count = getattr(config, "num_attention_heads", None)
    if count is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} has no num_attention_heads, so that heads cannot be aligned: add the field to "
            "the config, or use align='none'."
        )
    return Heads(
        count=count,
        groups=getattr(config, "num_key_value_heads", None) or count,
        dim=getattr(config, "head_dim", None) or config.hidden_size // count,
        rotary=getattr(config, "rope_parameters", None) is not None,
    )
