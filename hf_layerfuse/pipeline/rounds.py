"""Fuse and heal, in as many rounds as the recipe asks for; what is done is kept, so that a run can go on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..methods.base import Found
from ..methods.collapse.search import search_collapse
from ..methods.fusion.grouping import groups_of
from ..methods.fusion.planner import plan_fusion
from ..methods.fusion.search import search
from ..methods.merge.search import search_merge
from ..models.architectures import adapter_for
from ..models.finalize import merge_convs, straighten
from ..models.layer_map import fused_parameters, layer_map, mixed_weights
from ..models.loading import load_checkpoint
from ..models.modeling import expand
from ..models.surgery.size import are_unlike
from ..models.verify import warn_if_useless
from ..plan import Plan
from ..recipe import TARGETS, CollapseRecipe, FusionRecipe, HealRecipe, MergeRecipe, Recipe
from ..recipe.tasks import TASKS
from ..training.distributed import process_state
from ..training.heal import HealReport, heal
from ..training.schedule import compose, keeps_of, shares_of, steps_of
from .output import MARK, new_directory, unfinished
from .run_data import RunData, say


def fuse_and_heal(
    recipe: Recipe, original: PreTrainedModel, inputs: RunData, work: Path
) -> tuple[PreTrainedModel, Plan, dict[str, Any]]:
    """All rounds of fusing and healing: the model, one plan for all of them, and what was measured."""
    rounds = rounds_of(recipe, original, inputs)
    fused, plan, results, reports = original, None, {}, []
    for number, (goal, steps) in enumerate(rounds, 1):
        source = expand(fused) if plan else original
        target = target_of(goal, source, original)
        stage = work / f"fused-{number}"
        if not (stage / MARK).is_file():
            method = recipe.collapse or recipe.merge or dataclasses.replace(recipe.fusion, **target)
            _compress(method, source, original, inputs, stage)
        fused = load_checkpoint(stage, auto_class=auto_class_of(recipe), dtype=torch.float32).to(original.device)
        fused.config.name_or_path = fused.name_or_path = original.name_or_path
        step = Plan.load(stage / "plan.json")
        plan = compose(plan, step) if plan else step
        results |= json.loads((stage / MARK).read_text(encoding="utf-8"))
        if steps > 0:
            healing = dataclasses.replace(_healing(recipe), steps=steps)
            seed = recipe.seed + number - 1  # no round reads what the one before it has read, as long as there is more
            mixed = mixed_weights(fused, source, step, inputs.calibration()) if healing.mix else None
            report = _heal(recipe, healing, fused, original, plan, mixed, inputs, seed, work / f"heal-{number}")
            reports.append({**goal, **dataclasses.asdict(report)})
            if _straightens(recipe):
                say("merging the maps whose activation has become a line")
                asked = {name: getattr(recipe.collapse, name) for name in ("threshold", "fold")}
                fused, straight = straighten(fused, **asked, batches=inputs.calibration())
                plan = dataclasses.replace(straight, notes={**plan.notes, **straight.notes})
            if recipe.merge is not None and recipe.merge.method == "open":
                say("merging convolutions")
                fused, closed = merge_convs(fused)
                plan = dataclasses.replace(closed, notes=plan.notes)
    if reports:
        results["heal"] = reports[-1]
    if len(reports) > 1:
        results["rounds"] = reports
    return fused, plan, results


def _healing(recipe: Recipe) -> HealRecipe:
    """How it heals; activations that are to become lines are pulled there, however the recipe leaves it open."""
    homotopy = recipe.collapse is not None and recipe.collapse.method == "homotopy"
    return dataclasses.replace(recipe.heal, straighten=recipe.heal.straighten or "auto") if homotopy else recipe.heal


def _straightens(recipe: Recipe) -> bool:
    """Whether maps are merged when healing has made lines of the activations between them."""
    return recipe.collapse is not None and recipe.collapse.method == "homotopy" and recipe.collapse.merge


def _heal(
    recipe: Recipe,
    healing: HealRecipe,
    fused: PreTrainedModel,
    original: PreTrainedModel,
    plan: Plan,
    mixed: dict[str, list[torch.Tensor]] | None,
    inputs: RunData,
    seed: int,
    checkpoints: Path,
) -> HealReport:
    """Heal the model of a round, in place."""
    say(f"healing for {healing.steps} steps; where it is interrupted, the same command goes on")
    return heal(
        fused,
        inputs.train_loader(original, seed),
        healing,
        teacher=original,
        matches=layer_map(fused, original, plan),
        frozen=fused_parameters(fused, plan) if healing.freeze_fused else (),
        mixed=mixed,
        validation_batches=inputs.validation_batches(),
        threshold=recipe.collapse.threshold if _straightens(recipe) else None,
        seed=seed,
        checkpoints=unfinished(checkpoints, identity_of(healing)),
    )


Goal = dict[str, Any]
"""What a round leads to: `keep_layers` blocks that stay distinct, or a `ratio` of the original's block parameters that
are gone; nothing is what the recipe asks for."""


def rounds_of(recipe: Recipe, original: PreTrainedModel, inputs: RunData) -> list[tuple[Goal, int]]:
    """The goal of each round, and its steps of healing."""
    fusion, healing = recipe.fusion, recipe.heal
    if healing.schedule == "one-shot":
        return [({}, healing.steps)]
    by_size = fusion.rank == "auto" or are_unlike(original)  # a number of blocks says little about it
    if fusion.ratio is not None and by_size:
        goals: list[Goal] = [{"ratio": fusion.ratio * share} for share in shares_of(healing)]
    else:
        plan = plan_fusion(original, fusion, inputs.calibration())
        keeps = keeps_of(plan.num_layers, len(groups_of(plan, plan.edits[0].kind)), healing)
        goals = [{"keep_layers": keep} for keep in keeps]
    return list(zip(goals, steps_of(healing, len(goals)), strict=True))


def target_of(goal: Goal, source: PreTrainedModel, original: PreTrainedModel) -> dict[str, Any]:
    """Fields of a fusion recipe that lead from a model, the result of earlier rounds, to a goal."""
    if "ratio" in goal:
        here, whole = (
            sum(p.numel() for p in adapter_for(model).layer_list(model).parameters()) for model in (source, original)
        )
        # where a round before went too far, this one takes the least step
        goal = {"ratio": max(1 - (1 - goal["ratio"]) * whole / here, 1e-6)}
    return dict.fromkeys(TARGETS) | goal if goal else {}


def _compress(
    method: FusionRecipe | CollapseRecipe | MergeRecipe,
    source: PreTrainedModel,
    original: PreTrainedModel,
    inputs: RunData,
    stage: Path,
) -> None:
    """Make a model smaller, measure it, and leave it, its plan and its figures in a folder, whole or not at all."""
    state = process_state()
    batches = inputs.calibration()
    doing, searching = _SEARCHES[type(method)]
    say(doing)
    found = searching(source, method, batches)
    fused = round_to(found.model, inputs.dtype)
    if getattr(method, "method", "fitted") == "fitted":  # otherwise the result is trained first
        warn_if_useless(original, fused, batches)
    results = {} if source is not original else {"before": inputs.measure(original, original, "the original")}
    results["fused"] = inputs.measure(fused, original, "the fused model")
    if state.is_main_process:
        with new_directory(stage) as path:
            fused.save_pretrained(path)
            (path / "plan.json").write_text(found.plan.to_json(), encoding="utf-8")
            (path / MARK).write_text(json.dumps(results) + "\n", encoding="utf-8")
    state.wait_for_everyone()


_SEARCHES: Mapping[type, tuple[str, Callable[[PreTrainedModel, Any, Any], Found]]] = {
    FusionRecipe: ("fusing", search),
    CollapseRecipe: ("collapsing", search_collapse),
    MergeRecipe: ("merging", search_merge),
}


def auto_class_of(recipe: Recipe) -> Any:
    """The Auto class of the task of a recipe."""
    return getattr(transformers, TASKS[recipe.task].auto_class)


def identity_of(recipe: Any, *without: str) -> dict[str, Any]:
    """What makes a run what it is."""
    fields = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in without}
    return {**fields, "version": version("hf-layerfuse"), "processes": process_state().num_processes}


def round_to(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round weights to what the file will hold, so that the figures are those of the file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model
