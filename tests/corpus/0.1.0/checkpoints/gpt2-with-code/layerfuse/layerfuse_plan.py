# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""A plan: which blocks of a model become what. Readable JSON, no torch, no parameter names."""

from .layerfuse_plan_edit import Align, Blend, Drop, Edit, Fuse, Kind, Linearize, MergeConvs, Mode
from .layerfuse_plan_layout import BlendedForm, Layout, LinearForm, MergedForm, Operator, Slot, Source, Tie
from .layerfuse_plan_plan import CHAIN, TRANSFORMER, Plan

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
