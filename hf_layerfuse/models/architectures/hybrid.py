"""Models with mixers other than attention: Qwen3-Next and Qwen3.5 (linear attention in most layers), and Mamba.

The inside of a mixer is opaque: it can be dropped, kept or shared.
"""

from __future__ import annotations

from torch import nn

from .base import TransformerArchitecture
from .llama import LlamaArchitecture, MixtralArchitecture
from .placeholders import ZeroAttention, ZeroBlock

_MIXERS = {"norm": "input_layernorm", "full": "self_attn", "linear": "linear_attn"}


class Qwen35TextArchitecture(LlamaArchitecture):
    model_type = "qwen3_5_text"
    attention = _MIXERS
    silent = {"attention": ("self_attn.o_proj", "linear_attn.out_proj")}
    essential_types = ("full_attention",)
    skip = {
        "attention": {"input_layernorm": nn.Identity, "self_attn": ZeroAttention, "linear_attn": ZeroBlock},
        "mlp": LlamaArchitecture.skip["mlp"],
    }


class Qwen3NextArchitecture(Qwen35TextArchitecture):
    """Its MLPs are mixtures of experts, with an expert that all tokens share."""

    model_type = "qwen3_next"
    mlp = MixtralArchitecture.mlp
    activation = None
    silent = {
        **Qwen35TextArchitecture.silent,
        "mlp": ("mlp.experts.down_proj", "mlp.shared_expert.down_proj"),
    }


class MambaArchitecture(TransformerArchitecture):
    """One block per layer, a state-space mixer in the place of attention."""

    model_type = "mamba"
    layers = "layers"
    kinds = ("attention",)
    attention = {"norm": "norm", "mixer": "mixer"}
    silent = {"attention": ("mixer.out_proj",)}
    skip = {"attention": {"mixer": ZeroBlock}}  # the layer reads the data type of its norm
    per_layer_config = ()
