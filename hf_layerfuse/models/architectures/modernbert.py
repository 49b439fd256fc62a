"""ModernBERT: pre-norm encoder with joint maps, rotary positions, sliding windows, and no norm before layer 0."""

from __future__ import annotations

from torch import nn

from .base import TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class ModernBertArchitecture(TransformerArchitecture):
    model_type = "modernbert"
    layers = "layers"
    attention = {"norm": "attn_norm", "qkv": "attn.Wqkv", "out": "attn.Wo"}
    mlp = {"norm": "mlp_norm", "gate_in": "mlp.Wi", "out": "mlp.Wo"}
    activation = "mlp.act"
    skip = {
        "attention": {"attn_norm": nn.Identity, "attn": ZeroAttention},
        "mlp": {"mlp_norm": nn.Identity, "mlp": ZeroBlock},
    }
