"""Gemma 2 and 3: a norm before each block and another one after it, before the residual sum."""

from __future__ import annotations

from torch import nn

from .llama import LlamaArchitecture, Qwen3Architecture
from .placeholders import ZeroAttention, ZeroBlock


class Gemma2Architecture(LlamaArchitecture):
    model_type = "gemma2"
    mlp = {**LlamaArchitecture.mlp, "norm": "pre_feedforward_layernorm"}
    between = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    skip = {
        "attention": {
            "input_layernorm": nn.Identity,
            "self_attn": ZeroAttention,
            "post_attention_layernorm": nn.Identity,
        },
        "mlp": {
            "pre_feedforward_layernorm": nn.Identity,
            "mlp": ZeroBlock,
            "post_feedforward_layernorm": nn.Identity,
        },
    }


class Gemma3TextArchitecture(Gemma2Architecture):
    model_type = "gemma3_text"
    attention = Qwen3Architecture.attention


class Gemma3Architecture(Gemma3TextArchitecture):
    """The language model of the multimodal one."""

    model_type = "gemma3"
    layers = "language_model.layers"
    config = "text_config"
