"""Target lines of activations, and the error of replacing an activation with its line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.batches import Batches
from ..evaluation.hooks import When, watch_tokens
from .architectures import TransformerArchitecture
from .modules.shared_linear import theta_of


def fit_lines(
    model: PreTrainedModel, architecture: TransformerArchitecture, layers: Sequence[int], batches: Batches
) -> dict[int, tuple[Tensor, Tensor]]:
    """Fit a line to the activation of each MLP unit, by least squares.

    slope = Cov(act, z) / Var(z), offset = E act - slope E z, over all tokens except padding. If z is constant, the
    slope is 0.

    Args:
        model: Stock model.
        architecture: Architecture table of the model.
        layers: Layers whose MLPs are fitted.
        batches: Calibration batches.

    Returns:
        Layer -> slope and offset, (units,) float64.

    Raises:
        DataError: The batches contain no tokens.
    """
    sums = dict.fromkeys(layers, torch.zeros(()))
    rows = dict.fromkeys(layers, 0)

    def see(layer: int, z: Tensor, y: Tensor) -> None:
        sums[layer] = sums[layer] + torch.stack([z.sum(0), y.sum(0), z.square().sum(0), (z * y).sum(0)])
        rows[layer] += len(z)

    watch_activations(model, architecture, layers, batches, see)
    lines = {}
    for layer in layers:
        z, y, zz, zy = sums[layer] / rows[layer]
        variance = zz - z * z
        known = variance > 1e-12 * zz
        slope = torch.where(known, (zy - z * y) / variance.where(known, torch.ones_like(zz)), 0)
        lines[layer] = slope, y - slope * z
    return lines


def line_errors(
    model: PreTrainedModel, architecture: TransformerArchitecture, layers: Sequence[int], batches: Batches
) -> dict[int, float]:
    """Relative error of the MLP output after replacing its activation with the line, per layer with a homotopy.

    The error is the root mean square of f_a(x) - f_1(x) = (1 - a) W2 (act(z) - slope z - offset), divided by that of
    f_a(x).
    """
    lost, whole = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def see(layer: int, z: Tensor, y: Tensor) -> None:
        inside = architecture.layer_list(model)[layer]
        last, homotopy = (
            theta_of(inside.get_submodule(architecture.mlp["out"])),
            inside.get_submodule(architecture.activation),
        )
        lost[layer] += ((y - homotopy.line(z)) @ last[:-1]).square().sum().item()
        whole[layer] += (y @ last[:-1] + last[-1]).square().sum().item()

    watch_activations(model, architecture, layers, batches, see)
    return {layer: (lost[layer] / whole[layer]) ** 0.5 for layer in layers}


def watch_activations(
    model: PreTrainedModel,
    architecture: TransformerArchitecture,
    layers: Sequence[int],
    batches: Batches,
    see: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run batches and pass the inputs and outputs of MLP activations to a callback: `see(layer, z, act(z))`.

    Both are (tokens, units) float64, without padding.

    Raises:
        DataError: The batches contain only padding.
    """
    entered: dict[int, Tensor] = {}

    def record(key: tuple[int, When], states: Tensor) -> None:
        layer, when = key
        if when == "before":
            entered[layer] = states
        else:
            see(layer, entered.pop(layer).double(), states.double())

    activations = {
        layer: architecture.layer_list(model)[layer].get_submodule(architecture.activation) for layer in layers
    }
    sides: tuple[When, ...] = ("before", "after")
    modules = {(layer, when): (module, when) for layer, module in activations.items() for when in sides}
    watch_tokens(model, batches, modules, record, mask_name=architecture.mask)
