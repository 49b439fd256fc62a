"""Which modules of a fused model ought to agree with which of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Match:
    """Two modules, by their live paths, whose outputs (batch, tokens, width) ought to be alike.

    They are whole layers (`hidden`), or the output projections of attention (`attention`).
    """

    kind: Literal["hidden", "attention"]
    student: str
    teacher: str
