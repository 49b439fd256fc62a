"""How large a fused model will be, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...plan import Fuse, Plan, Source, Tie
from ...recipe import FusionRecipe
from ..architectures import LayerArchitecture, architecture_for
from ..modules.shared_linear import out_in
from .checks import shapes_of
from .layers import is_shared, relaxed_maps, reshape, target_config, tied_weights
from .weights import untied_state


def are_unlike(model: PreTrainedModel) -> bool:
    """Whether layers differ in shape, so that a number of them says little about how large they are."""
    return len({shapes_of(layer) for layer in architecture_for(model).layer_list(model)}) > 1


def size_of_blocks(model: PreTrainedModel, recipe: FusionRecipe) -> int:
    """Parameters of the blocks that a recipe is about, of which `ratio` is a share."""
    architecture = architecture_for(model)
    layers = architecture.layer_list(model)
    return sum(tensor.numel() for layer in layers for tensor in _parameters(layer, architecture, recipe))


def planned_size(model: PreTrainedModel, plan: Plan) -> dict[str, int]:
    """The size of what `apply(model, plan)` gives, from shapes alone.

    Returns:
        `parameters`, shared ones counted once; `bytes` of weights and buffers on disk, without the header of the file.
    """
    architecture = architecture_for(model)
    # how weights become one changes no shape, and 'freeze' is possible for all layers, also for those of several types
    frozen = [replace(edit, operator="freeze", weights=None) if isinstance(edit, Fuse) else edit for edit in plan.edits]
    layout = replace(plan, edits=frozen).layout()
    with torch.device("meta"):
        result = type(model)(target_config(model.config, architecture, layout))
        reshape(result, architecture, layout)
    copies = tied_weights(result, architecture, layout)
    stored = [tensor for name, tensor in untied_state(result).items() if name not in copies]
    return {
        "parameters": sum(tensor.numel() for tensor in stored if isinstance(tensor, torch.nn.Parameter)),
        "bytes": sum(
            tensor.numel() * (model.dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in stored
        ),
    }


def removed_by_even_runs(model: PreTrainedModel, recipe: FusionRecipe, runs: Sequence[Sequence[int]]) -> float:
    """The share of the parameters of blocks that is gone when each run becomes one; layers are of one shape.

    Norms and biases, of which each depth keeps its own where weights are shared, are too few to count. What a depth has
    beside the shared weights does count.
    """
    architecture = architecture_for(model)
    layer = architecture.layer_list(model)[0]
    left = sum(_size_of_run(layer, architecture, recipe, len(run)) for run in runs)
    return 1 - left / (sum(map(len, runs)) * _size_of_run(layer, architecture, recipe, 1))


def sizes_of_runs(model: PreTrainedModel, recipe: FusionRecipe) -> tuple[np.ndarray, int]:
    """What runs of layers have when they become one, and what all layers keep in any case.

    Returns:
        (layers + 1, layers + 1), parameters of the run i .. j-1 at [i, j] if its layers are of one shape; and the
        parameters that are in none of them: norms and biases, where weights are shared.
    """
    architecture = architecture_for(model)
    layers = architecture.layer_list(model)
    sizes = np.zeros((len(layers) + 1, len(layers) + 1), dtype=np.int64)
    for start, layer in enumerate(layers):
        for end in range(start + 1, len(layers) + 1):
            sizes[start, end] = _size_of_run(layer, architecture, recipe, end - start)
    single = sum(sizes[i, i + 1] for i in range(len(layers)))
    return sizes, sum(parameter.numel() for parameter in layers.parameters()) - int(single)


def _size_of_run(layer: nn.Module, architecture: LayerArchitecture, recipe: FusionRecipe, count: int) -> int:
    """Parameters of so many layers like this one whose blocks become one; where weights are shared, of matrices."""
    owned = _parameters(layer, architecture, recipe)
    size = sum(tensor.numel() for tensor in owned if recipe.mode == "depth" or is_shared(tensor))
    if recipe.mode == "depth" or count == 1:
        return size
    for kind in _kinds(architecture, recipe):
        slots = tuple(range(count))
        for module, rank in relaxed_maps(
            layer, architecture, Tie(kind, slots, Source(slots), recipe.mode, recipe.rank)
        ).values():
            outs, ins = out_in(module, module.weight).shape
            size += count * rank * outs + (count if recipe.mode == "share" else 1) * rank * ins
            size -= outs * ins if recipe.mode == "basis" else 0
    return size


def _kinds(architecture: LayerArchitecture, recipe: FusionRecipe) -> list[str]:
    return [kind for kind in architecture.kinds if recipe.blocks in ("layer", "separate", kind)]


def _parameters(layer: nn.Module, architecture: LayerArchitecture, recipe: FusionRecipe) -> list[nn.Parameter]:
    """Those of a layer that belong to the blocks that a recipe is about."""
    kinds = _kinds(architecture, recipe)
    return [tensor for name, tensor in layer.named_parameters() if architecture.owner(name) in kinds]
