"""Closed-form repair of a fused model on calibration data, front to back, without gradients.

The original is the teacher.
"""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...evaluation.batches import Batches
from ...evaluation.divergence import calibration_loss
from ...evaluation.modes import eval_mode, outside_inference_mode
from ...models.architectures import ConvArchitecture, architecture_of
from ...models.families import CONV_GRAPH, LAYERS, family_of
from ...models.surgery.checks import check_model, check_plan
from ...plan import Plan
from ..disk import WeightSnapshot
from ..layerwise import LayerwiseForward
from ..samples import Sample
from ..teacher_states import TeacherStates
from .base import RefitMethod, RefitReport, Repair, unless_worse
from .conv import ConvRepair
from .conv_graph import refit_conv_graph
from .transformer import TransformerRepair


@outside_inference_mode
def refit(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan, batches: Batches, method: RefitMethod = "full"
) -> RefitReport:
    """Repair a fused model in closed form, in place. The repair is undone if the calibration loss rises.

    The repair visits the blocks front to back, from the first edit on. A block of the student reads other states than
    its original. Its input maps are therefore refitted to give the original's outputs: a ridge fit predicts the
    original's inputs from the student's, and is folded into the maps. Its output projection is refitted to reach the
    original's state at the end of the group: min ||X (W + dW)^T + b + db - R||^2 + lambda ||dW||^2. X is the input of
    the projection, and R is the original's state less the residual to which the projection is added.

    Attention targets the input of its MLP in the original. Operator `select` builds a layer from the heads and hidden
    units of its whole group that reach these targets best (backward elimination). If that lets the MLPs come closer to
    the end of the group, its attention instead targets the sum of all attention outputs of the group.

    A linearised MLP is fitted as a whole. Its inputs predict the target state less the residual, and the penalty holds
    the fit towards the current map. Each token has the weight 1 / variance of the stream, as in norms.

    The layers behind the last edit are repaired only if that lowers the calibration loss. In large language models, the
    fits of layers that the plan leaves as they are may cost more than they mend.

    Shared matrices stay as they are. At each depth, the fit sets the norms that follow a sum, the gains of the norms
    before MLPs, the biases, and the residuals and coefficients of relaxed sharing. Fits of residuals are projected on
    their rank.

    With any `method` except `none`, the merged convolution of a segment is fitted to the output of the segment.

    The repair takes one pass of the original over the batches, and about three of the student, or five with `select`.
    Each further calibration loss takes an eighth of a pass.

    Args:
        student: Result of `apply(teacher, plan)`.
        teacher: Original model.
        plan: Plan that led from the original to the student.
        batches: Calibration batches, dicts of model inputs. One sequence in eight is held out to evaluate the result.
        method: Extent of the repair. `full` repairs all blocks. `maps` fits only the maps of linearised MLPs. `linear`
            fits one map on the outputs of the last block before removed ones, and folds it into that block's output
            projection (ReplaceMe, Shopkhoev et al. 2025). `none` leaves the model as it is.

    Returns:
        The calibration loss before and after, and the errors of each map.

    Raises:
        DataError: No calibration batches.
        PlanError: The plan is for another architecture or number of layers.
        UnsupportedModelError: The teacher cannot be fused, or the model does not run each of its layers once, in order.
    """
    return _REFITS[family_of(plan)](student, teacher, plan, Sample.of(batches), method)


def _refit_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan, sample: Sample, method: RefitMethod
) -> RefitReport:
    before = calibration_loss(student, teacher, sample.held_out_batches)
    if method == "none":
        return RefitReport(before, before, kept=False)
    architecture = architecture_of(plan, teacher)
    check_model(teacher, architecture)
    check_plan(teacher, architecture, plan)
    with eval_mode(student, teacher):
        return refit_by(student, TeacherStates(LayerwiseForward(teacher, sample, architecture)), plan, before, method)


def _refit_convolutions(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan, sample: Sample, method: RefitMethod
) -> RefitReport:
    return refit_conv_graph(student, teacher, plan, sample, fitted=method != "none")


_REFITS = {LAYERS: _refit_layers, CONV_GRAPH: _refit_convolutions}


def refit_by(
    student: PreTrainedModel, teacher_states: TeacherStates, plan: Plan, before: float, method: RefitMethod
) -> RefitReport:
    """Run `refit` with the states of a checked teacher, which several students may share.

    Args:
        student: Result of applying the plan, changed in place.
        teacher_states: States of the teacher.
        plan: Plan that led from the original to the student.
        before: Calibration loss of the student before the repair.
        method: Extent of the repair, as in `refit`.
    """

    def carry_out() -> tuple[list[dict[str, Any]], float]:
        architecture = architecture_of(plan, student)
        layerwise = LayerwiseForward(student, teacher_states.layerwise.sample, architecture)
        repair = repair_of(layerwise, teacher_states, plan, method)
        early: tuple[float, WeightSnapshot, int] | None = None
        for _ in tqdm(repair.slots, "Refitting", unit="layer", disable=None, leave=False):
            repair.step()
            if repair.may_stop:
                early = teacher_states.loss_of(student), WeightSnapshot(student), len(repair.blocks)
        after = teacher_states.loss(layerwise)
        if early is None or after <= early[0]:
            return repair.blocks, after
        early[1].restore(student)
        return repair.blocks[: early[2]], early[0]

    return unless_worse(student, before, carry_out)


def repair_of(student: LayerwiseForward, teacher: TeacherStates, plan: Plan, method: RefitMethod) -> Repair:
    """The repair for the blocks of a student's architecture."""
    kind = ConvRepair if student.architecture.kinds == ConvArchitecture.kinds else TransformerRepair
    return kind(student, teacher, plan, method)
