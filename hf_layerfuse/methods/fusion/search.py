"""Candidates compete on calibration loss: groups of blocks, and the operator that fuses each group."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...calibration.contract import check_contract
from ...calibration.disk import WeightSnapshot
from ...calibration.layerwise import LayerwiseForward
from ...calibration.refit.base import RefitReport
from ...calibration.refit.refit import refit_by
from ...calibration.refit.transformer import selecting
from ...calibration.samples import Sample
from ...calibration.teacher_states import TeacherStates
from ...evaluation.batches import Batches
from ...evaluation.divergence import calibration_loss
from ...evaluation.modes import eval_mode, outside_inference_mode, take_modes
from ...models.apply import applied
from ...models.architectures import ATTENDING, architecture_for
from ...models.surgery.checks import check_model
from ...models.surgery.size import are_unlike
from ...plan import CandidatePlan, Kind, OperatorLoss, Plan
from ...recipe import FusionRecipe
from ..base import SearchResult
from ..trials import Trials, share_of
from .grouping import Groups, even, groups_of, longest, of_one_shape, unexplained
from .latency_search import search_budget
from .planner import LayerImportance, divider, group_edit, layer_importance_of, operator_candidates, planned
from .targets import fits, kinds_of, settled

TABLE_COST = 5
"""Cost limit of a table of losses, in forward passes of the original over all calibration data."""

MOVES = 12
"""Number of plans next to the best one that effort `high` tries."""


@outside_inference_mode
def search(model: PreTrainedModel, recipe: FusionRecipe, batches: Batches | None = None) -> SearchResult:
    """Make a model smaller with a recipe: choose the groups and the operators, apply, refit.

    With calibration data, `effort` sets the number of candidates:

    - `low`: groups by similarity (with cluster `auto`, by the nonlinearity of runs of layers), and one refit;
    - `medium`: also groups by an exact dynamic program over the calibration loss of each run of layers when it alone is
      fused and refitted. The operators of each group compete on that loss. The two results then compete, each
      refitted as a whole;
    - `high`: also plans next to the best one, each refitted as a whole.

    With a latency budget, each block of a transformer is kept, dropped, linearised or fused: see `search_budget`.

    Without calibration data, groups and operators come from the weights alone and nothing is refitted. The notes of the
    plan record this.

    Args:
        model: Stock model with a registered architecture; it is not changed.
        recipe: Settings of the fusion.
        batches: Calibration batches, read once.

    Returns:
        The new `model`, its `plan`, and the `report` of the refit, which is None without batches.

    Raises:
        RecipeError: Target that cannot be met, or recipe that needs missing batches.
        UnsupportedModelError: Unknown architecture, or a model that cannot be fused.
    """
    batches = None if batches is None else list(batches)
    if recipe.is_timed:
        return search_budget(model, recipe, batches)
    architecture = architecture_for(model, stack=recipe.stack)
    check_model(model, architecture)
    check_contract(model, batches, architecture)
    recipe = settled(model, recipe)
    first = planned(model, recipe, batches)
    if batches is None:
        logging.getLogger(__name__).warning(
            "no calibration batches: the weights alone decide, and nothing is refitted. Pass batches=, or heal the "
            "result before use."
        )
        notes = replace(first.notes, recipe=asdict(recipe), calibration="none: from the weights alone")
        return SearchResult(applied(model, first), replace(first, notes=notes), None)
    with eval_mode(model):
        found = _Search(model, recipe, batches, first).run()
    take_modes(found.model, model)
    return found


class _Search:
    """One search. `tried` holds all refitted plans, for the notes of the plan."""

    def __init__(self, model: PreTrainedModel, recipe: FusionRecipe, batches: list[Any], first: Plan) -> None:
        self.model, self.recipe, self.batches, self.first = model, recipe, batches, first
        self.sample = Sample.of(batches)
        self.architecture = architecture_for(model, stack=recipe.stack)
        self.teacher_states = TeacherStates(LayerwiseForward(model, self.sample, self.architecture))
        self.importance = layer_importance_of(model, batches, recipe.stack)
        self.tried: dict[tuple, tuple[Plan, RefitReport]] = {}
        self.best: tuple[Plan, RefitReport, WeightSnapshot] | None = None

    def run(self) -> SearchResult:
        recipe = self.recipe
        start = self._with_groups({kind: self._start(kind) for kind in self._kinds()})
        scores: tuple[OperatorLoss, ...] = ()
        if recipe.effort == "low":
            self._try(start)
        else:
            table = _Table(self.model, recipe, self.batches, self.importance)
            plans = [start]
            if recipe.cluster == "auto":
                plans.append(self._with_groups({k: table.groups(k, self._count(k)) for k in self._kinds()}))
            for plan in (start, *map(table.operators, plans)):  # never worse than with effort `low`
                self._try(plan)
            if recipe.effort == "high" and recipe.cluster == "auto":
                self._climb(table)
            scores = table.scores()
        plan, report, weights = self.best
        student = applied(self.model, plan, self.batches)
        weights.restore(student)
        notes = replace(
            self.first.notes,
            recipe=asdict(recipe),
            calibration=f"{sum(map(len, self.sample.held_out))} sequences",
            operators=scores,
            competition=tuple(
                CandidatePlan(plan.edits, report.after, report.before) for plan, report in self.tried.values()
            ),
            refit=report,
        )
        return SearchResult(student, replace(plan, notes=notes), report)

    def _kinds(self) -> tuple[Kind, ...]:
        return kinds_of(self.model, self.recipe)

    def _count(self, kind: Kind) -> int:
        return len(groups_of(self.first, kind))

    def _start(self, kind: Kind) -> Groups:
        if self.recipe.cluster != "auto" or self.recipe.mode != "depth" or self.architecture.resizes:
            return groups_of(self.first, kind)
        if self.recipe.refit == "none":
            return even(self.first.num_layers, self._count(kind))
        if self.recipe.refit == "full" and self.recipe.operator in ("auto", "select") and kind not in ATTENDING:
            self.teacher_states.ahead(selecting(self.architecture.kinds))  # for any groups that will be chosen
        count, depth = self._count(kind), self.first.num_layers
        unlike = are_unlike(self.model, self.recipe.stack)
        cost = unexplained(self.teacher_states, depth if unlike else longest(depth, count))
        return divider(self.model, self.recipe)(of_one_shape(self.teacher_states.layers, cost), count)

    def _with_groups(self, groups: dict[Kind, Groups]) -> Plan:
        edits = [
            group_edit(kind, group, self.recipe, self.importance)
            for kind, found in groups.items()
            for group in found
            if len(group) > 1
        ]
        return replace(self.first, edits=tuple(edits))

    def _try(self, plan: Plan) -> RefitReport | None:
        """Apply and refit a plan on all calibration data. The best so far is kept, with its weights on disk.

        Returns None for a plan that was tried before or does not meet the target.
        """
        if plan.edits in self.tried or not fits(self.model, self.recipe, plan):
            return None
        student = applied(self.model, plan, self.batches)
        with eval_mode(student):
            if self.teacher_states.whole:
                before = self.teacher_states.loss_of(student)
            else:
                before = calibration_loss(student, self.model, self.sample.held_out_batches)
            report = RefitReport(before, before, kept=False)
            if self.recipe.refit != "none":
                report = refit_by(student, self.teacher_states, plan, before, self.recipe.refit)
        self.tried[plan.edits] = plan, report
        if self.best is None or report.after < self.best[1].after:
            self.best = plan, report, WeightSnapshot(student)
        return report

    def _climb(self, table: _Table) -> None:
        """Move the borders of groups by one layer, as long as the loss falls."""
        left = MOVES
        improved = True
        while improved and left:
            improved = False
            for plan in map(table.operators, self._neighbours(self.best[0])):
                if left and plan.edits not in self.tried:
                    left -= 1
                    improved = self._try(plan) is self.best[1]
                if improved:
                    break

    def _neighbours(self, plan: Plan) -> Iterator[Plan]:
        """Yield plans in which one border between two groups moves by one layer. Other groups keep their edits."""
        edits = {(edit.kind, edit.layers): edit for edit in plan.edits}
        for kind in self._kinds():
            groups = groups_of(plan, kind)
            for i, (left, right) in enumerate(pairwise(groups)):
                for moved in (((*left, right[0]), right[1:]), (left[:-1], (left[-1], *right))):
                    made = [(kind, group) for group in (*groups[:i], *moved, *groups[i + 2 :]) if len(group) > 1]
                    rest = [edit for edit in plan.edits if edit.kind != kind]
                    fresh = [edits.get(key) or group_edit(*key, self.recipe, self.importance) for key in made]
                    if all(moved):
                        yield replace(plan, edits=(*rest, *fresh))


class _Table:
    """Calibration losses of models in which a single group is fused and refitted, on a part of the data.

    The sum of these losses is a good enough objective for partitions, because the refit of one group repairs only part
    of the error of the group before it.
    """

    def __init__(
        self, model: PreTrainedModel, recipe: FusionRecipe, batches: list[Any], importance: LayerImportance
    ) -> None:
        self.recipe, self.importance = recipe, importance
        architecture = architecture_for(model, stack=recipe.stack)
        self.unlike, self.depth = are_unlike(model, recipe.stack), len(architecture.layer_list(model))
        self.divide = divider(model, recipe)
        share = share_of(Sample.of(batches), self.depth, 3 * self.depth, TABLE_COST)
        sample = Sample.of(batches, share)
        self.trials = Trials(model, recipe.refit, batches, TeacherStates(LayerwiseForward(model, sample, architecture)))

    def groups(self, kind: Kind, count: int) -> Groups:
        """Return the partition into `count` runs with the least sum of losses, by dynamic programming.

        Runs of two layers are measured. A longer run is expected to lose at least as much as the runs inside it, and is
        measured only if it is in the best partition by these lower bounds. This repeats until all runs of the best
        partition are measured.
        """
        cost = np.full((self.depth + 1, self.depth + 1), np.inf)
        cost[range(self.depth), range(1, self.depth + 1)] = 0
        most = self.depth if self.unlike else longest(self.depth, count)
        lengths = range(2, most + 1)
        left = {(start, start + size) for size in lengths for start in range(self.depth - size + 1)}
        todo = [run for run in sorted(left) if run[1] - run[0] == 2]
        with tqdm(desc="Comparing groups", unit="group", disable=None, leave=False) as progress:
            while todo:
                for start, end in todo:
                    left.remove((start, end))
                    edit = group_edit(kind, tuple(range(start, end)), self.recipe, self.importance)
                    cost[start, end] = self.trials.loss(edit)
                    progress.update()
                for start, end in sorted(left, key=lambda run: run[1] - run[0]):
                    cost[start, end] = max(cost[start + 1, end], cost[start, end - 1])
                found = self.divide(cost, count)
                todo = [run for run in ((group[0], group[-1] + 1) for group in found) if run in left]
        return found

    def operators(self, plan: Plan) -> Plan:
        """Choose the operator and alignment of least loss for each group."""
        loss = self.trials.loss
        return replace(plan, edits=tuple(min(operator_candidates(edit, self.recipe), key=loss) for edit in plan.edits))

    def scores(self) -> tuple[OperatorLoss, ...]:
        """Return all measured losses."""
        return tuple(
            OperatorLoss(edit.kind, edit.layers, edit.operator, loss, edit.keep, edit.align)
            for (edit,), loss in self.trials.losses.items()
            if math.isfinite(loss)
        )
