"""Llama and its relatives: pre-norm, RMSNorm, rotary positions, grouped keys and values, gated MLPs."""

from __future__ import annotations

from torch import nn

from .base import TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


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


class SmolLM3Architecture(LlamaArchitecture):
    model_type = "smollm3"
    per_layer_config = ("layer_types", "no_rope_layers")


class GraniteArchitecture(LlamaArchitecture):
    model_type = "granite"
    between = {"attention": "residual_multiplier", "mlp": "residual_multiplier"}


class Starcoder2Architecture(LlamaArchitecture):
    model_type = "starcoder2"
    mlp = {"norm": "post_attention_layernorm", "in": "mlp.c_fc", "out": "mlp.c_proj"}
    activation = "mlp.act"


class Olmo2Architecture(LlamaArchitecture):
    """A norm after each block, none before it."""

    model_type = "olmo2"
    attention = {
        **{role: path for role, path in LlamaArchitecture.attention.items() if role != "norm"},
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }
    mlp = {role: path for role, path in LlamaArchitecture.mlp.items() if role != "norm"}
    between = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    skip = {
        "attention": {"self_attn": ZeroAttention, "post_attention_layernorm": nn.Identity},
        "mlp": {"mlp": ZeroBlock, "post_feedforward_layernorm": nn.Identity},
    }


class MixtralArchitecture(LlamaArchitecture):
    """Mixtures of experts: the MLP is one opaque block."""

    model_type = "mixtral"
    mlp = {"norm": "post_attention_layernorm", "experts": "mlp"}
    activation = None
    silent = {"mlp": ("mlp.experts.down_proj",)}


class Qwen3MoeArchitecture(MixtralArchitecture):
    model_type = "qwen3_moe"
    attention = Qwen3Architecture.attention
    other_lists = ("mlp_only_layers",)
