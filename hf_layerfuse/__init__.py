"""Make a pretrained Hugging Face model smaller and faster by fusing its layers."""

from importlib.metadata import version

from .adapters import (
    ChainAdapter,
    ConvAdapter,
    Convolutions,
    ModelAdapter,
    Skip,
    TransformerAdapter,
    Unit,
    adapter_for,
)
from .align import align
from .apply import apply
from .auto import AutoFusedModel, collapse, fuse, merge
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
from .found import Found
from .heal import HealReport, heal
from .layermap import fused_parameters, layer_map, mixed_weights
from .merge import search_merge
from .methods.fusion import plan_fusion
from .modeling import expand, register_adapter
from .plan import Blend, Drop, Fuse, Linearize, MergeConvs, Plan
from .recipe import CollapseRecipe, FusionRecipe, HealRecipe, MergeRecipe
from .refit import refit
from .repair import RefitReport
from .search import search
from .straighten import merge_convs, straighten
from .verify import verify

__version__ = version("hf-layerfuse")

__all__ = [
    "AutoFusedModel",
    "Blend",
    "ChainAdapter",
    "CheckpointError",
    "CollapseRecipe",
    "ConvAdapter",
    "Convolutions",
    "DataError",
    "Drop",
    "Found",
    "Fuse",
    "FusionRecipe",
    "HealRecipe",
    "HealReport",
    "LayerFuseError",
    "LayerFuseWarning",
    "Linearize",
    "MergeConvs",
    "MergeRecipe",
    "ModelAdapter",
    "Plan",
    "PlanError",
    "RecipeError",
    "RefitReport",
    "Skip",
    "TrainingError",
    "TransformerAdapter",
    "Unit",
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
    "merge",
    "merge_convs",
    "mixed_weights",
    "plan_fusion",
    "refit",
    "register_adapter",
    "search",
    "search_collapse",
    "search_merge",
    "straighten",
    "verify",
]
