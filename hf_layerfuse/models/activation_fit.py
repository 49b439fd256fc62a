"""The lines that activations go to, and how far from them they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import DataError
from ..evaluation.batches import Batches, model_inputs
from ..evaluation.eval_mode import eval_mode
from .architectures import TransformerAdapter
from .modules.shared_linear import theta_of


def lines_of(
    model: PreTrainedModel, adapter: TransformerAdapter, layers: Sequence[int], batches: Batches
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer, the line nearest to the activation of each unit of its MLP: slope and offset, (units,) float64.

    slope = Cov(act, z) / Var(z), offset = E act - slope E z, over the tokens that are no padding. Where z never
    changes, the slope is 0.

    Args:
        model: stock.
        adapter: of it.
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

    watch(model, adapter, layers, batches, see)
    lines = {}
    for layer in layers:
        z, y, zz, zy = sums[layer] / rows[layer]
        variance = zz - z * z
        known = variance > 1e-12 * zz
        slope = torch.where(known, (zy - z * y) / variance.where(known, torch.ones_like(zz)), 0)
        lines[layer] = slope, y - slope * z
    return lines


def bends_of(
    model: PreTrainedModel, adapter: TransformerAdapter, layers: Sequence[int], batches: Batches
) -> dict[int, float]:
    """Per layer with a homotopy, how much of what its MLP gives is lost where a line takes its place.

    The root mean square of f_a(x) - f_1(x) = (1 - a) W2 (act(z) - slope z - offset), relative to that of f_a(x).
    """
    lost, whole = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def see(layer: int, z: Tensor, y: Tensor) -> None:
        inside = adapter.layer_list(model)[layer]
        last, homotopy = theta_of(inside.get_submodule(adapter.mlp["out"])), inside.get_submodule(adapter.activation)
        lost[layer] += ((y - homotopy.line(z)) @ last[:-1]).square().sum().item()
        whole[layer] += (y @ last[:-1] + last[-1]).square().sum().item()

    watch(model, adapter, layers, batches, see)
    return {layer: (lost[layer] / whole[layer]) ** 0.5 for layer in layers}


@torch.no_grad()
def watch(
    model: PreTrainedModel,
    adapter: TransformerAdapter,
    layers: Sequence[int],
    batches: Batches,
    see: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run batches, and show what enters and leaves the activation of MLPs: `see(layer, z, act(z))`.

    Both are (tokens, units) float64, without padding.

    Raises:
        DataError: there is nothing but padding.
    """
    inputs: dict[str, Tensor] = {}
    tokens = 0

    def keep(layer: int, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal tokens
        z, y = (states.flatten(0, -2) for states in (args[0], output))
        mask = inputs.get("attention_mask")
        if mask is not None and mask.numel() == len(z):
            z, y = z[mask.flatten().bool()], y[mask.flatten().bool()]
        if len(z):
            see(layer, z.double(), y.double())
        tokens += len(z)

    with eval_mode(model), ExitStack() as hooks:
        for layer in layers:
            module = adapter.layer_list(model)[layer].get_submodule(adapter.activation)
            handle = module.register_forward_hook(lambda _, args, output, layer=layer: keep(layer, args, output))
            hooks.callback(handle.remove)
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=None, leave=False):
            inputs = model_inputs(batch, model)
            model(**inputs)
    if not tokens:
        raise DataError("the calibration batches hold no tokens: give `batches` with at least one batch of inputs.")
