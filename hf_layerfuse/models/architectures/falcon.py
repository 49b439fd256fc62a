"""Falcon: three layouts of a layer, queries by group with their keys and values, rotary or ALiBi positions."""

from __future__ import annotations

import dataclasses

from torch import nn
from transformers import PreTrainedConfig

from .base import TransformerArchitecture
from .layouts import Heads
from .placeholders import ZeroAttention, ZeroBlock


class FalconArchitecture(TransformerArchitecture):
    """Falcon 7B: both blocks run in parallel and read one norm."""

    model_type = "falcon"
    layers = "h"
    attention = {"norm": "input_layernorm", "qkv": "self_attention.query_key_value", "out": "self_attention.dense"}
    mlp = {"norm": "input_layernorm", "in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"}
    activation = "mlp.act"
    skip = {"attention": {"self_attention": ZeroAttention}, "mlp": {"mlp": ZeroBlock}}
    joint = {"qkv": "groups"}
    parallel = True

    def variant(self, config: PreTrainedConfig) -> TransformerArchitecture:
        if not config.parallel_attn:
            return _Sequential()
        norms = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
        return _TwoNorms() if norms == 2 else self

    def heads(self, config: PreTrainedConfig, layer: int) -> Heads | None:
        heads = super().heads(config, layer)
        groups = 1 if config.multi_query else heads.count
        groups = config.num_kv_heads if config.new_decoder_architecture else groups
        # with ALiBi, queries and keys do not rotate
        rotary = 0 if config.alibi else heads.rotary
        return dataclasses.replace(heads, groups=groups, rotary=rotary, bound=config.alibi)


class _TwoNorms(FalconArchitecture):
    """Falcon 40B and 180B: both blocks run in parallel, each with its norm."""

    attention = {**FalconArchitecture.attention, "norm": "ln_attn"}
    mlp = {**FalconArchitecture.mlp, "norm": "ln_mlp"}
    skip = {
        "attention": {"ln_attn": nn.Identity, "self_attention": ZeroAttention},
        "mlp": {"ln_mlp": nn.Identity, "mlp": ZeroBlock},
    }


class _Sequential(FalconArchitecture):
    """Falcon RW: attention before the MLP."""

    mlp = {**FalconArchitecture.mlp, "norm": "post_attention_layernorm"}
    skip = {
        "attention": {"input_layernorm": nn.Identity, "self_attention": ZeroAttention},
        "mlp": {"post_attention_layernorm": nn.Identity, "mlp": ZeroBlock},
    }
    parallel = False
