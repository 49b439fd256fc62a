"""Candidate edits of each block of a transformer, and the importance of what they remove."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from ...evaluation.cache import MeasurementCache
from ...models.architectures import LayerArchitecture
from ...models.surgery.checks import can_be
from ...plan import Drop, Edit, Fuse, Linearize
from ...plan.edit_json import write_edit
from ...recipe import FusionRecipe
from ..candidates import Candidate, edits_of
from ..trials import Trials
from .planner import operator_candidates


def block_candidates(
    model: PreTrainedModel,
    architecture: LayerArchitecture,
    edits_of_runs: Callable[[tuple[int, ...]], Edit],
    *,
    runs_only: bool,
) -> list[Candidate]:
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
    found = [Candidate(block, block + 1, None) for block in range(depth * len(kinds))]
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
    nothing = architecture.plan(depth)
    able = [change for change in changes if can_be(model, architecture, replace(nothing, edits=(change[2],)))]
    return [*found, *(Candidate(*change) for change in able)]


class BlockImportance:
    """Increase of the calibration loss by each candidate, on top of a base combination.

    A candidate replaces those of the base that change the same blocks.

    Args:
        candidates: All candidates.
        trials: Trials that differ from the model of the base combination.
        cache: Measurement cache of losses.
        recipe: Recipe that defines the competing operators.
        base: Candidates of the base combination.
        prior: Losses without a base combination, which are known for all candidates that compete here. An unmeasured
            candidate is expected to add its loss in `prior`, scaled by the ratio of the losses of the base
            combination here and there, which is at most 1: the refit of later layers makes up for much.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        trials: Trials,
        cache: MeasurementCache,
        recipe: FusionRecipe,
        base: Sequence[Candidate] = (),
        prior: BlockImportance | None = None,
    ) -> None:
        self.trials, self.cache, self.recipe, self.prior = trials, cache, recipe, prior
        self.base = [candidate for candidate in base if candidate.changes]
        # a candidate that was not measured alone does not compete here either
        able = [candidate for candidate in candidates if prior is None or prior.knows(candidate)]
        self.candidates = [*able, *(candidate for candidate in self.base if candidate not in able)]
        self.known: dict[Candidate, float] = {}
        for candidate in self.base:
            self.measure(candidate)
        self.share = 1.0
        if prior is not None and (alone := sum(map(prior.of, self.base))) > 0:
            self.share = min(max(sum(self.known.values()) / alone, 0.0), 1.0)

    def knows(self, candidate: Candidate) -> bool:
        return not candidate.changes or candidate in self.known

    def of(self, candidate: Candidate) -> float:
        """Return the measured loss, else the one expected from `prior`, else the largest of the included candidates."""
        if self.knows(candidate):
            return self.known.get(candidate, 0.0)
        if self.prior is not None:
            return self.share * self.prior.of(candidate)
        return max((loss for other, loss in self.known.items() if candidate.includes(other)), default=0.0)

    def first(self, candidate: Candidate) -> list[Candidate]:
        """Return the candidates to measure first: the smallest that this one includes, which may rule it out."""
        inside = [other for other in self.candidates if candidate.includes(other) and not self.knows(other)]
        if not inside:
            return [candidate]
        least = min(other.end - other.start for other in inside)
        return [other for other in inside if other.end - other.start == least]

    def measure(self, candidate: Candidate) -> None:
        """Measure the loss that a candidate adds."""
        if candidate not in self.known:
            others = [other for other in self.base if not other.overlaps(candidate)]
            self.known[candidate] = self._loss([*others, candidate]) - self._loss(others)

    def best(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the operator of least loss, if it fuses layers."""
        if not isinstance(candidate.edit, Fuse):
            return candidate
        options = [replace(candidate, edit=edit) for edit in operator_candidates(candidate.edit, self.recipe)]
        for option in options:
            self.measure(option)
        return min(options, key=self.of)

    def total(self, chosen: Iterable[Candidate]) -> float:
        """Return the expected calibration loss of a combination."""
        return self._loss(self.base) + sum(map(self.of, chosen)) - sum(map(self.of, self.base))

    def _loss(self, candidates: Sequence[Candidate]) -> float:
        edits = edits_of(candidates)
        key = json.dumps([[write_edit(edit) for edit in part] for part in (edits_of(self.base), edits)])
        if key not in self.cache.values:
            self.cache.put({key: self.trials.loss(*edits)})
        return self.cache.values[key]
