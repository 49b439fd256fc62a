"""Tiny random models of many families of transformers, and their inputs: the one table of configs of the tests."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import LayerArchitecture, architecture_for

LAYERS = 6

_DECODERS = ("CausalLM", "LMHeadModel")

Inputs = Mapping[str, Tensor]


class Family(NamedTuple):
    """A row of the table. Its name is the `model_type` of the config, in variants with words behind a comma.

    Attributes:
        head: Name of the class that the quick tests use.
        config: Fields of the tiny config.
        inputs: Function of a model, a number of rows and a seed, for models that random inputs do not fit.
        stack: Name of the stack that is fused, in models that have several; empty for the default.
    """

    head: str
    config: Mapping[str, Any]
    inputs: Callable[[PreTrainedModel, int, int], Inputs] | None = None
    stack: str = ""


def _image_and_text(model: PreTrainedModel, rows: int, seed: int) -> Inputs:
    """The tokens of an image, and eight tokens of text behind them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 58, (rows, 8), generator=generator)
    image = torch.full((rows, getattr(model.config, "mm_tokens_per_image", 16)), model.config.image_token_id)
    ids = torch.cat([image, text], 1)
    pixels = torch.randn(rows, 3, 8, 8, generator=generator).to(model.dtype)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = (ids == image[0, 0]).long()
    return inputs


def _text_alone(model: PreTrainedModel, rows: int, seed: int) -> Inputs:
    """Tokens, none of which stands for an image."""
    return {"input_ids": torch.randint(3, 58, (rows, 16), generator=torch.Generator().manual_seed(seed))}


def _points(model: PreTrainedModel, rows: int, seed: int) -> Inputs:
    """Images, with one point in each."""
    pixels = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "input_points": torch.full((rows, 1, 1, 2), 4.0)}


