"""Plans: edits of a model's blocks, as readable JSON without parameter names. This package does not need torch."""

from .edit import Align, Blend, Drop, Edit, Fuse, Kind, Linearize, MergeConvs, Mode
from .layout import BlendedForm, Layout, LinearForm, MergedForm, Operator, Slot, Source, Tie
from .notes import (
    CandidatePlan,
    EditLoss,
    FrontierPoint,
    LinearActivation,
    OperatorLoss,
    PlanLatency,
    PlanNotes,
    RefitReport,
    SegmentLoss,
)
from .plan import CONV_GRAPH_KINDS, DECODER, TRANSFORMER, Plan

__all__ = [
    "CONV_GRAPH_KINDS",
    "DECODER",
    "TRANSFORMER",
    "Align",
    "Blend",
    "BlendedForm",
    "CandidatePlan",
    "Drop",
    "Edit",
    "EditLoss",
    "FrontierPoint",
    "Fuse",
    "Kind",
    "Layout",
    "LinearActivation",
    "LinearForm",
    "Linearize",
    "MergeConvs",
    "MergedForm",
    "Mode",
    "Operator",
    "OperatorLoss",
    "Plan",
    "PlanLatency",
    "PlanNotes",
    "RefitReport",
    "SegmentLoss",
    "Slot",
    "Source",
    "Tie",
]
