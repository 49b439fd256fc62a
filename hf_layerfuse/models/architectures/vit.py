"""ViT and DeiT: pre-norm encoders of image patches."""

from __future__ import annotations

from torch import nn

from .base import TransformerArchitecture, ZeroAttention, ZeroBlock


class ViTArchitecture(TransformerArchitecture):
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


class DeiTArchitecture(ViTArchitecture):
    model_type = "deit"