def _two_towers(model: PreTrainedModel, rows: int, seed: int) -> Inputs:
    """Images, and texts for heads that take them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator).to(model.dtype)}
    if "input_ids" in inspect.signature(model.forward).parameters:
        inputs["input_ids"] = torch.randint(3, 64, (rows, 16), generator=generator)
    return inputs


def _ended(model: PreTrainedModel, rows: int, seed: int) -> Inputs:
    """Rows of tokens that end with the only end token, which heads of T5 and BART that classify look for."""
    inputs = dummy_inputs(model, rows, seed=seed)
    end = model.config.eos_token_id
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            ids = inputs[name]
            ids[ids == end] = end + 1
            ids[:, -1] = end
    return inputs


_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LM = {**_TEXT, **_TOKENS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 40}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 2,
}
_TWO_STACKS = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_BART = {**_TWO_STACKS, "max_position_embeddings": 64}
_WHISPER = {
    **_TWO_STACKS,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 40,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_DECODER = {"encoder_layers": LAYERS + 1, "decoder_layers": LAYERS}  # a decoder alone sizes its cache by the encoder
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_T5_DECODER = {**_T5, "num_layers": 2, "num_decoder_layers": LAYERS}
_SPEECH = {
    **_TEXT,
    "vocab_size": 40,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
_STABLE = {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
_GEMMA = {**_LM, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
_OPT = {
    **_TEXT,
    **_TOKENS,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}
_NEOX = {**_TEXT, **_TOKENS, "intermediate_size": 48, "max_position_embeddings": 64, "rotary_pct": 0.5}
_GPT2 = {**_TOKENS, "vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
_BLOOM = {**_TOKENS, "vocab_size": 64, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}
_FALCON = {**_TEXT, **_TOKENS, "ffn_hidden_size": 48, "bias": True}
_MODERNBERT = {**_BERT, **_TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
_GPT_NEO = {
    **_TOKENS,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": LAYERS,
    "num_heads": 4,
    "attention_types": [[["global", "local"], LAYERS // 2]],
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "window_size": 6,
}
_VISION_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_EXPERTS = {"num_experts_per_tok": 2}
_HYBRID = {  # one layer with attention, and the others with a mixer of another shape
    **_LM,
    "head_dim": 8,
    "layer_types": ["full_attention", *["linear_attention"] * (LAYERS - 1)],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_TOWERS = {
    "text_config": {**_BERT, **_TOKENS, "projection_dim": 16, "projection_size": 32},
    "vision_config": {**_VIT, "projection_dim": 16},
    "projection_dim": 16,
}
_DEBERTA = {
    **_BERT,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}

# the ten architectures that go through most tests
TINY = {
    "gpt2": Family("GPT2LMHeadModel", {**_GPT2, "n_positions": 64}),
    "bert": Family("BertForMaskedLM", _BERT),
    "roberta": Family("RobertaForMaskedLM", _ROBERTA),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        {
            "vocab_size": 64,
            "dim": 32,
            "n_layers": LAYERS,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
        },
    ),
    "vit": Family("ViTForImageClassification", {**_VIT, "encoder_stride": 2}),
    "deit": Family("DeiTForImageClassification", {**_VIT, "encoder_stride": 2}),
    "llama": Family("LlamaForCausalLM", _LM),
    "mistral": Family("MistralForCausalLM", {**_LM, "sliding_window": 6}),
    "qwen2": Family(
        "Qwen2ForCausalLM", {**_LM, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
    ),
    "qwen3": Family("Qwen3ForCausalLM", {**_LM, "head_dim": 8}),
}

# one row for each other family, and one for each variant that its table tells apart
FAMILIES = {
    "smollm3": Family("SmolLM3ForCausalLM", _LM),
    "granite": Family("GraniteForCausalLM", {**_LM, "residual_multiplier": 0.5}),
    "starcoder2": Family("Starcoder2ForCausalLM", _LM),
    "olmo2": Family("Olmo2ForCausalLM", _LM),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": Family("Gemma3ForCausalLM", _GEMMA),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA,
            "vision_config": {**_VIT, "num_hidden_layers": 2, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
        _image_and_text,
    ),
    "mixtral": Family("MixtralForCausalLM", {**_LM, **_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**_LM, **_EXPERTS, "num_experts": 4, "head_dim": 8, "moe_intermediate_size": 24},
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            **_HYBRID,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", _HYBRID),
    "mamba": Family(
        "MambaForCausalLM",
        {**_TOKENS, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4},
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", _NEOX),
    "gpt_neox, sequential": Family("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    "bloom": Family("BloomForCausalLM", _BLOOM),
    "falcon": Family("FalconForCausalLM", _FALCON),
    "falcon, two norms": Family("FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, sequential": Family(
        "FalconForCausalLM", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}
    ),
    "phi": Family("PhiForCausalLM", _LM),
    "phi, norms of queries": Family("PhiForCausalLM", {**_LM, "qk_layernorm": True}),
    "phi3": Family("Phi3ForCausalLM", _LM),
    "cohere": Family("CohereForCausalLM", _LM),
    "cohere, norms of queries": Family("CohereForCausalLM", {**_LM, "use_qk_norm": True}),
    "glm4": Family("Glm4ForCausalLM", {**_LM, "head_dim": 8}),
    "gpt_neo": Family("GPTNeoForCausalLM", _GPT_NEO),
    "gpt2, cross-attention": Family("GPT2LMHeadModel", {**_GPT2, "add_cross_attention": True}),
    "bert, cross-attention": Family("BertLMHeadModel", {**_BERT, "is_decoder": True, "add_cross_attention": True}),
    "opt": Family("OPTForCausalLM", _OPT),
    "opt, norms behind": Family("OPTForCausalLM", {**_OPT, "do_layer_norm_before": False}),
    "xlm-roberta": Family("XLMRobertaForMaskedLM", _ROBERTA),
    "camembert": Family("CamembertForMaskedLM", _ROBERTA),
    "electra": Family("ElectraForMaskedLM", {**_BERT, "embedding_size": 16}),
    "mpnet": Family("MPNetForMaskedLM", _ROBERTA),
    "deberta-v2": Family("DebertaV2ForMaskedLM", _DEBERTA),
    "modernbert": Family("ModernBertForMaskedLM", _MODERNBERT),
    "nomic_bert": Family("NomicBertForMaskedLM", _BERT),
    "t5": Family("T5ForConditionalGeneration", _T5, _ended),
    "t5, gated": Family("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, _ended),
    "t5, decoder": Family("T5ForConditionalGeneration", _T5_DECODER, _ended, stack="decoder"),
    "t5, gated, decoder": Family(
        "T5ForConditionalGeneration", {**_T5_DECODER, "feed_forward_proj": "gated-gelu"}, _ended, stack="decoder"
    ),
    "bart": Family("BartForConditionalGeneration", _BART, _ended),
    "bart, decoder": Family("BartForConditionalGeneration", {**_BART, **_DECODER}, _ended, stack="decoder"),
    "mbart": Family("MBartForConditionalGeneration", _BART, _ended),
    "mbart, decoder": Family("MBartForConditionalGeneration", {**_BART, **_DECODER}, _ended, stack="decoder"),
    "marian": Family("MarianMTModel", _BART),
    "marian, decoder": Family("MarianMTModel", {**_BART, **_DECODER}, stack="decoder"),
    "whisper": Family("WhisperForConditionalGeneration", _WHISPER),
    "whisper, decoder": Family("WhisperForConditionalGeneration", {**_WHISPER, **_DECODER}, stack="decoder"),
    "wav2vec2": Family("Wav2Vec2ForCTC", _SPEECH),
    "wav2vec2, stable": Family("Wav2Vec2ForCTC", _STABLE),
    "hubert": Family("HubertForCTC", _SPEECH),
    "hubert, stable": Family("HubertForCTC", _STABLE),
    "clip": Family("CLIPModel", _TOWERS, _two_towers),
    "clip, text": Family("CLIPModel", _TOWERS, _two_towers, "text"),
    "siglip": Family("SiglipModel", _TOWERS, _two_towers),
    "siglip, text": Family("SiglipModel", _TOWERS, _two_towers, "text"),
    "clip_vision_model": Family("CLIPVisionModelWithProjection", {**_VIT, "projection_dim": 16}),
    "clip_text_model": Family("CLIPTextModelWithProjection", {**_BERT, **_TOKENS, "projection_dim": 16}),
    "siglip_vision_model": Family("SiglipVisionModel", _VIT),
    "siglip_text_model": Family("SiglipTextModel", {**_BERT, **_TOKENS, "projection_size": 32}),
    "vit_mae": Family(
        "ViTMAEModel",
        {
            **_VIT,
            "decoder_num_hidden_layers": 2,
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
    ),
    "dinov2": Family("Dinov2ForImageClassification", {**_VIT, "layerscale_value": 0.5, "mlp_ratio": 2}),
    "dinov3_vit": Family("DINOv3ViTModel", {**_VIT, "layerscale_value": 0.5, "num_register_tokens": 2}),
    "beit": Family(
        "BeitForImageClassification",
        {**_VIT, "layer_scale_init_value": 0.5, "use_relative_position_bias": True, "out_indices": [1, 2, 3, 4]},
    ),
}

# families without a table in the package
OTHERS = {
    "albert": Family("AlbertForMaskedLM", {**_BERT, "embedding_size": 16}),
    "swin": Family(
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2, LAYERS],
            "num_heads": [2, 2, 4],
            "window_size": 4,
        },
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        {"image_size": 32, "hidden_sizes": [8, 16, 32], "depths": [2, LAYERS, 2], "num_stages": 3, "patch_size": 2},
    ),
    "detr": Family(
        "DetrForObjectDetection",
        {
            **_TWO_STACKS,
            "decoder_layers": LAYERS,
            "num_queries": 5,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 8, 16, 16],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage4"],
            },
        },
    ),
    "sam": Family(
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "mlp_dim": 48,
                "image_size": 32,
                "patch_size": 4,
                "output_channels": 16,
                "num_pos_feats": 8,
                "window_size": 4,
                "global_attn_indexes": [2, 5],
            },
            "prompt_encoder_config": {
                "hidden_size": 16,
                "num_pos_feats": 8,
                "image_size": 32,
                "patch_size": 4,
                "mask_input_channels": 4,
                "image_embedding_size": 8,
            },
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        _points,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **_LM,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_LM, "model_type": "llama"},
            "vision_config": {**_VIT, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 63,
            "image_token_id": 63,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
        },
        _image_and_text,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            **_VISION_TOKENS,
            "text_config": {**_LM, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": LAYERS,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        _text_alone,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        {
            **_VISION_TOKENS,
            "text_config": {**_LM, "head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
            "vision_config": {
                "depth": LAYERS,
                "hidden_size": 32,
                "num_heads": 4,
                "intermediate_size": 48,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [1, 3, 5],
            },
        },
        _text_alone,
    ),
}

CROSSED = tuple(name for name in FAMILIES if name.endswith(("cross-attention", "decoder")))
"""Rows whose layers have a cross-attention block."""

_ROWS = {**TINY, **FAMILIES, **OTHERS}


def model_type_of(name: str) -> str:
    """`model_type` of a row."""
    return name.partition(",")[0]


def takes_states(name: str, head: str) -> bool:
    """Whether a class takes the states that the cross-attention blocks of a row read."""
    alone = name.endswith("cross-attention")  # without an encoder in the model
    return not alone or "encoder_hidden_states" in inspect.signature(getattr(transformers, head).forward).parameters


def heads_of(model_type: str) -> list[type[PreTrainedModel]]:
    """Every public model class of transformers with this `model_type`."""
    package = CONFIG_MAPPING[model_type].__module__.rpartition(".")[0]
    module = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
    classes = [getattr(module, name) for name in module.__all__ if "PreTrainedModel" not in name]
    classes = [each for each in classes if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    return [
        each
        for each in classes
        if getattr(each.config_class, "model_type", None) == model_type
        and each.forward is not PreTrainedModel.forward  # bases under an old name
    ]


def family_config(name: str, head: str = "", **changes: Any) -> PreTrainedConfig:
    """The config of a row, for the class with this name."""
    family = _ROWS[name]
    config = CONFIG_MAPPING[model_type_of(name)](**copy.deepcopy({**family.config, **changes}))
    if head.endswith(_DECODERS) and not family.head.endswith(_DECODERS):
        config.is_decoder = True
    return config


def family_model(name: str, head: str = "", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in which every parameter that trains has an effect: norms and biases are random too."""
    torch.manual_seed(seed)
    model = getattr(transformers, head or _ROWS[name].head)(family_config(name, head, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:  # tables of sines and cosines are computed anew, not saved
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def family_table(name: str, model: PreTrainedModel) -> LayerArchitecture:
    """The table of the stack of a family that is fused."""
    return architecture_for(model, stack=_ROWS[name].stack or None)


def family_inputs(name: str, model: PreTrainedModel, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A seeded random batch that a model of a family accepts."""
    make = _ROWS[name].inputs
    return dict(make(model, rows, seed)) if make else dummy_inputs(model, rows, seed=seed)


def family_batches(name: str, model: PreTrainedModel, count: int = 6, rows: int = 4) -> list[dict[str, Tensor]]:
    """Calibration batches for a model of a family."""
    return [family_inputs(name, model, rows, seed) for seed in range(1, count + 1)]
