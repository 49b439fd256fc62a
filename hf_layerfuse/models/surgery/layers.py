"""How the edits of a plan reshape a model, the same way while compressing and while loading."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ...errors import PlanError, UnsupportedModelError
from ...plan import Layout, Slot, Source, Tie
from ..architectures import LayerArchitecture
from ..modules.shared_linear import PER_DEPTH, Linear, Relaxed, can_relax, out_in, relax
from .linear_mlp import take_form


def target_config(config: PreTrainedConfig, architecture: LayerArchitecture, layout: Layout) -> PreTrainedConfig:
    """The config of the result: fewer layers, every per-layer list in step. `config` is not changed."""
    target = copy.deepcopy(config)
    for name in architecture.per_layer_config:
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


def reshape(model: PreTrainedModel, architecture: LayerArchitecture, layout: Layout) -> None:
    """Take the removed blocks out of a model with one layer per slot, renumber its cache, and put relaxed maps in the
    place of those that are shared with a rank, and other forms in the place of MLPs that have become that. In place.

    The key-value cache of transformers has one entry per layer of the config, and asks the first entry of each layer
    type how long the sequence is, so the attention blocks that remain take the first entries of their own type.
    """
    layers = architecture.layer_list(model)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    free = {kind: iter([i for i, other in enumerate(types) if other == kind]) for kind in types}
    for layer, slot, layer_type in zip(layers, layout.slots, types, strict=True):
        for kind in architecture.kinds:
            if slot.source(kind) is None:
                for path, stand_in in architecture.skip[kind].items():
                    layer.set_submodule(path, stand_in())
            elif (form := slot.source(kind).form) is not None:
                take_form(layer, architecture, form)
        if slot.source("attention") is None:
            continue
        index = next(free[layer_type])
        for path in architecture.skip["attention"]:
            for module in layer.get_submodule(path).modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
    for tie in layout.ties:
        for slot in tie.slots:
            for at, (module, rank) in relaxed_maps(layers[slot], architecture, tie).items():
                layers[slot].set_submodule(at, relax(module, tie.mode, rank))


def relaxed_maps(layer: nn.Module, architecture: LayerArchitecture, tie: Tie) -> dict[str, tuple[Linear, int]]:
    """Path -> (stock module, rank) of the maps of a layer that a tie is to relax; none where it has no rank.

    A joint map of queries, keys and values is one map. The rank is that of the tie, or where a map has fewer
    dimensions as many as it has, which is enough to be exact: min(out, in) of a residual, min(in, depths x out) of a
    basis.

    Raises:
        UnsupportedModelError: a matrix belongs to a module that computes something else than `nn.Linear`.
    """
    found = {}
    for at in architecture.table(tie.kind).values() if tie.rank else ():
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


def tied_weights(model: PreTrainedModel, architecture: LayerArchitecture, layout: Layout) -> dict[str, str]:
    """Shared matrices of a reshaped model, {name of a copy: name of the one that is kept}: weights and bases."""
    path, layers = architecture.layers_path(model), architecture.layer_list(model)
    return {
        f"{path}.{slot}.{name}": f"{path}.{tie.slots[0]}.{name}"
        for tie in layout.ties
        for name, tensor in layers[tie.slots[0]].named_parameters()
        if architecture.owner(name) == tie.kind and is_shared(tensor) and name.rpartition(".")[2] not in PER_DEPTH
        for slot in tie.slots[1:]
    }


def is_shared(tensor: Tensor) -> bool:
    """Weight matrices are shared; norms and biases stay per depth, where they cost little and repair a lot."""
    return tensor.ndim >= 2
