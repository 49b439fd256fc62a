"""Common base of the closed-form repairs: a layer-wise forward of the student beside its teacher, and a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from ...plan import Plan, RefitReport, Slot
from ..disk import StoredTensors, WeightSnapshot
from ..layer_hooks import HookPoint
from ..layerwise import LayerwiseForward
from ..teacher_states import TeacherStates

RefitMethod = Literal["full", "maps", "linear", "none"]
"""Extent of a repair, see `refit`."""


def unless_worse(
    student: PreTrainedModel, before: float, carry_out: Callable[[], tuple[Sequence[Mapping[str, Any]], float]]
) -> RefitReport:
    """Repair a student, and undo the repair if the calibration loss rises.

    Args:
        student: Model to repair, changed in place.
        before: Calibration loss of the student before the repair.
        carry_out: Function that repairs the student, and returns a row for each map and the new calibration loss.

    Returns:
        The calibration loss before and after, and the rows of a repair that was kept.
    """
    kept = WeightSnapshot(student)
    blocks, after = carry_out()
    if after <= before:
        return RefitReport(before, after, kept=True, blocks=tuple(blocks))
    kept.restore(student)
    return RefitReport(before, before, kept=False, blocks=tuple(blocks))


class Repair(ABC):
    """Repair of a student, one layer at a time, in its layer-wise forward.

    Layers before the first edit equal those of the original, and stay as they are.

    Args:
        student: Layer-wise forward of the model to repair, at any layer.
        teacher: States of the original.
        plan: Plan that led from the original to the student.
        method: Method of `refit`.

    Attributes:
        blocks: One row for each map refitted so far.
        changed: Depths in the student of the layers that the plan changes.
    """

    def __init__(self, student: LayerwiseForward, teacher: TeacherStates, plan: Plan, method: str) -> None:
        self.student, self.teacher, self.method = student, teacher, method
        layout = plan.layout()
        self.slots = layout.slots
        self.tied = {(slot, tie.kind) for tie in layout.ties for slot in tie.slots}
        self.blocks: list[dict[str, Any]] = []
        self.changed = [index for index, slot in enumerate(self.slots) if self._is_changed(index, slot)]

    def step(self) -> None:
        """Repair the student's next layer, and run it."""
        self.repair()
        self.student.advance()

    def repair(self) -> None:
        """Repair the student's next layer."""
        index = self.student.depth
        slot = self.slots[index]
        if self.changed and index >= self.changed[0]:
            self._repair(index, slot, self.teacher.see(self._wanted(slot)))

    def _is_changed(self, index: int, slot: Slot) -> bool:
        sources = slot.blocks.values()
        fused = any(source is None or len(source.layers) > 1 or source.linear for source in sources)
        tied = any((index, kind) in self.tied for kind in slot.blocks)
        return len(slot.layers) > 1 or fused or tied or (index == 0 and slot.layers[0] > 0)

    @property
    def may_stop(self) -> bool:
        """Whether the plan leaves the layers to come as they are, so that the repair may end here."""
        depth = self.student.depth
        return self.method == "full" and bool(self.changed) and self.changed[-1] + 1 == depth < len(self.slots)

    @abstractmethod
    def _wanted(self, slot: Slot) -> set[tuple[int, HookPoint]]:
        """The (layer, hook point) pairs of the teacher that the repair of a slot needs."""

    @abstractmethod
    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, HookPoint], StoredTensors]) -> None:
        """Repair the layer at `index`, which the student has not run yet."""

    def _note(self, layer: int, kind: str, role: str, before: float, after: float, **more: float) -> None:
        self.blocks.append({"layer": layer, "kind": kind, "map": role, "before": before, "after": after, **more})
