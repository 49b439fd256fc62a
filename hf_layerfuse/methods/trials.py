"""What a few edits cost: candidates are compared before they are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel

from ..calibration.layerwise import LayerwiseForward, TeacherStates
from ..calibration.refit.transformer import Method, repair_of
from ..calibration.samples import Sample
from ..errors import PlanError, UnsupportedModelError
from ..evaluation.eval_mode import eval_mode
from ..models.apply import applied
from ..models.architectures import architecture_for
from ..plan import Edit, Plan

TRIAL_SEQUENCES = 12
"""Fewer sequences than these, if there are more, tell edits apart too badly."""


def share_of(sample: Sample, depth: int, trials: int, cost: float) -> float:
    """The share of the calibration sequences with which so many trials together take no more than some forward passes.

    Args:
        sample: all of them.
        depth: layers of the model.
        trials: each costs about six layers to refit and what is left of the model to judge, two thirds with its head.
        cost: forward passes of the model over all sequences.
    """
    sequences = sum(map(len, sample.held_out))
    share = min(0.5, cost / trials / (6 / depth + 0.67))
    return min(1.0, max(share, TRIAL_SEQUENCES / sequences))


class Trials:
    """Calibration losses of models that differ by a few edits from one that is there, and are refitted only in between.

    Args:
        model: in eval mode.
        method: of the refit, of the layers that differ alone.
        batches: calibration batches.
        trace: of the model, on those of them that are used.
        base: a student of the model and its plan, from which trials differ; None is the model itself. Only plans in
            which nothing is shared have one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        batches: Sequence[Any],
        trace: TeacherStates,
        base: tuple[PreTrainedModel, Plan] | None = None,
    ) -> None:
        self.model, self.method, self.batches = model, method, batches
        self.architecture = architecture_for(model)
        self.depth = len(self.architecture.layer_list(model))
        self.trace = trace
        trace.states(self.depth)
        self.base, plan = trace, self._plan()
        if base is not None:
            student, plan = base
            self.base = TeacherStates(LayerwiseForward(student, trace.walk.sample))
        self.parts = _parts(plan)
        self.losses: dict[tuple[Edit, ...], float] = {}

    def loss(self, *edits: Edit) -> float:
        """Calibration loss when these edits are all that is done to the model; infinite where that cannot be."""
        if edits not in self.losses:
            self.losses[edits] = self._measure(edits)
        return self.losses[edits]

    def _plan(self, edits: Sequence[Edit] = ()) -> Plan:
        return Plan(self.architecture.model_type, self.depth, tuple(edits), kinds=self.architecture.kinds)

    def _measure(self, edits: Sequence[Edit]) -> float:
        try:
            plan = self._plan(edits)
            student = applied(self.model, plan, self.batches)
        except (PlanError, UnsupportedModelError):  # the average of layers of different types; heads of unknown number
            return math.inf
        parts = _parts(plan)
        first, behind = _common(parts, self.parts), _common(parts[::-1], self.parts[::-1])
        # without its first layer, a model has no layer that is another
        last = min(max(len(parts) - behind, first + 1), len(parts))
        with eval_mode(student):
            walk = LayerwiseForward(student, self.trace.walk.sample)
            walk.depth, walk.states = first, self.base.states(first)
            if self.base is not self.trace:
                for index in range(last, len(parts)):
                    theirs = self.base.layers[index - len(parts)]
                    walk.layers[index].load_state_dict(theirs.state_dict())
            if self.method != "none":
                repair = repair_of(walk, self.trace, plan, self.method)
                while walk.depth < last:
                    repair.step()
            while walk.depth < len(walk.layers):
                walk.advance()
            return self.trace.loss(walk)


def _parts(plan: Plan) -> list[tuple[Any, ...]]:
    """The layers that a plan leads to, each with what it shares: those of two plans are compared."""
    layout = plan.layout()
    return [(slot, *(tie for tie in layout.ties if index in tie.slots)) for index, slot in enumerate(layout.slots)]


def _common(some: Sequence[Any], others: Sequence[Any]) -> int:
    """How many of the first ones are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))
