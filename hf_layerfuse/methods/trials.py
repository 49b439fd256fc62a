"""The calibration loss of a few edits alone, to compare candidates before combining them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel

from ..calibration.layerwise import LayerwiseForward
from ..calibration.refit.base import RefitMethod
from ..calibration.refit.refit import repair_of
from ..calibration.samples import Sample
from ..calibration.teacher_states import TeacherStates
from ..errors import PlanError, UnsupportedModelError
from ..evaluation.modes import eval_mode
from ..models.apply import applied
from ..models.architectures import architecture_for
from ..plan import Edit, Plan

TRIAL_SEQUENCES = 12
"""Minimum number of sequences to rank edits reliably."""


def share_of(sample: Sample, depth: int, trials: int, cost: float) -> float:
    """Return the share of the calibration sequences that keeps the cost of a number of trials within a limit.

    Args:
        sample: All calibration sequences.
        depth: Number of layers of the model.
        trials: Number of trials. Each costs about six layers to refit, plus the rest of the model to evaluate, which
            is two thirds of the model with its head.
        cost: Limit, in forward passes of the model over all sequences.
    """
    sequences = sum(map(len, sample.held_out))
    share = min(0.5, cost / trials / (6 / depth + 0.67))
    return min(1.0, max(share, TRIAL_SEQUENCES / sequences))


class Trials:
    """Calibration losses of models that differ from a base model by a few edits; only changed layers are refitted.

    Args:
        model: Original model, in eval mode.
        method: Refit method for the layers that differ.
        batches: Calibration batches.
        teacher_states: States of the original on the calibration sequences in use.
        base: Base model, a student, and its plan. None is the original itself. The plan must not share weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: RefitMethod,
        batches: Sequence[Any],
        teacher_states: TeacherStates,
        base: tuple[PreTrainedModel, Plan] | None = None,
    ) -> None:
        self.model, self.method, self.batches = model, method, batches
        self.architecture = teacher_states.architecture
        self.depth = len(self.architecture.layer_list(model))
        self.teacher_states = teacher_states
        teacher_states.states(self.depth)
        self.base, plan = teacher_states, self._plan()
        if base is not None:
            student, plan = base
            self.base = TeacherStates(
                LayerwiseForward(
                    student, teacher_states.layerwise.sample, architecture_for(student, stack=self.architecture.stack)
                )
            )
        self.parts = _parts(plan)
        self.losses: dict[tuple[Edit, ...], float] = {}

    def loss(self, *edits: Edit) -> float:
        """Return the calibration loss with only these edits; infinite where they cannot be applied."""
        if edits not in self.losses:
            self.losses[edits] = self._measure(edits)
        return self.losses[edits]

    def _plan(self, edits: Sequence[Edit] = ()) -> Plan:
        return self.architecture.plan(self.depth, edits)

    def _measure(self, edits: Sequence[Edit]) -> float:
        try:
            plan = self._plan(edits)
            student = applied(self.model, plan, self.batches)
        except (PlanError, UnsupportedModelError):  # layers of different types, unknown number of heads
            return math.inf
        parts = _parts(plan)
        first, behind = _common(parts, self.parts), _common(parts[::-1], self.parts[::-1])
        # after a drop no remaining layer differs, and the one after it is refitted
        last = min(max(len(parts) - behind, first + 1), len(parts))
        with eval_mode(student):
            architecture = architecture_for(student, stack=self.architecture.stack)
            layerwise = LayerwiseForward(student, self.teacher_states.layerwise.sample, architecture)
            layerwise.depth, layerwise.states = first, self.base.states(first)
            if self.base is not self.teacher_states:
                for index in range(last, len(parts)):
                    theirs = self.base.layers[index - len(parts)]
                    layerwise.layers[index].load_state_dict(theirs.state_dict())
            if self.method != "none":
                repair = repair_of(layerwise, self.teacher_states, plan, self.method)
                while layerwise.depth < last:
                    repair.step()
            while layerwise.depth < len(layerwise.layers):
                layerwise.advance()
            return self.teacher_states.loss(layerwise)


def _parts(plan: Plan) -> list[tuple[Any, ...]]:
    """Describe each layer of the result of a plan, with its shared weights, to compare two plans."""
    layout = plan.layout()
    return [(slot, *(tie for tie in layout.ties if index in tie.slots)) for index, slot in enumerate(layout.slots)]


def _common(some: Sequence[Any], others: Sequence[Any]) -> int:
    """Count the equal items at the start of both sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))
