"""T5: pre-norm RMSNorm, and a position bias that the first layer computes for all."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from ...plan import DECODER
from .base import Architecture, TransformerArchitecture
from .placeholders import Placeholder, ZeroBlock

_MLP = "layer.1.DenseReluDense"


class ZeroT5Attention(Placeholder):
    """Placeholder for a removed attention module: contributes nothing, and passes the position bias on."""

    outputs = 3
    passed = {1: "position_bias"}


class T5Architecture(TransformerArchitecture):
    """The encoder of T5."""

    model_type = "t5"
    stack = "encoder"
    layers = "encoder.block"
    depth = "num_layers"
    fixed = {"attention": (0,)}  # the first layer computes the position bias of all
    attention = {
        "norm": "layer.0.layer_norm",
        "q": "layer.0.SelfAttention.q",
        "k": "layer.0.SelfAttention.k",
        "v": "layer.0.SelfAttention.v",
        "out": "layer.0.SelfAttention.o",
    }
    mlp = {"norm": "layer.1.layer_norm", "in": f"{_MLP}.wi", "out": f"{_MLP}.wo"}
    activation = f"{_MLP}.act"
    skip = {
        "attention": {"layer.0.layer_norm": nn.Identity, "layer.0.SelfAttention": ZeroT5Attention},
        "mlp": {"layer.1.layer_norm": nn.Identity, _MLP: ZeroBlock},
    }

    bound_heads = True

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return _GatedT5() if config.is_gated_act else self


class _GatedT5(T5Architecture):
    """T5 1.1, Flan-T5."""

    mlp = {"norm": "layer.1.layer_norm", "gate": f"{_MLP}.wi_0", "in": f"{_MLP}.wi_1", "out": f"{_MLP}.wo"}


class _T5Decoder(T5Architecture):
    stack = "decoder"
    layers = "decoder.block"
    depth = "num_decoder_layers"
    mask = "decoder_attention_mask"
    kinds = DECODER
    cross = {
        role: path.replace("layer.0.", "layer.1.").replace("SelfAttention", "EncDecAttention")
        for role, path in T5Architecture.attention.items()
    }
    mlp = {role: path.replace("layer.1.", "layer.2.") for role, path in T5Architecture.mlp.items()}
    activation = T5Architecture.activation.replace("layer.1.", "layer.2.")
    skip = {
        "attention": T5Architecture.skip["attention"],
        "cross": {"layer.1.layer_norm": nn.Identity, "layer.1.EncDecAttention": ZeroT5Attention},
        "mlp": {"layer.2.layer_norm": nn.Identity, _MLP.replace("layer.1.", "layer.2."): ZeroBlock},
    }

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return _GatedT5Decoder() if config.is_gated_act else self


class _GatedT5Decoder(_T5Decoder):
    mlp = {role: path.replace("layer.1.", "layer.2.") for role, path in _GatedT5.mlp.items()}


T5Architecture.other_stacks = (_T5Decoder,)
