"""Checks before fusing: whether a model can be fused, and whether a plan fits it.

`check_model` reads every weight, so the public functions call it once per model. `check_plan` reads only shapes and can
run for every candidate of a search.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import PlanError, UnsupportedModelError
from ...plan import Plan
from ..architectures import FUSED_PREFIX, LayerArchitecture
from .altered import check_unaltered
from .layers import overrides_of, relaxed_maps, target_config
from .linear_mlp import check_form


def check_model(model: PreTrainedModel, architecture: LayerArchitecture) -> None:
    """Raise `UnsupportedModelError` unless the model can be fused."""
    check_structure(model, architecture)
    check_weights(model)


def check_structure(model: PreTrainedModel, architecture: LayerArchitecture) -> None:
    """Raise `UnsupportedModelError` unless a model of this structure can be fused. It reads no weights."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a model: pass a model with its weights, as from_pretrained returns it."
        )
    if model.config.model_type.startswith(FUSED_PREFIX):
        raise UnsupportedModelError(
            f"{type(model).__name__} is already fused: apply a new plan to the original, or to expand(model)."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError("the model is quantised: fuse the full-precision model, then quantise the result.")
    config = architecture.config_of(model.config) if isinstance(architecture, LayerArchitecture) else model.config
    _check_skips(config)
    try:
        architecture.check(model)
        check_unaltered(model)
    except RuntimeError as error:
        if overrides_of(config) is None:
            raise
        raise UnsupportedModelError(
            f"config.per_layer_config makes layers differ in {', '.join(sorted(config.per_layer_attributes))}, and "
            f"{type(model).__name__} cannot be built from it: {str(error).partition('.')[0]}. Remove per_layer_config, "
            "or use a model class that reads it, such as Step3p7TextModel."
        ) from error


def _check_skips(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` if a config asks for layers without a block: no class of Transformers reads it."""
    skips = {layer: each["skip"] for layer, each in enumerate(overrides_of(config) or ()) if each.get("skip")}
    for layer, names in skips.items():
        raise UnsupportedModelError(
            f"config.per_layer_config skips {', '.join(names)} in layer {layer}, and no model of Transformers reads "
            "`skip`, so that the layer has these blocks nevertheless: remove `skip`, and drop the blocks with a plan."
        )


def check_weights(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if a weight is on the meta device, NaN or infinite. It reads every weight."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: load the model without offloading to fuse it.")
        if tensor.is_inference():
            raise UnsupportedModelError(
                f"{name} was made under torch.inference_mode, so that nothing can be computed from it outside: load "
                "the model outside of it, or pass copy.deepcopy(model)."
            )
        if not torch.isfinite(tensor).all():
            raise UnsupportedModelError(
                f"{name} holds NaN or infinite values: the checkpoint is damaged or was trained past divergence; "
                "use an earlier one."
            )


def check_plan(model: PreTrainedModel, architecture: LayerArchitecture, plan: Plan) -> None:
    """Raise unless a plan fits the architecture and the shapes of a model that `check_model` accepts.

    Raises:
        PlanError: The plan is for another architecture or number of layers, fuses layers of different shapes, or has
            a rank that is too large for the matrices.
        UnsupportedModelError: An edit needs a module, or an entry of the table, that this architecture lacks.
    """
    if plan.model_type != architecture.model_type:
        raise PlanError(
            f"the plan is for {plan.model_type!r}, the model is {architecture.model_type!r}: make a new plan."
        )
    depth = len(architecture.layer_list(model))
    if plan.num_layers != depth:
        raise PlanError(f"the plan is for {plan.num_layers} layers, the model has {depth}: make a new plan.")
    if plan.stack and plan.stack != architecture.stack:
        raise PlanError(f"the plan is for stack {plan.stack!r}, not {architecture.stack!r}: make a new plan.")
    if plan.kinds != architecture.kinds:
        raise PlanError(
            f"the plan is for layers of {' and '.join(plan.kinds)} blocks, but {architecture.model_type!r} has layers "
            f"of {' and '.join(architecture.kinds)} blocks: make a new plan."
        )
    if overrides_of(architecture.config_of(model.config)) is not None:
        target_config(model.config, architecture, plan.layout())  # layers whose fields differ cannot be combined
    shapes = [shapes_of(layer) for layer in architecture.layer_list(model)]
    if len(set(shapes)) > 1:
        _check_places(model, architecture, plan, shapes)
    _check_needed(model, architecture, plan)
    for edit in plan.edits:
        unlike = [layer for layer in edit.layers if shapes[layer] != shapes[edit.layers[0]]]
        if unlike:
            raise PlanError(
                f"{edit} fuses layers whose weights have different shapes, such as layers {edit.layers[0]} and "
                f"{unlike[0]}: group layers of one shape."
            )
        layer = architecture.layer_list(model)[edit.layers[0]]
        if edit.source and edit.source.form:
            check_form(layer, architecture, edit.source.form)
        ties = replace(plan, edits=(edit,)).layout().ties  # a whole layer may have two ties
        ranks = [rank for tie in ties for _, rank in relaxed_maps(layer, architecture, tie).values()]
        if ranks and max(ranks) < edit.rank:
            raise PlanError(
                f"Fuse.rank is {edit.rank}, but the matrices of these {edit.kind} blocks allow at most {max(ranks)} "
                f"with mode={edit.mode!r}: lower the rank. Only a much lower rank saves parameters."
            )


def _check_needed(model: PreTrainedModel, architecture: LayerArchitecture, plan: Plan) -> None:
    """Raise `PlanError` if a plan removes a block whose results other layers or the model use."""
    for kind, fixed in architecture.fixed.items():
        kept = {layer for slot in plan.layout().slots if (source := slot.source(kind)) for layer in source.layers}
        lost = sorted({*fixed} - kept)
        if lost:
            raise PlanError(
                f"the plan removes the {kind} of layer {lost[0]}, which computes what other layers use: keep it."
            )
    types = getattr(architecture.config_of(model.config), "layer_types", None) or ()
    sources = [source for slot in plan.layout().slots if (source := slot.source("attention"))]
    left = {types[layer] for source in sources for layer in source.layers if types}
    for name in architecture.essential_types:
        if name in types and name not in left:
            raise PlanError(
                f"the plan removes the attention of every {name} layer (layers "
                f"{', '.join(str(i) for i, each in enumerate(types) if each == name)}): keep at least one."
            )


def _check_places(
    model: PreTrainedModel,
    architecture: LayerArchitecture,
    plan: Plan,
    shapes: list[tuple[tuple[str, torch.Size], ...]],
) -> None:
    """Raise `PlanError` if the stock class builds a layer of another shape in the place where a layer moves."""
    slots = plan.layout().slots
    with torch.device("meta"):
        stock = type(model)(target_config(model.config, architecture, plan.layout()))
    for index, (layer, slot) in enumerate(zip(architecture.layer_list(stock), slots, strict=True)):
        moved = slot.layers[0]
        if index != moved and shapes_of(layer) != shapes[moved]:
            raise PlanError(
                f"layer {moved} cannot become layer {index}: {type(model).__name__} builds a layer of another shape "
                "there. Keep the layers that differ from the others in their places."
            )


def can_be(model: PreTrainedModel, architecture: LayerArchitecture, plan: Plan) -> bool:
    """Whether `check_plan` accepts a plan."""
    try:
        check_plan(model, architecture, plan)
    except (PlanError, UnsupportedModelError):
        return False
    return True


def shapes_of(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Name and shape of each weight of a layer. Layers can be fused only if these are equal."""
    return tuple((name, tensor.shape) for name, tensor in layer.state_dict().items())
