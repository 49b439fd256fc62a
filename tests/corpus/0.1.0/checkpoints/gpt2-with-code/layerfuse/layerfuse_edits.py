# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""How the edits of a plan reshape a model, and where the weights of the result come from.

The same functions serve compressing and loading: `reshape` gives a freshly built model of the right depth its shape,
`fused_weights` fills it while compressing, the checkpoint fills it while loading.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from .layerfuse_adapters import FUSED_PREFIX, LayerAdapter
from .layerfuse_errors import PlanError, UnsupportedModelError
from .layerfuse_forms import Line, check_form, form_weights, gives_way, take_form
from .layerfuse_math_lowrank import low_rank, shared_basis
from .layerfuse_operators import combine
from .layerfuse_plan import Blend, Layout, Linearize, Plan, Slot, Source, Tie
from .layerfuse_relaxed import PER_DEPTH, Linear, Relaxed, can_relax, out_in, relax


def check_plan(model: PreTrainedModel, adapter: LayerAdapter, plan: Plan) -> None:
    """Raise unless `plan` was made for this architecture and depth, and the model can be fused at all.

    Raises:
        PlanError: the plan is for another architecture or number of layers, or asks for a rank that no matrix has.
        UnsupportedModelError: the model is already fused, quantised, carries PEFT adapters, or differs from layer to
            layer.
    """
    check_model(model, adapter)
    if plan.model_type != adapter.model_type:
        raise PlanError(f"the plan is for {plan.model_type!r}, the model is {adapter.model_type!r}: make a new plan.")
    depth = len(adapter.layer_list(model))
    if plan.num_layers != depth:
        raise PlanError(f"the plan is for {plan.num_layers} layers, the model has {depth}: make a new plan.")
    if plan.kinds != adapter.kinds:
        raise PlanError(
            f"the plan is for layers of {' and '.join(plan.kinds)} blocks, those of {adapter.model_type!r} have "
            f"{' and '.join(adapter.kinds)}: make a new plan."
        )
    shapes = [shapes_of(layer) for layer in adapter.layer_list(model)]
    for edit in plan.edits:
        unlike = [layer for layer in edit.layers if shapes[layer] != shapes[edit.layers[0]]]
        if unlike:
            raise PlanError(
                f"{edit} makes one of layers whose weights have different shapes, such as {edit.layers[0]} and "
                f"{unlike[0]}: group layers of one shape."
            )
        layer = adapter.layer_list(model)[edit.layers[0]]
        if isinstance(edit, Linearize | Blend):
            check_form(layer, adapter, edit.source.form)
        ties = replace(plan, edits=(edit,)).layout().ties  # a whole layer may be two
        ranks = [rank for tie in ties for _, rank in relaxed_maps(layer, adapter, tie).values()]
        if ranks and max(ranks) < edit.rank:
            raise PlanError(
                f"Fuse.rank is {edit.rank}, and no matrix of these {edit.kind} blocks can use more than {max(ranks)} "
                f"with mode={edit.mode!r}: lower it, to much less than that to save anything."
            )


def can_be(model: PreTrainedModel, adapter: LayerAdapter, plan: Plan) -> bool:
    """Whether `check_plan` accepts a plan."""
    try:
        check_plan(model, adapter, plan)
    except (PlanError, UnsupportedModelError):
        return False
    return True


