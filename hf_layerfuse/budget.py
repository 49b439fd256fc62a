"""What becomes of each block of a transformer within a latency budget: one exact multiple-choice program."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import LayerAdapter, adapter_for
from .blocktimes import BlockTimes
from .calibration import Sample
from .edits import can_be, check_model
from .errors import LayerFuseError, RecipeError, UnsupportedModelError
from .fingerprint import digest, fingerprint
from .found import Found
from .math.knapsack import Frontier, Option
from .methods.fusion import candidates, group_edit, importance_of
from .modeling import apply
from .modes import eval_mode
from .plan import Drop, Edit, Fuse, Linearize, Plan
from .plan.edit import write_edit
from .recipe import FusionRecipe
from .refit import refit_by
from .repair import RefitReport
from .states import Saved
from .table import Table
from .trials import Trials, share_of
from .walk import Trace, Walk

_Chosen = TypeVar("_Chosen")

UNITS = 10_000
"""Parts of the budget: each choice is rounded up to one of them."""

ROUNDS = {"low": 0, "medium": 2, "high": 6}
"""By effort, how often choices are judged anew, on top of the best combination so far."""

COST = 10
"""Forward passes of the original, over all of the calibration data, that judging choices may take at first."""

NEAR = 1.02
"""A model that takes so much more than the budget is within what its timing is worth."""

TRIES = 3
"""More programs, with a smaller and smaller budget, where what they choose takes longer than they think."""


class Times(Protocol):
    """What a model takes, in milliseconds, and what of that is no choice."""

    original: float
    rest: float


def affordable(length: int, options: Mapping[tuple[int, int], Sequence[Option]], limit: float, times: Times) -> list:
    """The labels of the options of most value in sum that together take no more than some milliseconds.

    Args:
        length: of the chain.
        options: (i, j) -> what can be chosen between these boundaries; costs are milliseconds.
        limit: for the options, without the rest.
        times: for the message of the error.

    Raises:
        RecipeError: none take so little.
    """
    try:
        steps = Frontier(length, options, max(limit, 1e-9), UNITS).best()
    except LayerFuseError as error:
        least = Frontier(length, options, 1e9).cheapest + times.rest
        raise RecipeError(
            f"no choice takes {limit + times.rest:.3g} ms or less: the least that can be had is {least:.3g} ms, "
            f"{least / times.original:.0%} of the original's {times.original:.3g} ms. Use a larger budget."
        ) from error
    return [option.label for _, _, option in steps]


def within(
    choose: Callable[[float], _Chosen], measure: Callable[[_Chosen], float], limit: float, allowed: float
) -> tuple[_Chosen, float]:
    """What is chosen for a limit, or where the whole takes longer than its parts, for a smaller one.

    Args:
        choose: for a limit of milliseconds.
        measure: milliseconds of the model that a choice leads to.
        limit: at first.
        allowed: milliseconds of the model.

    Returns:
        The choice, and the limit that it was chosen for. What takes too long all the same is said in the log.

    Raises:
        RecipeError: nothing is chosen for the first limit.
    """
    chosen = choose(limit)
    took, tries = measure(chosen), 0
    while took > NEAR * allowed and tries < TRIES:
        smaller, tries = limit * allowed / took, tries + 1
        try:
            chosen = choose(smaller)
        except RecipeError:  # nothing is that fast
            break
        limit, took = smaller, measure(chosen)
    if took > NEAR * allowed:
        logging.getLogger(__name__).warning(
            "what was chosen takes %.3g ms, and %.3g were asked for: parts together take longer than each alone. Use a "
            "smaller budget, or more timed rounds.",
            took,
            allowed,
        )
    return chosen, limit


@dataclass(frozen=True)
class Choice:
    """What becomes of blocks start + 1 to end, counted through all layers; without an edit, they stay as they are."""

    start: int
    end: int
    edit: Edit | None = None

    def touches(self, other: Choice) -> bool:
        """Whether there is a block that both are of."""
        return self.start < other.end and other.start < self.end

    def exceeds(self, other: Choice) -> bool:
        """Whether this does what the other does, and more, so that it is taken to lose no less."""
        if self == other or other.edit is None or not (self.start <= other.start and other.end <= self.end):
            return False
        if isinstance(self.edit, Drop):
            return isinstance(other.edit, Linearize | Drop)
        return isinstance(self.edit, Fuse) and isinstance(other.edit, Fuse)


def choices_of(
    model: PreTrainedModel, adapter: LayerAdapter, edits_of_runs: Callable[[tuple[int, ...]], Edit], *, runs_only: bool
) -> list[Choice]:
    """All that there is to choose from.

    A block stays, an MLP becomes linear, a block or a layer is dropped, a run of layers becomes one. The first layer
    is never dropped, so that something is left.

    Args:
        model: a stock transformer.
        adapter: of its architecture.
        edits_of_runs: what a run of layers becomes.
        runs_only: nothing but runs, and blocks as they are.
    """
    depth, kinds = len(adapter.layer_list(model)), adapter.kinds
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
    nothing = Plan(adapter.model_type, depth, kinds=kinds)
    able = [change for change in changes if can_be(model, adapter, replace(nothing, edits=(change[2],)))]
    return [*found, *(Choice(*change) for change in able)]


def search_budget(model: PreTrainedModel, recipe: FusionRecipe, batches: Sequence[Any] | None) -> Found:
    """Make a transformer faster by a recipe with a latency budget: measure choices, choose, apply, refit.

    A choice costs milliseconds, and what it adds to the calibration loss when it is all that is done to the model and
    its layer was refitted. The program takes the choices of the least sum that keep the budget: a multiple-choice
    knapsack over blocks and runs of layers. A choice is measured when the program wants it; until then it is taken to
    lose as much as the most that was measured of what it includes.

    Such sums mislead: of two choices, one can be harmless and both not. So with effort `medium` and `high`, choices are
    judged anew by what they add to the best combination that was refitted so far, without what they take the place of,
    and the program runs again. Combinations compete on the calibration loss, refitted as a whole. What is chosen is
    timed; where it takes longer than the budget, the program gets a smaller one.

    Args:
        model: a stock transformer with a registered adapter; never changed.
        recipe: with `latency_budget` or `latency_ms`.
        batches: calibration batches.

    Raises:
        RecipeError: the budget cannot be met, or there are no batches.
        UnsupportedModelError: no adapter for the architecture, one of convolutions, or a model that cannot be fused.
        LayerFuseError: the tables are of another device, other weights or other data.
    """
    adapter = adapter_for(model)
    check_model(model, adapter)
    if "attention" not in adapter.kinds:
        raise UnsupportedModelError(
            f"layers of {adapter.model_type!r} have no attention and MLPs to choose from: use merge(model, budget=...) "
            "for convolutions, or a target other than latency."
        )
    if batches is None:
        raise RecipeError("what a choice is worth is measured on calibration batches: pass batches=.")
    with eval_mode(model):
        found = _Budget(model, adapter, recipe, list(batches)).run()
    found.model.train(model.training)
    return found


class _Budget:
    """One search; the best combination so far is kept, its weights on disk."""

    def __init__(self, model: PreTrainedModel, adapter: LayerAdapter, recipe: FusionRecipe, batches: list[Any]) -> None:
        self.model, self.adapter, self.recipe, self.batches = model, adapter, recipe, batches
        self.sample = Sample.of(batches)
        self.trace = Trace(Walk(model, self.sample))
        self.depth = len(adapter.layer_list(model))
        few = Sample.of(batches, share_of(self.sample, self.depth, 5 * self.depth, COST))
        self.few = Trace(Walk(model, few))
        folder = None if recipe.tables is None else Path(recipe.tables)
        self.times = BlockTimes(
            model,
            batch_of(self.sample, recipe.latency_batch_size),
            folder and folder / "latency.json",
            repeats=recipe.latency_repeats,
        )
        about = {
            "weights": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "batches": digest(self.sample.batches),
            "refit": recipe.refit,
            "transformers": transformers.__version__,
        }
        self.losses = Table(folder and folder / "losses.json", about)
        self.allowed = recipe.latency_ms or recipe.latency_budget * self.times.original
        if self.allowed >= self.times.original:
            raise RecipeError(
                f"latency_ms={self.allowed:.6g} is met as it is: the model takes {self.times.original:.3g} ms. Ask for "
                "less."
            )
        self.limit = self.allowed - self.times.rest
        importance = importance_of(model, batches)
        self.choices = choices_of(
            model,
            adapter,
            lambda run: group_edit("layer", run, recipe, importance),
            runs_only=recipe.choose == "runs",
        )
        if "gate" in adapter.mlp and recipe.refit == "none":  # without its activation, such an MLP is still a product
            self.choices = [choice for choice in self.choices if not isinstance(choice.edit, Linearize)]
        self.tried: dict[tuple[Edit, ...], dict[str, Any]] = {}
        self.best: tuple[list[Choice], Plan, RefitReport, Saved] | None = None

    def run(self) -> Found:
        alone = _Worth(self)
        self._try(alone, self._program(alone))
        for _ in range(ROUNDS[self.recipe.effort]):
            chosen, plan, _, weights = self.best
            student = apply(self.model, plan, self.batches)
            weights.restore(student)
            worth = _Worth(self, chosen, student.eval(), alone)
            again = self._program(worth)
            if self.plan(again).edits in self.tried:
                break
            self._try(worth, again)
        chosen, plan, report, weights = self.best
        student = apply(self.model, plan, self.batches)
        weights.restore(student)
        notes = {
            "recipe": asdict(self.recipe),
            "calibration": f"{sum(map(len, self.sample.judges))} sequences",
            "latency_ms": {
                "original": self.times.original,
                "predicted": self.times.rest + sum(map(self.cost, chosen)),
                "measured": self.times.model_of(plan),
                "rest": self.times.rest,
                "inputs": self.times.table.about["inputs"],
            },
            "losses": [{"edit": write_edit(choice.edit), "loss": loss} for choice, loss in alone.known.items()],
            "competition": list(self.tried.values()),
            "refit": asdict(report),
        }
        return Found(student, replace(plan, notes=notes), report)

    def cost(self, choice: Choice) -> float:
        """Milliseconds of what a choice leads to."""
        layer, place = divmod(choice.start, len(self.adapter.kinds))
        if isinstance(choice.edit, Drop):
            return 0.0
        if isinstance(choice.edit, Linearize):
            return self.times.linear(layer)
        if isinstance(choice.edit, Fuse):
            return self.times.layer(layer)
        return self.times.block(layer, self.adapter.kinds[place])

    def plan(self, chosen: Iterable[Choice]) -> Plan:
        edits = tuple(choice.edit for choice in chosen if choice.edit is not None)
        return Plan(self.adapter.model_type, self.depth, edits, kinds=self.adapter.kinds)

    def _program(self, worth: _Worth) -> list[Choice]:
        """The choices of the least sum of losses that keep the budget when they are timed together."""
        chosen, self.limit = within(partial(self._settled, worth), self._milliseconds, self.limit, self.allowed)
        return chosen

    def _milliseconds(self, chosen: Iterable[Choice]) -> float:
        plan = self.plan(chosen)
        self.times.measure(plan)
        return self.times.model_of(plan)

    def _settled(self, worth: _Worth, limit: float) -> list[Choice]:
        """The program, until all that it chooses has been measured."""
        with tqdm(desc="Comparing choices", unit="choice", disable=None, leave=False) as progress:
            while True:
                options: dict[tuple[int, int], list[Option]] = {}
                for choice in worth.choices:
                    if math.isfinite(loss := worth.of(choice)):
                        option = Option(self.cost(choice), -loss, choice)
                        options.setdefault((choice.start, choice.end), []).append(option)
                length = self.depth * len(self.adapter.kinds)
                chosen = affordable(length, options, limit, self.times)
                wanted = [choice for choice in chosen if not worth.knows(choice)]
                if not wanted:
                    return chosen
                for first in dict.fromkeys(itertools.chain.from_iterable(map(worth.first, wanted))):
                    worth.measure(first)
                    progress.update()

    def _try(self, worth: _Worth, chosen: list[Choice]) -> None:
        """Apply and refit what was chosen, and that with the best operator for each run, on all calibration data."""
        every = [chosen] if self.recipe.effort == "low" else [chosen, [*map(worth.best, chosen)]]
        for choices in every:
            plan = self.plan(choices)
            if plan.edits in self.tried:
                continue
            student, report = self._carried_out(plan)
            self.tried[plan.edits] = {
                "edits": [write_edit(edit) for edit in plan.edits],
                "loss": report.after,
                "loss_before_refit": report.before,
                "expected": worth.total(choices),
                "ms": self.times.model_of(plan),
            }
            if self.best is None or report.after < self.best[2].after:
                self.best = choices, plan, report, Saved(student)

    def _carried_out(self, plan: Plan) -> tuple[PreTrainedModel, RefitReport]:
        student = apply(self.model, plan, self.batches)
        with eval_mode(student):
            before = self.trace.loss_of(student)
            if self.recipe.refit == "none":
                return student, RefitReport(before, before, kept=False)
            return student, refit_by(student, self.trace, plan, before, self.recipe.refit)


class _Worth:
    """What each choice adds to the calibration loss of a model in which some others are made already.

    The others that it takes the place of, because they are of the same blocks, are not made then.
    """

    def __init__(
        self,
        search: _Budget,
        base: Sequence[Choice] = (),
        student: PreTrainedModel | None = None,
        prior: _Worth | None = None,
    ) -> None:
        self.search, self.prior = search, prior
        self.base = [choice for choice in base if choice.edit is not None]
        self.choices = [*search.choices, *(choice for choice in self.base if choice not in search.choices)]
        self.known = {}
        pair = None if student is None else (student, search.plan(self.base))
        self.trials = Trials(search.model, search.recipe.refit, search.batches, search.few, pair)
        for choice in self.base:
            self.measure(choice)

    def knows(self, choice: Choice) -> bool:
        return choice.edit is None or choice in self.known

    def of(self, choice: Choice) -> float:
        """What was measured, else what `prior` says, else the most of all that the choice includes."""
        if self.knows(choice):
            return self.known.get(choice, 0.0)
        if self.prior is not None:
            return self.prior.of(choice)
        return max((loss for other, loss in self.known.items() if choice.exceeds(other)), default=0.0)

    def first(self, choice: Choice) -> list[Choice]:
        """What to measure where a choice is wanted: the least of what it includes, which may rule it out."""
        inside = [other for other in self.choices if choice.exceeds(other) and not self.knows(other)]
        if self.prior is not None or not inside:
            return [choice]
        least = min(other.end - other.start for other in inside)
        return [other for other in inside if other.end - other.start == least]

    def measure(self, choice: Choice) -> None:
        """Carry it out, and see what that adds."""
        if choice not in self.known:
            others = [other for other in self.base if not other.touches(choice)]
            self.known[choice] = self._loss([*others, choice]) - self._loss(others)

    def best(self, choice: Choice) -> Choice:
        """The same with the operator of least loss, where several layers become one."""
        if not isinstance(choice.edit, Fuse):
            return choice
        options = [replace(choice, edit=edit) for edit in candidates(choice.edit, self.search.recipe)]
        for option in options:
            self.measure(option)
        return min(options, key=self.of)

    def total(self, chosen: Iterable[Choice]) -> float:
        """The calibration loss that is expected of a combination."""
        return self._loss(self.base) + sum(map(self.of, chosen)) - sum(map(self.of, self.base))

    def _loss(self, choices: Sequence[Choice]) -> float:
        edits = self.search.plan(sorted(choices, key=lambda choice: choice.start)).edits
        key = json.dumps([[write_edit(edit) for edit in part] for part in (self.search.plan(self.base).edits, edits)])
        if key not in self.search.losses.values:
            self.search.losses.put({key: self.trials.loss(*edits)})
        return self.search.losses.values[key]


def batch_of(sample: Sample, size: int) -> dict[str, Tensor]:
    """So many sequences of middle length, as a model is given them; they repeat where there are too few."""
    batches = sorted(sample.batches, key=lambda batch: next(iter(batch.values())).shape[-1])
    batch = batches[len(batches) // 2]
    rows = torch.arange(size) % len(next(iter(batch.values())))
    return {name: tensor[rows.to(tensor.device)] for name, tensor in batch.items()}
