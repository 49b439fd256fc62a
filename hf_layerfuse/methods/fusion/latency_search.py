"""Choose one edit per block of a transformer within a latency budget, by an exact multiple-choice knapsack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...calibration.contract import check_contract
from ...calibration.disk import WeightSnapshot
from ...calibration.layerwise import LayerwiseForward
from ...calibration.refit.base import RefitReport
from ...calibration.refit.refit import refit_by
from ...calibration.samples import Sample
from ...calibration.teacher_states import TeacherStates
from ...errors import RecipeError, UnsupportedModelError
from ...evaluation.fingerprint import digest
from ...evaluation.modes import eval_mode, take_modes
from ...models.apply import applied
from ...models.architectures import LayerArchitecture, architecture_for
from ...models.surgery.checks import check_model
from ...models.surgery.linear_mlp import needs_fit
from ...plan import CandidatePlan, Edit, EditLoss, Linearize, Plan, PlanLatency, PlanNotes
from ...recipe import FusionRecipe
from ..base import SearchResult
from ..candidates import Candidate, edits_of, loss_cache, options_of
from ..latency_budget import NEAR, affordable, within
from ..trials import Trials, share_of
from .block_latency import BlockLatencies
from .candidates import BlockImportance, block_candidates
from .planner import group_edit, layer_importance_of

ROUNDS = {"low": 0, "medium": 2, "high": 6}
"""Number of rounds, by effort, that measure candidates again on top of the best combination so far."""

COST = 10
"""Cost limit of the first round of measurements, in forward passes of the original over all calibration data."""


def search_budget(model: PreTrainedModel, recipe: FusionRecipe, batches: Sequence[Any] | None) -> SearchResult:
    """Make a transformer faster with a recipe that has a latency budget: measure candidates, choose, apply, refit.

    Each candidate has a latency, and a loss: the calibration loss after applying and refitting that candidate alone.
    The program, a multiple-choice knapsack over blocks and runs of layers, chooses the candidates of least total loss
    within the budget. It measures a candidate only when it chooses it. Until then, the expected loss of a candidate is
    the largest measured loss of the candidates that it includes.

    Losses do not always add up: two candidates can be harmless alone and harmful together. Efforts `medium` and `high`
    therefore measure candidates again on top of the best refitted combination, in which they replace candidates for
    the same blocks, and run the program again. Combinations compete on the calibration loss, each refitted as a whole.
    The latency of each chosen combination is measured. If it exceeds the budget, the program runs with a smaller one.

    Args:
        model: Stock transformer with a registered architecture; it is not changed.
        recipe: Settings of the fusion, with `latency_budget` or `latency_ms`.
        batches: Calibration batches.

    Returns:
        The new `model`, its `plan`, and the `report` of the refit.

    Raises:
        RecipeError: Latency budget that cannot be met, or missing batches.
        UnsupportedModelError: Unknown architecture, convolutional model, or a model that cannot be fused.
        LayerFuseError: Measurement cache of another device, other weights or other data.
    """
    architecture = architecture_for(model, stack=recipe.stack)
    check_model(model, architecture)
    if "attention" not in architecture.kinds:
        raise UnsupportedModelError(
            f"layers of {architecture.model_type!r} have no attention and MLPs to choose from: use "
            "merge(model, latency_budget=...) for convolutions, or a target other than latency."
        )
    if batches is None:
        raise RecipeError("a latency budget needs calibration batches to measure the candidates: pass batches=.")
    check_contract(model, batches, architecture)
    with eval_mode(model):
        found = _Budget(model, architecture, recipe, list(batches)).run()
    take_modes(found.model, model)
    return found


class _Budget:
    """One search. It keeps the best combination so far, with its weights on disk."""

    def __init__(
        self, model: PreTrainedModel, architecture: LayerArchitecture, recipe: FusionRecipe, batches: list[Any]
    ) -> None:
        self.model, self.architecture, self.recipe, self.batches = model, architecture, recipe, batches
        self.sample = Sample.of(batches)
        self.teacher_states = TeacherStates(LayerwiseForward(model, self.sample, architecture))
        self.depth = len(architecture.layer_list(model))
        few = Sample.of(batches, share_of(self.sample, self.depth, 5 * self.depth, COST))
        self.few = TeacherStates(LayerwiseForward(model, few, architecture))
        folder = None if recipe.tables is None else Path(recipe.tables)
        self.latencies = BlockLatencies(
            model,
            batch_of(self.sample, recipe.latency_batch_size),
            folder and folder / "latency.json",
            architecture,
            repeats=recipe.latency_repeats,
        )
        batches_digest = digest(self.sample.batches)
        self.losses = loss_cache(model, folder and folder / "losses.json", batches=batches_digest, refit=recipe.refit)
        self.allowed = recipe.latency_ms or recipe.latency_budget * self.latencies.original
        if self.allowed >= self.latencies.original:
            raise RecipeError(
                f"latency_ms={self.allowed:.6g} is met already: the model takes {self.latencies.original:.3g} ms. "
                "Ask for less."
            )
        self.limit = self.allowed - self.latencies.rest
        importance = layer_importance_of(model, batches)
        self.candidates = block_candidates(
            model,
            architecture,
            lambda run: group_edit("layer", run, recipe, importance),
            runs_only=recipe.choose == "runs",
        )
        if needs_fit(architecture) and recipe.refit == "none":
            self.candidates = [each for each in self.candidates if not isinstance(each.edit, Linearize)]
        self.tried: dict[tuple[Edit, ...], CandidatePlan] = {}
        self.best: tuple[list[Candidate], Plan, RefitReport, WeightSnapshot] | None = None

    def run(self) -> SearchResult:
        alone = self._importance()
        self._try(alone, self._program(alone))
        for _ in range(ROUNDS[self.recipe.effort]):
            chosen, plan, _, weights = self.best
            student = applied(self.model, plan, self.batches)
            weights.restore(student)
            importance = self._importance(chosen, student.eval(), alone)
            again = self._program(importance)
            if self.plan(again).edits in self.tried:
                break
            self._try(importance, again)
        chosen, plan, report, weights = self.best
        student = applied(self.model, plan, self.batches)
        weights.restore(student)
        notes = PlanNotes(
            recipe=asdict(self.recipe),
            calibration=f"{sum(map(len, self.sample.held_out))} sequences",
            latency_ms=PlanLatency(
                original=self.latencies.original,
                predicted=self.latencies.rest + sum(map(self.latencies.of, chosen)),
                measured=self.latencies.model_of(plan),
                rest=self.latencies.rest,
                inputs=self.latencies.cache.about["inputs"],
            ),
            losses=tuple(EditLoss(candidate.edit, loss) for candidate, loss in alone.known.items()),
            competition=tuple(self.tried.values()),
            refit=report,
        )
        return SearchResult(student, replace(plan, notes=notes), report)

    def plan(self, chosen: Iterable[Candidate]) -> Plan:
        return self.architecture.plan(self.depth, edits_of(chosen))

    def _importance(
        self,
        base: Sequence[Candidate] = (),
        student: PreTrainedModel | None = None,
        prior: BlockImportance | None = None,
    ) -> BlockImportance:
        pair = None if student is None else (student, self.plan(base))
        trials = Trials(self.model, self.recipe.refit, self.batches, self.few, pair)
        return BlockImportance(self.candidates, trials, self.losses, self.recipe, base, prior)

    def _program(self, importance: BlockImportance) -> list[Candidate]:
        """Return the candidates of least total loss whose measured latency together is within the budget."""
        chosen, self.limit = within(partial(self._settled, importance), self._milliseconds, self.limit, self.allowed)
        return chosen

    def _milliseconds(self, chosen: Iterable[Candidate]) -> float:
        return self.latencies.model_of(self.plan(chosen))

    def _settled(self, importance: BlockImportance, limit: float) -> list[Candidate]:
        """Run the program until all the candidates that it chooses are measured."""
        with tqdm(desc="Comparing candidates", unit="candidate", disable=None, leave=False) as progress:
            while True:
                losses = {candidate: importance.of(candidate) for candidate in importance.candidates}
                values = {candidate: -loss for candidate, loss in losses.items() if math.isfinite(loss)}
                options = options_of(values, self.latencies.of)
                length = self.depth * len(self.architecture.kinds)
                chosen = affordable(length, options, limit, self.latencies)
                wanted = [candidate for candidate in chosen if not importance.knows(candidate)]
                if not wanted:
                    return chosen
                for first in dict.fromkeys(itertools.chain.from_iterable(map(importance.first, wanted))):
                    importance.measure(first)
                    progress.update()

    def _try(self, importance: BlockImportance, chosen: list[Candidate]) -> None:
        """Apply and refit a combination, also with the best operator for each run, on all calibration data."""
        every = [chosen] if self.recipe.effort == "low" else [chosen, [*map(importance.best, chosen)]]
        for candidates in every:
            plan = self.plan(candidates)
            if plan.edits in self.tried:
                continue
            student, report = self._carried_out(plan)
            expected = importance.total(candidates)
            self.tried[plan.edits] = CandidatePlan(
                plan.edits, report.after, report.before, expected, self.latencies.model_of(plan)
            )
            if self.best is None or self._rank(plan, report) < self._rank(*self.best[1:3]):
                self.best = candidates, plan, report, WeightSnapshot(student)

    def _rank(self, plan: Plan, report: RefitReport) -> tuple[float, float]:
        """Return a sort key, least first: models within the budget before slower ones, then by calibration loss."""
        return max(self.latencies.model_of(plan), NEAR * self.allowed), report.after

    def _carried_out(self, plan: Plan) -> tuple[PreTrainedModel, RefitReport]:
        student = applied(self.model, plan, self.batches)
        with eval_mode(student):
            before = self.teacher_states.loss_of(student)
            if self.recipe.refit == "none":
                return student, RefitReport(before, before, kept=False)
            return student, refit_by(student, self.teacher_states, plan, before, self.recipe.refit)


def batch_of(sample: Sample, size: int) -> dict[str, Tensor]:
    """Return a batch of `size` sequences of middle length. Sequences repeat if there are too few."""
    batches = sorted(sample.batches, key=lambda batch: next(iter(batch.values())).shape[-1])
    batch = batches[len(batches) // 2]
    rows = torch.arange(size) % len(next(iter(batch.values())))
    return {name: tensor[rows.to(tensor.device)] for name, tensor in batch.items()}
