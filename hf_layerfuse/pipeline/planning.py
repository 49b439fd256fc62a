"""Plans before a run: the search of a run without the steps after it, with the size and the speed to expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery import ensure_architecture
from ..errors import CheckpointError, RecipeError
from ..evaluation.latency import latency_side_by_side
from ..evaluation.timing import device_name
from ..methods import method_of
from ..methods.fusion.method import FUSION
from ..methods.fusion.planner import plan_evenly, plan_fusion
from ..models.apply import applied
from ..models.architectures import LayerArchitecture
from ..models.surgery.size import planned_size
from ..plan import Plan
from ..plan.words import change_table
from ..recipe import FusionRecipe, Recipe
from .inspect import load_model, text_batches
from .progress import say, steps
from .report.tables import in_words, text_table
from .rounds import rounds_of, search_of
from .run import prepare_run


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A plan, and the model that it leads to.

    Attributes:
        plan: Plan of the result.
        sizes: Number of `parameters` and `bytes` of the file, before and after.
        latency_ms: Median latency before and after, by batch size, measured in turn; empty if it was not measured.
        remarks: Sentences about the origin of the plan and the figures.
    """

    plan: Plan
    sizes: Mapping[str, tuple[int, int]]
    latency_ms: Mapping[int, tuple[float, float]]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        """The changes of the plan, the figures before and after it, and the remarks."""
        figures = [["", "before", "after", ""]]
        for name, (before, after) in self.sizes.items():
            figures.append([name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"])
        for batch, (before, after) in self.latency_ms.items():
            figures.append([f"latency, batch {batch} (ms)", f"{before:.1f}", f"{after:.1f}", in_words(before / after)])
        return "\n\n".join([*map(text_table, (change_table(self.plan), figures)), "\n".join(self.remarks)])


@steps()
def plan_run(recipe: Recipe) -> Prediction:
    """Search as a run of a recipe does, on the same data, and stop there.

    Args:
        recipe: Recipe of a run.

    Raises:
        LayerFuseError: Any error of the run up to the end of its first search.
    """
    original, _, inputs = prepare_run(recipe)
    rounds = rounds_of(recipe, original, inputs)
    found = search_of(recipe, rounds[0][0], original, original, inputs)
    plan, model = found.plan, found.model
    timed_again = "" if plan.notes.latency_ms is None else " It measures latency again, which varies a little."
    remarks = [f"The run decides the same: the search used its calibration data and its seed.{timed_again}"]
    if plan.notes.refit is not None:
        refit = plan.notes.refit
        remarks.append(f"Calibration loss: {refit.before:.4g} before the refit, {refit.after:.4g} after it.")
    finish = method_of(recipe).finish(recipe.method)
    if finish is not None:
        plan = finish.plan(plan)
        model = applied(original, plan)
        remarks.append(f"The plan is that of the result, after healing and {finish.doing}.")
    if len(rounds) > 1:
        [(name, goal)] = rounds[-1][0].to_dict().items()
        remarks.append(
            f"This is round 1 of {len(rounds)}. Each later round decides on the healed model; the last one leads to "
            f"{name}={goal:.4g}."
        )
    say("measuring the size and the speed")
    before, after = (inputs.size(each, original) for each in (original, model))
    timed: Mapping[int, tuple[float, float]] = {}
    if recipe.evaluate.latency:
        timed = _timed(original, model, sequence_length=recipe.data.max_length, repeats=recipe.evaluate.latency_repeats)
    return _prediction(
        plan, {name: (before[name], after[name]) for name in ("parameters", "bytes")}, timed, remarks, original
    )


@steps()
def plan_model(
    name: str, recipe: FusionRecipe, text: Path | None = None, trust_remote_code: bool = False
) -> Prediction:
    """Plan a fusion without a recipe of a run.

    Args:
        name: Checkpoint or Hub name; or a config, or the directory of one, which is planned evenly.
        recipe: Recipe of the fusion.
        text: File with lines of text to calibrate on. Without it, the weights alone decide.
        trust_remote_code: Whether the model may run its own code.

    Raises:
        CheckpointError: The model cannot be loaded, or has no weights to calibrate.
        DataError: The text is missing or cannot be read.
        LayerFuseError: The recipe does not fit the model.
    """
    say(f"loading {name}")
    model = load_model(name, trust_remote_code)
    has_weights = model.device.type != "meta"
    if text is not None and not has_weights:
        raise CheckpointError(
            f"{name!r} is a config, which has no weights to calibrate: leave --text out, or name a checkpoint."
        )
    batches = text_batches(name, text, recipe.similarity, trust_remote_code) if has_weights else None
    if batches is None and recipe.is_timed:
        raise RecipeError(
            "a latency target needs measurements on calibration data: give --text FILE with lines of text, or the "
            "recipe of a run."
        )
    if has_weights:
        ensure_architecture(model, LayerArchitecture, batches, recipe.stack)
    result = None
    if batches is not None:
        say(f"{FUSION.doing}: searching on the lines of {text}")
        found = FUSION.search(model, recipe, batches)
        plan, result = found.plan, found.model
        remarks = [f"Decided on {plan.notes.calibration} from {text}. A run on other data may choose other groups."]
    else:
        plan = plan_fusion(model, recipe) if has_weights else plan_evenly(model, recipe)
        basis = "the weights" if has_weights else "the shapes in the config"
        remarks = [
            f"This plan is from {basis} alone. A run decides on calibration data, and may choose other groups. To see "
            "them, add --text FILE with lines of text, or give the recipe of the run: hf-layerfuse plan RECIPE.yaml"
        ]
    sizes = [planned_size(model, replace(plan, edits=edits)) for edits in ((), plan.edits)]
    timed: Mapping[int, tuple[float, float]] = {}
    if has_weights:
        say("timing both models in turn")
        timed = _timed(model, applied(model, plan) if result is None else result)
    return _prediction(plan, {name: (sizes[0][name], sizes[1][name]) for name in sizes[0]}, timed, remarks, model)


def _timed(original: PreTrainedModel, planned: PreTrainedModel, **options: Any) -> dict[int, tuple[float, float]]:
    times = latency_side_by_side({"before": original, "after": planned}, **options)
    return {batch: (row["median_ms"], times["after"][batch]["median_ms"]) for batch, row in times["before"].items()}


def _prediction(
    plan: Plan,
    sizes: Mapping[str, tuple[int, int]],
    timed: Mapping[int, tuple[float, float]],
    remarks: list[str],
    original: PreTrainedModel,
) -> Prediction:
    latency = plan.notes.latency_ms
    if latency is not None:
        expected = latency.predicted if latency.measured is None else latency.measured
        remarks.append(
            f"The search met its latency budget with {expected:.4g} ms, for {latency.original:.4g} ms of the original."
        )
    if timed:
        remarks.append(
            f"Latency is measured on this machine ({device_name(original.device)}, threads: "
            f"{torch.get_num_threads()}), both models in turn."
        )
    return Prediction(plan=plan, sizes=sizes, latency_ms=timed, remarks=tuple(remarks))
