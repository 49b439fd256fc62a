"""What a search comes to."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..calibration.refit.base import RefitReport
from ..plan import Plan


@dataclass(frozen=True)
class Found:
    """A fused model and how it came about. `report` is None where there was no calibration data."""

    model: PreTrainedModel
    plan: Plan
    report: RefitReport | None
