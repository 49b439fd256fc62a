"""Make a pretrained Hugging Face model smaller and faster by fusing its layers."""

from .api import AutoFusedModel, collapse, fuse, merge
from .calibration.refit.base import RefitReport
from .calibration.refit.refit import refit
from .discovery import Discovery, discover_architecture
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
from .evaluation.comparison import Comparison, compare, evaluate
from .math.knee import knee
from .methods.base import SearchResult
from .methods.collapse.search import search_collapse
from .methods.fusion.planner import plan_fusion
from .methods.fusion.search import search
from .methods.merge.search import search_merge
from .methods.report import FusionReport
from .models.align import align
from .models.apply import apply
from .models.architectures import (
    Architecture,
    ConvArchitecture,
    ConvGraphArchitecture,
    Convolutions,
    Placeholder,
    Skip,
    TransformerArchitecture,
    Unit,
    ZeroAttention,
    ZeroBlock,
    architecture_for,
)
from .models.finalize import linearize_mlps, merge_convs
from .models.layer_map import fused_parameters, heal_scope, layer_map, mixed_weights
from .models.modeling import expand, register_architecture
from .models.verify import verify
from .pipeline.fuse_checkpoint import fuse_checkpoint
from .pipeline.report.card import model_card
from .pipeline.report.plots import plot_distances, plot_plan
from .plan import Blend, Drop, Fuse, Linearize, MergeConvs, Plan, PlanNotes
from .plan.heal_scope import HealScope
from .recipe import CollapseRecipe, FusionRecipe, HealRecipe, MergeRecipe
from .training.heal import HealReport, heal

__version__: str

__all__ = [
    "Architecture",
    "AutoFusedModel",
    "Blend",
    "CheckpointError",
    "CollapseRecipe",
    "Comparison",
    "ConvArchitecture",
    "ConvGraphArchitecture",
    "Convolutions",
    "DataError",
    "Discovery",
    "Drop",
    "Fuse",
    "FusionRecipe",
    "FusionReport",
    "HealRecipe",
    "HealReport",
    "HealScope",
    "LayerFuseError",
    "LayerFuseWarning",
    "Linearize",
    "MergeConvs",
    "MergeRecipe",
    "Placeholder",
    "Plan",
    "PlanError",
    "PlanNotes",
    "RecipeError",
    "RefitReport",
    "SearchResult",
    "Skip",
    "TrainingError",
    "TransformerArchitecture",
    "Unit",
    "UnsupportedModelError",
    "VerificationError",
    "ZeroAttention",
    "ZeroBlock",
    "align",
    "apply",
    "architecture_for",
    "collapse",
    "compare",
    "discover_architecture",
    "evaluate",
    "expand",
    "fuse",
    "fuse_checkpoint",
    "fused_parameters",
    "heal",
    "heal_scope",
    "knee",
    "layer_map",
    "linearize_mlps",
    "merge",
    "merge_convs",
    "mixed_weights",
    "model_card",
    "plan_fusion",
    "plot_distances",
    "plot_plan",
    "refit",
    "register_architecture",
    "search",
    "search_collapse",
    "search_merge",
    "verify",
]
