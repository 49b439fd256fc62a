"""BERT, RoBERTa and DistilBERT: post-norm, a norm follows the residual sum of each block."""

from __future__ import annotations

from torch import nn

from .base import TransformerArchitecture, ZeroAttention, ZeroBlock


class BertArchitecture(TransformerArchitecture):
    model_type = "bert"
    layers = "encoder.layer"
    attention = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "out": "attention.output.dense",
        "norm": "attention.output.LayerNorm",
    }
    mlp = {"in": "intermediate.dense", "out": "output.dense", "norm": "output.LayerNorm"}
    activation = "intermediate.intermediate_act_fn"
    adds = "output"
    skip = {
        "attention": {"attention.self": ZeroAttention, "attention.output.dense": nn.Identity},
        "mlp": {"intermediate": ZeroBlock, "output.dense": nn.Identity},
    }
    post_norm = True


class RobertaArchitecture(BertArchitecture):
    model_type = "roberta"


class DistilBertArchitecture(TransformerArchitecture):
    model_type = "distilbert"
    layers = "transformer.layer"
    attention = {
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "out": "attention.out_lin",
        "norm": "sa_layer_norm",
    }
    mlp = {"in": "ffn.lin1", "out": "ffn.lin2", "norm": "output_layer_norm"}
    activation = "ffn.activation"
    skip = {
        "attention": {"attention": ZeroAttention},
        "mlp": {"ffn": ZeroBlock},
    }
    post_norm = True
