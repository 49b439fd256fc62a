"""GLM-4: Llama with norms after the blocks, a joint gate, and partial rotary positions of neighbouring coordinates."""

from __future__ import annotations

from torch import nn

from .llama import LlamaArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class Glm4Architecture(LlamaArchitecture):
    model_type = "glm4"
    mlp = {"norm": "post_attention_layernorm", "gate_in": "mlp.gate_up_proj", "out": "mlp.down_proj"}
    activation = "mlp.activation_fn"
    between = {"attention": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}
    skip = {
        "attention": {
            "input_layernorm": nn.Identity,
            "self_attn": ZeroAttention,
            "post_self_attn_layernorm": nn.Identity,
        },
        "mlp": {
            "post_attention_layernorm": nn.Identity,
            "mlp": ZeroBlock,
            "post_mlp_layernorm": nn.Identity,
        },
    }
    pairing = "neighbours"
