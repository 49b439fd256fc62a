"""Forms of a linearised MLP (LayerCollapse, Shabgahi et al. 2023).

An MLP becomes one linear map, a product of two linear maps, or an MLP whose activation training turns into a line.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError, UnsupportedModelError
from ...math.lowrank import low_rank
from ...math.ridge import compose
from ...plan import BlendedForm, LinearForm
from ..architectures import IdentityWithUnitGate, TransformerArchitecture, UnitGate
from ..architectures.layouts import JointLayout
from ..modules.conv import Parts
from ..modules.homotopy import Homotopy
from ..modules.shared_linear import out_in, theta_of

START = 0.01
"""Slope of the PReLU in the paper before training, which is its initial a."""

_MAPS = ("in", "gate", "gate_in", "out")


Form = LinearForm | BlendedForm
Line = tuple[Tensor, Tensor]
"""Slope and offset of the target line of each unit's activation, (units,) each."""


class Collapsed(nn.Linear):
    """Linear map that replaces an MLP, or the second of two such maps."""


class CollapsedWithUnitGate(nn.Linear):
    """First of two linear maps that replace an MLP with a joint map: its outputs, with ones in place of the gate."""

    def __init__(self, ins: int, rank: int, layout: JointLayout, **like: Any) -> None:
        super().__init__(ins, rank, bias=False, **like)
        self.unit_gate = IdentityWithUnitGate(layout)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit_gate(super().forward(x))


def needs_fit(architecture: TransformerArchitecture) -> bool:
    """Whether an MLP stays nonlinear without its activation (gated MLPs do), so that only a fit makes it linear."""
    return not {"gate", "gate_in"}.isdisjoint(architecture.mlp)


def check_form(layer: nn.Module, architecture: TransformerArchitecture, form: Form) -> None:
    """Raise unless the MLP of a stock layer can take a form.

    Raises:
        PlanError: The rank saves no parameters, or the form folds a sum into a product of two maps.
        UnsupportedModelError: The table of the architecture lacks the activation or the maps of the MLP, the residual
            sum cannot be folded, or a gated MLP would get a `Blend`.
    """
    names = architecture.mlp.keys()
    maps, others = names & {*_MAPS}, [architecture.mlp[name] for name in names - {"norm", *_MAPS}]
    known = maps in ({"in", "out"}, {"in", "gate", "out"}, {"gate_in", "out"})
    unknown = any(tensor.ndim >= 2 for path in others for tensor in layer.get_submodule(path).parameters())
    if architecture.activation is None or not known or unknown:
        raise UnsupportedModelError(
            f"the architecture of {architecture.model_type!r} has an MLP of {', '.join(names)} with the activation at "
            f"{architecture.activation!r}, which cannot become linear: in the architecture's table, name the maps "
            "'in', 'out' and 'gate' (or 'gate_in' for 'in' and 'gate' in one), and set the path of the activation."
        )
    if isinstance(form, BlendedForm):
        if needs_fit(architecture):
            raise UnsupportedModelError(
                f"the MLPs of {architecture.model_type!r} are gated: with a linear activation they are still products "
                "of two maps of their input. Only a fit makes them linear: use Linearize(layer) with refit, or "
                "collapse(...)."
            )
        return
    if form.fold and architecture.adds is None:
        raise UnsupportedModelError(
            f"the residual sum after the MLPs of {architecture.model_type!r} cannot be folded: "
            + (
                "it has no module of its own."
                if architecture.post_norm
                else "later blocks read it, and no norm follows."
            )
            + " Use fold=False."
        )
    ins, outs = _widths(layer, architecture)
    if form.fold and _rank(layer, architecture, form) is not None:
        raise PlanError(
            f"MLPs of {_units(layer, architecture)} units become a product of two maps, which cannot include the "
            f"residual sum of {outs} channels: use fold=False."
        )
    if form.rank is not None and form.rank * (ins + outs) >= ins * outs:
        raise PlanError(
            f"Linearize.rank is {form.rank}, but two maps of that rank are not smaller than one of {ins} x {outs}: "
            f"use {(ins * outs - 1) // (ins + outs)} or less, or None for the full map."
        )


def reshape_mlp(layer: nn.Module, architecture: TransformerArchitecture, form: Form) -> None:
    """Give the MLP of a stock layer another form, in place. The weights of new modules are arbitrary."""
    (_linearize if isinstance(form, LinearForm) else _blend)(layer, architecture, form)


def form_weights(
    layer: nn.Module, architecture: TransformerArchitecture, form: Form, line: Line | None
) -> dict[str, Tensor]:
    """Weights of the modules that `reshape_mlp` adds, by name relative to the layer.

    Args:
        layer: Stock layer.
        architecture: Architecture table of the model.
        form: New form of its MLP.
        line: Target line of the activation, see `activation_fit.fit_lines`; None is z itself.
    """
    if isinstance(form, LinearForm):
        return linear_weights(layer, architecture, form)
    at, like = architecture.activation, layer.get_submodule(architecture.mlp["out"]).weight
    units = _units(layer, architecture)
    slope, offset = line or (torch.ones(units), torch.zeros(units))
    found = {"a": torch.full((1,), START if form.faithful else 0.0), "slope": slope, "offset": offset}
    return {f"{at}.{name}": tensor.detach().to(like, copy=True) for name, tensor in found.items()}


