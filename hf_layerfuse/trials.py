"""What one edit alone costs: candidates are compared before they are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from .adapters import adapter_for
from .errors import PlanError, UnsupportedModelError
from .modeling import apply
from .modes import eval_mode
from .plan import Edit, Fuse, Plan
from .refit import Method, repair_of
from .walk import Trace, Walk


class Trials:
    """Calibration losses of models in which one edit alone is carried out and refitted.

    Args:
        model: in eval mode.
        method: of the refit, of the layers of the edit alone.
        batches: calibration batches.
        trace: of the model, on those of them that are used.
    """

    def __init__(self, model: PreTrainedModel, method: Method, batches: Sequence[Any], trace: Trace) -> None:
        self.model, self.method, self.batches = model, method, batches
        self.adapter = adapter_for(model)
        self.depth = len(self.adapter.layer_list(model))
        self.trace = trace
        trace.states(self.depth)
        self.losses: dict[Edit, float] = {}

    def loss(self, edit: Edit) -> float:
        """Calibration loss when `edit` is all that is done to the model; infinite where it cannot be done."""
        if edit not in self.losses:
            self.losses[edit] = self._measure(edit)
        return self.losses[edit]

    def _measure(self, edit: Edit) -> float:
        plan = Plan(self.adapter.model_type, self.depth, (edit,), kinds=self.adapter.kinds)
        try:
            student = apply(self.model, plan, self.batches)
        except (PlanError, UnsupportedModelError):  # the average of layers of different types; heads of unknown number
            return math.inf
        with eval_mode(student):
            walk = Walk(student, self.trace.walk.sample)
            walk.depth, walk.states = edit.layers[0], self.trace.states(edit.layers[0])
            if self.method != "none":
                repair = repair_of(walk, self.trace, plan, self.method)
                runs_once = isinstance(edit, Fuse) and edit.mode == "depth"
                while walk.depth <= edit.layers[0 if runs_once else -1]:
                    repair.step()
            while walk.depth < len(walk.layers):
                walk.advance()
            return self.trace.loss(walk)
