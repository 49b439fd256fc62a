# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""ViT and DeiT: pre-norm encoders of image patches."""

from __future__ import annotations

from torch import nn

from .layerfuse_adapters_base import TransformerAdapter, ZeroAttention, ZeroBlock


class ViTAdapter(TransformerAdapter):
    model_type = "vit"
    layers = "layers"
    attention = {
        "norm": "layernorm_before",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "out": "attention.o_proj",
    }
    mlp = {"norm": "layernorm_after", "in": "mlp.fc1", "out": "mlp.fc2"}
    activation = "mlp.activation_fn"
    skip = {
        "attention": {"layernorm_before": nn.Identity, "attention": ZeroAttention},
        "mlp": {"layernorm_after": nn.Identity, "mlp": ZeroBlock},
    }


class DeiTAdapter(ViTAdapter):
    model_type = "deit"
