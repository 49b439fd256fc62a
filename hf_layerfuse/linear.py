"""MLPs that have become one linear map of the stream, or the product of two (LayerCollapse, Shabgahi et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapters import One, TransformerAdapter
from .errors import PlanError, UnsupportedModelError
from .math.lowrank import low_rank
from .math.ridge import chain
from .plan import Linear
from .relaxed import out_in, theta_of

_MAPS = ("in", "gate", "out")


class Collapsed(nn.Linear):
    """The linear map that an MLP has become, or the second of the two."""


def check_linear(layer: nn.Module, adapter: TransformerAdapter, linear: Linear) -> None:
    """Raise unless the MLP of a stock layer can become linear.

    Raises:
        PlanError: the rank saves nothing.
        UnsupportedModelError: the adapter does not say where the activation is, or what the MLP is made of.
    """
    names = adapter.mlp.keys()
    if adapter.activation is None or not {"in", "out"} <= names or names - {"norm", *_MAPS}:
        raise UnsupportedModelError(
            f"the adapter of {adapter.model_type!r} has an MLP of {', '.join(names)} with the activation at "
            f"{adapter.activation!r}: to make it linear, name its maps 'in', 'out' and 'gate', and its activation."
        )
    ins, outs = _widths(layer, adapter)
    if linear.rank is not None and linear.rank * (ins + outs) >= ins * outs:
        raise PlanError(
            f"Linearize.rank is {linear.rank}, and two maps of that rank are no smaller than one of {ins} x {outs}: "
            f"use {(ins * outs - 1) // (ins + outs)} or less, or None for the full map."
        )


def linearize(layer: nn.Module, adapter: TransformerAdapter, linear: Linear) -> None:
    """Put linear maps in the place of a stock layer's MLP, in place. Their weights mean nothing yet."""
    table, last = adapter.mlp, layer.get_submodule(adapter.mlp["out"])
    if isinstance(last, Collapsed):  # a head that builds its body by AutoModel gets one that is reshaped already
        return
    ins, outs = _widths(layer, adapter)
    rank, like = _rank(layer, adapter, linear), {"device": last.weight.device, "dtype": last.weight.dtype}
    layer.set_submodule(adapter.activation, nn.Identity())
    if "gate" in table:
        layer.set_submodule(table["gate"], One())
    first = nn.Identity() if rank is None else nn.Linear(ins, rank, bias=False, **like)
    layer.set_submodule(table["in"], first)
    layer.set_submodule(table["out"], Collapsed(rank or ins, outs, **like))


def linear_weights(layer: nn.Module, adapter: TransformerAdapter, linear: Linear) -> dict[str, Tensor]:
    """Weights of the maps that stand for the MLP of a stock layer, by name from the layer on.

    What they compute is the MLP without its activation, W2 (W1 x + b1) + b2 in float64. A gated MLP without its
    activation is no linear map, so that nothing but its constant is left of it, until it is fitted.
    """
    table = adapter.mlp
    first, last = (theta_of(layer.get_submodule(table[role])) for role in ("in", "out"))
    theta = chain(first, last)
    if "gate" in table:
        theta = torch.cat([torch.zeros_like(theta[:-1]), last[-1:]])
    weights = {f"{table['out']}.bias": theta[-1]}
    rank = _rank(layer, adapter, linear)
    if rank is None:
        weights[f"{table['out']}.weight"] = theta[:-1].T
    else:
        weights[f"{table['out']}.weight"], weights[f"{table['in']}.weight"] = low_rank(theta[:-1].T, rank)
    dtype = layer.get_submodule(table["out"]).weight.dtype
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def in_linear(parameter: str, adapter: TransformerAdapter) -> bool:
    """Whether a parameter, named from its layer on, is of a map that gives way when an MLP becomes linear."""
    return parameter.rpartition(".")[0] in [adapter.mlp.get(role) for role in _MAPS]


def _widths(layer: nn.Module, adapter: TransformerAdapter) -> tuple[int, int]:
    """What the MLP of a stock layer reads and writes."""
    first, last = (layer.get_submodule(adapter.mlp[role]) for role in ("in", "out"))
    return out_in(first, first.weight).shape[1], out_in(last, last.weight).shape[0]


def _rank(layer: nn.Module, adapter: TransformerAdapter, linear: Linear) -> int | None:
    """The rank that the linear MLP of a stock layer has; None is one full map.

    An MLP of few units has no more rank than those: two maps are smaller then.
    """
    ins, outs = _widths(layer, adapter)
    last = layer.get_submodule(adapter.mlp["out"])
    units = out_in(last, last.weight).shape[1]
    rank = min(units, linear.rank or units)
    return rank if rank * (ins + outs) < ins * outs else None
