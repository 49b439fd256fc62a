"""Correspondence of a fused model to its original: matching modules, fused or mixed parameters, scope of healing."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PlanError
from ..evaluation.batches import Batches
from ..plan import Plan
from ..plan.heal_scope import HealScope
from ..plan.match import Match
from ..recipe import HealRecipe
from .align import align
from .architectures import ConvGraphArchitecture, architecture_for, architecture_of
from .families import CONV_GRAPH, LAYERS, family_of
from .modeling import skeleton
from .modules.conv import module_at


def heal_scope(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: Plan,
    recipe: HealRecipe,
    *,
    batches: Batches | None = None,
    source: tuple[PreTrainedModel, Plan] | None = None,
) -> HealScope:
    """Parts of a fused model that `heal` compares, freezes and mixes.

    Args:
        student: Fused model from `apply(teacher, plan, batches)`.
        teacher: Original model.
        plan: Plan that leads from the teacher to the student.
        recipe: Settings of the training. Fused parameters are frozen with `freeze_fused` and mixed with `mix`.
        batches: Calibration batches that were passed to `apply`, for `mix`.
        source: Model and plan of the last round, where `plan` composes several, for `mix`.

    Returns:
        Pairs of layers, frozen parameters and source weights; no threshold.

    Raises:
        PlanError: The plan does not lead from this teacher to this student.
        UnsupportedModelError: One of the models has an unknown architecture.
    """
    return HealScope(
        matches=layer_map(student, teacher, plan),
        frozen=fused_parameters(student, plan) if recipe.freeze_fused else (),
        mixed=mixed_weights(student, *(source or (teacher, plan)), batches) if recipe.mix else None,
    )


def layer_map(student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan) -> tuple[Match, ...]:
    """Pairs of modules of a fused model and its original that should have similar outputs.

    Layer i of the student matches the last original layer of its group, including removed layers after the group. Its
    attention matches the attention of the last layer from which it was made. An activation after merged convolutions
    matches the same activation of the original, if there is one.

    Args:
        student: Fused model from `apply(teacher, plan)`, or its checkpoint.
        teacher: Original model.
        plan: Plan that was applied to the teacher.

    Returns:
        The kind of each pair, `hidden` or `attention`, and the live path of the module in each model.

    Raises:
        PlanError: The plan does not lead from this teacher to this student.
        UnsupportedModelError: One of the models has an unknown architecture.
    """
    return _MATCHES[family_of(plan)](student, teacher, plan)


def _matches_of_layers(student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan) -> tuple[Match, ...]:
    architecture = architecture_of(plan, teacher)
    slots = plan.layout().slots
    ours, theirs = ((architecture.layers_path(model), model) for model in (student, teacher))
    for (path, model), count in ((ours, len(slots)), (theirs, plan.num_layers)):
        found = len(model.get_submodule(path))
        if found != count:
            raise PlanError(
                f"the plan leads from {plan.num_layers} layers to {len(slots)}, but {type(model).__name__} has {found} "
                f"layers instead of {count}: pass the plan that made this student from this teacher."
            )
    matches = []
    for index, slot in enumerate(slots):
        matches.append(Match("hidden", f"{ours[0]}.{index}", f"{theirs[0]}.{slot.layers[-1]}"))
        attention = slot.source("attention")
        if attention is not None:
            out = architecture.table("attention")["out"]
            pair = ((ours[0], index), (theirs[0], attention.layers[-1]))
            matches.append(Match("attention", *(f"{path}.{layer}.{out}" for path, layer in pair)))
    return tuple(matches)


def _matches_of_convolutions(student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan) -> tuple[Match, ...]:
    units = architecture_for(teacher, ConvGraphArchitecture).convolutions(teacher).units
    ends = [units[edit.end].act for edit in plan.edits if len(edit.layers) > 1]
    return tuple(Match("hidden", act, act) for act in ends if module_at(teacher, act) is not None)


_MATCHES = {LAYERS: _matches_of_layers, CONV_GRAPH: _matches_of_convolutions}


def fused_parameters(student: PreTrainedModel, plan: Plan) -> frozenset[str]:
    """Names of the parameters of fused blocks: blocks that were made from several.

    Args:
        student: Fused model from `apply(teacher, plan)`, or its checkpoint.
        plan: Plan of the student.

    Returns:
        Live names, as in `named_parameters`.

    Raises:
        UnsupportedModelError: The architecture is unknown.
    """
    paths = _FUSED_MODULES[family_of(plan)](student, plan)
    return frozenset(f"{at}.{name}" for at in paths for name, _ in student.get_submodule(at).named_parameters())


def _fused_modules_of_layers(student: PreTrainedModel, plan: Plan) -> list[str]:
    layout = plan.layout()
    tied = {(slot, tie.kind) for tie in layout.ties for slot in tie.slots}
    paths = []
    for block in architecture_of(plan, student).blocks(student):
        source = layout.slots[block.layer].source(block.kind)
        if len(source.layers) > 1 or (block.layer, block.kind) in tied:
            paths += block.modules.values()
    return paths


def _merged_convolutions(student: PreTrainedModel, plan: Plan) -> list[str]:
    units = architecture_for(student, ConvGraphArchitecture).convolutions(skeleton(student)).units
    made = [(edit.start + 1,) if edit.merged else edit.keep for edit in plan.edits if len(edit.layers) > 1]
    return [units[place].conv for places in made for place in places]


_FUSED_MODULES = {LAYERS: _fused_modules_of_layers, CONV_GRAPH: _merged_convolutions}


def mixed_weights(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan, batches: Batches | None = None
) -> dict[str, list[Tensor]]:
    """Aligned original parameters from which operator `mix` made each parameter, by name.

    Args:
        student: Fused model from `apply(teacher, plan, batches)`.
        teacher: Original model.
        plan: Plan that was applied to the teacher.
        batches: Calibration batches that were passed to `apply`.

    Returns:
        Name of a parameter of the student -> a tensor of its shape from each layer of its group.

    Raises:
        UnsupportedModelError: The architecture is unknown.
    """
    architecture, slots = architecture_of(plan, teacher), plan.layout().slots
    ties = {(slot, tie.kind): tie.source for tie in plan.layout().ties for slot in tie.slots}
    prefix, originals = architecture.layers_path(student), architecture.layer_list(align(teacher, plan, batches))
    known = dict(student.named_parameters(remove_duplicate=False))
    found = {}
    for block in architecture.blocks(student):
        tied = ties.get((block.layer, block.kind))
        source = tied or slots[block.layer].source(block.kind)
        if source.operator != "mix" or len(source.layers) < 2:
            continue
        inside = f"{prefix}.{block.layer}."
        for path in block.modules.values():
            for name, _ in student.get_submodule(path).named_parameters():
                full, own = f"{path}.{name}", f"{path}.{name}".removeprefix(inside)
                # parameters that each depth keeps for itself were not mixed
                if tied is None or sum(known[full] is other for other in known.values()) > 1:
                    found[full] = [originals[layer].get_parameter(own) for layer in source.layers]
    return found
