"""Verifying a fused model: refuse checkpoints that do not reload, and warn when the result is worse than chance."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError, LayerFuseError, LayerFuseWarning, VerificationError
from ..evaluation.batches import Batches, model_inputs, output_mask
from ..evaluation.divergence import decode, prediction
from ..evaluation.dummy_inputs import dummy_inputs, predicts_next_token, running
from ..evaluation.modes import eval_mode, plain_outputs
from ..plan import Plan
from .families import family_of
from .loading import load_checkpoint


def verify(
    model: PreTrainedModel, path: str | Path | None = None, inputs: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Save a model, reload it from disk, and compare.

    Args:
        model: Model from `apply`, healed or not.
        path: Existing checkpoint of the model; by default, one is written to a temporary directory.
        inputs: Batch for the comparison; by default, random inputs of the right shape.

    Returns:
        `reload`, the largest absolute difference of the outputs after reloading, which must be 0. For models that
        generate, also `cache`, the largest difference between decoding with and without a key-value cache, relative to
        the largest logit.

    Raises:
        VerificationError: Weights are missing or unexpected, outputs are not finite, or outputs differ after reloading
            or between cached and uncached decoding.
        UnsupportedModelError: The model cannot run, because its config has contradictory values.
    """
    inputs = _inputs(model, inputs)
    with eval_mode(model):
        with torch.inference_mode(), running(model):
            expected = _predict(model, inputs)
        if not torch.isfinite(expected).all():
            raise VerificationError("the fused model returns NaN or infinite values: check the data type and the plan.")
        if path is not None:
            report = {"reload": _compare_reloaded(model, Path(path), inputs, expected)}
        else:
            with tempfile.TemporaryDirectory(prefix="layerfuse-") as directory:
                _save(model, directory)
                report = {"reload": _compare_reloaded(model, Path(directory), inputs, expected)}
        if _decodes(model, inputs):
            report["cache"] = _compare_cached(model, inputs)
    return report


def _save(model: PreTrainedModel, directory: str) -> None:
    try:
        model.save_pretrained(directory)
    except LayerFuseError:
        raise
    except (ValueError, StrictDataclassError) as error:  # such as a flag that its kernel does not support
        raise VerificationError(
            f"Transformers cannot save the fused model: {' '.join(str(error).split())[:400]} Correct the config of the "
            "original, or load it with other arguments."
        ) from error


