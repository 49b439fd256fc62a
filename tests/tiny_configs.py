"""Tiny models of many families of Transformers, with six layers each, and their inputs."""

import copy

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

LAYERS = 6

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_BERT = {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 40}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_LM = {**_TEXT, **_SPECIAL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GEMMA = {**_LM, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
_MOE = {**_LM, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_HYBRID = {
    **_LM,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 2,
}
_SCALED_VIT = {**_VIT, "layerscale_value": 0.5}
_TOWERS = {"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
_TOWERS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_BART = {**_TOWERS, "vocab_size": 64, "max_position_embeddings": 64}
_BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
_SPEECH = {
    **_TEXT,
    "vocab_size": 40,
    "intermediate_size": 48,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}
_SPEECH |= {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4)}
_SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
_VISION_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def _rope(*sections: int) -> dict:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}


# name of a family: (model_type, name of the class, fields of the config)
CONFIGS = {
    "gpt2": ("gpt2", "GPT2LMHeadModel", {**_SPECIAL, "vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}),
    "bert": ("bert", "BertForMaskedLM", _BERT),
    "roberta": ("roberta", "RobertaForMaskedLM", _ROBERTA),
    "distilbert": (
        "distilbert",
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48},
    ),
    "vit": ("vit", "ViTForImageClassification", _VIT),
    "deit": ("deit", "DeiTForImageClassification", _VIT),
    "llama": ("llama", "LlamaForCausalLM", _LM),
    "mistral": ("mistral", "MistralForCausalLM", {**_LM, "sliding_window": 6}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _LM),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**_LM, "head_dim": 8}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": ("gemma3_text", "Gemma3ForCausalLM", _GEMMA),
    "phi": ("phi", "PhiForCausalLM", _LM),
    "phi3": ("phi3", "Phi3ForCausalLM", _LM),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", _LM),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", _LM),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {**_BERT, **_SPECIAL}),
    "opt": ("opt", "OPTForCausalLM", {**_TEXT, **_SPECIAL, "word_embed_proj_dim": 32, "ffn_dim": 48}),
    "gpt_neo": (
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            **_SPECIAL,
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], LAYERS // 2]],
            "intermediate_size": 48,
            "window_size": 6,
        },
    ),
    "bloom": (
        "bloom",
        "BloomForCausalLM",
        {**_SPECIAL, "vocab_size": 64, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    ),
    "falcon": ("falcon", "FalconForCausalLM", {**_TEXT, **_SPECIAL}),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", _LM),
    "cohere": ("cohere", "CohereForCausalLM", _LM),
    "glm4": ("glm4", "Glm4ForCausalLM", {**_LM, "head_dim": 8}),
    "granite": ("granite", "GraniteForCausalLM", {**_LM, "residual_multiplier": 0.5}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _MOE),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**_LM, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "deepseek_v3",
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
    "qwen3_next": ("qwen3_next", "Qwen3NextForCausalLM", {**_HYBRID, **_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_5_text": ("qwen3_5_text", "Qwen3_5ForCausalLM", _HYBRID),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForMaskedLM", _ROBERTA),
    "camembert": ("camembert", "CamembertForMaskedLM", _ROBERTA),
    "electra": ("electra", "ElectraForMaskedLM", {**_BERT, "embedding_size": 16}),
    "albert": ("albert", "AlbertForMaskedLM", {**_BERT, "embedding_size": 16}),
    "mpnet": ("mpnet", "MPNetForMaskedLM", _ROBERTA),
    "deberta-v2": (
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "modernbert": (
        "modernbert",
        "ModernBertForMaskedLM",
        {**_BERT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6},
    ),
    "nomic_bert": ("nomic_bert", "NomicBertForMaskedLM", _BERT),
    "t5": (
        "t5",
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4},
    ),
    "bart": ("bart", "BartForConditionalGeneration", _BART),
    "mbart": ("mbart", "MBartForConditionalGeneration", _BART),
    "marian": ("marian", "MarianMTModel", _BART),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        {
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 40,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "wav2vec2": ("wav2vec2", "Wav2Vec2ForCTC", _SPEECH),
    "wav2vec2 stable": (
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    ),
    "hubert": ("hubert", "HubertForCTC", _SPEECH),
    "clip": (
        "clip",
        "CLIPModel",
        {
            "text_config": {**_BERT, **_SPECIAL, "projection_dim": 16},
            "vision_config": {**_VIT, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    "clip_vision_model": ("clip_vision_model", "CLIPVisionModelWithProjection", {**_VIT, "projection_dim": 16}),
    "clip_text_model": ("clip_text_model", "CLIPTextModelWithProjection", {**_BERT, **_SPECIAL, "projection_dim": 16}),
    "siglip": (
        "siglip",
        "SiglipModel",
        {"text_config": {**_BERT, "projection_size": 32}, "vision_config": _VIT},
    ),
    "siglip_text_model": ("siglip_text_model", "SiglipTextModel", {**_BERT, **_SPECIAL, "projection_size": 32}),
    "siglip_vision_model": ("siglip_vision_model", "SiglipVisionModel", _VIT),
    "dinov2": ("dinov2", "Dinov2ForImageClassification", {**_SCALED_VIT, "mlp_ratio": 2}),
    "dinov3_vit": ("dinov3_vit", "DINOv3ViTModel", {**_SCALED_VIT, "num_register_tokens": 2}),
    "beit": (
        "beit",
        "BeitForImageClassification",
        {**_VIT, "layer_scale_init_value": 0.5, "use_relative_position_bias": True, "out_indices": [1, 2, 3, 4]},
    ),
    "swin": (
        "swin",
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
    "convnext": (
        "convnext",
        "ConvNextForImageClassification",
        {"image_size": 32, "hidden_sizes": [8, 16, 32], "depths": [2, LAYERS, 2], "num_stages": 3, "patch_size": 2},
    ),
    "vit_mae": ("vit_mae", "ViTMAEModel", _VIT),
    "detr": (
        "detr",
        "DetrForObjectDetection",
        {
            **_TOWERS,
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
    "sam": (
        "sam",
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
    ),
    "llava": (
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_LM, "model_type": "llama"},
            "vision_config": {**_VIT, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 63,
            "image_token_id": 63,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            **_VISION_TOKENS,
            "text_config": {**_LM, "rope_parameters": _rope(1, 1, 2)},
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
    ),
    "qwen3_vl": (
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {
            **_VISION_TOKENS,
            "text_config": {**_LM, "head_dim": 8, "rope_parameters": _rope(2, 1, 1)},
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
    ),
    "gemma3": (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA,
            "vision_config": {**_VIT, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
    ),
    "mamba": (
        "mamba",
        "MambaForCausalLM",
        {**_SPECIAL, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS},
    ),
}


def configured_model(name: str) -> PreTrainedModel:
    """A random model of a family in which every parameter has an effect."""
    model_type, head, fields = CONFIGS[name]
    torch.manual_seed(0)
    model = getattr(transformers, head)(CONFIG_MAPPING[model_type](**copy.deepcopy(fields))).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def configured_inputs(name: str, rows: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    """A batch of random inputs that a family accepts, without padding."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int = tokens) -> Tensor:
        return torch.randint(3, 40, (rows, count), generator=generator)

    def pixels(size: int) -> Tensor:
        return torch.randn(rows, 3, size, size, generator=generator)

    if name in ("wav2vec2", "wav2vec2 stable", "hubert"):
        return {"input_values": torch.randn(rows, 256, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 32, generator=generator), "decoder_input_ids": ids(8)}
    if name in ("t5", "bart", "mbart", "marian"):
        return {"input_ids": ids(), "decoder_input_ids": ids(8)}
    if name in ("clip", "siglip"):
        return {"input_ids": ids(), "pixel_values": pixels(8)}
    if name in ("swin", "convnext"):
        return {"pixel_values": pixels(32)}
    if name == "sam":
        return {"pixel_values": pixels(32), "input_points": torch.tensor([[[[4.0, 5.0]]]] * rows)}
    if name == "detr":
        return {"pixel_values": pixels(64)}
    if name == "vit_mae":
        return {"pixel_values": pixels(8), "noise": torch.rand(rows, 16, generator=generator)}
    if name in ("llava", "gemma3"):
        images = torch.full((rows, 16 if name == "llava" else 4), 63)
        batch = {"input_ids": torch.cat([images, ids(8)], 1), "pixel_values": pixels(8)}
        return batch if name == "llava" else {**batch, "token_type_ids": (batch["input_ids"] == 63).long()}
    if CONFIGS[name][2].get("image_size"):
        return {"pixel_values": pixels(8)}
    return {"input_ids": ids()}
