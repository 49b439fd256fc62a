"""The lines that activations go to, and how far from them they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import TransformerAdapter
from .calibration import Batches
from .errors import DataError
from .modes import eval_mode
from .relaxed import theta_of


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
    for layer, z, y in activations(model, adapter, layers, batches):
        sums[layer] = sums[layer] + torch.stack([z.sum(0), y.sum(0), z.square().sum(0), (z * y).sum(0)])
        rows[layer] += len(z)
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
    for layer, z, y in activations(model, adapter, layers, batches):
        inside = adapter.layer_list(model)[layer]
        last, homotopy = theta_of(inside.get_submodule(adapter.mlp["out"])), inside.get_submodule(adapter.activation)
        lost[layer] += ((y - homotopy.line(z)) @ last[:-1]).square().sum().item()
        whole[layer] += (y @ last[:-1] + last[-1]).square().sum().item()
    return {layer: (lost[layer] / whole[layer]) ** 0.5 for layer in layers}


@torch.no_grad()
def activations(
    model: PreTrainedModel, adapter: TransformerAdapter, layers: Sequence[int], batches: Batches
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What enters and leaves the activation of MLPs, (layer, z, act(z)) with (tokens, units) float64; no padding.

    Raises:
        DataError: there is nothing but padding.
    """
    seen: list[tuple[int, Tensor, Tensor]] = []
    found = False
    with eval_mode(model), ExitStack() as hooks:
        for layer in layers:
            module = adapter.layer_list(model)[layer].get_submodule(adapter.activation)

            def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
                seen.append((layer, *(states.flatten(0, -2).double() for states in (args[0], output))))

            hooks.callback(module.register_forward_hook(keep).remove)
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=None, leave=False):
            inputs = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
            model(**inputs)
            mask = inputs.get("attention_mask")
            for layer, z, y in seen:
                rows = mask.flatten().bool() if mask is not None and mask.numel() == len(z) else slice(None)
                found = found or len(z[rows]) > 0
                yield layer, z[rows], y[rows]
            seen.clear()
    if not found:
        raise DataError("the calibration batches hold no tokens: give `batches` with at least one batch of inputs.")
