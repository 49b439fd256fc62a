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
from .gpt2 import GPT2Adapter
from .llama import LlamaAdapter, MistralAdapter, Qwen2Adapter, Qwen3Adapter
from .maps import READERS, Heads, LinearMap, heads_of, linear_maps
from .vit import DeiTAdapter, ViTAdapter

BUILTIN: tuple[type[TransformerAdapter], ...] = (
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
)

__all__ = [
    "ADAPTERS",
    "BUILTIN",
    "FUSED_PREFIX",
    "READERS",
    "Block",
    "ConvAdapter",
    "Heads",
    "LayerAdapter",
    "LinearMap",
    "ModelAdapter",
    "One",
    "Place",
    "TransformerAdapter",
    "ZeroAttention",
    "ZeroBlock",
    "adapter_for",
    "heads_of",
    "linear_maps",
]
