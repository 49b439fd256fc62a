"""Fusion of a model that is larger than memory: original and result move through the layers side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...calibration.contract import check_contract
from ...calibration.disk import StoredTensors
from ...calibration.layerwise import LayerwiseForward
from ...calibration.refit.base import RefitReport
from ...calibration.refit.refit import repair_of
from ...calibration.samples import Sample
from ...calibration.teacher_states import TeacherStates
from ...errors import RecipeError, UnsupportedModelError
from ...evaluation.precision import dtype_in_file
from ...models.architectures import LayerArchitecture, TransformerArchitecture, architecture_for, architecture_of
from ...models.modeling import names_in_files
from ...models.paging import PagedWeights, empty, fill, hollow, in_memory
from ...models.surgery.checks import check_plan, check_structure
from ...models.surgery.layers import target_config
from ...models.surgery.size import are_unlike
from ...models.surgery.weights import layer_weights
from ...plan import Plan
from ...recipe import FusionRecipe
from .grouping import TOKENS_PER_STATE, groups_of, longest, of_one_shape, unexplained
from .planner import divider, group_edit, layer_importance_of, plan_evenly
from .targets import kinds_of, settled

_NEEDED = {"mode": "depth", "blocks": "layer", "cluster": "auto", "align": "none", "effort": "low"}
"""Values of recipe fields that need no more than one layer at a time."""

_OPERATORS = ("auto", "select", "freeze")

Layer = dict[str, Tensor]
"""Weights of a layer by their names in it, in the data type of the file."""

Row = Mapping[str, Any]


class Finished(NamedTuple):
    """A layer of the result, and the rows of the report for its maps."""

    layer: Layer
    rows: list[Row]


def plan_by_layers(model: PreTrainedModel, recipe: FusionRecipe, batches: list[Mapping[str, Any]]) -> Plan:
    """Choose the groups of effort `low`, in one pass of the original over some of the batches.

    Args:
        model: Model from `paged_model`.
        recipe: Settings of the fusion.
        batches: Calibration batches.

    Raises:
        RecipeError: Setting that needs the whole model in memory, or target that cannot be met.
        UnsupportedModelError: Unknown architecture, or model that cannot be fused.
    """
    for name, needed in _NEEDED.items():
        if (value := getattr(recipe, name)) != needed:
            raise RecipeError(
                f"{name}={value!r} needs the whole model in memory: use {name}={needed!r}, or load the model and pass "
                "it to fuse()."
            )
    if recipe.operator not in _OPERATORS or recipe.is_timed:
        asked = "a latency target" if recipe.is_timed else f"operator={recipe.operator!r}"
        raise RecipeError(
            f"{asked} needs the whole model in memory: use {', '.join(_OPERATORS)}, and a target in layers, parameters "
            "or bytes; or load the model and pass it to fuse()."
        )
    architecture = architecture_for(model, stack=recipe.stack)
    check_structure(model, architecture)
    if not isinstance(architecture, TransformerArchitecture):
        raise UnsupportedModelError(
            f"{model.config.model_type!r} is a convolutional network, and only transformers are fused layer by layer: "
            "load the model, and pass it to fuse()."
        )
    recipe = settled(model, recipe)
    even = plan_evenly(model, recipe)
    check_contract(model, batches, architecture)
    sample, (kind,) = Sample.of(batches), kinds_of(model, recipe)
    groups = groups_of(even, kind)
    if recipe.refit != "none":  # the costs are what a repair cannot restore
        unlike = are_unlike(model, recipe.stack)
        size = even.num_layers if unlike else longest(even.num_layers, len(groups))
        cost = _costs(model, architecture, sample, size)
        groups = divider(model, recipe)(cost, len(groups))
    importance = layer_importance_of(model, batches, recipe.stack)
    edits = tuple(group_edit(kind, group, recipe, importance) for group in groups if len(group) > 1)
    notes = replace(even.notes, recipe=asdict(recipe), calibration=f"{sum(map(len, sample.held_out))} sequences")
    return replace(even, edits=edits, notes=notes)


def _costs(model: PreTrainedModel, architecture: LayerArchitecture, sample: Sample, size: int) -> np.ndarray:
    """Cost of each run of up to `size` layers, from one pass over as many of the batches as the costs need."""
    layerwise = LayerwiseForward(model, sample, architecture)
    chosen = layerwise.spread(TOKENS_PER_STATE * layerwise.states[0].shape[-1])
    part = Sample(*([of[index] for index in chosen] for of in (sample.batches, sample.held_out, sample.selection)))
    states = TeacherStates(LayerwiseForward(model, part, architecture))
    return of_one_shape(states.layers, unexplained(states, size, forget=True))


class LayerByLayer:
    """Fusion by a plan of whole layers in depth, with one layer of the result in memory at a time.

    The original and the result move through the layers side by side. Each layer of the result is combined, repaired,
    and rounded to the data type of the file before it runs, so that later layers repair the rounding too, and so that
    a run that resumes computes the same.

    Args:
        model: Model from `paged_model`, with its weights attached.
        weights: Weights of the model.
        plan: Plan from `plan_by_layers`.
        batches: Calibration batches.

    Attributes:
        result: The smaller model. Its layers have no weights once they have run.
        names: Name of each weight of the original in its files.

    Raises:
        PlanError: The plan does not fit the model.
    """

    def __init__(
        self, model: PreTrainedModel, weights: PagedWeights, plan: Plan, batches: list[Mapping[str, Any]]
    ) -> None:
        recipe = FusionRecipe(**plan.notes.recipe)
        self.architecture = architecture_of(plan, model)
        check_plan(model, self.architecture, plan)
        self.plan, self.slots, self.dtype = plan, plan.layout().slots, dtype_in_file(model)
        self.result = hollow(type(model), target_config(model.config, self.architecture, plan.layout()))
        weights.attach(self.result, self.architecture, layers=False)
        self.names = names_in_files(model, weights.files)
        sample = Sample.of(batches)
        every = [mask[mask] for mask in sample.evaluated if mask.any()]
        held_out = Sample(sample.held_out_batches, every, [~mask for mask in every])
        self._teacher = TeacherStates(LayerwiseForward(model, sample, self.architecture))
        # outputs of the first layer may be arguments of the others, such as the position bias of T5
        fill(self.architecture.layer_list(self.result)[0], self._combined(0))
        self._student = LayerwiseForward(self.result, sample, self.architecture)
        unrepaired = LayerwiseForward(self.result, held_out, self.architecture)
        self._stopped = {0: unrepaired}  # the held-out sequences, by the depth in the result where the repair ends
        self._repair = None if recipe.refit == "none" else repair_of(self._student, self._teacher, plan, recipe.refit)
        self._rows: list[Row] = []

    @torch.no_grad()
    def run(
        self,
        finished: Callable[[int], Finished | None],
        write: Callable[[int, Finished], None],
        undo: Callable[[int, Layer], None],
    ) -> RefitReport:
        """Make all layers of the result, front to back.

        Args:
            finished: Function that returns a layer that an earlier run has written, by its depth in the result; None
                for other layers.
            write: Function that writes a layer.
            undo: Function that writes a layer without its repair. It is called in the end, for all layers or for those
                behind the last edit, if the calibration loss is lower without their repair.

        Returns:
            The calibration loss before and after the repair.
        """
        for index in tqdm(range(len(self.slots)), "Fusing", unit="layer", disable=None):
            layer = self._student.layers[index]
            fill(layer, self._combined(index))
            for stopped in self._stopped.values():
                stopped.advance()
            made = finished(index)
            if made is None:
                made = self._repaired(index)
                write(index, made)
            fill(layer, _to(self.result.dtype, made.layer))
            self._rows += made.rows
            self._student.advance()
            empty(layer, made.layer)
            self._teacher.forget(self.slots[index].layers[-1] + 1)
            if self._repair is not None and self._repair.may_stop:
                self._stopped[index + 1] = self._held_out()
        losses = {depth: self._teacher.loss(stopped) for depth, stopped in self._stopped.items()}
        losses[len(self.slots)] = self._teacher.loss(self._student)
        end = min(losses, key=lambda depth: (math.inf if math.isnan(losses[depth]) else losses[depth], -depth))
        for index in tqdm(range(end, len(self.slots)), "Undoing the repair", unit="layer", disable=None):
            undo(index, _to(self.dtype, self._combined(index)))
        kept = self._repair is not None and end > 0
        rows = tuple(row for row in self._rows if row["layer"] < (end or len(self.slots)))
        return RefitReport(losses[0], losses[end], kept=kept, blocks=rows)

    def loss_of(self, model: PreTrainedModel) -> float:
        """Calibration loss of another model on the same held-out sequences, after `run`."""
        layerwise = LayerwiseForward(model, self._stopped[0].sample, self.architecture)
        while layerwise.depth < len(layerwise.layers):
            layerwise.advance()
        return self._teacher.loss(layerwise)

    def _held_out(self) -> LayerwiseForward:
        """The held-out sequences where the student is."""
        found = copy.copy(self._stopped[0])
        found.depth, found.states = self._student.depth, StoredTensors()
        for _, states in self._student.held_out_states():
            found.states.append(states)
        return found

    def _combined(self, index: int) -> Layer:
        """Weights of a layer of the result before its repair, in float32, rounded to the data type of the file."""
        slot, layers = self.slots[index], self._teacher.layers
        with in_memory([layers[slot.whole.kept]]):  # all operators of `_OPERATORS` start from this layer alone
            states = {layer: layers[layer].state_dict() for layer in slot.layers}
            return _to(self.result.dtype, _to(self.dtype, layer_weights(self.architecture, states, slot)))

    def _repaired(self, index: int) -> Finished:
        rows = len(self._repair.blocks) if self._repair else 0
        if self._repair is not None:
            self._repair.repair()
        layer = self._student.layers[index]
        return Finished(_to(self.dtype, layer.state_dict()), self._repair.blocks[rows:] if self._repair else [])


def _to(dtype: torch.dtype, layer: Layer) -> Layer:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in layer.items()}
