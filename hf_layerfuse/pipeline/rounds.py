"""Fuse and heal in the rounds of the recipe. Finished rounds are kept, so that a run can resume."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..methods import method_of
from ..methods.base import SearchResult
from ..methods.fusion.grouping import groups_of
from ..methods.fusion.planner import plan_fusion
from ..models.architectures import architecture_for
from ..models.layer_map import heal_scope
from ..models.loading import load_checkpoint
from ..models.modeling import expand
from ..models.surgery.size import are_unlike
from ..models.verify import warn_if_useless
from ..plan import Plan
from ..recipe import TARGETS, Recipe
from ..recipe.tasks import TASKS
from ..training.distributed import process_state
from ..training.heal import HealReport, heal
from ..training.schedule import compose, keeps_of, shares_of, steps_of
from .output import MARK, new_directory, unfinished
from .progress import say
from .results import Goal, HealRound, Measurement
from .run_data import RunData


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of all rounds of fusing and healing.

    Attributes:
        model: Model after the last round.
        shaped: Model of the shape that the last fusing gave: `model`, or the one from before the method's last step.
        plan: One plan for all rounds.
        before: Measurement of the original.
        fused: Measurement of the model after the last fusing.
        rounds: Rounds of healing, in order.
    """

    model: PreTrainedModel
    shaped: PreTrainedModel
    plan: Plan
    before: Measurement
    fused: Measurement
    rounds: tuple[HealRound, ...]


def fuse_and_heal(recipe: Recipe, original: PreTrainedModel, inputs: RunData, work: Path) -> Outcome:
    """Carry out all rounds of fusing and healing."""
    method = method_of(recipe)
    finish = method.finish(recipe.method)
    rounds = rounds_of(recipe, original, inputs)
    fused, plan, measured, healed = original, None, {}, []
    for number, (goal, steps) in enumerate(rounds, 1):
        source = expand(fused) if plan else original
        stage = work / f"fused-{number}"
        if not (stage / MARK).is_file():
            _compress(recipe, goal, source, original, inputs, stage)
        fused = load_checkpoint(stage, auto_class=auto_class_of(recipe), dtype=torch.float32).to(original.device)
        fused.config.name_or_path = fused.name_or_path = original.name_or_path
        step = Plan.load(stage / "plan.json")
        plan = compose(plan, step) if plan else step
        tree = json.loads((stage / MARK).read_text(encoding="utf-8"))
        measured |= {name: Measurement.from_dict(figures) for name, figures in tree.items()}
        shaped = fused
        if steps > 0:
            healing = method.healing(recipe.method, recipe.heal)
            healing = dataclasses.replace(healing, steps=steps, schedule="one-shot")  # a single round
            seed = recipe.seed + number - 1  # rounds read different rows, as long as there are enough
            batches = inputs.calibration() if healing.mix else None
            scope = heal_scope(fused, original, plan, healing, batches=batches, source=(source, step))
            name = f"round {number} of {len(rounds)}: " if len(rounds) > 1 else ""
            say(f"{name}healing for {steps} steps; if interrupted, rerun the same command to resume")
            report = heal(
                fused,
                inputs.train_loader(original, seed),
                healing,
                teacher=original,
                scope=dataclasses.replace(scope, threshold=finish.threshold if finish else None),
                validation_batches=inputs.validation_batches(),
                seed=seed,
                checkpoints=unfinished(work / f"heal-{number}", identity_of(healing)),
            )
            healed.append(HealRound(goal, report))
            _say_losses(report)
            if finish:
                say(finish.doing)
                fused, plan = finish.apply(fused, plan, inputs.calibration())
    return Outcome(fused, shaped, plan, measured["before"], measured["fused"], tuple(healed))


def retrain_original(
    recipe: Recipe, original: PreTrainedModel, plan: Plan, inputs: RunData, work: Path
) -> tuple[PreTrainedModel, HealReport]:
    """Train a copy of the original on the data and steps of the healing, with the original as teacher.

    The step of the lowest validation loss is kept, as it is for the fused model. What only a fused model has does not
    apply: frozen or mixed weights, activations that become linear, and rounds.

    Args:
        recipe: Recipe of the run, with `heal.steps` above 0.
        original: Model before any change; it stays as it is.
        plan: Plan of the fused model.
        inputs: Data of the run.
        work: Folder of the unfinished run.

    Returns:
        The retrained model, in the precision of the file, and the report of its training.
    """
    say(f"retraining the original for {recipe.heal.steps} steps; if interrupted, rerun the same command to resume")
    healing = dataclasses.replace(
        recipe.heal, schedule="one-shot", mix=False, freeze_fused=False, homotopy_strength=0.0, progressive=False
    )
    model = copy.deepcopy(original)
    scope = heal_scope(model, original, dataclasses.replace(plan, edits=()), healing)
    if not scope.matches:  # convolutions are compared where they were merged
        healing = dataclasses.replace(healing, hidden_weight=0.0, attention_weight=0.0)
    report = heal(
        model,
        inputs.train_loader(original, recipe.seed),
        healing,
        teacher=original,
        scope=scope,
        validation_batches=inputs.validation_batches(),
        seed=recipe.seed,
        checkpoints=unfinished(work / "original", identity_of(healing)),
    )
    _say_losses(report)
    return round_to(model, inputs.dtype), report


