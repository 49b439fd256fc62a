"""One table per architecture; `BUILTIN` lists the architectures that ship with the package."""

from .base import (
    Architecture,
    Block,
    ConvArchitecture,
    LayerArchitecture,
    One,
    OneBeside,
    Place,
    TransformerArchitecture,
    ZeroAttention,
    ZeroBlock,
)
from .bert import BertArchitecture, DistilBertArchitecture, RobertaArchitecture
from .block_weights import READERS, LinearMap, linear_maps
from .conv_graph import ConvGraphArchitecture, Convolutions, Skip, Unit
from .gpt2 import GPT2Architecture
from .layouts import Heads
from .llama import LlamaArchitecture, MistralArchitecture, Qwen2Architecture, Qwen3Architecture
from .mobilenet_v2 import MobileNetV2Architecture
from .registry import ARCHITECTURES, FUSED_PREFIX, architecture_for
from .resnet import ResNetArchitecture
from .vit import DeiTArchitecture, ViTArchitecture

BUILTIN: tuple[type[Architecture], ...] = (
    GPT2Architecture,
    BertArchitecture,
    RobertaArchitecture,
    DistilBertArchitecture,
    ViTArchitecture,
    DeiTArchitecture,
    LlamaArchitecture,
    MistralArchitecture,
    Qwen2Architecture,
    Qwen3Architecture,
    ResNetArchitecture,
    MobileNetV2Architecture,
)

__all__ = [
    "ARCHITECTURES",
    "BUILTIN",
    "FUSED_PREFIX",
    "READERS",
    "Architecture",
    "Block",
    "ConvArchitecture",
    "ConvGraphArchitecture",
    "Convolutions",
    "Heads",
    "LayerArchitecture",
    "LinearMap",
    "One",
    "OneBeside",
    "Place",
    "Skip",
    "TransformerArchitecture",
    "Unit",
    "ZeroAttention",
    "ZeroBlock",
    "architecture_for",
    "linear_maps",
]
