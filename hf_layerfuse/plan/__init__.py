"""A plan: which blocks of a model become what. Readable JSON, no torch, no parameter names."""

from .edit import Align, Drop, Edit, Fuse, Kind, Linearize, Mode
from .layout import Layout, Linear, Operator, Slot, Source, Tie
from .plan import TRANSFORMER, Plan

__all__ = [
    "TRANSFORMER",
    "Align",
    "Drop",
    "Edit",
    "Fuse",
    "Kind",
    "Layout",
    "Linear",
    "Linearize",
    "Mode",
    "Operator",
    "Plan",
    "Slot",
    "Source",
    "Tie",
]
