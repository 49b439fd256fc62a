"""wav2vec 2.0 and HuBERT: post-norm encoders of speech, or pre-norm in their stable form."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from .base import Architecture, TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class Wav2Vec2Architecture(TransformerArchitecture):
    model_type = "wav2vec2"
    layers = "encoder.layers"
    attention = {
        "norm": "layer_norm",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "out": "attention.out_proj",
    }
    mlp = {
        "norm": "final_layer_norm",
        "in": "feed_forward.intermediate_dense",
        "out": "feed_forward.output_dense",
    }
    activation = "feed_forward.intermediate_act_fn"
    skip = {"attention": {"attention": ZeroAttention}, "mlp": {"feed_forward": ZeroBlock}}
    post_norm = True
    other_lists = ("conv_dim", "conv_stride", "conv_kernel", "tdnn_dim", "tdnn_kernel", "tdnn_dilation")

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return _STABLE[self.model_type] if config.do_stable_layer_norm else self


class HubertArchitecture(Wav2Vec2Architecture):
    model_type = "hubert"


class _StableWav2Vec2(Wav2Vec2Architecture):
    skip = {
        "attention": {"layer_norm": nn.Identity, "attention": ZeroAttention},
        "mlp": {"final_layer_norm": nn.Identity, "feed_forward": ZeroBlock},
    }
    post_norm = False


class _StableHubert(_StableWav2Vec2):
    model_type = "hubert"


_STABLE = {"wav2vec2": _StableWav2Vec2(), "hubert": _StableHubert()}