def replaces(parameter: str, architecture: TransformerArchitecture, form: Form | None) -> bool:
    """Whether the form replaces the module that owns a parameter; its name is relative to its layer."""
    maps = (
        [architecture.mlp[role] for role in _MAPS if role in architecture.mlp] if isinstance(form, LinearForm) else []
    )
    return parameter.rpartition(".")[0] in maps


def _linearize(layer: nn.Module, architecture: TransformerArchitecture, linear: LinearForm) -> None:
    table, last = architecture.mlp, layer.get_submodule(architecture.mlp["out"])
    if isinstance(last, Collapsed):  # a head that builds its body with AutoModel gets a body that is already reshaped
        return
    ins, outs = _widths(layer, architecture)
    rank, like = _rank(layer, architecture, linear), {"device": last.weight.device, "dtype": last.weight.dtype}
    layer.set_submodule(architecture.activation, nn.Identity())
    if "gate_in" in table:
        layout = architecture.joint["gate_in"]
        first = IdentityWithUnitGate(layout) if rank is None else CollapsedWithUnitGate(ins, rank, layout, **like)
    else:
        first = nn.Identity() if rank is None else nn.Linear(ins, rank, bias=False, **like)
    if "gate" in table:
        layer.set_submodule(table["gate"], UnitGate())
    layer.set_submodule(_reader(architecture), first)
    layer.set_submodule(table["out"], Collapsed(rank or ins, outs, **like))
    if linear.fold:
        names = (table[role].removeprefix(f"{architecture.adds}.") for role in ("out", "norm"))
        layer.set_submodule(architecture.adds, Parts(layer.get_submodule(architecture.adds), tuple(names)))


def linear_weights(layer: nn.Module, architecture: TransformerArchitecture, linear: LinearForm) -> dict[str, Tensor]:
    """Weights of the maps that replace the MLP of a layer, by name relative to the layer.

    The maps compute the MLP without its activation, W2 (W1 x + b1) + b2 in float64. If the activation has become a
    line, they compute W2 (slope (W1 x + b1) + offset) + b2. A gated MLP without its activation is not linear, so before
    the fit the maps compute only its constant, b2.
    """
    reads, writes = _reader(architecture), architecture.mlp["out"]
    first, last = (theta_of(layer.get_submodule(path)) for path in (reads, writes))
    if needs_fit(architecture):
        theta = torch.cat([last.new_zeros(len(first) - 1, last.shape[1]), last[-1:]])
    else:
        act = layer.get_submodule(architecture.activation)
        if isinstance(act, Homotopy):
            first = first * act.slope.double()
            first[-1] += act.offset.double()
        theta = compose(first, last)
    if linear.fold:
        theta[:-1] += torch.eye(len(theta) - 1).to(theta)
    weights = {f"{writes}.bias": theta[-1]}
    rank = _rank(layer, architecture, linear)
    if rank is None:
        weights[f"{writes}.weight"] = theta[:-1].T
    else:
        weights[f"{writes}.weight"], weights[f"{reads}.weight"] = low_rank(theta[:-1].T, rank)
    dtype = layer.get_submodule(writes).weight.dtype
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def _reader(architecture: TransformerArchitecture) -> str:
    """Path of the map of an MLP that the first of two linear maps replaces."""
    return architecture.mlp.get("in") or architecture.mlp["gate_in"]


def _widths(layer: nn.Module, architecture: TransformerArchitecture) -> tuple[int, int]:
    """Input and output width of the MLP of a stock layer."""
    first, last = (layer.get_submodule(path) for path in (_reader(architecture), architecture.mlp["out"]))
    return out_in(first, first.weight).shape[1], out_in(last, last.weight).shape[0]


def _rank(layer: nn.Module, architecture: TransformerArchitecture, linear: LinearForm) -> int | None:
    """Rank of the linearised MLP of a stock layer; None is one full map.

    The rank is at most the number of units, so an MLP with few units becomes two smaller maps.
    """
    ins, outs = _widths(layer, architecture)
    units = _units(layer, architecture)
    rank = min(units, linear.rank or units)
    return rank if rank * (ins + outs) < ins * outs else None


def _units(layer: nn.Module, architecture: TransformerArchitecture) -> int:
    """Hidden units of the MLP of a layer."""
    last = layer.get_submodule(architecture.mlp["out"])
    return out_in(last, last.weight).shape[1]


def _blend(layer: nn.Module, architecture: TransformerArchitecture, blended: BlendedForm) -> None:
    act = layer.get_submodule(architecture.activation)
    if isinstance(act, Homotopy):  # a head that builds its body with AutoModel gets a body that is already reshaped
        return
    weight = layer.get_submodule(architecture.mlp["out"]).weight
    act, start = (nn.ReLU(), START) if blended.faithful else (act, 0.0)
    homotopy = Homotopy(act, _units(layer, architecture), start, device=weight.device, dtype=weight.dtype)
    layer.set_submodule(architecture.activation, homotopy)
