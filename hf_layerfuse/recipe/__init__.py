"""Recipes: strict dataclasses, read from YAML and overridden on the command line."""

from .collapse import COLLAPSE_TARGETS, CollapseRecipe
from .data import DataRecipe
from .fields import add_fields
from .fusion import TARGETS, FusionRecipe
from .heal import HealRecipe
from .hub import HubRecipe
from .merge import MERGE_TARGETS, MergeRecipe
from .run import SECTIONS, EvaluateRecipe, Recipe, load_recipe, recipe_of
from .strict import current_names

__all__ = [
    "COLLAPSE_TARGETS",
    "MERGE_TARGETS",
    "SECTIONS",
    "TARGETS",
    "CollapseRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "FusionRecipe",
    "HealRecipe",
    "HubRecipe",
    "MergeRecipe",
    "Recipe",
    "add_fields",
    "current_names",
    "load_recipe",
    "recipe_of",
]
