"""GPT-NeoX: parallel attention and MLP, queries, keys and values by head in one map, partial rotary positions."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from .base import TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class GPTNeoXArchitecture(TransformerArchitecture):
    model_type = "gpt_neox"
    layers = "layers"
    attention = {"norm": "input_layernorm", "qkv": "attention.query_key_value", "out": "attention.dense"}
    mlp = {"norm": "post_attention_layernorm", "in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"}
    activation = "mlp.act"
    skip = {
        "attention": {"input_layernorm": nn.Identity, "attention": ZeroAttention},
        "mlp": {"post_attention_layernorm": nn.Identity, "mlp": ZeroBlock},
    }
    joint = {"qkv": "groups"}
    parallel = True

    def variant(self, config: PreTrainedConfig) -> TransformerArchitecture:
        return self if config.use_parallel_residual else _Sequential()


class _Sequential(GPTNeoXArchitecture):
    parallel = False