def _say_losses(report: HealReport) -> None:
    losses = dict(report.validation_loss)
    if losses:
        best = f"{losses[report.best_step]:.4g} at step {report.best_step}" if report.best_step else "never lower"
        say(f"validation loss: {losses[0]:.4g} at step 0, {best}")


def rounds_of(recipe: Recipe, original: PreTrainedModel, inputs: RunData) -> list[tuple[Goal, int]]:
    """The goal of each round, and its steps of healing."""
    healing = recipe.heal
    if healing.schedule == "one-shot":
        return [(Goal(), healing.steps)]
    fusion = recipe.fusion  # no other method has rounds
    by_size = fusion.rank == "auto" or are_unlike(
        original, fusion.stack
    )  # the number of blocks does not determine the size
    if fusion.ratio is not None and by_size:
        goals = [Goal(ratio=fusion.ratio * share) for share in shares_of(healing)]
    else:
        plan = plan_fusion(original, fusion, inputs.calibration())
        keeps = keeps_of(plan.num_layers, len(groups_of(plan, plan.edits[0].kind)), healing)
        goals = [Goal(keep_layers=keep) for keep in keeps]
    return list(zip(goals, steps_of(healing, len(goals)), strict=True))


def target_of(
    goal: Goal, source: PreTrainedModel, original: PreTrainedModel, stack: str | None = None
) -> dict[str, Any]:
    """Target fields of a fusion recipe that lead from the model of the earlier rounds to a goal."""
    if goal.ratio is not None:
        here, whole = (
            sum(p.numel() for p in architecture_for(model, stack=stack).layer_list(model).parameters())
            for model in (source, original)
        )
        # where an earlier round removed too much, this one takes the smallest step
        goal = Goal(ratio=max(1 - (1 - goal.ratio) * whole / here, 1e-6))
    target = goal.to_dict()
    return dict.fromkeys(TARGETS) | target if target else {}


def search_of(
    recipe: Recipe, goal: Goal, source: PreTrainedModel, original: PreTrainedModel, inputs: RunData
) -> SearchResult:
    """Make a model smaller: the search of one round. The weights of the result are rounded to the type of the file.

    Args:
        recipe: Recipe of the run.
        goal: Goal of the round.
        source: Model to start from, which is the original in the first round.
        original: Original.
        inputs: Data of the run.
    """
    method, batches = method_of(recipe), inputs.calibration()
    stack = getattr(recipe.method, "stack", None)  # convolutions have one stack
    asked = dataclasses.replace(recipe.method, **target_of(goal, source, original, stack))
    target = next(f"{name}={value}" for name in method.targets if (value := getattr(asked, name)) is not None)
    say(f"{method.doing} with {target}: searching on calibration data")
    found = method.search(source, asked, batches)
    found = dataclasses.replace(found, model=round_to(found.model, inputs.dtype))
    if not method.needs_training(asked):  # a model that needs training first is of no use yet
        warn_if_useless(original, found.model, batches)
    return found


def _compress(
    recipe: Recipe, goal: Goal, source: PreTrainedModel, original: PreTrainedModel, inputs: RunData, stage: Path
) -> None:
    """Make a model smaller, measure it, and write the model, its plan and its results to a folder, as a whole."""
    state = process_state()
    found = search_of(recipe, goal, source, original, inputs)
    measured = {} if source is not original else {"before": inputs.measure(original, original, "the original")}
    measured["fused"] = inputs.measure(found.model, original, f"the {method_of(recipe).done} model")
    if state.is_main_process:
        with new_directory(stage) as path:
            found.model.save_pretrained(path)
            (path / "plan.json").write_text(found.plan.to_json(), encoding="utf-8")
            tree = {name: figures.to_dict() for name, figures in measured.items()}
            (path / MARK).write_text(json.dumps(tree) + "\n", encoding="utf-8")
    state.wait_for_everyone()


def auto_class_of(recipe: Recipe) -> Any:
    """The Auto class of the task of a recipe."""
    return getattr(transformers, TASKS[recipe.task].auto_class)


def identity_of(recipe: Any, *without: str) -> dict[str, Any]:
    """The settings that identify a run: two runs with the same ones share their unfinished work."""
    fields = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in without}
    return {**fields, "version": version("hf-layerfuse"), "processes": process_state().num_processes}


def round_to(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round weights to the data type of the file, so that the results hold for the file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model
