"""A plan: which blocks of a model become what. Readable JSON, no torch, no parameter names."""

from .edit import Align, Blend, Drop, Edit, Fuse, Kind, Linearize, Mode
from .layout import BlendedForm, Layout, LinearForm, Operator, Slot, Source, Tie
from .plan import TRANSFORMER, Plan

__all__ = [
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
    "Mode",
    "Operator",
    "Plan",
    "Slot",
    "Source",
    "Tie",
]
