"""One table per architecture; `BUILTIN` lists those that come with the package."""

from .base import (
    ADAPTERS,
    FUSED_PREFIX,
    Block,
    ConvAdapter,
    LayerAdapter,
    ModelAdapter,
    One,
    Place,
    TransformerAdapter,
    ZeroAttention,
    ZeroBlock,
    adapter_for,
)
from .bert import BertAdapter, DistilBertAdapter, RobertaAdapter
from .block_weights import READERS, Heads, LinearMap, heads_of, linear_maps
from .conv_graph import ChainAdapter, Convolutions, Skip, Unit
from .gpt2 import GPT2Adapter
from .llama import LlamaAdapter, MistralAdapter, Qwen2Adapter, Qwen3Adapter
from .mobilenet_v2 import MobileNetV2Adapter
from .resnet import ResNetAdapter
from .vit import DeiTAdapter, ViTAdapter

BUILTIN: tuple[type[ModelAdapter], ...] = (
    GPT2Adapter,
    BertAdapter,
    RobertaAdapter,
    DistilBertAdapter,
    ViTAdapter,
    DeiTAdapter,
    LlamaAdapter,
    MistralAdapter,
    Qwen2Adapter,
    Qwen3Adapter,
    ResNetAdapter,
    MobileNetV2Adapter,
)

__all__ = [
    "ADAPTERS",
    "BUILTIN",
    "FUSED_PREFIX",
    "READERS",
    "Block",
    "ChainAdapter",
    "ConvAdapter",
    "Convolutions",
    "Heads",
    "LayerAdapter",
    "LinearMap",
    "ModelAdapter",
    "One",
    "Place",
    "Skip",
    "TransformerAdapter",
    "Unit",
    "ZeroAttention",
    "ZeroBlock",
    "adapter_for",
    "heads_of",
    "linear_maps",
]
