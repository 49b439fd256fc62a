"""Layer Fusion (O'Neill, Ver Steeg, Galstyan, ACML 2021): cluster similar blocks and fuse each cluster."""

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
from ...evaluation.modes import eval_mode
from ...math import cluster
from ...models.architectures import architecture_for
from ...models.surgery.checks import check_model
from ...models.surgery.size import are_unlike, size_of_blocks, sizes_of_runs
from ...plan import Align, Fuse, Kind, Plan, PlanNotes
from ...recipe import FusionRecipe
from .distances import block_distances
from .grouping import even
from .targets import counts_of, fits, kinds_of, settled

_CLUSTERS = {
    "global": cluster.connected,
    "agglomerative": cluster.agglomerative,
}

LayerImportance = Callable[[], Sequence[float]] | None

_PART = 0.25
"""Share of the calibration batches that the importance of layers is measured on."""


_LAST_RESORT = 1e9
"""Cost of a run whose loss is infinite, where every partition contains such a run."""


def plan_fusion(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> Plan:
    """Decide which blocks of a model to fuse.

    Args:
        model: Stock model with a registered architecture.
        recipe: Settings of the fusion.
        batches: Calibration batches, which similarities of activations need; read once.

    Returns:
        A plan of `Fuse` edits. Its `notes` hold the recipe and the matrix of distances for each kind of block.

    Raises:
        RecipeError: Target that cannot be met, or similarity that needs missing batches.
        DataError: Batches without tokens, or with too few for the similarity.
        UnsupportedModelError: Unknown architecture, or a model that cannot be fused.
    """
    check_model(model, architecture_for(model, stack=recipe.stack))
    return planned(model, settled(model, recipe), batches)


def planned(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> Plan:
    """Plan as `plan_fusion` does, for a model that passed `check_model` and a recipe from `settled`."""
    architecture = architecture_for(model, stack=recipe.stack)
    depth = len(architecture.layer_list(model))
    keeps = counts_of(model, recipe)
    distances = block_distances(model, kinds_of(model, recipe), recipe.similarity, batches, recipe.stack)
    divide = divider(model, recipe)
    importance = layer_importance_of(model, batches, recipe.stack)
    notes = PlanNotes(
        recipe=asdict(recipe),
        distances={
            kind: [[_rounded(value) for value in row] for row in matrix.tolist()] for kind, matrix in distances.items()
        },
    )

    def plan(keep: int) -> Plan:
        groups = {}
        for kind, matrix in distances.items():
            if recipe.cluster in ("auto", "adjacent"):
                groups[kind] = divide(cluster.inside_runs(matrix), keep)
            else:
                groups[kind] = _CLUSTERS[recipe.cluster](_finite(matrix), keep)
        return architecture.plan(depth, _edits(recipe, groups, importance), notes)

    found = next((found for keep in keeps if fits(model, recipe, found := plan(keep))), None)
    if found is None:
        raise RecipeError(
            f"{recipe.mode} fusion by cluster {recipe.cluster!r} misses the target with layers of different shapes: "
            "keep more, or use cluster='adjacent'."
        )
    return found


def plan_evenly(model: PreTrainedModel, recipe: FusionRecipe) -> Plan:
    """Plan a fusion from shapes alone, in runs of nearly equal length, for a model without weights.

    Raises:
        RecipeError: Target that cannot be met, or that needs a measurement.
    """
    architecture, recipe = architecture_for(model, stack=recipe.stack), settled(model, recipe)
    depth = len(architecture.layer_list(model))
    for keep in counts_of(model, recipe):
        groups = {kind: even(depth, keep) for kind in kinds_of(model, recipe)}
        found = architecture.plan(depth, _edits(recipe, groups, None))
        if fits(model, recipe, found):
            return found
    raise RecipeError(
        "no runs of about equal length meet the target: keep fewer layers, or use a checkpoint instead of a config."
    )


def divider(model: PreTrainedModel, recipe: FusionRecipe) -> Callable[[np.ndarray, int], cluster.Groups]:
    """Return a function that divides layers into runs that meet the target, by the costs and the number of runs.

    Where layers differ in size, a `ratio` limits the removed parameters, not the number of remaining layers.

    Raises:
        RecipeError: Target that no division into runs of one shape meets.
    """
    layers = architecture_for(model, stack=recipe.stack).layer_list(model)
    unlike = are_unlike(model, recipe.stack)
    if unlike and recipe.ratio is not None:
        whole = size_of_blocks(model, recipe)
        sizes, kept = sizes_of_runs(model, recipe)

    def divide(cost: np.ndarray, count: int) -> cluster.Groups:
        if unlike and recipe.ratio is not None:
            found = cluster.partition_within(cost, sizes, (1 - recipe.ratio) * whole - kept)
            if found is None:
                raise RecipeError(f"ratio={recipe.ratio} is out of reach: only layers of one shape can be fused.")
            return found
        found = cluster.partition(cost, count)
        if found is None and not unlike:  # the best partition, by an operator that works for all layers
            found = cluster.partition(np.where(np.isfinite(cost), cost, _LAST_RESORT), count)
        if found is None:
            raise RecipeError(
                f"{count} groups are too few for the shapes of these {len(layers)} layers: only those of one shape "
                "can be fused. Keep more."
            )
        return found

    return divide


def _rounded(value: float) -> float | None:
    """Round to six digits for the notes; None for layers that can never be fused."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _finite(distance: Tensor) -> Tensor:
    """Replace infinite distances with values far larger than all others."""
    known = distance[distance.isfinite()].max()
    return distance.where(distance.isfinite(), 1e6 * (1 + known))


def group_edit(kind: Kind, group: tuple[int, ...], recipe: FusionRecipe, importance: LayerImportance) -> Fuse:
    """Return the edit that fuses a group by the operator of a recipe.

    Operator `auto` starts from one that the refit improves well. In depth mode that is `select`. Where the refit cannot
    select, it is `freeze`, which keeps the first layer of the group: only this layer still reads the states it was
    trained on, and the refit fits its outputs to the end of the group. Without a refit, the layer nearest the middle is
    kept. Shared weights are averaged after matching their heads and units.

    Args:
        kind: Kind of block.
        group: Layers of the group.
        recipe: Settings of the fusion.
        importance: Function that returns the importance of each layer of the model, see `layer_importances`; None
            without calibration batches.
    """
    rest = {"mode": recipe.mode, "align": recipe.align, "rank": recipe.rank}
    if recipe.operator == "weighted":
        if importance is None:
            raise RecipeError(
                "operator='weighted' weights layers by their change of the residual stream: pass batches=, or use "
                "operator='mean'."
            )
        shares = [importance()[layer] for layer in group]
        weights = [share / sum(shares) for share in shares] if sum(shares) else [1 / len(group)] * len(group)
        return Fuse(kind, group, operator="weighted", weights=tuple(weights), **rest)
    if recipe.operator == "select":
        if importance is None:
            raise RecipeError(
                "operator='select' selects heads and units on calibration batches: pass batches=, or use 'freeze'."
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


def operator_candidates(edit: Fuse, recipe: FusionRecipe) -> list[Fuse]:
    """Return the candidates for a group: its edit and, with operator `auto`, kept layers and the mean."""
    if recipe.operator != "auto":
        return [edit]
    plain = replace(edit, operator="freeze", keep=None, align="none")
    kept = [replace(plain, keep=layer) for layer in dict.fromkeys((edit.layers[0], plain.source.kept))]
    mean = replace(plain, operator="mean", align=matching(edit.kind))
    return list(dict.fromkeys([edit, *kept, mean]))


def matching(kind: Kind) -> Align:
    """Return the alignment with the least loss of averages. Channels of convolutions cannot be rotated."""
    return "permutation" if kind == "conv" else "rotation"


def layer_importance_of(model: PreTrainedModel, batches: Batches | None, stack: str | None = None) -> LayerImportance:
    """Return a function that measures `layer_importances` once, on first use; None without batches."""
    if batches is None:
        return None
    return functools.cache(lambda: layer_importances(model, Sample.of(batches, _PART), stack))


def layer_importances(model: PreTrainedModel, sample: Sample, stack: str | None = None) -> list[float]:
    """Return 1 - E cos of the states around each layer (block influence, ShortGPT, Men et al. 2024, eq. 1)."""
    found = []
    with eval_mode(model):
        layerwise = LayerwiseForward(model, sample, architecture_for(model, stack=stack))
        while layerwise.depth < len(layerwise.layers):
            before = layerwise.states
            layerwise.advance()
            if before[0].shape != layerwise.states[0].shape:  # no other layer can replace this one
                found.append(1.0)
                continue
            cosines = [
                cosine_similarity(layerwise.rows(i, before[i]), layerwise.rows(i, layerwise.states[i]), dim=-1)
                for i in range(len(before))
            ]
            found.append(max(0.0, 1 - torch.cat(cosines).double().mean().item()))
    return found


def _edits(recipe: FusionRecipe, groups: Mapping[Kind, cluster.Groups], importance: LayerImportance) -> list[Fuse]:
    return [
        group_edit(kind, group, recipe, importance)
        for kind, found in groups.items()
        for group in found
        if len(group) > 1
    ]
