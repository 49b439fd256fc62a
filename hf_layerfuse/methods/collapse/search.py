"""MLPs compete on calibration loss to become linear: their order and their number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...calibration.contract import check_contract
from ...calibration.layerwise import LayerwiseForward
from ...calibration.refit.base import RefitReport
from ...calibration.refit.refit import refit_by
from ...calibration.samples import Sample
from ...calibration.teacher_states import TeacherStates
from ...errors import RecipeError, UnsupportedModelError
from ...evaluation.batches import Batches
from ...evaluation.modes import eval_mode, outside_inference_mode, take_modes
from ...models.apply import applied
from ...models.architectures import architecture_for
from ...models.surgery.checks import check_model, check_plan
from ...models.surgery.linear_mlp import needs_fit
from ...models.surgery.size import planned_size
from ...plan import Blend, CandidatePlan, EditLoss, Linearize, Plan, PlanNotes
from ...recipe import COLLAPSE_TARGETS, CollapseRecipe
from ..base import SearchResult
from ..trials import Trials


@outside_inference_mode
def search_collapse(model: PreTrainedModel, recipe: CollapseRecipe, batches: Batches | None = None) -> SearchResult:
    """Replace MLPs of a model with linear maps by a recipe: choose, apply, fit.

    The cost of an MLP is the calibration loss after making it alone linear and fitting it, per parameter saved. MLPs
    are chosen in order of cost and fitted front to back, each on the outputs of the changed layers before it. With
    method `homotopy`, the chosen MLPs get activations that `heal` makes linear and `linearize_mlps` merges.

    Args:
        model: Stock model with a registered architecture; it is not changed.
        recipe: Settings of the collapse.
        batches: Calibration batches, read once.

    Returns:
        The new `model`, its `plan`, and the `report` of the refit, which is None without batches and with `homotopy`.

    Raises:
        RecipeError: Target that cannot be met, or recipe that needs missing batches.
        PlanError: Rank that saves no parameters.
        UnsupportedModelError: Unknown architecture, or one without an activation; model that cannot be fused; or gated
            MLPs without batches or a refit, which become linear only by a fit.
    """
    architecture = architecture_for(model, stack=recipe.stack)
    check_model(model, architecture)
    batches = None if batches is None else list(batches)
    check_contract(model, batches, architecture)
    nothing = architecture.plan(len(architecture.layer_list(model)))
    edits = [Linearize(layer, recipe.rank, recipe.fold) for layer in range(nothing.num_layers)]
    homotopy = recipe.method == "homotopy"
    for plan in (replace(nothing, edits=edits), *([_bent(replace(nothing, edits=edits), recipe)] if homotopy else [])):
        check_plan(model, architecture, plan)
    if needs_fit(architecture) and (batches is None or recipe.refit == "none"):
        raise UnsupportedModelError(
            f"the MLPs of {architecture.model_type!r} are gated, so they stay bilinear without their activation: only "
            "a fit makes them linear. Pass batches=, and use refit='full' or 'maps'."
        )
    if batches is None and (recipe.order == "measured" or recipe.max_loss is not None):
        raise RecipeError(
            f"order={recipe.order!r} with {_asked(recipe)} needs calibration batches: pass batches=, or use "
            "order='deepest' and another target."
        )
    if batches is None and not homotopy:
        logging.getLogger(__name__).warning(
            "no calibration batches: each linear map is the MLP without its activation, and nothing is fitted. Pass "
            "batches=, or heal the result before use."
        )
    if batches is None:
        plan = _plans(model, recipe, nothing, edits[::-1])[0]
        notes = PlanNotes(recipe=asdict(recipe), calibration="none: from the weights alone")
        plan = replace(_bent(plan, recipe) if homotopy else plan, notes=notes)
        return SearchResult(applied(model, plan), plan, None)
    with eval_mode(model):
        found = _searched(model, recipe, batches, nothing, edits)
    take_modes(found.model, model)
    return found


def _searched(
    model: PreTrainedModel, recipe: CollapseRecipe, batches: list[Any], nothing: Plan, edits: list[Linearize]
) -> SearchResult:
    sample = Sample.of(batches)
    teacher_states = TeacherStates(LayerwiseForward(model, sample, architecture_for(model, stack=recipe.stack)))
    losses = {}
    order = edits[::-1]
    if recipe.order == "measured":
        trials = Trials(model, "none" if recipe.refit == "none" else "maps", batches, teacher_states)
        losses = {
            edit: trials.loss(edit) for edit in tqdm(edits, "Measuring MLPs", unit="MLP", disable=None, leave=False)
        }
        whole = planned_size(model, nothing)["parameters"]
        saved = {edit: whole - planned_size(model, replace(nothing, edits=(edit,)))["parameters"] for edit in edits}
        order = sorted(edits, key=lambda edit: losses[edit] / saved[edit])
    notes = PlanNotes(
        recipe=asdict(recipe),
        calibration=f"{sum(map(len, sample.held_out))} sequences",
        losses=tuple(EditLoss(edit, loss) for edit, loss in losses.items()),
    )
    if recipe.method == "homotopy":
        plan = replace(_bent(_plans(model, recipe, nothing, order)[0], recipe), notes=notes)
        return SearchResult(applied(model, plan, batches), plan, None)
    found, tried = None, []
    for plan in _plans(model, recipe, nothing, order):
        student = applied(model, plan)
        with eval_mode(student):
            before = teacher_states.loss_of(student)
            report = RefitReport(before, before, kept=False)
            if recipe.refit != "none":
                report = refit_by(student, teacher_states, plan, before, recipe.refit)
        tried.append(CandidatePlan(plan.edits, report.after, report.before))
        if recipe.max_loss is not None and report.after > recipe.max_loss:
            break
        found = SearchResult(student, plan, report)
    if found is None:
        raise RecipeError(
            f"{_asked(recipe)} allows no linear MLP: the cheapest one, in layer {order[0].layer}, costs "
            f"{tried[0].loss:.3g}. Use that or more."
        )
    notes = replace(notes, competition=tuple(tried), refit=found.report)
    return replace(found, plan=replace(found.plan, notes=notes))


def _bent(plan: Plan, recipe: CollapseRecipe) -> Plan:
    """Return the plan whose result becomes the one of `plan` by training."""
    return replace(plan, edits=[Blend(edit.layer, recipe.faithful) for edit in plan.edits])


def _plans(model: PreTrainedModel, recipe: CollapseRecipe, nothing: Plan, order: Sequence[Linearize]) -> Sequence[Plan]:
    """Return the plans to try, each of the first few MLPs of an order: one plan, or with `max_loss` all of them."""
    most = len(order)
    plans = [replace(nothing, edits=sorted(order[:count], key=lambda edit: edit.layer)) for count in range(most + 1)]
    if recipe.max_loss is not None:
        return plans[1:]
    if recipe.count is not None:
        if recipe.count > most:
            raise RecipeError(f"count={recipe.count} of the model's {most} MLPs: use 1 to {most}.")
        return [plans[recipe.count]]
    unit = "bytes" if recipe.max_bytes is not None else "parameters"
    sizes = [planned_size(model, plan)[unit] for plan in plans]
    limit = recipe.max_bytes or recipe.max_parameters
    if recipe.ratio is not None:
        architecture = architecture_for(model, stack=recipe.stack)
        limit = sizes[0] - recipe.ratio * sum(
            parameter.numel()
            for layer in architecture.layer_list(model)
            for name, parameter in layer.named_parameters()
            if architecture.owner(name)
        )
    met = next((plan for plan, size in zip(plans, sizes, strict=True) if size <= limit), None)
    if met is None or not met.edits:
        what = "changes nothing" if met else "is out of reach"
        raise RecipeError(
            f"{_asked(recipe)} {what}: the model has {sizes[0]} {unit}, {sizes[-1]} with all {most} MLPs linear. Use "
            "a target between these."
        )
    return [met]


def _asked(recipe: CollapseRecipe) -> str:
    return next(f"{name}={value:.12g}" for name in COLLAPSE_TARGETS if (value := getattr(recipe, name)) is not None)
