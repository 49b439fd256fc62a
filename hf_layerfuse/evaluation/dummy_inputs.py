"""Dummy inputs that any supported model accepts, to time it and to compare it with itself."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)

from ..errors import LayerFuseError, UnsupportedModelError

_CHOICES = 2


@contextmanager
def running(model: PreTrainedModel) -> Iterator[None]:
    """Turn errors of the code of a model, which a config with contradictory values leads to, into one in words.

    Raises:
        UnsupportedModelError: The model cannot run.
    """
    try:
        yield
    except LayerFuseError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run: {type(error).__name__}: {' '.join(str(error).split())[:400]}. If the "
            "original cannot either, correct its config.json."
        ) from error


def dummy_inputs(
    model: PreTrainedModel, batch_size: int = 2, sequence_length: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Make a seeded random batch for `model(**batch)`, on the device of the model.

    The same seed gives the same values on every device. No token is the padding token, so no mask is needed.

    Args:
        model: Text, image or audio model with any head. A decoder with a sequence classification head accepts more
            than one row only if `model.config.pad_token_id` is set.
        batch_size: Number of rows, images or recordings.
        sequence_length: Tokens per row, at most the positions of the model; ignored for images and audio.
        seed: Seed of the values.

    Returns:
        `input_ids` of shape (batch, tokens), or (batch, choices, tokens) for multiple choice heads; `pixel_values` of
        shape (batch, channels, height, width), with `bool_masked_pos` (batch, patches) for masked image modelling;
        `input_values` of shape (batch, samples); or `input_features` of shape (batch, mel bins, frames).
        Encoder-decoder models also get `decoder_input_ids` of shape (batch, tokens), and decoders with cross-attention
        alone get `encoder_hidden_states` (`encoder_outputs` in Whisper) of shape (batch, tokens, width).

    Raises:
        UnsupportedModelError: The main input of the model is none of these, or it takes several kinds at once.
    """
    generator = torch.Generator().manual_seed(seed)
    main_input = getattr(model, "main_input_name", None)
    make = _MAKERS.get(main_input)
    composite = all(hasattr(getattr(model, "config", None), name) for name in ("text_config", "vision_config"))
    if make is None or composite:
        also = " and inputs of another kind" if make is not None else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {main_input!r}{also} as its input; dummy inputs exist for models that take "
            f"one of {', '.join(map(repr, _MAKERS))}. Pass calibration batches, which show what the model takes."
        )
    inputs = make(model, batch_size, sequence_length, generator)
    if model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = _token_inputs(model, batch_size, sequence_length, generator)["input_ids"]
    takes = inspect.signature(model.forward).parameters
    states = next((name for name in ("encoder_hidden_states", "encoder_outputs") if name in takes), None)
    # decoders of models that have an encoder, and those of others that were made to read one
    crosses = getattr(model.config, "add_cross_attention", False) or hasattr(model.config, "decoder_layers")
    if states is not None and crosses and not model.config.is_encoder_decoder:
        shape = (batch_size, sequence_length, model.config.hidden_size)
        inputs[states] = torch.randn(shape, generator=generator).to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def predicts_next_token(model: PreTrainedModel) -> bool:
    """Whether the logits at a position predict the next token, as in a causal language model."""
    return model.can_generate()


def _has_head(model: PreTrainedModel, class_names: dict[str, str]) -> bool:
    """Whether the class of the model, or one that it extends, is in an Auto mapping of transformers."""
    return not {base.__name__ for base in type(model).__mro__}.isdisjoint(class_names.values())


def _token_inputs(
    model: PreTrainedModel, batch_size: int, sequence_length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa counts positions from after its padding id, so the first rows of that table are never read.
        skipped = [
            table.padding_idx + 1
            for name, table in model.named_modules()
            if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None
        ]
        sequence_length = min(sequence_length, positions - max(skipped, default=0))

    shape = (batch_size, sequence_length)
    takes_choices = "mc_token_ids" in inspect.signature(model.forward).parameters  # GPT2DoubleHeadsModel
    if takes_choices or _has_head(model, MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES):
        shape = (batch_size, _CHOICES, sequence_length)
    vocabulary = model.config.vocab_size
    input_ids = torch.randint(vocabulary, shape, generator=generator)
    pad = getattr(model.config, "pad_token_id", None)
    if pad is not None:
        input_ids[input_ids == pad] = (pad + 1) % vocabulary
    return {"input_ids": input_ids}


def _image_inputs(
    model: PreTrainedModel, batch_size: int, sequence_length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    config = model.config
    height, width = _pair(getattr(config, "image_size", 224))  # convolutional networks take any size and state none
    channels = getattr(config, "num_channels", 3)
    pixels = torch.randn(batch_size, channels, height, width, generator=generator)
    inputs = {"pixel_values": pixels.to(model.dtype)}
    if _has_head(model, MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES):
        patch_height, patch_width = _pair(config.patch_size)
        patches = (height // patch_height) * (width // patch_width)
        inputs["bool_masked_pos"] = torch.rand(batch_size, patches, generator=generator) < 0.5
    if "noise" in inspect.signature(model.forward).parameters:  # masked autoencoders draw their mask from it
        patch_height, patch_width = _pair(config.patch_size)
        patches = (height // patch_height) * (width // patch_width)
        inputs["noise"] = torch.rand(batch_size, patches, generator=generator)
    return inputs


def _recordings(
    model: PreTrainedModel, batch_size: int, sequence_length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Samples of sound, long enough for two dozen frames of the encoder."""
    samples = 24 * math.prod(getattr(model.config, "conv_stride", (320,)))
    return {"input_values": torch.randn(batch_size, samples, generator=generator).to(model.dtype)}


def _spectrograms(
    model: PreTrainedModel, batch_size: int, sequence_length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    frames = 2 * model.config.max_source_positions
    features = torch.randn(batch_size, model.config.num_mel_bins, frames, generator=generator)
    return {"input_features": features.to(model.dtype)}


_MAKERS = {
    "input_ids": _token_inputs,
    "pixel_values": _image_inputs,
    "input_values": _recordings,
    "input_features": _spectrograms,
}
"""Functions that make inputs, by the main input of a model."""


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
