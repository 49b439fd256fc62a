"""Model and recipe in, plan out: one folder per method, and one entry here."""

from ..recipe import Recipe
from .base import Method
from .collapse.method import COLLAPSE
from .fusion.method import FUSION
from .merge.method import MERGE

METHODS: tuple[Method, ...] = (FUSION, COLLAPSE, MERGE)


def method_of(recipe: Recipe) -> Method:
    """The method that a run's recipe asks for."""
    return next(method for method in METHODS if method.recipe_type is type(recipe.method))
