"""OPT, BART and its relatives, whose layers hold both maps of the MLP themselves."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from ...plan import DECODER
from .base import Architecture, TransformerArchitecture
from .layouts import Heads
from .placeholders import ZeroAttention, ZeroBlock

# a zero in front of `out` would leave its bias, so `out` is replaced
_MLP = {"fc1": nn.Identity, "activation_fn": nn.Identity, "fc2": ZeroBlock}


class OPTArchitecture(TransformerArchitecture):
    model_type = "opt"
    layers = "decoder.layers"
    attention = {
        "norm": "self_attn_layer_norm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
    }
    mlp = {"norm": "final_layer_norm", "in": "fc1", "out": "fc2"}
    activation = "activation_fn"
    skip = {
        "attention": {"self_attn_layer_norm": nn.Identity, "self_attn": ZeroAttention},
        "mlp": {"final_layer_norm": nn.Identity, **_MLP},
    }

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return self if config.do_layer_norm_before else _PostNormOPT()


class _PostNormOPT(OPTArchitecture):
    """OPT-350m."""

    skip = {"attention": {"self_attn": ZeroAttention}, "mlp": _MLP}
    post_norm = True


class BartArchitecture(OPTArchitecture):
    """The encoder of BART."""

    model_type = "bart"
    stack = "encoder"
    layers = "encoder.layers"
    depth = "encoder_layers"
    skip = _PostNormOPT.skip
    post_norm = True

    def variant(self, config: PreTrainedConfig) -> Architecture:
        return self


class _BartDecoder(BartArchitecture):
    stack = "decoder"
    layers = "decoder.layers"
    depth = "decoder_layers"
    mask = "decoder_attention_mask"
    kinds = DECODER
    cross = {role: path.replace("self_attn", "encoder_attn") for role, path in OPTArchitecture.attention.items()}
    skip = {**BartArchitecture.skip, "cross": {"encoder_attn": ZeroAttention}}

    def heads(self, config: PreTrainedConfig, layer: int) -> Heads:
        count = config.decoder_attention_heads  # num_attention_heads is the number of the encoder
        return Heads(count, count, config.d_model // count, 0, self.pairing, self.bound_heads)


class MarianArchitecture(BartArchitecture):
    """The encoder of Marian."""

    model_type = "marian"


class _MarianDecoder(_BartDecoder):
    model_type = "marian"


class MBartArchitecture(BartArchitecture):
    """The encoder of mBART."""

    model_type = "mbart"
    skip = OPTArchitecture.skip
    post_norm = False


class _MBartDecoder(_BartDecoder):
    model_type = "mbart"
    skip = {
        **OPTArchitecture.skip,
        "cross": {"encoder_attn_layer_norm": nn.Identity, "encoder_attn": ZeroAttention},
    }
    post_norm = False


class WhisperArchitecture(MBartArchitecture):
    """The encoder of Whisper."""

    model_type = "whisper"


class _WhisperDecoder(_MBartDecoder):
    model_type = "whisper"


BartArchitecture.other_stacks = (_BartDecoder,)
MarianArchitecture.other_stacks = (_MarianDecoder,)
MBartArchitecture.other_stacks = (_MBartDecoder,)
WhisperArchitecture.other_stacks = (_WhisperDecoder,)
