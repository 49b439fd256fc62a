"""GPT-2 and GPT-Neo: pre-norm. GPT-2 has Conv1D weights of shape (in, out), and queries, keys and values in one map."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ...plan import DECODER
from .base import Architecture, TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class GPT2Architecture(TransformerArchitecture):
    model_type = "gpt2"
    layers = "h"
    attention = {"norm": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj"}
    mlp = {"norm": "ln_2", "in": "mlp.c_fc", "out": "mlp.c_proj"}
    activation = "mlp.act"
    skip = {
        "attention": {"ln_1": nn.Identity, "attn": ZeroAttention},
        "mlp": {"ln_2": nn.Identity, "mlp": ZeroBlock},
    }

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return _CrossedGPT2() if config.add_cross_attention else self

    def check(self, model: PreTrainedModel) -> None:
        if model.config.scale_attn_by_inverse_layer_idx:
            raise UnsupportedModelError(
                "scale_attn_by_inverse_layer_idx=True makes attention depend on the depth, so a layer cannot move to "
                "another depth: multiply the query weights of layer i by 1/(i + 1), set it to False, and fuse."
            )


class _CrossedGPT2(GPT2Architecture):
    kinds = DECODER
    cross = {
        "norm": "ln_cross_attn",
        "q": "crossattention.q_attn",
        "kv": "crossattention.c_attn",
        "out": "crossattention.c_proj",
    }
    skip = {
        **GPT2Architecture.skip,
        "cross": {"ln_cross_attn": nn.Identity, "crossattention": ZeroAttention},
    }


class GPTNeoArchitecture(GPT2Architecture):
    model_type = "gpt_neo"
    attention = {
        "norm": "ln_1",
        "q": "attn.attention.q_proj",
        "k": "attn.attention.k_proj",
        "v": "attn.attention.v_proj",
        "out": "attn.attention.out_proj",
    }
    per_layer_config = ("attention_layers",)

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return self

    def check(self, model: PreTrainedModel) -> None:
        pass

    def complete(self, config: PreTrainedConfig) -> None:
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
