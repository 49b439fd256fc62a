"""GPT-2: pre-norm, Conv1D weights of shape (in, out), queries, keys and values in one map."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .base import TransformerArchitecture, ZeroAttention, ZeroBlock


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

    def check(self, model: PreTrainedModel) -> None:
        if model.config.scale_attn_by_inverse_layer_idx:
            raise UnsupportedModelError(
                "scale_attn_by_inverse_layer_idx=True makes attention depend on the depth, so a layer cannot move to "
                "another depth: multiply the query weights of layer i by 1/(i + 1), set it to False, and fuse."
            )
