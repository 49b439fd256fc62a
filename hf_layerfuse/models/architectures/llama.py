"""Llama and its relatives: pre-norm, RMSNorm, rotary positions, grouped keys and values, gated MLPs."""

from __future__ import annotations

from torch import nn

from .base import TransformerArchitecture, ZeroAttention, ZeroBlock


class LlamaArchitecture(TransformerArchitecture):
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


class MistralArchitecture(LlamaArchitecture):
    model_type = "mistral"


class Qwen2Architecture(LlamaArchitecture):
    model_type = "qwen2"


class Qwen3Architecture(LlamaArchitecture):
    model_type = "qwen3"
    attention = {**LlamaArchitecture.attention, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
