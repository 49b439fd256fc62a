"""What all closed-form repairs have in common: a walk of the student beside its teacher, and what is kept of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ...plan import Plan, Slot
from ..layer_hooks import HookPoint
from ..layerwise import LayerwiseForward, TeacherStates
from ..mmap import MappedActivations, WeightSnapshot


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        before: calibration loss, on sequences that took no part in the repair, of the model as it was given.
        after: that of the model as it is now, never more.
        kept: whether the repair was kept; otherwise it made things worse and was undone.
        blocks: per repaired map, its layer, kind and role, and its mean squared error on held-out tokens before and
            after. For `heads` of a selected layer, what the MLPs of its group miss the end of the group by, with heads
            of the kept layer and with those in use. For a linear map that was an MLP, errors are relative to the
            variance of the stream at each token, and `r2` is the share of the variance of what it ought to give that
            it explains on held-out tokens. A merged convolution has its `segment` in the place of those names.
    """

    before: float
    after: float
    kept: bool
    blocks: Sequence[Mapping[str, Any]] = ()


def unless_worse(
    student: PreTrainedModel, before: float, carry_out: Callable[[], tuple[Sequence[Mapping[str, Any]], float]]
) -> RefitReport:
    """Repair a student, and take that back where its calibration loss is more than before.

    Args:
        student: changed in place.
        before: its calibration loss.
        carry_out: repairs it; gives a row for each map, and the calibration loss then.
    """
    kept = WeightSnapshot(student)
    blocks, after = carry_out()
    if after <= before:
        return RefitReport(before, after, kept=True, blocks=tuple(blocks))
    kept.restore(student)
    return RefitReport(before, before, kept=False, blocks=tuple(blocks))


class Repair(ABC):
    """`step` repairs the student's next layer and leads the student through it.

    Layers in front of the first edit are those of the original, and stay as they are.

    Attributes:
        blocks: a row for each map that was refitted so far.
    """

    def __init__(self, student: LayerwiseForward, teacher: TeacherStates, plan: Plan, method: str) -> None:
        self.student, self.teacher, self.method = student, teacher, method
        layout = plan.layout()
        self.slots = layout.slots
        self.tied = {(slot, tie.kind) for tie in layout.ties for slot in tie.slots}
        self.blocks: list[dict[str, Any]] = []
        self._differs = any(map(self._edited, range(student.depth)))

    def step(self) -> None:
        """Repair the student's next layer, and lead the student through it."""
        index = self.student.depth
        self._differs = self._differs or self._edited(index)
        if self._differs:
            slot = self.slots[index]
            self._repair(index, slot, self.teacher.see(self._wanted(slot)))
        self.student.advance()

    def _edited(self, index: int) -> bool:
        slot = self.slots[index]
        sources = slot.blocks.values()
        fused = any(source is None or len(source.layers) > 1 or source.linear for source in sources)
        tied = any((index, kind) in self.tied for kind in slot.blocks)
        return len(slot.layers) > 1 or fused or tied or slot.layers[0] > index

    @abstractmethod
    def _wanted(self, slot: Slot) -> set[tuple[int, HookPoint]]:
        """What the repair of a slot has to know of the teacher: (layer, point)."""

    @abstractmethod
    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, HookPoint], MappedActivations]) -> None:
        """Repair the layer at `index`, which the student has not run yet."""

    def _note(self, layer: int, kind: str, role: str, before: float, after: float, **more: float) -> None:
        self.blocks.append({"layer": layer, "kind": kind, "map": role, "before": before, "after": after, **more})
