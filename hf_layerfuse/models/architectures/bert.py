"""BERT and its relatives, DistilBERT and Nomic BERT: post-norm, a norm follows the residual sum of each block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig

from ...plan import DECODER
from .base import Architecture, TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


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

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return _CrossedBert(self.model_type) if getattr(config, "add_cross_attention", False) else self


class _CrossedBert(BertArchitecture):
    """Decoders of BERT and its relatives, which have the same layers."""

    kinds = DECODER
    cross = {role: f"cross{path}" for role, path in BertArchitecture.attention.items()}
    skip = {
        **BertArchitecture.skip,
        "cross": {"crossattention.self": ZeroAttention, "crossattention.output.dense": nn.Identity},
    }

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


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


class XLMRobertaArchitecture(BertArchitecture):
    model_type = "xlm-roberta"


class CamembertArchitecture(BertArchitecture):
    model_type = "camembert"


class ElectraArchitecture(BertArchitecture):
    model_type = "electra"


class MPNetArchitecture(BertArchitecture):
    model_type = "mpnet"
    attention = {
        "q": "attention.attn.q",
        "k": "attention.attn.k",
        "v": "attention.attn.v",
        "out": "attention.attn.o",
        "norm": "attention.LayerNorm",
    }
    skip = {**BertArchitecture.skip, "attention": {"attention.attn": ZeroAttention}}
    bound_heads = True


class DebertaV2Architecture(BertArchitecture):
    model_type = "deberta-v2"
    attention = {
        **BertArchitecture.attention,
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
    }
    also_positions = ("q", "k")

    def variant(self, config: PreTrainedConfig) -> Architecture:
        types = config.pos_att_type or () if config.relative_attention else ()
        return self if getattr(config, "share_att_key", False) or not types else _ApartDebertaV2(types)


class _ApartDebertaV2(DebertaV2Architecture):
    """Relative positions have maps of their own, for queries and for keys to be multiplied with."""

    also_positions = ()

    def __init__(self, types: Sequence[str]) -> None:
        paths = {
            "p2c": ("q_position", "attention.self.pos_query_proj"),
            "c2p": ("k_position", "attention.self.pos_key_proj"),
        }
        self.attention = {**DebertaV2Architecture.attention, **dict(paths[name] for name in types)}


class NomicBertArchitecture(TransformerArchitecture):
    model_type = "nomic_bert"
    layers = "layers"
    attention = {
        "norm": "post_attention_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
    }
    mlp = {"norm": "post_mlp_layernorm", "gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"}
    activation = "mlp.act_fn"
    skip = {"attention": {"self_attn": ZeroAttention}, "mlp": {"mlp": ZeroBlock}}
    post_norm = True
