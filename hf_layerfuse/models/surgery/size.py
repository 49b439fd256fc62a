"""Size of a fused model, predicted from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...evaluation.precision import dtype_in_file
from ...plan import Fuse, Plan, Source, Tie
from ...recipe import FusionRecipe
from ..architectures import LayerArchitecture, architecture_for, architecture_of
from ..modules.shared_linear import out_in
from .checks import shapes_of
from .layers import is_shared, relaxed_maps, reshape, target_config, tied_weights
from .weights import untied_state


def are_unlike(model: PreTrainedModel, stack: str | None = None) -> bool:
    """Whether layers differ in shape. If so, the number of layers does not determine their size."""
    return len({shapes_of(layer) for layer in architecture_for(model, stack=stack).layer_list(model)}) > 1


def size_of_blocks(model: PreTrainedModel, recipe: FusionRecipe) -> int:
    """Number of parameters of the blocks that a recipe covers; `ratio` is a share of this number."""
    architecture = architecture_for(model, stack=recipe.stack)
    layers = architecture.layer_list(model)
    return sum(tensor.numel() for layer in layers for tensor in _parameters(layer, architecture, recipe))


def planned_size(model: PreTrainedModel, plan: Plan) -> dict[str, int]:
    """Size of the model that `apply(model, plan)` returns, from shapes alone.

    Returns:
        `parameters`, the number of parameters, with shared ones counted once; and `bytes`, the size of weights and
        buffers on disk, without the file header.
    """
    dtype = dtype_in_file(model)
    architecture = architecture_of(plan, model)
    # the operator does not change shapes, and 'freeze' is allowed for all layers, even if their types differ
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
            tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in stored
        ),
    }


def removed_by_even_runs(model: PreTrainedModel, recipe: FusionRecipe, runs: Sequence[Sequence[int]]) -> float:
    """Share of the block parameters that is removed when each run becomes one; all layers have one shape.

    With shared weights, each depth keeps its norms and biases; these are too few to count. Residuals and coefficients
    of each depth do count.
    """
    architecture = architecture_for(model, stack=recipe.stack)
    layer = architecture.layer_list(model)[0]
    left = sum(_size_of_run(layer, architecture, recipe, len(run)) for run in runs)
    return 1 - left / (sum(map(len, runs)) * _size_of_run(layer, architecture, recipe, 1))


def sizes_of_runs(model: PreTrainedModel, recipe: FusionRecipe) -> tuple[np.ndarray, int]:
    """Number of parameters of each fused run of layers, and the number that all plans keep.

    Returns:
        Two values. The first is an array of shape (layers + 1, layers + 1): entry [i, j] is the number of parameters of
        the fused run i .. j-1, if its layers have one shape. The second is the number of parameters of these blocks
        outside all runs, such as norms and biases where weights are shared.
    """
    architecture = architecture_for(model, stack=recipe.stack)
    layers = architecture.layer_list(model)
    sizes = np.zeros((len(layers) + 1, len(layers) + 1), dtype=np.int64)
    for start, layer in enumerate(layers):
        for end in range(start + 1, len(layers) + 1):
            sizes[start, end] = _size_of_run(layer, architecture, recipe, end - start)
    single = sum(sizes[i, i + 1] for i in range(len(layers)))
    return sizes, size_of_blocks(model, recipe) - int(single)


def _size_of_run(layer: nn.Module, architecture: LayerArchitecture, recipe: FusionRecipe, count: int) -> int:
    """Number of parameters of `count` fused layers of this shape. With shared weights, only matrices count."""
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
    """Parameters of a layer that belong to the blocks that a recipe covers."""
    kinds = _kinds(architecture, recipe)
    return [tensor for name, tensor in layer.named_parameters() if architecture.owner(name) in kinds]
