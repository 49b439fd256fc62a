"""ViT and its relatives, and both towers of CLIP and SigLIP: pre-norm encoders."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from .base import TransformerArchitecture
from .placeholders import ZeroAttention, ZeroBlock


class ViTArchitecture(TransformerArchitecture):
    model_type = "vit"
    layers = "layers"
    attention = {
        "norm": "layernorm_before",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "out": "attention.o_proj",
    }
    mlp = {"norm": "layernorm_after", "in": "mlp.fc1", "out": "mlp.fc2"}
    activation = "mlp.activation_fn"
    skip = {
        "attention": {"layernorm_before": nn.Identity, "attention": ZeroAttention},
        "mlp": {"layernorm_after": nn.Identity, "mlp": ZeroBlock},
    }


class DeiTArchitecture(ViTArchitecture):
    model_type = "deit"


class ViTMAEArchitecture(ViTArchitecture):
    model_type = "vit_mae"


class _Backbone(ViTArchitecture):
    """Models whose config names one stage per layer, to serve as backbones of others."""

    def complete(self, config: PreTrainedConfig) -> None:
        depth, last = config.num_hidden_layers, len(config.stage_names) - 1
        stages = ["stem", *(f"stage{layer + 1}" for layer in range(depth))]
        # a backbone gives the last stages, by their distance from the end
        chosen = sorted({max(depth - (last - index), 0) for index in config._out_indices or [last]})
        config.stage_names, config._out_indices = stages, chosen
        config._out_features = [stages[index] for index in chosen]


class DINOv2Architecture(_Backbone):
    """A gain per channel between each block and the residual sum."""

    model_type = "dinov2"
    layers = "encoder.layer"
    attention = {**ViTArchitecture.attention, "norm": "norm1"}
    mlp = {**ViTArchitecture.mlp, "norm": "norm2"}
    between = {"attention": "layer_scale1.lambda1", "mlp": "layer_scale2.lambda1"}
    skip = {
        "attention": {"norm1": nn.Identity, "attention": ZeroAttention, "layer_scale1": nn.Identity},
        "mlp": {"norm2": nn.Identity, "mlp": ZeroBlock, "layer_scale2": nn.Identity},
    }


class DINOv3Architecture(DINOv2Architecture):
    model_type = "dinov3_vit"
    layers = "layer"
    mlp = {"norm": "norm2", "in": "mlp.up_proj", "out": "mlp.down_proj"}
    activation = "mlp.act_fn"


class BEiTArchitecture(_Backbone):
    model_type = "beit"
    attention = {**ViTArchitecture.attention, "bias": "relative_position_bias"}
    between = {"attention": "lambda_1", "mlp": "lambda_2"}
    bound_heads = True


class CLIPVisionArchitecture(TransformerArchitecture):
    model_type = "clip_vision_model"
    layers = "encoder.layers"
    attention = {
        "norm": "layer_norm1",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
    }
    mlp = {"norm": "layer_norm2", "in": "mlp.fc1", "out": "mlp.fc2"}
    activation = "mlp.activation_fn"
    skip = {
        "attention": {"layer_norm1": nn.Identity, "self_attn": ZeroAttention},
        "mlp": {"layer_norm2": nn.Identity, "mlp": ZeroBlock},
    }


class CLIPTextArchitecture(CLIPVisionArchitecture):
    model_type = "clip_text_model"


class SigLIPVisionArchitecture(CLIPVisionArchitecture):
    model_type = "siglip_vision_model"


class SigLIPTextArchitecture(CLIPVisionArchitecture):
    model_type = "siglip_text_model"


class CLIPArchitecture(CLIPVisionArchitecture):
    """The image tower of the two-tower model."""

    model_type = "clip"
    stack = "vision"
    layers = "vision_model.encoder.layers"
    config = "vision_config"
    mask = ""


class _CLIPText(CLIPArchitecture):
    stack = "text"
    layers = "text_model.encoder.layers"
    config = "text_config"
    mask = "attention_mask"


class SigLIPArchitecture(CLIPArchitecture):
    """The image tower of the two-tower model."""

    model_type = "siglip"


class _SigLIPText(_CLIPText):
    model_type = "siglip"


CLIPArchitecture.other_stacks = (_CLIPText,)
SigLIPArchitecture.other_stacks = (_SigLIPText,)
