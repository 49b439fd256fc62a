"""A tiny random model for each family of transformers and each variant that a table tells apart."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import LayerArchitecture, architecture_for

DEPTH = 6

Inputs = Mapping[str, Tensor]


class Family(NamedTuple):
    """A row of `FAMILIES`.

    Attributes:
        model_type: `model_type` of the config.
        head: Name of the class that the quick tests use.
        config: Fields of the tiny config.
        inputs: Function of a model, a number of rows and a seed, for models that random inputs do not fit.
        stack: Name of the stack that is fused, in models that have several; empty for the default.
    """

    model_type: str
    head: str
    config: Mapping[str, Any]
    inputs: Callable[[PreTrainedModel, int, int], Inputs] | None = None
    stack: str = ""


def _image_and_text(model: PreTrainedModel, rows: int, seed: int) -> Inputs:
    """An image of four tokens, and eight tokens of text behind it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 58, (rows, 8), generator=generator)
    image = torch.full((rows, model.config.mm_tokens_per_image), model.config.image_token_id)
    ids = torch.cat([image, text], 1)
    pixels = torch.randn(rows, 3, 8, 8, generator=generator).to(model.dtype)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == image[0, 0]).long()}


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


_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LM = {**_TEXT, **_TOKENS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 40}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 2,
}
_TWO_STACKS = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": DEPTH,
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
_DECODER = {"encoder_layers": DEPTH + 1, "decoder_layers": DEPTH}  # a decoder alone sizes its cache by the encoder
_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": DEPTH,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_T5_DECODER = {**_T5, "num_layers": 2, "num_decoder_layers": DEPTH}
_SPEECH = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
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
_BLOOM = {**_TOKENS, "vocab_size": 64, "hidden_size": 32, "n_layer": DEPTH, "n_head": 4}
_FALCON = {**_TEXT, **_TOKENS, "ffn_hidden_size": 48, "bias": True}
_MODERNBERT = {**_BERT, **_TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
_GPT_NEO = {
    **_TOKENS,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": DEPTH,
    "num_heads": 4,
    "attention_types": [[["global", "local"], DEPTH // 2]],
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "window_size": 6,
}
_EXPERTS = {"num_experts_per_tok": 2}
_HYBRID = {  # one layer with attention, and the others with a mixer of another shape
    **_LM,
    "head_dim": 8,
    "layer_types": ["full_attention", *["linear_attention"] * (DEPTH - 1)],
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

# one row per family, and one for each variant that its table tells apart
FAMILIES = {
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _LM),
    "granite": Family("granite", "GraniteForCausalLM", {**_LM, "residual_multiplier": 0.5}),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM", _LM),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _LM),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA),
    "gemma3": Family(
        "gemma3",
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
    "mixtral": Family("mixtral", "MixtralForCausalLM", {**_LM, **_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_LM, **_EXPERTS, "num_experts": 4, "head_dim": 8, "moe_intermediate_size": 24},
    ),
    "qwen3_next": Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_HYBRID,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_5_text": Family("qwen3_5_text", "Qwen3_5ForCausalLM", _HYBRID),
    "mamba": Family(
        "mamba",
        "MambaForCausalLM",
        {**_TOKENS, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": DEPTH, "state_size": 4},
    ),
    "gpt_neox": Family("gpt_neox", "GPTNeoXForCausalLM", _NEOX),
    "gpt_neox, sequential": Family("gpt_neox", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    "bloom": Family("bloom", "BloomForCausalLM", _BLOOM),
    "falcon": Family("falcon", "FalconForCausalLM", _FALCON),
    "falcon, two norms": Family(
        "falcon", "FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon, sequential": Family(
        "falcon", "FalconForCausalLM", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}
    ),
    "phi": Family("phi", "PhiForCausalLM", _LM),
    "phi, norms of queries": Family("phi", "PhiForCausalLM", {**_LM, "qk_layernorm": True}),
    "phi3": Family("phi3", "Phi3ForCausalLM", _LM),
    "cohere": Family("cohere", "CohereForCausalLM", _LM),
    "cohere, norms of queries": Family("cohere", "CohereForCausalLM", {**_LM, "use_qk_norm": True}),
    "glm4": Family("glm4", "Glm4ForCausalLM", {**_LM, "head_dim": 8}),
    "gpt_neo": Family("gpt_neo", "GPTNeoForCausalLM", _GPT_NEO),
    "gpt2, cross-attention": Family(
        "gpt2",
        "GPT2LMHeadModel",
        {**_TOKENS, "vocab_size": 64, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "add_cross_attention": True},
    ),
    "opt": Family("opt", "OPTForCausalLM", _OPT),
    "opt, norms behind": Family("opt", "OPTForCausalLM", {**_OPT, "do_layer_norm_before": False}),
    "xlm-roberta": Family("xlm-roberta", "XLMRobertaForMaskedLM", _ROBERTA),
    "camembert": Family("camembert", "CamembertForMaskedLM", _ROBERTA),
    "electra": Family("electra", "ElectraForMaskedLM", {**_BERT, "embedding_size": 16}),
    "mpnet": Family("mpnet", "MPNetForMaskedLM", _ROBERTA),
    "deberta-v2": Family("deberta-v2", "DebertaV2ForMaskedLM", _DEBERTA),
    "modernbert": Family("modernbert", "ModernBertForMaskedLM", _MODERNBERT),
    "nomic_bert": Family("nomic_bert", "NomicBertForMaskedLM", _BERT),
    "t5": Family("t5", "T5ForConditionalGeneration", _T5, _ended),
    "t5, gated": Family("t5", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, _ended),
    "t5, decoder": Family("t5", "T5ForConditionalGeneration", _T5_DECODER, _ended, stack="decoder"),
    "t5, gated, decoder": Family(
        "t5", "T5ForConditionalGeneration", {**_T5_DECODER, "feed_forward_proj": "gated-gelu"}, _ended, stack="decoder"
    ),
    "bart": Family("bart", "BartForConditionalGeneration", _BART, _ended),
    "bart, decoder": Family("bart", "BartForConditionalGeneration", {**_BART, **_DECODER}, _ended, stack="decoder"),
    "mbart": Family("mbart", "MBartForConditionalGeneration", _BART, _ended),
    "mbart, decoder": Family("mbart", "MBartForConditionalGeneration", {**_BART, **_DECODER}, _ended, stack="decoder"),
    "marian": Family("marian", "MarianMTModel", _BART),
    "marian, decoder": Family("marian", "MarianMTModel", {**_BART, **_DECODER}, stack="decoder"),
    "whisper": Family("whisper", "WhisperForConditionalGeneration", _WHISPER),
    "whisper, decoder": Family("whisper", "WhisperForConditionalGeneration", {**_WHISPER, **_DECODER}, stack="decoder"),
    "wav2vec2": Family("wav2vec2", "Wav2Vec2ForCTC", _SPEECH),
    "wav2vec2, stable": Family("wav2vec2", "Wav2Vec2ForCTC", _STABLE),
    "hubert": Family("hubert", "HubertForCTC", _SPEECH),
    "hubert, stable": Family("hubert", "HubertForCTC", _STABLE),
    "clip": Family("clip", "CLIPModel", _TOWERS, _two_towers),
    "clip, text": Family("clip", "CLIPModel", _TOWERS, _two_towers, "text"),
    "siglip": Family("siglip", "SiglipModel", _TOWERS, _two_towers),
    "siglip, text": Family("siglip", "SiglipModel", _TOWERS, _two_towers, "text"),
    "clip_vision_model": Family("clip_vision_model", "CLIPVisionModelWithProjection", {**_VIT, "projection_dim": 16}),
    "clip_text_model": Family(
        "clip_text_model", "CLIPTextModelWithProjection", {**_BERT, **_TOKENS, "projection_dim": 16}
    ),
    "siglip_vision_model": Family("siglip_vision_model", "SiglipVisionModel", _VIT),
    "siglip_text_model": Family("siglip_text_model", "SiglipTextModel", {**_BERT, **_TOKENS, "projection_size": 32}),
    "vit_mae": Family(
        "vit_mae",
        "ViTMAEModel",
        {
            **_VIT,
            "decoder_num_hidden_layers": 2,
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
    ),
    "dinov2": Family("dinov2", "Dinov2ForImageClassification", {**_VIT, "layerscale_value": 0.5, "mlp_ratio": 2}),
    "dinov3_vit": Family("dinov3_vit", "DINOv3ViTModel", {**_VIT, "layerscale_value": 0.5, "num_register_tokens": 2}),
    "beit": Family(
        "beit",
        "BeitForImageClassification",
        {**_VIT, "layer_scale_init_value": 0.5, "use_relative_position_bias": True, "out_indices": [1, 2, 3, 4]},
    ),
}


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


def family_model(name: str, head: str = "", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in which every parameter that trains has an effect: norms and biases are random too."""
    family = FAMILIES[name]
    head = head or family.head
    config = CONFIG_MAPPING[family.model_type](**copy.deepcopy({**family.config, **changes}))
    if head.endswith("CausalLM") and not family.head.endswith("CausalLM"):
        config.is_decoder = True
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:  # tables of sines and cosines are computed anew, not saved
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def family_table(name: str, model: PreTrainedModel) -> LayerArchitecture:
    """The table of the stack of a family that is fused."""
    return architecture_for(model, stack=FAMILIES[name].stack or None)


def family_inputs(name: str, model: PreTrainedModel, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A seeded random batch that a model of a family accepts."""
    make = FAMILIES[name].inputs
    return dict(make(model, rows, seed)) if make else dummy_inputs(model, rows, seed=seed)


def family_batches(name: str, model: PreTrainedModel, count: int = 6, rows: int = 4) -> list[dict[str, Tensor]]:
    """Calibration batches for a model of a family."""
    return [family_inputs(name, model, rows, seed) for seed in range(1, count + 1)]
