"""The interface of a method, and the result of its search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from ..calibration.refit.base import RefitReport
from ..evaluation.batches import Batches
from ..models.architectures import Architecture, LayerArchitecture
from ..plan import Plan
from ..recipe import HealRecipe

_Recipe = TypeVar("_Recipe")


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        model: Smaller model.
        plan: Plan that was applied.
        report: Report of the refit. None without calibration data, or where the result is still to be trained.
    """

    model: PreTrainedModel
    plan: Plan
    report: RefitReport | None


def _the_same(plan: Plan) -> Plan:
    return plan


@dataclass(frozen=True)
class Finish:
    """Last step of a method, after training.

    Attributes:
        doing: Progress message for the user.
        apply: Function of the trained model, its plan and calibration batches that returns the final model and plan.
        threshold: Largest distance from linear at which an activation is merged. Training needs it to choose the best
            weights. None where no activation becomes linear by training.
        plan: Function of the plan before this step that returns the plan after it, provided that training succeeds.
    """

    doing: str
    apply: Callable[[PreTrainedModel, Plan, Sequence[Any]], tuple[PreTrainedModel, Plan]]
    threshold: float | None = None
    plan: Callable[[Plan], Plan] = _the_same


def _never(recipe: Any) -> bool:
    return False


def _as_it_is(recipe: Any, heal: HealRecipe) -> HealRecipe:
    return heal


def _nothing(recipe: Any) -> Finish | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Method(Generic[_Recipe]):
    """A way to make a model smaller, with all that runs and the public entry points need to know about it.

    Attributes:
        name: Section of the recipe of a run that selects this method.
        recipe_type: Class of that section.
        targets: Fields of that section that set the target. A recipe has exactly one of them.
        architecture_type: Class that the table of the model's architecture must have.
        doing: Verb for progress messages, such as `fusing`.
        done: Participle that describes the results, such as `fused`.
        tag: Tag of the model cards.
        search: Function of a model, a recipe and calibration batches that makes the smaller model.
        needs_training: Function of a recipe; true if its result must be trained before use.
        healing: Function of a recipe and the user's heal recipe that returns the heal recipe to train with.
        finish: Function of a recipe that returns the last step after training, or None.
    """

    name: str
    recipe_type: type[_Recipe]
    targets: Sequence[str]
    architecture_type: type[Architecture] = LayerArchitecture
    doing: str
    done: str
    tag: str
    search: Callable[[PreTrainedModel, _Recipe, Batches | None], SearchResult]
    needs_training: Callable[[_Recipe], bool] = _never
    healing: Callable[[_Recipe, HealRecipe], HealRecipe] = _as_it_is
    finish: Callable[[_Recipe], Finish | None] = _nothing
