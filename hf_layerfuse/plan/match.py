"""Pairs of modules of a fused model and its original whose outputs should agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Match:
    """Two modules, by their paths in the loaded models, whose outputs (batch, tokens, width) should agree.

    The modules are whole layers (`hidden`) or the output projections of attention (`attention`).
    """

    kind: Literal["hidden", "attention"]
    student: str
    teacher: str
