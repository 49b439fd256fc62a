"""What a method is to the rest of the package, and what its search comes to."""

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
    """A fused model and how it came about. `report` is None where there was no calibration data."""

    model: PreTrainedModel
    plan: Plan
    report: RefitReport | None


@dataclass(frozen=True)
class Finish:
    """What a method does to a model once it is trained.

    Attributes:
        doing: line that tells the user what happens.
        apply: function of the trained model, its plan and calibration batches; it returns the final model and plan.
        threshold: distance from a line that an activation may have to be merged, which training has to know when it
            chooses the best weights; None where no activation is on its way to a line.
    """

    doing: str
    apply: Callable[[PreTrainedModel, Plan, Sequence[Any]], tuple[PreTrainedModel, Plan]]
    threshold: float | None = None


def _never(recipe: Any) -> bool:
    return False


def _as_it_is(recipe: Any, heal: HealRecipe) -> HealRecipe:
    return heal


def _nothing(recipe: Any) -> Finish | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Method(Generic[_Recipe]):
    """A way to make a model smaller, and all that a run and the front doors have to know about it.

    Attributes:
        name: section of a run's recipe that asks for it.
        recipe_type: class of that section.
        targets: fields of it that say how far to go, of which a recipe has one.
        architecture_type: kind of architecture that the architecture must have.
        doing: word that tells the user what happens, such as `fusing`.
        done: word for what its results are, such as `fused`.
        tag: tag of their cards.
        search: function of a model, a recipe and calibration batches that makes the smaller model.
        needs_training: whether the result of a recipe is of use only once it is trained.
        healing: settings to train the result of a recipe with, from those that the user gives.
        finish: what is done to the result of a recipe once it is trained; None is nothing.
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
