"""Layer Fusion (O'Neill, Ver Steeg, Galstyan, ACML 2021): cluster similar blocks and make each cluster one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ...calibration.layerwise import LayerwiseForward
from ...calibration.samples import Sample
from ...errors import RecipeError
from ...evaluation.batches import Batches
from ...evaluation.eval_mode import eval_mode
from ...math import cluster
from ...models.architectures import architecture_for
from ...models.surgery.checks import check_model
from ...models.surgery.size import are_unlike, sizes_of_runs
from ...plan import Align, Fuse, Kind, Plan
from ...recipe import FusionRecipe
from .distances import block_distances
from .grouping import even
from .targets import counts_of, fits, kinds_of, settled

_CLUSTERS = {
    "global": cluster.connected,
    "agglomerative": cluster.agglomerative,
}

Importance = Callable[[], Sequence[float]] | None

_PART = 0.25
"""Of the calibration batches, the share that the importance of layers is taken from."""


_LAST_RESORT = 1e9
"""The cost of a run that cannot be measured, where there is no way around it."""


def plan_fusion(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> Plan:
    """Decide which blocks of a model to fuse.

    Args:
        model: a stock model with a registered architecture.
        recipe: what is asked for.
        batches: calibration batches, needed by the similarities that compare activations; read once.

    Returns:
        A plan of `Fuse` edits; its `notes` hold the recipe and, for each kind of block, the matrix of distances it was
        decided from.

    Raises:
        RecipeError: the target cannot be met, or the similarity needs batches and there are none.
        DataError: the batches hold no tokens, or too few for the similarity.
        UnsupportedModelError: an unknown architecture, or a model that cannot be fused.
    """
    check_model(model, architecture_for(model))
    return planned(model, settled(model, recipe), batches)


def planned(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> Plan:
    """`plan_fusion` for a model that `check_model` accepted, and a recipe from `settled`."""
    architecture = architecture_for(model)
    depth = len(architecture.layer_list(model))
    keeps = counts_of(model, recipe)
    distances = block_distances(model, kinds_of(model, recipe), recipe.similarity, batches)
    divide = divider(model, recipe)
    importance = importance_of(model, batches)
    notes = {
        "recipe": asdict(recipe),
        "distances": {
            kind: [[_rounded(value) for value in row] for row in matrix.tolist()] for kind, matrix in distances.items()
        },
    }

    def plan(keep: int) -> Plan:
        groups = {}
        for kind, matrix in distances.items():
            if recipe.cluster in ("auto", "adjacent"):
                groups[kind] = divide(cluster.inside_runs(matrix), keep)
            else:
                groups[kind] = _CLUSTERS[recipe.cluster](_finite(matrix), keep)
        return Plan(architecture.model_type, depth, _edits(recipe, groups, importance), notes, architecture.kinds)

    found = next((found for keep in keeps if fits(model, recipe, found := plan(keep))), None)
    if found is None:
        raise RecipeError(
            f"{recipe.mode} fusion by cluster {recipe.cluster!r} cannot be that small with layers of different shapes: "
            "keep more, or use cluster='adjacent'."
        )
    return found


def plan_evenly(model: PreTrainedModel, recipe: FusionRecipe) -> Plan:
    """What a target comes to by shapes alone, in runs of as equal length as can be: for a model without weights.

    Raises:
        RecipeError: the target cannot be met, or needs a measurement.
    """
    architecture, recipe = architecture_for(model), settled(model, recipe)
    depth = len(architecture.layer_list(model))
    for keep in counts_of(model, recipe):
        groups = {kind: even(depth, keep) for kind in kinds_of(model, recipe)}
        found = Plan(architecture.model_type, depth, _edits(recipe, groups, None), kinds=architecture.kinds)
        if fits(model, recipe, found):
            return found
    raise RecipeError("no runs of even length are that small: keep less, or choose for a model with weights.")


def divider(model: PreTrainedModel, recipe: FusionRecipe) -> Callable[[np.ndarray, int], cluster.Groups]:
    """What divides layers into runs, by the costs of runs and the number of runs, so that the target is met.

    Where layers differ in size, a `ratio` is of what is removed, and not of how many are left.

    Raises:
        RecipeError: no division of layers of one shape into runs meets the target.
    """
    layers = architecture_for(model).layer_list(model)
    unlike = are_unlike(model)
    if unlike and recipe.ratio is not None:
        whole = sum(parameter.numel() for parameter in layers.parameters())
        sizes, kept = sizes_of_runs(model, recipe)

    def divide(cost: np.ndarray, count: int) -> cluster.Groups:
        if unlike and recipe.ratio is not None:
            found = cluster.partition_within(cost, sizes, (1 - recipe.ratio) * whole - kept)
            if found is None:
                raise RecipeError(f"ratio={recipe.ratio} is out of reach: only layers of one shape become one.")
            return found
        found = cluster.partition(cost, count)
        if found is None and not unlike:  # the best that there is, by an operator that works for all layers
            found = cluster.partition(np.where(np.isfinite(cost), cost, _LAST_RESORT), count)
        if found is None:
            raise RecipeError(
                f"{count} groups are too few for the shapes of these {len(layers)} layers: only those of one shape "
                "become one. Keep more."
            )
        return found

    return divide


def _rounded(value: float) -> float | None:
    """Six digits for the notes; None between layers that can never be one."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _finite(distance: Tensor) -> Tensor:
    """Distances in which those that are infinite are far larger than all others."""
    known = distance[distance.isfinite()].max()
    return distance.where(distance.isfinite(), 1e6 * (1 + known))


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
        chooses = repaired and recipe.refit == "full" and kind in ("layer", "mlp")
        operator = "select" if chooses else "freeze"
        return Fuse(kind, group, operator=operator, keep=group[0] if repaired else None, **rest)
    return Fuse(kind, group, operator="mean", **{**rest, "align": matching(kind)})


def candidates(edit: Fuse, recipe: FusionRecipe) -> list[Fuse]:
    """What may become of a group: the edit itself, and with operator `auto` each layer kept, and averages."""
    if recipe.operator != "auto":
        return [edit]
    plain = replace(edit, operator="freeze", keep=None, align="none")
    kept = [replace(plain, keep=layer) for layer in dict.fromkeys((edit.layers[0], plain.source.kept))]
    mean = replace(plain, operator="mean", align=matching(edit.kind))
    return list(dict.fromkeys([edit, *kept, mean]))


def matching(kind: Kind) -> Align:
    """The alignment that an average loses least with; channels between convolutions have no coordinates to turn."""
    return "permutation" if kind == "conv" else "rotation"


def importance_of(model: PreTrainedModel, batches: Batches | None) -> Importance:
    """`importances` when they are asked for, taken once; None without batches."""
    if batches is None:
        return None
    return functools.cache(lambda: importances(model, Sample.of(batches, _PART)))


def importances(model: PreTrainedModel, sample: Sample) -> list[float]:
    """Per layer, 1 - E cos of what enters and what leaves it (block influence, ShortGPT, Men et al. 2024, eq. 1)."""
    found = []
    with eval_mode(model):
        walk = LayerwiseForward(model, sample)
        while walk.depth < len(walk.layers):
            before = walk.states
            walk.advance()
            if before[0].shape != walk.states[0].shape:  # nothing else can do what this layer does
                found.append(1.0)
                continue
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
