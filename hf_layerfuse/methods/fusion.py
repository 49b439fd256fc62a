"""Layer Fusion (O'Neill, Ver Steeg, Galstyan, ACML 2021): cluster similar blocks and make each cluster one."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import TransformerAdapter, adapter_for
from ..calibration import Batches, states_after
from ..edits import check_model, is_shared
from ..errors import RecipeError
from ..math import cluster, similarity
from ..plan import Fuse, Plan
from ..recipe import FusionRecipe


def plan_fusion(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> Plan:
    """Decide which blocks of a model to fuse.

    Args:
        model: a stock model with a registered adapter.
        recipe: what is asked for.
        batches: calibration batches, needed by the similarities `cka` and `block_influence`.

    Returns:
        A plan of `Fuse` edits; its `notes` hold the recipe and the matrix of distances it was decided from.

    Raises:
        RecipeError: the target cannot be met, or the similarity needs batches and there are none.
        UnsupportedModelError: no adapter for the architecture, or a model that cannot be fused.
    """
    adapter = adapter_for(model)
    check_model(model, adapter)
    depth = len(adapter.layer_list(model))
    keep = _target(recipe, depth)
    distance = block_distances(model, adapter, recipe, batches)
    find_groups = cluster.adjacent if recipe.cluster == "adjacent" else cluster.connected
    edits = [
        Fuse(recipe.blocks, group, recipe.mode, recipe.operator)
        for group in find_groups(distance, keep)
        if len(group) > 1
    ]
    notes = {
        "recipe": dataclasses.asdict(recipe),
        "distances": [[float(f"{value:.6g}") for value in row] for row in distance.tolist()],
    }
    return Plan(adapter.model_type, depth, edits, notes)


def _target(recipe: FusionRecipe, depth: int) -> int:
    if depth < 2:
        raise RecipeError(f"the model has {depth} layer: there is nothing to fuse.")
    if recipe.ratio is not None:
        # all layers of the supported architectures have the same size, so the nearest ratio is the nearest count
        keep = round(depth * (1 - recipe.ratio))
        if not 1 <= keep < depth:
            raise RecipeError(
                f"ratio={recipe.ratio} is out of reach with {depth} {recipe.blocks} blocks: whole blocks allow "
                f"{1 / depth:.3f} to {1 - 1 / depth:.3f}."
            )
        return keep
    if recipe.keep_layers >= depth:
        raise RecipeError(
            f"keep_layers={recipe.keep_layers} of the model's {depth} fuses nothing: use 1 to {depth - 1}."
        )
    return recipe.keep_layers


def block_distances(
    model: PreTrainedModel, adapter: TransformerAdapter, recipe: FusionRecipe, batches: Batches | None
) -> Tensor:
    """Distances between all blocks of the kind that the recipe fuses, by its similarity: (depth, depth) float64.

    Raises:
        RecipeError: the similarity compares activations and there are no batches.
    """
    if recipe.needs_batches:
        if batches is None:
            raise RecipeError(
                f"similarity={recipe.similarity!r} compares activations: pass batches=, an iterable of model inputs, "
                "or use 'cosine' or 'euclidean', which compare weights."
            )
        measure = {"cka": similarity.cka, "block_influence": similarity.block_influence}[recipe.similarity]
        return measure(states_after(model, adapter, recipe.blocks, batches, seed=recipe.seed)).cpu()
    measure = {"cosine": similarity.cosine, "euclidean": similarity.euclidean}[recipe.similarity]
    kinds = ("attention", "mlp") if recipe.blocks == "layer" else (recipe.blocks,)
    weights = [
        {
            name: tensor
            for name, tensor in layer.named_parameters()
            if is_shared(tensor) and adapter.owner(name) in kinds
        }
        for layer in adapter.layer_list(model)
    ]
    return measure(weights).cpu()
