# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""Llama and its relatives: pre-norm, RMSNorm, rotary positions, grouped keys and values, gated MLP."""

from __future__ import annotations

from torch import nn

from .layerfuse_adapters_base import TransformerAdapter, ZeroAttention, ZeroBlock


class LlamaAdapter(TransformerAdapter):
    model_type = "llama"
    layers = "layers"
    attention = {
        "norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
    }
    mlp = {"norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"}
    activation = "mlp.act_fn"
    skip = {
        "attention": {"input_layernorm": nn.Identity, "self_attn": ZeroAttention},
        "mlp": {"post_attention_layernorm": nn.Identity, "mlp": ZeroBlock},
    }


class MistralAdapter(LlamaAdapter):
    model_type = "mistral"


class Qwen2Adapter(LlamaAdapter):
    model_type = "qwen2"


class Qwen3Adapter(LlamaAdapter):
    model_type = "qwen3"
    attention = {**LlamaAdapter.attention, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
