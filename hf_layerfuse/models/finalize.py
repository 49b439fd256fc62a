"""Final step after training: MLPs with linear activations become one linear map, open segments one convolution."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedModel

from ..errors import LayerFuseError, PlanError
from ..evaluation.batches import Batches
from ..evaluation.metrics import bytes_in_memory
from ..evaluation.modes import outside_inference_mode
from ..plan import Blend, LinearActivation, LinearForm, Linearize, Plan, PlanNotes
from .activation_fit import line_errors
from .apply import merged
from .architectures import architecture_for
from .modeling import build, with_plan
from .surgery.linear_mlp import check_form, linear_weights
from .surgery.weights import untied_state


@outside_inference_mode
def linearize_mlps(
    model: PreTrainedModel, *, threshold: float = 0.05, fold: bool = False, batches: Batches | None = None
) -> tuple[PreTrainedModel, Plan]:
    """Replace each MLP whose activation has become a line with one linear map. This completes `Blend` edits.

    W = W2 diag(slope) W1 and b = W2 (slope b1 + offset) + b2, in float64.

    Args:
        model: Trained model with `Blend` edits; it is not changed.
        threshold: Largest allowed distance of a from 1.
        fold: Whether to fold the residual sum, as in `Linearize`.
        batches: Calibration batches for measuring the loss of the step from a to 1.

    Returns:
        The model, with the `fusion_report` of `model` if it has one, and its plan with `Linearize` instead of `Blend`.
        The notes of the plan hold `a` for each layer. With batches, they also hold `relative_error`: the root mean
        square of the difference, relative to the output of the MLP.

    Raises:
        PlanError: The model has no `Blend` edits.
        UnsupportedModelError: The residual sum cannot be folded.
        LayerFuseError: An activation is not close enough to a line yet.
    """
    tree = getattr(model.config, "layerfuse_plan", None)
    plan = Plan.from_dict(tree) if tree else None
    architecture = architecture_for(model, stack=plan.stack if plan else None)
    blends = {edit.layer: edit for edit in (plan.edits if plan else ()) if isinstance(edit, Blend)}
    if not blends:
        raise PlanError(f"no activation of this {type(model).__name__} is becoming a line: apply Blend edits first.")
    slots = {slot.layers[0]: index for index, slot in enumerate(plan.layout().slots)}
    places = {layer: slots[layer] for layer in blends}
    inside = {layer: architecture.layer_list(model)[place] for layer, place in places.items()}
    found = {layer: module.get_submodule(architecture.activation).a.item() for layer, module in inside.items()}
    if curved := [f"the activation of layer {i}, a = {a:.3f}" for i, a in found.items() if not a >= 1 - threshold]:
        raise LayerFuseError(
            f"not a line yet: {', '.join(curved)}; a must be {1 - threshold:.3f} or more: train longer, raise "
            "heal.homotopy_strength, or raise threshold."
        )
    for module in inside.values():
        check_form(module, architecture, LinearForm(fold=fold))
    lost = {} if batches is None else line_errors(model, architecture, list(places.values()), batches)
    notes = PlanNotes(homotopy=tuple(LinearActivation(layer, a, lost.get(places[layer])) for layer, a in found.items()))
    plan = dataclasses.replace(linearized(plan, fold=fold), notes=notes)
    gone = [
        f"{architecture.layers_path(model)}.{places[layer]}.{at}."
        for layer in blends
        for at in (architecture.activation, architecture.mlp["in"], architecture.mlp["out"])
    ]
    weights = {
        name: tensor.detach().clone()
        for name, tensor in untied_state(model).items()
        if not name.startswith(tuple(gone))
    }
    for layer, module in inside.items():
        prefix = f"{architecture.layers_path(model)}.{places[layer]}"
        weights |= {f"{prefix}.{k}": v for k, v in linear_weights(module, architecture, LinearForm(fold=fold)).items()}
    result = build(type(model), with_plan(type(model), model.config, plan), weights, model)
    return _with_report(result, model, plan), plan


@outside_inference_mode
def merge_convs(model: PreTrainedModel) -> tuple[PreTrainedModel, Plan]:
    """Merge each open segment into one convolution. This completes `MergeConvs(..., merged=False)` edits.

    Batch norms are folded, kernels composed and skips added in float64. In eval mode, the result computes the same.

    Args:
        model: Trained model with open segments; it is not changed.

    Returns:
        The model, with the `fusion_report` of `model` if it has one, and its plan.

    Raises:
        PlanError: The model has no open segment.
    """
    tree = getattr(model.config, "layerfuse_plan", None)
    plan = Plan.from_dict(tree) if tree else None
    if plan is None or all(getattr(edit, "merged", True) for edit in plan.edits):
        raise PlanError(
            f"no segment of this {type(model).__name__} is open: apply MergeConvs(..., merged=False) first."
        )
    plan = closed(plan)
    return _with_report(merged(model, plan), model, plan), plan


def linearized(plan: Plan, *, fold: bool = False) -> Plan:
    """The plan that `linearize_mlps` returns for the model of a plan, without its notes."""
    edits = [Linearize(edit.layer, fold=fold) if isinstance(edit, Blend) else edit for edit in plan.edits]
    return dataclasses.replace(plan, edits=tuple(edits))


def closed(plan: Plan) -> Plan:
    """The plan that `merge_convs` returns for the model of a plan."""
    return dataclasses.replace(plan, edits=tuple(dataclasses.replace(edit, merged=True) for edit in plan.edits))


def _with_report(result: PreTrainedModel, model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The result, with the `fusion_report` of the trained model if it has one, and with its own plan and sizes."""
    if (report := getattr(model, "fusion_report", None)) is not None:
        sizes = {
            "parameters": (report.parameters[0], result.num_parameters()),
            "bytes": (report.bytes[0], bytes_in_memory(result)),
        }
        result.fusion_report = dataclasses.replace(report, plan=plan, **sizes)
    return result
