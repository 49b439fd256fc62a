"""Reshaping a model by the edits of a plan. Compressing and loading use the same code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ...errors import PlanError, UnsupportedModelError
from ...plan import Layout, Slot, Source, Tie
from ..architectures import ATTENDING, MAPS, LayerArchitecture, part_at
from ..modules.shared_linear import PER_DEPTH, Linear, Relaxed, can_relax, out_in, relax
from .linear_mlp import reshape_mlp

_NUMBERS_OF_FIRST_LAYERS = ("max_window_layers", "first_k_dense_replace")
"""Config fields with the number of layers before the first one of another kind."""


def target_config(config: PreTrainedConfig, architecture: LayerArchitecture, layout: Layout) -> PreTrainedConfig:
    """Config of the result: fewer layers, every per-layer list in step. `config` is not changed."""
    whole = copy.deepcopy(config)
    config, target = architecture.config_of(config), architecture.config_of(whole)
    for name in architecture.per_layer_config:
        if getattr(config, name, None) is not None:
            setattr(target, name, [_per_layer(getattr(config, name), slot, name) for slot in layout.slots])
    types = getattr(target, "layer_types", None)
    if types is not None and "layer_types" in architecture.per_layer_config:
        # A layer without attention needs no cache of its own type. If all attention of a type is removed, a cache of
        # that type would stay empty and report length 0. Such layers take the type of a layer with attention.
        used = {kind: None for kind, slot in zip(types, layout.slots, strict=True) if slot.source("attention")}
        fallback = next(iter(used))
        target.layer_types = [kind if kind in used else fallback for kind in types]
    for name in _NUMBERS_OF_FIRST_LAYERS:
        if getattr(config, name, None) is not None:
            setattr(target, name, sum(slot.layers[0] < getattr(config, name) for slot in layout.slots))
    differences = overrides_of(config)
    if differences is not None:
        moved = [_per_layer(differences, slot, "per_layer_config") for slot in layout.slots]
        target.per_layer_config = None  # the entries of the original have other places
    setattr(target, architecture.depth, len(layout.slots))
    if differences is not None:
        target.per_layer_config = {i: copy.deepcopy(fields) for i, fields in enumerate(moved) if fields}
    architecture.complete(target)
    return whole


def overrides_of(config: PreTrainedConfig) -> list[dict[str, Any]] | None:
    """Fields in which each layer differs from its config, from `per_layer_config` of Transformers; None without it."""
    if not getattr(config, "is_heterogeneous", False):
        return None
    found = {int(layer): fields for layer, fields in config.to_dict()["per_layer_config"].items()}
    return [found.get(layer, {}) for layer in range(len(config.per_layer_config))]


def _per_layer(values: Sequence[Any], slot: Slot, name: str) -> Any:
    """Entry of a per-layer config list for a slot, taken from the layers whose weights the slot gets."""
    source = next(iter(slot.blocks.values())) or Source(slot.layers[:1])
    if source.operator in ("freeze", "select"):
        return values[source.kept]
    entries = [values[layer] for layer in source.layers]
    if any(entry != entries[0] for entry in entries):
        raise PlanError(
            f"layers {source.layers} differ in config.{name} ({', '.join(map(str, entries))}), so operator "
            f"{source.operator!r} cannot combine them: use operator 'freeze', or group layers of one kind."
        )
    return entries[0]


def reshape(model: PreTrainedModel, architecture: LayerArchitecture, layout: Layout) -> None:
    """Reshape a model with one layer per slot, in place.

    The function removes blocks, renumbers the cache, relaxes maps that are shared with a rank, and gives linearised
    MLPs their form.

    The key-value cache of Transformers has one entry per layer of the config and reads the sequence length from the
    first entry of each layer type. Therefore, the remaining attention blocks take the first entries of their type. So
    do cross-attention blocks, which have a cache of their own.
    """
    layers = architecture.layer_list(model)
    types = getattr(architecture.config_of(model.config), "layer_types", None) or ["full_attention"] * len(layers)
    free = {
        (kind, each): iter([i for i, other in enumerate(types) if other == each])
        for kind in ATTENDING
        for each in types
    }
    for layer, slot, layer_type in zip(layers, layout.slots, types, strict=True):
        for kind in architecture.kinds:
            if slot.source(kind) is None:
                for path, placeholder in architecture.skip[kind].items():
                    if part_at(layer, path) is not None:
                        layer.set_submodule(path, placeholder())
            elif (form := slot.source(kind).form) is not None:
                reshape_mlp(layer, architecture, form)
        for kind in ATTENDING:
            if slot.source(kind) is None:
                continue
            index = next(free[kind, layer_type])
            for path in architecture.skip[kind]:
                part = part_at(layer, path)
                for module in () if part is None else part.modules():
                    if hasattr(module, "layer_idx"):
                        module.layer_idx = index
    for tie in layout.ties:
        for slot in tie.slots:
            for at, (module, rank) in relaxed_maps(layers[slot], architecture, tie).items():
                layers[slot].set_submodule(at, relax(module, tie.mode, rank))


def relaxed_maps(layer: nn.Module, architecture: LayerArchitecture, tie: Tie) -> dict[str, tuple[Linear, int]]:
    """Path -> (stock module, rank), for the maps of a layer that a tie relaxes; empty if the tie has no rank.

    A joint map of queries, keys and values is one map. The rank is the rank of the tie, capped where a smaller rank is
    exact: at min(out, in) for a residual, and at min(in, depths x out) for a basis.

    Raises:
        UnsupportedModelError: A matrix belongs to a module that cannot be relaxed.
    """
    found = {}
    for role, at in architecture.table(tie.kind).items() if tie.rank else ():
        module = part_at(layer, at)
        if module is None:
            continue
        # a head that builds its body with AutoModel, as those of Llama do, gets a body that is already reshaped
        if not isinstance(module, Relaxed) and any(is_shared(tensor) for tensor in module.parameters()):
            if not can_relax(module, tie.mode):
                if role not in MAPS:  # experts, or a table of positions
                    continue
                raise UnsupportedModelError(
                    f"{at} is a {type(module).__name__}. A residual needs an nn.Linear, a Conv1D, or an nn.Conv2d of "
                    "one group; a basis needs an nn.Linear or a Conv1D. Share this block with rank 0."
                )
            outs, ins = out_in(module, module.weight).shape
            full = min(ins, outs * len(tie.slots) if tie.mode == "basis" else outs)
            found[at] = module, min(tie.rank, full)
    return found


def tied_weights(model: PreTrainedModel, architecture: LayerArchitecture, layout: Layout) -> dict[str, str]:
    """Shared weights and bases of a reshaped model, {name of a copy: name of the matrix that is kept}."""
    path, layers = architecture.layers_path(model), architecture.layer_list(model)
    return {
        f"{path}.{slot}.{name}": f"{path}.{tie.slots[0]}.{name}"
        for tie in layout.ties
        for name, tensor in layers[tie.slots[0]].named_parameters()
        if architecture.owner(name) == tie.kind and is_shared(tensor) and name.rpartition(".")[2] not in PER_DEPTH
        for slot in tie.slots[1:]
    }


def is_shared(tensor: Tensor) -> bool:
    """Whether depths share a parameter: matrices only. Norms and biases per depth cost little and repair a lot."""
    return tensor.ndim >= 2
