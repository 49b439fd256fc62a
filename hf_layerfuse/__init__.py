"""Make a pretrained Hugging Face model smaller and faster by fusing its layers."""

from importlib.metadata import version

from .adapters import ConvAdapter, ModelAdapter, TransformerAdapter, adapter_for
from .align import align
from .auto import AutoFusedModel, collapse, fuse
from .collapse import search_collapse
from .errors import (
    CheckpointError,
    DataError,
    LayerFuseError,
    LayerFuseWarning,
    PlanError,
    RecipeError,
    TrainingError,
    UnsupportedModelError,
    VerificationError,
)
from .heal import HealReport, heal
from .layermap import fused_parameters, layer_map, mixed_weights
from .methods.fusion import plan_fusion
from .modeling import apply, expand, register_adapter
from .plan import Blend, Drop, Fuse, Linearize, Plan
from .recipe import CollapseRecipe, FusionRecipe, HealRecipe
from .refit import RefitReport, refit
from .search import search
from .straighten import straighten
from .verify import verify

__version__ = version("hf-layerfuse")

__all__ = [
    "AutoFusedModel",
    "Blend",
    "CheckpointError",
    "CollapseRecipe",
    "ConvAdapter",
    "DataError",
    "Drop",
    "Fuse",
    "FusionRecipe",
    "HealRecipe",
    "HealReport",
    "LayerFuseError",
    "LayerFuseWarning",
    "Linearize",
    "ModelAdapter",
    "Plan",
    "PlanError",
    "RecipeError",
    "RefitReport",
    "TrainingError",
    "TransformerAdapter",
    "UnsupportedModelError",
    "VerificationError",
    "adapter_for",
    "align",
    "apply",
    "collapse",
    "expand",
    "fuse",
    "fused_parameters",
    "heal",
    "layer_map",
    "mixed_weights",
    "plan_fusion",
    "refit",
    "register_adapter",
    "search",
    "search_collapse",
    "straighten",
    "verify",
]
