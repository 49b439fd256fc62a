"""Applying a plan to a stock model."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from ..evaluation.batches import Batches
from ..evaluation.modes import outside_inference_mode
from ..plan import Blend, Plan
from ..plan.layout import Layout
from .activation_fit import fit_lines
from .align import aligned
from .architectures import ConvGraphArchitecture, LayerArchitecture, architecture_for, architecture_of
from .families import CONV_GRAPH, LAYERS, family_of
from .modeling import build, fused_class, skeleton, with_plan
from .surgery.checks import check_model, check_plan
from .surgery.conv_graph import check_merges, merged_weights
from .surgery.layers import target_config
from .surgery.weights import fused_weights


@outside_inference_mode
def apply(model: PreTrainedModel, plan: Plan, batches: Batches | None = None) -> PreTrainedModel:
    """Apply a plan: align blocks and combine their weights. The plan holds all decisions; the model is not changed.

    Args:
        model: Stock model of the plan's architecture, with any head.
        plan: Plan from `plan_fusion`, from a `plan.json`, or written by hand.
        batches: Calibration batches, used by edits with align `activation` and for the target lines of `Blend`.

    Returns:
        A new model on the same device and of the same dtype. If the stock class can represent the result, the model
        has that class and fewer layers. Otherwise, it has the fused class, with the plan in its config.

    Raises:
        PlanError: The plan is for another architecture or number of layers, or has a rank that is too large.
        UnsupportedModelError: The architecture is unknown, or the model is fused, quantised, or has NaN weights.
    """
    conv_graph = family_of(plan) is CONV_GRAPH
    check_model(
        model,
        architecture_for(model, ConvGraphArchitecture) if conv_graph else architecture_of(plan, model),
    )
    return applied(model, plan, batches)


def applied(model: PreTrainedModel, plan: Plan, batches: Batches | None = None) -> PreTrainedModel:
    """Run `apply` without `check_model`: a search checks its model once, and each plan only by shape."""
    return _APPLIED[family_of(plan)](model, plan, batches)


def _with_fused_layers(model: PreTrainedModel, plan: Plan, batches: Batches | None) -> PreTrainedModel:
    architecture = architecture_of(plan, model)
    check_plan(model, architecture, plan)
    layout = plan.layout()
    blended = [edit.layer for edit in plan.edits if isinstance(edit, Blend) and not edit.faithful]
    lines = fit_lines(model, architecture, blended, batches) if blended and batches is not None else {}
    weights = fused_weights(aligned(model, plan, batches), architecture, layout, lines)
    config = target_config(model.config, architecture, layout)
    cls = type(model)
    if not layout.is_stock:
        cls = fused_class(cls)
        config = with_plan(cls, config, plan)
    student = build(cls, config, weights, model)
    _freeze_like(student, model, architecture, layout)
    return student


def _freeze_like(
    student: PreTrainedModel, model: PreTrainedModel, architecture: LayerArchitecture, layout: Layout
) -> None:
    """Freeze the parameters of a student that are frozen in all layers of the original that they come from."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return
    path = f"{architecture.layers_path(model)}."
    for name, parameter in student.named_parameters():
        names = {name}
        if name.startswith(path):
            number, _, rest = name.removeprefix(path).partition(".")
            names = {f"{path}{layer}.{rest}" for layer in layout.slots[int(number)].layers}
        parameter.requires_grad_(not names <= frozen)


def _with_merged_convolutions(model: PreTrainedModel, plan: Plan, batches: Batches | None) -> PreTrainedModel:
    check_merges(model, architecture_for(model, ConvGraphArchitecture), plan)
    return merged(model, plan) if plan.edits else copy.deepcopy(model)


_APPLIED = {LAYERS: _with_fused_layers, CONV_GRAPH: _with_merged_convolutions}


def merged(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Build the merged model of a plan, from a stock model or from a fused one with open segments.

    The kernels are composed in float64.
    """
    like, architecture = skeleton(model), architecture_for(model, ConvGraphArchitecture)
    cls = fused_class(type(like))
    config = with_plan(cls, model.config, plan)
    with torch.device("meta"):
        names = cls(config).state_dict().keys()
    weights = merged_weights(model, like, architecture, plan, names)
    return build(cls, config, weights, model)
