# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""One table per architecture; `BUILTIN` lists those that come with the package."""

from .layerfuse_adapters_base import (
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
from .layerfuse_adapters_bert import BertAdapter, DistilBertAdapter, RobertaAdapter
from .layerfuse_adapters_chain import ChainAdapter, Convolutions, Skip, Unit
from .layerfuse_adapters_gpt2 import GPT2Adapter
from .layerfuse_adapters_llama import LlamaAdapter, MistralAdapter, Qwen2Adapter, Qwen3Adapter
from .layerfuse_adapters_maps import READERS, Heads, LinearMap, heads_of, linear_maps
from .layerfuse_adapters_mobilenet_v2 import MobileNetV2Adapter
from .layerfuse_adapters_resnet import ResNetAdapter
from .layerfuse_adapters_vit import DeiTAdapter, ViTAdapter

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