def _predict(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Prediction with every weight at an address that torch would allocate.

    Weights that are mapped from a file can have any address, and some kernels round differently at unaligned addresses.
    """
    tensors = {
        name: tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return prediction(torch.func.functional_call(model, tensors, (), dict(inputs)))


def _inputs(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if inputs is None:
        # decoders that classify sequences find the end by the padding token; without one, they accept only one row
        return dummy_inputs(model, 1 if getattr(model.config, "pad_token_id", None) is None else 2)
    return model_inputs(inputs, model)


def _decodes(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    text = model.main_input_name == "input_ids" and "pixel_values" not in inputs
    if not model.can_generate() or not (text or "decoder_input_ids" in inputs):
        return False
    decoder = model.config.is_encoder_decoder or getattr(model.config, "is_decoder", None) is not False
    return decoder or _gives_cache(model, inputs["input_ids"])


@torch.inference_mode()
def _gives_cache(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a model returns a cache. BERT with a language-model head does only if it is configured as a decoder."""
    output = model(input_ids=ids.reshape(-1, ids.shape[-1])[:1], use_cache=True)
    return getattr(output, "past_key_values", None) is not None


@torch.inference_mode()
def _compare_reloaded(model: PreTrainedModel, path: Path, inputs: dict[str, Tensor], expected: Tensor) -> float:
    try:
        reloaded, info = load_checkpoint(path, dtype=model.dtype, output_loading_info=True)
    except CheckpointError as error:
        raise VerificationError(f"the saved checkpoint cannot be loaded: {error}") from error
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise VerificationError(f"the saved checkpoint does not match its config: {wrong}.")
    reloaded.set_attn_implementation(model.config._attn_implementation)
    with plain_outputs(reloaded):
        difference = (_predict(reloaded.to(model.device), inputs) - expected).abs().max().item()
    if difference != 0:
        raise VerificationError(
            f"outputs differ by up to {difference:.3g} after saving and loading; they must be equal. Please report "
            "this with the plan."
        )
    return difference


@torch.inference_mode()
def _compare_cached(model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    ids = inputs[name]
    ids = ids.reshape(-1, ids.shape[-1])[:1, :16]  # double-head models have an extra dimension for choices
    encoder = model.main_input_name if model.config.is_encoder_decoder else "encoder_hidden_states"
    encoded = {encoder: inputs[encoder][:1]} if encoder in inputs else {}
    prefix = max(1, ids.shape[1] // 2)
    whole = model(**encoded, **{name: ids}, use_cache=False).logits
    logits, cache = decode(model, ids[:, :prefix], **encoded)
    parts = [logits]
    for position in range(prefix, ids.shape[1]):
        logits, cache = decode(model, ids[:, position : position + 1], cache, **encoded)
        parts.append(logits)
    difference = (torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max()
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not difference <= tolerance:
        raise VerificationError(
            f"decoding with a cache differs from decoding without by {difference:.3g} of the largest logit (allowed "
            f"{tolerance}): the layer indices are wrong. Please report this with the plan."
        )
    return difference.item()


@torch.inference_mode()
def warn_if_useless(original: PreTrainedModel, fused: PreTrainedModel, batches: Batches | None) -> None:
    """Warn if fusing changed nothing, or if the fused model is worse than chance on the calibration batches.

    With class labels, chance is the loss of a uniform guess, ln(classes). Without labels, chance is the mean cosine
    with the original's outputs for other inputs. A fused model must be closer to the original's outputs for its own
    inputs than that; otherwise it has lost its content.
    """
    tree = getattr(fused.config, "layerfuse_plan", None)
    saves = not tree or family_of(Plan.from_dict(tree)).saves_parameters
    if saves and fused.num_parameters() >= original.num_parameters():
        _warn("fusing removed no parameters: the plan is empty. Lower the target.")
        return
    losses, matches, chances, classes = [], [], [], 0
    with eval_mode(original, fused):
        for batch in batches or ():
            inputs = _inputs(fused, batch)
            student = prediction(fused(**inputs))
            loss = _cross_entropy(fused, student, batch.get("labels"))
            if loss is not None:
                losses.append(loss)
                classes = student.shape[-1]
                continue
            ours, theirs = _vectors(student, inputs), _vectors(prediction(original(**inputs)), inputs)
            if ours.shape[0] > 1 and ours.shape[1] > 1:  # a single number has no direction
                matches.append(torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).mean().item())
                chances.append(torch.nn.functional.cosine_similarity(theirs.roll(1, 0), ours, dim=-1).mean().item())
    if losses and not (loss := math.fsum(losses) / len(losses)) < math.log(classes):
        _warn(
            f"the fused model is worse than chance on the calibration batches: loss {loss:.2f}, but a uniform guess "
            f"over {classes} classes has loss {math.log(classes):.2f}. Fuse less, or heal before use."
        )
    if matches and not math.fsum(matches) > math.fsum(chances):
        match, chance = math.fsum(matches) / len(matches), math.fsum(chances) / len(chances)
        _warn(
            f"the fused model is worse than chance on the calibration batches: cosine {match:.2f} with the original's "
            f"outputs for its inputs, {chance:.2f} with those for other inputs. Fuse less, or heal before use."
        )


def _cross_entropy(model: PreTrainedModel, logits: Tensor, labels: Tensor | None) -> float | None:
    """Cross-entropy of class labels in nats, or None if the labels are not classes for these logits."""
    if labels is None or labels.is_floating_point() or logits.ndim != labels.ndim + 1 or logits.shape[-1] < 2:
        return None
    labels = labels.to(logits.device)
    if predicts_next_token(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        return None
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten()).item()


def _vectors(output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Output averaged over all tokens except padding, (batch, features)."""
    mask = output_mask(inputs)
    if mask is not None and output.shape[: mask.ndim] == mask.shape and output.ndim == mask.ndim + 1:
        weights = mask[..., None].to(output.dtype)
        output = (output * weights).sum(-2) / weights.sum(-2).clamp_min(1)
    elif output.ndim == 3:
        output = output.mean(1)
    return output.float().flatten(1)


def _warn(message: str) -> None:
    logging.getLogger(__name__).warning(message)
    warnings.warn(
        message, LayerFuseWarning, stacklevel=6
    )  # the caller of fuse or collapse; inference_mode adds a frame of its own
