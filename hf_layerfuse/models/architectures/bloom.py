"""Bloom: queries, keys and values by head in one map, ALiBi positions, modules that also add the residual."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .base import TransformerArchitecture
from .placeholders import Placeholder


class ResidualAttention(Placeholder):
    """Placeholder for a removed attention module that adds the residual, its second argument: returns the residual."""

    outputs = 2
    passed = {0: 1}


class ResidualBlock(Placeholder):
    """Placeholder for a removed MLP that adds the residual, its second argument: returns the residual."""

    passed = {0: 1}


class BloomArchitecture(TransformerArchitecture):
    model_type = "bloom"
    layers = "h"
    attention = {"norm": "input_layernorm", "qkv": "self_attention.query_key_value", "out": "self_attention.dense"}
    mlp = {"norm": "post_attention_layernorm", "in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"}
    activation = "mlp.gelu_impl"
    skip = {
        "attention": {"input_layernorm": nn.Identity, "self_attention": ResidualAttention},
        "mlp": {"post_attention_layernorm": nn.Identity, "mlp": ResidualBlock},
    }
    joint = {"qkv": "groups"}
    bound_heads = True

    def check(self, model: PreTrainedModel) -> None:
        if model.config.apply_residual_connection_post_layernorm:
            raise UnsupportedModelError(
                "apply_residual_connection_post_layernorm=True makes the residual stream start anew at every norm, so "
                "blocks cannot be dropped or combined: use a model with False."
            )
