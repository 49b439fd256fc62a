"""Layer Fusion (O'Neill, Ver Steeg, Galstyan, ACML 2021): cluster similar blocks and make each cluster one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..adapters import READERS, Block, TransformerAdapter, adapter_for, linear_maps
from ..calibration import Batches, Sample, observe
from ..edits import check_model, is_shared, reshape, target_config, tied_weights, untied_state
from ..errors import RecipeError
from ..math import cluster
from ..math.similarity import ON_ACTIVATIONS, ON_WEIGHTS
from ..modes import eval_mode
from ..plan import Fuse, Kind, Plan
from ..recipe import FusionRecipe
from ..walk import Walk

_CLUSTERS = {
    "auto": cluster.adjacent,
    "adjacent": cluster.adjacent,
    "global": cluster.connected,
    "agglomerative": cluster.agglomerative,
}

Importance = Callable[[], Sequence[float]] | None

_PART = 0.25
"""Of the calibration batches, the share that the importance of layers is taken from."""


def plan_fusion(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> Plan:
    """Decide which blocks of a model to fuse.

    Args:
        model: a stock model with a registered adapter.
        recipe: what is asked for.
        batches: calibration batches, needed by the similarities that compare activations; read once.

    Returns:
        A plan of `Fuse` edits; its `notes` hold the recipe and, for each kind of block, the matrix of distances it was
        decided from.

    Raises:
        RecipeError: the target cannot be met, or the similarity needs batches and there are none.
        DataError: the batches hold no tokens, or too few for the similarity.
        UnsupportedModelError: no adapter for the architecture, or a model that cannot be fused.
    """
    adapter = adapter_for(model)
    check_model(model, adapter)
    depth = len(adapter.layer_list(model))
    keeps = _keeps(model, recipe, depth)
    distances = block_distances(model, adapter, recipe, batches)
    importance = importance_of(model, batches)
    notes = {
        "recipe": asdict(recipe),
        "distances": {
            kind: [[float(f"{value:.6g}") for value in row] for row in matrix.tolist()]
            for kind, matrix in distances.items()
        },
    }

    def plan(keep: int) -> Plan:
        groups = {kind: _CLUSTERS[recipe.cluster](matrix, keep) for kind, matrix in distances.items()}
        return Plan(adapter.model_type, depth, _edits(recipe, groups, importance), notes)

    return next(found for keep in keeps if fits(model, recipe, found := plan(keep)))


def _kinds(recipe: FusionRecipe) -> tuple[Kind, ...]:
    """The kinds of block that are grouped, each on its own."""
    return ("attention", "mlp") if recipe.blocks == "separate" else (recipe.blocks,)


def group_edit(kind: Kind, group: tuple[int, ...], recipe: FusionRecipe, importance: Importance) -> Fuse:
    """What becomes of a group by the operator of a recipe.

    Operator `auto` starts from one that the refit works well with. In depth mode that is `select`, or where the refit
    does not choose, the first layer of the group: it alone reads what it was trained to read, and the refit leads its
    outputs to the end of the group. Where nothing is refitted, it is the layer nearest the middle. Weights that are
    shared are averaged after their heads and units were matched.

    Args:
        importance: per layer of the model, see `importances`; None where there are no calibration batches.
    """
    rest = {"mode": recipe.mode, "align": recipe.align, "rank": recipe.rank}
    if recipe.operator == "weighted":
        if importance is None:
            raise RecipeError(
                "operator='weighted' weighs layers by how much they change the residual stream: pass batches=, or use "
                "operator='mean'."
            )
        shares = [importance()[layer] for layer in group]
        weights = [share / sum(shares) for share in shares] if sum(shares) else [1 / len(group)] * len(group)
        return Fuse(kind, group, operator="weighted", weights=tuple(weights), **rest)
    if recipe.operator == "select":
        if importance is None:
            raise RecipeError(
                "operator='select' chooses heads and units by calibration: pass batches=, or use 'freeze'."
            )
        return Fuse(kind, group, operator="select", keep=group[0], **rest)
    if recipe.operator != "auto":
        return Fuse(kind, group, operator=recipe.operator, **rest)
    repaired = importance is not None and recipe.refit != "none"
    if recipe.mode == "depth":
        chooses = repaired and recipe.refit == "full" and kind != "attention"
        operator = "select" if chooses else "freeze"
        return Fuse(kind, group, operator=operator, keep=group[0] if repaired else None, **rest)
    return Fuse(kind, group, operator="mean", **{**rest, "align": "rotation"})


def importance_of(model: PreTrainedModel, batches: Batches | None) -> Importance:
    """`importances` when they are asked for, taken once; None without batches."""
    if batches is None:
        return None
    return functools.cache(lambda: importances(model, Sample.of(batches, _PART)))


def importances(model: PreTrainedModel, sample: Sample) -> list[float]:
    """Per layer, 1 - E cos of what enters and what leaves it (block influence, ShortGPT, Men et al. 2024, eq. 1)."""
    found = []
    with eval_mode(model):
        walk = Walk(model, sample)
        while walk.depth < len(walk.layers):
            before = walk.states
            walk.advance()
            cosines = [
                cosine_similarity(walk.rows(i, before[i]), walk.rows(i, walk.states[i]), dim=-1)
                for i in range(len(before))
            ]
            found.append(max(0.0, 1 - torch.cat(cosines).double().mean().item()))
    return found


def _edits(recipe: FusionRecipe, groups: Mapping[Kind, cluster.Groups], importance: Importance) -> list[Fuse]:
    return [
        group_edit(kind, group, recipe, importance)
        for kind, found in groups.items()
        for group in found
        if len(group) > 1
    ]


def _keeps(model: PreTrainedModel, recipe: FusionRecipe, depth: int) -> Sequence[int]:
    """How many blocks of each kind may stay distinct, the best first; the first whose plan fits is taken.

    Raises `RecipeError` where none can, before minutes of calibration are spent.
    """
    if depth < 2:
        raise RecipeError(f"the model has {depth} layer: there is nothing to fuse.")
    if recipe.keep_layers is not None:
        if recipe.keep_layers >= depth:
            raise RecipeError(
                f"keep_layers={recipe.keep_layers} of the model's {depth} fuses nothing: use 1 to {depth - 1}."
            )
        return [recipe.keep_layers]
    if recipe.ratio is not None:
        # all layers of the supported architectures have the same size, so the nearest ratio is the nearest count
        keep = round(depth * (1 - recipe.ratio))
        if not 1 <= keep < depth:
            raise RecipeError(
                f"ratio={recipe.ratio} is out of reach with {depth} {recipe.blocks} blocks: whole blocks allow "
                f"{1 / depth:.3f} to {1 - 1 / depth:.3f}."
            )
        return [keep]

    # one group of everything is the least, whatever the distances will be
    least = _edits(recipe, {kind: [tuple(range(depth))] for kind in _kinds(recipe)}, lambda: [1.0] * depth)
    smallest, whole = (planned_size(model, Plan(model.config.model_type, depth, edits)) for edits in (least, ()))
    for name, unit, most in _limits(recipe):
        if whole[unit] <= most:
            raise RecipeError(
                f"{name}={most:.12g} fuses nothing, the model has {whole[unit]} {unit}: use less, down to "
                f"{smallest[unit]}."
            )
        if smallest[unit] > most:
            raise RecipeError(
                f"{name}={most:.12g} is out of reach: with all {depth} {' and '.join(_kinds(recipe))} blocks as one "
                f"in mode {recipe.mode!r}, {smallest[unit]} {unit} remain. Use that or more, or other blocks or mode."
            )
    return range(depth - 1, 0, -1)


def _limits(recipe: FusionRecipe) -> list[tuple[str, str, float]]:
    """Name, unit and value of each target that limits the size of the whole model."""
    limits = [("max_parameters", "parameters", recipe.max_parameters), ("max_bytes", "bytes", recipe.max_bytes)]
    return [limit for limit in limits if limit[2] is not None]


def fits(model: PreTrainedModel, recipe: FusionRecipe, plan: Plan) -> bool:
    """Whether what a plan leads to is as small as the recipe asks for."""
    return all(planned_size(model, plan)[unit] <= most for _, unit, most in _limits(recipe))


def planned_size(model: PreTrainedModel, plan: Plan) -> dict[str, int]:
    """The size of what `apply(model, plan)` gives, from shapes alone.

    Returns:
        `parameters`, shared ones counted once; `bytes` of weights and buffers on disk, without the header of the file.
    """
    adapter = adapter_for(model)
    # how weights become one changes no shape, and 'freeze' is possible for all layers, also for those of several types
    frozen = [replace(edit, operator="freeze", weights=None) if isinstance(edit, Fuse) else edit for edit in plan.edits]
    layout = replace(plan, edits=frozen).layout()
    with torch.device("meta"):
        result = type(model)(target_config(model.config, adapter, layout))
        reshape(result, adapter, layout)
    copies = tied_weights(result, adapter, layout)
    stored = [tensor for name, tensor in untied_state(result).items() if name not in copies]
    return {
        "parameters": sum(tensor.numel() for tensor in stored if isinstance(tensor, torch.nn.Parameter)),
        "bytes": sum(
            tensor.numel() * (model.dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in stored
        ),
    }


def block_distances(
    model: PreTrainedModel, adapter: TransformerAdapter, recipe: FusionRecipe, batches: Batches | None
) -> dict[Kind, Tensor]:
    """Distances between all blocks of each kind that the recipe fuses, by its similarity: (depth, depth) float64.

    Raises:
        RecipeError: the similarity compares activations and there are no batches.
        DataError: the batches hold no tokens, or too few for the similarity.
    """
    kinds = _kinds(recipe)
    if not recipe.needs_batches:
        measure = ON_WEIGHTS[recipe.similarity]
        return {kind: measure(_aligned_maps(model, adapter, kind)).cpu() for kind in kinds}
    if batches is None:
        raise RecipeError(
            f"similarity={recipe.similarity!r} compares activations: pass batches=, an iterable of model inputs, "
            f"or use one that compares weights: {', '.join(ON_WEIGHTS)}."
        )
    measures = {kind: ON_ACTIVATIONS[recipe.similarity]() for kind in kinds}
    observe(model, adapter, batches, {kind: measure.update for kind, measure in measures.items()})
    return {kind: measure.distance().cpu() for kind, measure in measures.items()}


def _aligned_maps(model: PreTrainedModel, adapter: TransformerAdapter, kind: Kind) -> Iterator[Tensor]:
    """For each linear map of a kind of block, its matrices in all layers: (layers, units, stream) float64.

    The columns are coordinates of the residual stream, also for maps that write to it. A norm in front of the block
    scales these coordinates, which is part of what the maps behind it compute.
    """
    for part in ("attention", "mlp") if kind == "layer" else (kind,):
        blocks = [block for block in adapter.blocks(model) if block.kind == part]
        maps = [linear_maps(model, block) for block in blocks]
        gains = [None if adapter.post_norm else _gain(model, block) for block in blocks]
        for role, first in maps[0].items():
            if not is_shared(first.weight):
                continue
            weights = torch.stack([found[role].weight.double() for found in maps])
            if role == "out":
                weights = weights.transpose(1, 2)
            elif role in READERS and gains[0] is not None:
                weights = weights * torch.stack(gains).unsqueeze(1)
            yield weights.contiguous()


def _gain(model: PreTrainedModel, block: Block) -> Tensor | None:
    weight = getattr(model.get_submodule(block.modules["norm"]), "weight", None)
    return None if weight is None else weight.detach().double()
