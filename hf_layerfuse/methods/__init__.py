"""Methods turn a model and a recipe into a plan. Each method has one folder, and one entry here."""

from ..recipe import Recipe
from .base import Method
from .collapse.method import COLLAPSE
from .fusion.method import FUSION
from .merge.method import MERGE

METHODS: tuple[Method, ...] = (FUSION, COLLAPSE, MERGE)


def method_of(recipe: Recipe) -> Method:
    """Return the method that the recipe of a run selects."""
    return next(method for method in METHODS if method.recipe_type is type(recipe.method))
