"""Phi: parallel blocks that read one norm, partial rotary positions. Phi-3: Llama with joint maps."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .base import TransformerArchitecture
from .llama import LlamaArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class PhiArchitecture(TransformerArchitecture):
    model_type = "phi"
    layers = "layers"
    attention = {
        "norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.dense",
    }
    mlp = {"norm": "input_layernorm", "in": "mlp.fc1", "out": "mlp.fc2"}
    activation = "mlp.activation_fn"
    skip = {"attention": {"self_attn": ZeroAttention}, "mlp": {"mlp": ZeroBlock}}
    parallel = True

    def variant(self, config: PreTrainedConfig) -> TransformerArchitecture:
        return _WithNorms() if config.qk_layernorm else self


class _WithNorms(PhiArchitecture):
    attention = {**PhiArchitecture.attention, "q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"}


class Phi3Architecture(LlamaArchitecture):
    model_type = "phi3"
    attention = {"norm": "input_layernorm", "qkv": "self_attn.qkv_proj", "out": "self_attn.o_proj"}
    mlp = {"norm": "post_attention_layernorm", "gate_in": "mlp.gate_up_proj", "out": "mlp.down_proj"}
    activation = "mlp.activation_fn"
