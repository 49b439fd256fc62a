"""Weights of a fused model, and of the stock model that computes the same.

While compressing, `fused_weights` fills the reshaped model. While loading, the checkpoint fills it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...math.lowrank import low_rank, shared_basis
from ...plan import Layout, Slot, Source
from ..architectures import LayerArchitecture
from ..modules.shared_linear import Relaxed, out_in
from .layers import is_shared, relaxed_maps
from .linear_mlp import Line, form_weights, replaces


def fused_weights(
    model: PreTrainedModel,
    architecture: LayerArchitecture,
    layout: Layout,
    lines: Mapping[int, Line] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Weights of the result by live name, computed from those of `model`. They do not alias the original.

    Tied copies are omitted, as on disk. `lines` holds slope and offset of the target line of activations, by layer;
    the default is slope 1 and offset 0.
    """
    path, layers = architecture.layers_path(model), architecture.layer_list(model)
    weights = {
        name: tensor.detach().clone() for name, tensor in untied_state(model).items() if not name.startswith(f"{path}.")
    }
    states = [layer.state_dict() for layer in layers]
    ties = {(slot, tie.kind): tie for tie in layout.ties for slot in tie.slots}
    for index, slot in enumerate(layout.slots):
        shared = {
            kind: tie.source if index == tie.slots[0] else None
            for kind in slot.blocks
            if (tie := ties.get((index, kind)))
        }
        made = layer_weights(architecture, states, slot, shared)
        weights |= {f"{path}.{index}.{name}": tensor for name, tensor in made.items()}
        for source in filter(None, slot.blocks.values()):
            if source.form is not None:
                layer = source.layers[0]
                made = form_weights(layers[layer], architecture, source.form, lines.get(layer))
                weights |= {f"{path}.{index}.{name}": tensor for name, tensor in made.items()}
    for tie in layout.ties:
        for at, (module, rank) in relaxed_maps(layers[tie.source.layers[0]], architecture, tie).items():
            shared = weights[f"{path}.{tie.slots[0]}.{at}.weight"]
            originals = [out_in(module, states[layer][f"{at}.weight"]) for layer in tie.source.layers]
            if tie.mode == "basis":
                del weights[f"{path}.{tie.slots[0]}.{at}.weight"]
            made = _relaxed_weights(originals, out_in(module, shared), tie.mode, rank)
            weights |= {
                f"{path}.{slot}.{at}.{name}": tensor.to(shared.dtype, copy=True).contiguous()
                for slot, tensors in zip(tie.slots, made, strict=True)
                for name, tensor in tensors.items()
            }
    return weights


def layer_weights(
    architecture: LayerArchitecture,
    states: Mapping[int, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    slot: Slot,
    shared: Mapping[str, Source | None] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Weights of one layer of the result by their names in the layer, without those of blocks that change their form.

    Args:
        architecture: Architecture table of the model.
        states: `state_dict` of each original layer of the slot, by its depth.
        slot: Layer of the result.
        shared: Kind of block -> source of the matrices that it shares with other depths; None where another depth has
            them.
    """
    weights = {}
    for name, tensor in states[slot.layers[0]].items():
        kind = architecture.owner(name)
        source = slot.source(kind)
        if kind in shared and is_shared(tensor):
            source = shared[kind]
        elif source is None and architecture.stays(name):
            source = Source(slot.layers[:1])
        if source is not None and not replaces(name, architecture, source.form):
            group = [states[layer][name] for layer in source.layers]
            seed = zlib.crc32(name.encode())  # the seed depends on name and group, and is the same in every process
            weights[name] = combine(group, source, seed=seed + source.layers[0])
    return weights


def _relaxed_weights(originals: list[Tensor], shared: Tensor, mode: str, rank: int) -> list[dict[str, Tensor]]:
    """Parameters of a relaxed map besides the shared weight, or instead of it, per depth; all are (out, in)."""
    if mode == "basis":
        basis, coefficients = shared_basis(originals, rank)
        return [{"coefficients": part} | ({} if i else {"basis": basis}) for i, part in enumerate(coefficients)]
    pairs = [low_rank(original.double() - shared.double(), rank) for original in originals]
    return [{"residual_out": left, "residual_in": right} for left, right in pairs]


def combine(tensors: Sequence[Tensor], source: Source, *, seed: int = 0) -> Tensor:
    """Combine the tensors of a group, all of one shape. The result is computed in float64 and cast once.

    The operators are:

    - `freeze`: the tensor of the kept layer.
    - `select`: the tensor of the kept layer, until the refit chooses.
    - `mean`: the average.
    - `weighted`: the average with the shares of the source.
    - `mix`: each element from one layer, drawn with equal probability (O'Neill et al. 2021).
    - `telescope`: theta_0 + sum_k (theta_k - theta_0) (LaCo, Yang et al. 2024, eq. 1).

    Args:
        tensors: Tensors of the layers of the source, in its order.
        source: Layers and operator.
        seed: Random seed of `mix`.
    """
    first = tensors[0].detach()
    if source.operator in ("freeze", "select"):
        return tensors[source.layers.index(source.kept)].detach().clone()
    if len(tensors) == 1 or not first.is_floating_point():
        return first.clone()
    stack = torch.stack([tensor.detach().double() for tensor in tensors])
    if source.operator == "mix":
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(tensors), first.shape, generator=generator).to(first.device)
        return stack.gather(0, pick.unsqueeze(0)).squeeze(0).to(first.dtype)
    if source.operator == "telescope":
        return (stack.sum(0) - (len(tensors) - 1) * stack[0]).to(first.dtype)
    if source.operator == "mean":
        return stack.mean(0).to(first.dtype)
    shares = torch.tensor(source.weights, dtype=torch.float64, device=first.device)
    return torch.tensordot(shares, stack, 1).to(first.dtype)


def expanded_weights(model: PreTrainedModel, architecture: LayerArchitecture, layout: Layout) -> dict[str, Tensor]:
    """Weights of the stock model that computes the same as a fused model.

    Shared matrices are copied, residuals and bases are multiplied out, and a removed block becomes a block whose output
    projection is zero.
    """
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for at, module in model.named_modules():
        if isinstance(module, Relaxed):
            matrices = {name: tensor for name, tensor in module.named_parameters() if is_shared(tensor)}
            for name in matrices:
                del weights[f"{at}.{name}"]
            dtype = next(iter(matrices.values())).dtype
            weights[f"{at}.weight"] = module.merged_weight().to(dtype).contiguous()
    path = architecture.layers_path(model)
    for kind in architecture.kinds:
        if all(slot.source(kind) for slot in layout.slots):
            continue
        state: dict[str, Tensor] = {}  # of the first layer that has a parameter: layers need not be alike
        for index, slot in enumerate(layout.slots):
            inside = f"{path}.{index}."
            for name, tensor in weights.items():
                if slot.source(kind) and name.startswith(inside):
                    state.setdefault(name.removeprefix(inside), tensor)
        for index, slot in enumerate(layout.slots):
            for name, tensor in state.items():
                if slot.source(kind) is None and architecture.owner(name) == kind and not architecture.stays(name):
                    # Only the output is zero: a block of zeros has no gradient and cannot be trained again.
                    silent = architecture.silences(kind, name)
                    weights[f"{path}.{index}.{name}"] = torch.zeros_like(tensor) if silent else tensor.clone()
    return weights


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """`state_dict` without the copies that the model declares as tied and that are in fact tied."""
    state = model.state_dict(keep_vars=True)
    ties = model.all_tied_weights_keys
    return {name: tensor for name, tensor in state.items() if state.get(ties.get(name, "")) is not tensor}
