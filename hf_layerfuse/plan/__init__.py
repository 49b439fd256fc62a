"""A plan: which blocks of a model become what. Readable JSON, no torch, no parameter names."""

from .edit import Align, Drop, Edit, Fuse, Kind, Mode
from .layout import Layout, Operator, Slot, Source, Tie
from .plan import TRANSFORMER, Plan

__all__ = [
    "TRANSFORMER",
    "Align",
    "Drop",
    "Edit",
    "Fuse",
    "Kind",
    "Layout",
    "Mode",
    "Operator",
    "Plan",
    "Slot",
    "Source",
    "Tie",
]
