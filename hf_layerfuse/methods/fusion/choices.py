"""Candidate edits of each block of a transformer, and their cost in quality."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from ...evaluation.cache import MeasurementCache
from ...models.architectures import LayerArchitecture
from ...models.surgery.checks import can_be
from ...plan import Drop, Edit, Fuse, Linearize, Plan
from ...plan.edit_json import write_edit
from ...recipe import FusionRecipe
from ..trials import Trials
from .planner import candidates


@dataclass(frozen=True)
class Choice:
    """Candidate edit of blocks start + 1 to end, counted across all layers. Without an edit, they are kept."""

    start: int
    end: int
    edit: Edit | None = None

    def touches(self, other: Choice) -> bool:
        """Return whether both candidates change a common block."""
        return self.start < other.end and other.start < self.end

    def exceeds(self, other: Choice) -> bool:
        """Return whether this edit includes the other, so that its loss is expected to be at least as large."""
        if self == other or other.edit is None or not (self.start <= other.start and other.end <= self.end):
            return False
        if isinstance(self.edit, Drop):
            return isinstance(other.edit, Linearize | Drop)
        return isinstance(self.edit, Fuse) and isinstance(other.edit, Fuse)


def choices_of(
    model: PreTrainedModel,
    architecture: LayerArchitecture,
    edits_of_runs: Callable[[tuple[int, ...]], Edit],
    *,
    runs_only: bool,
) -> list[Choice]:
    """List all candidates.

    Each block is kept, linearised (MLPs), dropped alone or with its layer, or fused with a run of layers. The first
    layer is never dropped, so that the model keeps at least one.

    Args:
        model: Stock transformer.
        architecture: Architecture table of the model.
        edits_of_runs: Function of a run of layers that returns the edit which fuses it.
        runs_only: Whether to offer only kept blocks and fused runs.
    """
    depth, kinds = len(architecture.layer_list(model)), architecture.kinds
    found = [Choice(block, block + 1) for block in range(depth * len(kinds))]
    changes: list[tuple[int, int, Edit]] = []
    for layer in range(depth) if not runs_only else ():
        first = layer * len(kinds)
        places = {kind: (first + place, first + place + 1) for place, kind in enumerate(kinds)}
        changes.append((*places["mlp"], Linearize(layer)))
        if layer:
            changes += [(*places[kind], Drop(kind, layer)) for kind in kinds]
            changes.append((first, first + len(kinds), Drop("layer", layer)))
    for start in range(depth):
        for end in range(start + 2, depth + 1):
            changes.append((start * len(kinds), end * len(kinds), edits_of_runs(tuple(range(start, end)))))
    nothing = Plan(architecture.model_type, depth, kinds=kinds)
    able = [change for change in changes if can_be(model, architecture, replace(nothing, edits=(change[2],)))]
    return [*found, *(Choice(*change) for change in able)]


def edits_of(choices: Iterable[Choice]) -> tuple[Edit, ...]:
    """Return the edits of some candidates, front to back."""
    chosen = sorted((choice for choice in choices if choice.edit is not None), key=lambda choice: choice.start)
    return tuple(choice.edit for choice in chosen)


class Worth:
    """Increase of the calibration loss by each candidate, on top of a base combination.

    A candidate replaces those of the base that change the same blocks.

    Args:
        choices: All candidates.
        trials: Trials that differ from the model of the base combination.
        table: Measurement cache of losses.
        recipe: Recipe that defines the competing operators.
        base: Candidates of the base combination.
        prior: Losses without a base combination, which are known for all candidates that compete here. An unmeasured
            candidate is expected to add its loss in `prior`, scaled by the ratio of the losses of the base
            combination here and there, which is at most 1: the refit of later layers makes up for much.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        trials: Trials,
        table: MeasurementCache,
        recipe: FusionRecipe,
        base: Sequence[Choice] = (),
        prior: Worth | None = None,
    ) -> None:
        self.trials, self.table, self.recipe, self.prior = trials, table, recipe, prior
        self.base = [choice for choice in base if choice.edit is not None]
        # a candidate that was not measured alone does not compete here either
        able = [choice for choice in choices if prior is None or prior.knows(choice)]
        self.choices = [*able, *(choice for choice in self.base if choice not in able)]
        self.known: dict[Choice, float] = {}
        for choice in self.base:
            self.measure(choice)
        self.share = 1.0
        if prior is not None and (alone := sum(map(prior.of, self.base))) > 0:
            self.share = min(max(sum(self.known.values()) / alone, 0.0), 1.0)

    def knows(self, choice: Choice) -> bool:
        return choice.edit is None or choice in self.known

    def of(self, choice: Choice) -> float:
        """Return the measured loss, else the one expected from `prior`, else the largest of the included candidates."""
        if self.knows(choice):
            return self.known.get(choice, 0.0)
        if self.prior is not None:
            return self.share * self.prior.of(choice)
        return max((loss for other, loss in self.known.items() if choice.exceeds(other)), default=0.0)

    def first(self, choice: Choice) -> list[Choice]:
        """Return the candidates to measure first: the smallest that this one includes, which may rule it out."""
        inside = [other for other in self.choices if choice.exceeds(other) and not self.knows(other)]
        if not inside:
            return [choice]
        least = min(other.end - other.start for other in inside)
        return [other for other in inside if other.end - other.start == least]

    def measure(self, choice: Choice) -> None:
        """Measure the loss that a candidate adds."""
        if choice not in self.known:
            others = [other for other in self.base if not other.touches(choice)]
            self.known[choice] = self._loss([*others, choice]) - self._loss(others)

    def best(self, choice: Choice) -> Choice:
        """Return the candidate with the operator of least loss, if it fuses layers."""
        if not isinstance(choice.edit, Fuse):
            return choice
        options = [replace(choice, edit=edit) for edit in candidates(choice.edit, self.recipe)]
        for option in options:
            self.measure(option)
        return min(options, key=self.of)

    def total(self, chosen: Iterable[Choice]) -> float:
        """Return the expected calibration loss of a combination."""
        return self._loss(self.base) + sum(map(self.of, chosen)) - sum(map(self.of, self.base))

    def _loss(self, choices: Sequence[Choice]) -> float:
        edits = edits_of(choices)
        key = json.dumps([[write_edit(edit) for edit in part] for part in (edits_of(self.base), edits)])
        if key not in self.table.values:
            self.table.put({key: self.trials.loss(*edits)})
        return self.table.values[key]
