"""The lines that activations go to, and how far from them they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.batches import Batches
from ..evaluation.hooks import When, watch_tokens
from .architectures import TransformerArchitecture
from .modules.shared_linear import theta_of


def lines_of(
    model: PreTrainedModel, architecture: TransformerArchitecture, layers: Sequence[int], batches: Batches
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer, the line nearest to the activation of each unit of its MLP: slope and offset, (units,) float64.

    slope = Cov(act, z) / Var(z), offset = E act - slope E z, over the tokens that are no padding. Where z never
    changes, the slope is 0.

    Args:
        model: stock.
        architecture: of it.
        layers: whose MLPs are looked at.
        batches: calibration batches.

    Raises:
        DataError: they hold no tokens.
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


def bends_of(
    model: PreTrainedModel, architecture: TransformerArchitecture, layers: Sequence[int], batches: Batches
) -> dict[int, float]:
    """Per layer with a homotopy, how much of what its MLP gives is lost where a line takes its place.

    The root mean square of f_a(x) - f_1(x) = (1 - a) W2 (act(z) - slope z - offset), relative to that of f_a(x).
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
    """Run batches, and show the inputs and outputs of the activations of MLPs: `see(layer, z, act(z))`.

    Both are (tokens, units) float64, without padding.

    Raises:
        DataError: There is nothing but padding.
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
    watch_tokens(model, batches, modules, record)
