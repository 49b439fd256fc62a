"""The `Method` entry of Layer Fusion."""

from ...recipe import TARGETS, FusionRecipe
from ..base import Method
from .search import search

FUSION = Method(
    name="fusion",
    recipe_type=FusionRecipe,
    targets=TARGETS,
    doing="fusing",
    done="fused",
    tag="layer-fusion",
    search=search,
)
