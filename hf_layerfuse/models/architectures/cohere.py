"""Cohere (Command R): parallel blocks that read one norm, rotary positions of neighbouring coordinates."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .base import TransformerArchitecture
from .llama import LlamaArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class CohereArchitecture(LlamaArchitecture):
    model_type = "cohere"
    mlp = {**LlamaArchitecture.mlp, "norm": "input_layernorm"}
    skip = {"attention": {"self_attn": ZeroAttention}, "mlp": {"mlp": ZeroBlock}}
    pairing = "neighbours"
    parallel = True

    def variant(self, config: PreTrainedConfig) -> TransformerArchitecture:
        return _WithNorms() if config.use_qk_norm else self


class _WithNorms(CohereArchitecture):
    """Command R+: each head has its own gains."""

    attention = {**CohereArchitecture.attention, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
