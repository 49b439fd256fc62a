"""A student and its teacher walked through side by side: the base of every closed-form repair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .plan import Plan, Slot
from .states import States
from .taps import Tap
from .walk import Trace, Walk


class Repair(ABC):
    """`step` repairs the student's next layer and leads the student through it.

    Layers in front of the first edit are those of the original, and stay as they are.

    Attributes:
        blocks: a row for each map that was refitted so far.
    """

    def __init__(self, student: Walk, teacher: Trace, plan: Plan, method: str) -> None:
        self.student, self.teacher, self.method = student, teacher, method
        layout = plan.layout()
        self.slots = layout.slots
        self.tied = {(slot, tie.kind) for tie in layout.ties for slot in tie.slots}
        self.blocks: list[dict[str, Any]] = []
        self._differs = False

    def step(self) -> None:
        """Repair the student's next layer, and lead the student through it."""
        index = self.student.depth
        slot = self.slots[index]
        sources = slot.blocks.values()
        fused = any(source is None or len(source.layers) > 1 or source.linear for source in sources)
        tied = any((index, kind) in self.tied for kind in slot.blocks)
        self._differs = self._differs or len(slot.layers) > 1 or fused or tied or slot.layers[0] > index
        if self._differs:
            self._repair(index, slot, self.teacher.see(self._wanted(slot)))
        self.student.advance()

    @abstractmethod
    def _wanted(self, slot: Slot) -> set[tuple[int, Tap]]:
        """What the repair of a slot has to know of the teacher: (layer, tap)."""

    @abstractmethod
    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, Tap], States]) -> None:
        """Repair the layer at `index`, which the student has not run yet."""

    def _note(self, layer: int, kind: str, role: str, before: float, after: float, **more: float) -> None:
        self.blocks.append({"layer": layer, "kind": kind, "map": role, "before": before, "after": after, **more})
