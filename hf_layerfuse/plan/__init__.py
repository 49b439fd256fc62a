"""A plan: which blocks of a model become what. Readable JSON, no torch, no parameter names."""

from .edit import Align, Blend, Drop, Edit, Fuse, Kind, Linearize, MergeConvs, Mode
from .layout import BlendedForm, Layout, LinearForm, MergedForm, Operator, Slot, Source, Tie
from .plan import CHAIN, TRANSFORMER, Plan

__all__ = [
    "CHAIN",
    "TRANSFORMER",
    "Align",
    "Blend",
    "BlendedForm",
    "Drop",
    "Edit",
    "Fuse",
    "Kind",
    "Layout",
    "LinearForm",
    "Linearize",
    "MergeConvs",
    "MergedForm",
    "Mode",
    "Operator",
    "Plan",
    "Slot",
    "Source",
    "Tie",
]