def shapes_of(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Name and shape of each weight of a layer: those of layers that can become one are equal."""
    return tuple((name, tensor.shape) for name, tensor in layer.state_dict().items())


def check_model(model: PreTrainedModel, adapter: LayerAdapter) -> None:
    """Raise `UnsupportedModelError` unless the model is one that can be fused."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: pass the model itself, without torch.compile or "
            "other wrappers; merge PEFT adapters first (merge_and_unload)."
        )
    if model.config.model_type.startswith(FUSED_PREFIX):
        raise UnsupportedModelError(
            f"{type(model).__name__} is already fused: apply a new plan to the original, or to expand(model)."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError("the model is quantised: fuse the full-precision model, then quantise the result.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError("the model carries PEFT adapters: merge them (merge_and_unload), then fuse.")
    if getattr(model.config, "is_heterogeneous", False):
        raise UnsupportedModelError("config.per_layer_config makes layers differ: such models cannot be fused yet.")
    adapter.check(model)
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: load the model without offloading to fuse it.")
        if not torch.isfinite(tensor).all():
            raise UnsupportedModelError(
                f"{name} holds NaN or infinite values: the checkpoint is damaged or was trained past divergence; "
                "use an earlier one."
            )


def target_config(config: PreTrainedConfig, adapter: LayerAdapter, layout: Layout) -> PreTrainedConfig:
    """The config of the result: fewer layers, every per-layer list in step. `config` is not changed."""
    target = copy.deepcopy(config)
    for name in adapter.per_layer_config:
        if getattr(config, name, None) is not None:
            setattr(target, name, [_per_layer(getattr(config, name), slot, name) for slot in layout.slots])
    types = getattr(target, "layer_types", None)
    if types is not None:
        # A layer without attention needs no cache of its own type. Where a type has lost all its attention, a cache
        # of that type would stay empty and report length 0, so such layers take the type of one that is there.
        used = {kind: None for kind, slot in zip(types, layout.slots, strict=True) if slot.source("attention")}
        fallback = next(iter(used))
        target.layer_types = [kind if kind in used else fallback for kind in types]
    target.num_hidden_layers = len(layout.slots)
    return target


def _per_layer(values: Sequence[Any], slot: Slot, name: str) -> Any:
    """The entry of a per-layer config list that belongs to the layer whose weights a slot gets."""
    source = next(iter(slot.blocks.values())) or Source(slot.layers[:1])
    if source.operator in ("freeze", "select"):
        return values[source.kept]
    entries = [values[layer] for layer in source.layers]
    if any(entry != entries[0] for entry in entries):
        raise PlanError(
            f"layers {source.layers} differ in config.{name} ({', '.join(map(str, entries))}), so their weights do "
            f"not make one layer by {source.operator!r}: use operator 'freeze', or group layers of one kind."
        )
    return entries[0]


def reshape(model: PreTrainedModel, adapter: LayerAdapter, layout: Layout) -> None:
    """Take the removed blocks out of a model with one layer per slot, renumber its cache, and put relaxed maps in the
    place of those that are shared with a rank, and other forms in the place of MLPs that have become that. In place.

    The key-value cache of transformers has one entry per layer of the config, and asks the first entry of each layer
    type how long the sequence is, so the attention blocks that remain take the first entries of their own type.
    """
    layers = adapter.layer_list(model)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    free = {kind: iter([i for i, other in enumerate(types) if other == kind]) for kind in types}
    for layer, slot, layer_type in zip(layers, layout.slots, types, strict=True):
        for kind in adapter.kinds:
            if slot.source(kind) is None:
                for path, stand_in in adapter.skip[kind].items():
                    layer.set_submodule(path, stand_in())
            elif (form := slot.source(kind).form) is not None:
                take_form(layer, adapter, form)
        if slot.source("attention") is None:
            continue
        index = next(free[layer_type])
        for path in adapter.skip["attention"]:
            for module in layer.get_submodule(path).modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
    for tie in layout.ties:
        for slot in tie.slots:
            for at, (module, rank) in relaxed_maps(layers[slot], adapter, tie).items():
                layers[slot].set_submodule(at, relax(module, tie.mode, rank))


def relaxed_maps(layer: nn.Module, adapter: LayerAdapter, tie: Tie) -> dict[str, tuple[Linear, int]]:
    """Path -> (stock module, rank) of the maps of a layer that a tie is to relax; none where it has no rank.

    A joint map of queries, keys and values is one map. The rank is that of the tie, or where a map has fewer
    dimensions as many as it has, which is enough to be exact: min(out, in) of a residual, min(in, depths x out) of a
    basis.

    Raises:
        UnsupportedModelError: a matrix belongs to a module that computes something else than `nn.Linear`.
    """
    found = {}
    for at in adapter.table(tie.kind).values() if tie.rank else ():
        module = layer.get_submodule(at)
        # a head that builds its body by AutoModel, as those of Llama do, gets one that is reshaped already
        if not isinstance(module, Relaxed) and any(is_shared(tensor) for tensor in module.parameters()):
            if not can_relax(module, tie.mode):
                raise UnsupportedModelError(
                    f"{at} is a {type(module).__name__}, and only nn.Linear and Conv1D can have a residual or a basis, "
                    "and an nn.Conv2d of one group a residual: share this block with rank 0."
                )
            outs, ins = out_in(module, module.weight).shape
            full = min(ins, outs * len(tie.slots) if tie.mode == "basis" else outs)
            found[at] = module, min(tie.rank, full)
    return found


def tied_weights(model: PreTrainedModel, adapter: LayerAdapter, layout: Layout) -> dict[str, str]:
    """Shared matrices of a reshaped model, {name of a copy: name of the one that is kept}: weights and bases."""
    path, layers = adapter.layers_path(model), adapter.layer_list(model)
    return {
        f"{path}.{slot}.{name}": f"{path}.{tie.slots[0]}.{name}"
        for tie in layout.ties
        for name, tensor in layers[tie.slots[0]].named_parameters()
        if adapter.owner(name) == tie.kind and is_shared(tensor) and name.rpartition(".")[2] not in PER_DEPTH
        for slot in tie.slots[1:]
    }


def is_shared(tensor: Tensor) -> bool:
    """Weight matrices are shared; norms and biases stay per depth, where they cost little and repair a lot."""
    return tensor.ndim >= 2


def fused_weights(
    model: PreTrainedModel,
    adapter: LayerAdapter,
    layout: Layout,
    lines: Mapping[int, Line] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Weights of the result by live name, made from those of `model`; none aliases the original.

    Tied copies are left out, as they are on disk. `lines` are slope and offset of the lines that activations go to, by
    layer; those that are not in it are 1 and 0.
    """
    path, layers = adapter.layers_path(model), adapter.layer_list(model)
    weights = {
        name: tensor.detach().clone() for name, tensor in untied_state(model).items() if not name.startswith(f"{path}.")
    }
    states = [layer.state_dict() for layer in layers]
    ties = {(slot, tie.kind): tie for tie in layout.ties for slot in tie.slots}
    for index, slot in enumerate(layout.slots):
        for name, tensor in states[slot.layers[0]].items():
            kind = adapter.owner(name)
            source = slot.source(kind)
            tie = ties.get((index, kind))
            if tie is not None and is_shared(tensor):
                if index != tie.slots[0]:
                    continue
                source = tie.source
            if source is None and adapter.stays(name):
                source = Source(slot.layers[:1])
            if source is not None and not gives_way(name, adapter, source.form):
                group = [states[layer][name] for layer in source.layers]
                seed = zlib.crc32(name.encode())  # the same parameter of another group draws anew, whatever the process
                weights[f"{path}.{index}.{name}"] = combine(group, source, seed=seed + source.layers[0])
        for source in filter(None, slot.blocks.values()):
            if source.form is not None:
                layer = source.layers[0]
                made = form_weights(layers[layer], adapter, source.form, lines.get(layer))
                weights |= {f"{path}.{index}.{name}": tensor for name, tensor in made.items()}
    for tie in layout.ties:
        for at, (module, rank) in relaxed_maps(layers[tie.source.layers[0]], adapter, tie).items():
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


def _relaxed_weights(originals: list[Tensor], shared: Tensor, mode: str, rank: int) -> list[dict[str, Tensor]]:
    """Per depth, what a relaxed map has beside the shared weight, or instead of it; all weights are (out, in)."""
    if mode == "basis":
        basis, coefficients = shared_basis(originals, rank)
        return [{"coefficients": part} | ({} if i else {"basis": basis}) for i, part in enumerate(coefficients)]
    pairs = [low_rank(original.double() - shared.double(), rank) for original in originals]
    return [{"residual_out": left, "residual_in": right} for left, right in pairs]


def expanded_weights(model: PreTrainedModel, adapter: LayerAdapter, layout: Layout) -> dict[str, Tensor]:
    """Weights for a stock model that computes what a fused one does: shared matrices are copied, residuals and bases
    multiplied out, and a removed block becomes one whose output projection is zero.
    """
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for at, module in model.named_modules():
        if isinstance(module, Relaxed):
            matrices = {name: tensor for name, tensor in module.named_parameters() if is_shared(tensor)}
            for name in matrices:
                del weights[f"{at}.{name}"]
            dtype = next(iter(matrices.values())).dtype
            weights[f"{at}.weight"] = module.merged_weight().to(dtype).contiguous()
    path = adapter.layers_path(model)
    for kind in adapter.kinds:
        donor = f"{path}.{next(i for i, slot in enumerate(layout.slots) if slot.source(kind))}."
        state = {name.removeprefix(donor): tensor for name, tensor in weights.items() if name.startswith(donor)}
        out = adapter.table(kind)["out"]
        for index, slot in enumerate(layout.slots):
            for name, tensor in state.items():
                if slot.source(kind) is None and adapter.owner(name) == kind and not adapter.stays(name):
                    # Not all zeros: a block of zeros has no gradient, and could never be trained again.
                    is_out = name.startswith(f"{out}.")
                    weights[f"{path}.{index}.{name}"] = torch.zeros_like(tensor) if is_out else tensor.clone()
    return weights


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """`state_dict` without the copies that the model declares as tied and that really are."""
    state = model.state_dict(keep_vars=True)
    ties = model.all_tied_weights_keys
    return {name: tensor for name, tensor in state.items() if state.get(ties.get(name, "")) is not tensor}
