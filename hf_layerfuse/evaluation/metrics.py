"""Metrics of any model, fused or not: perplexity, accuracy, fidelity and size."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CheckpointError, DataError
from .batches import model_inputs
from .intervals import bootstrap, wilson
from .limits import Limits
from .modes import eval_mode

Scores = list[tuple[float, float]]
"""Sum and divisor of each row, to compare two models row by row."""


class Accuracy(evaluate.Metric):
    """Share of right predictions: a metric of the `evaluate` library that needs neither the Hub nor sklearn.

    Use it through `add_batch(predictions=..., references=...)` and `compute()`, which returns `{"accuracy": float}`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the predictions that equal their reference.",
            citation="",
            inputs_description="predictions: class ids. references: class ids.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_length: int,
    stride: int | None = None,
    batch_size: int,
    max_windows: int | None = None,
    bf16: bool = False,
    scores: Scores | None = None,
) -> dict[str, float | int]:
    """Measure the perplexity of a causal language model on a text, with a sliding window.

    The window moves by `stride` tokens. Every token is scored at most once, with at least `max_length - stride`
    tokens before it, fewer only at the start of the text; the first token of the text is not scored. Windows that do
    not overlap (`stride == max_length`) also leave the first token of each window without context: it is not scored.

    Words are counted as in WikiText: whitespace-separated strings, and every end of line. The word perplexity uses
    the mean over the scored tokens for the tokens that are not scored:
    exp(nll / tokens * (all tokens) / words). See Merity et al. 2017, https://arxiv.org/abs/1609.07843.

    Args:
        model: Model that maps `input_ids` and `attention_mask` to `logits` of shape (batch, tokens, vocabulary).
        tokenizer: Tokenizer of the model; no special tokens are added.
        text: Whole text, with its line ends.
        max_length: Number of tokens in a window.
        stride: Number of tokens by which the window moves; `max_length` when None.
        batch_size: Number of windows per batch.
        max_windows: Maximum number of windows, from the start of the text.
        bf16: Whether to compute in bfloat16 autocast.
        scores: List that receives the loss and the number of scored tokens of each window.

    Returns:
        `token_perplexity` and its 95% interval by a bootstrap over windows, `word_perplexity`, `nll` (sum over the
        scored tokens, in nats), `tokens` (scored), `words`, `stride` and `max_length`.

    Raises:
        DataError: The text is too short, or `max_length` or `stride` do not fit the model or each other.
    """
    stride = max_length if stride is None else stride
    limits = Limits.of(model)
    positions = limits.positions or getattr(model.config, "max_position_embeddings", None) or max_length
    if not 2 <= max_length <= positions or not 1 <= stride <= max_length:
        raise DataError(
            f"max_length={max_length} and stride={stride} do not fit: use a max_length of 2 to {positions} tokens, and "
            "a stride of 1 to max_length."
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if max_windows is not None and len(ids) > max_length + (max_windows - 1) * stride:
        ids = ids[: max_length + (max_windows - 1) * stride]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # to count the words of this part
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least 2. Use a longer text.")
    limits.check_ids("the text", min(ids), max(ids))

    scores = [] if scores is None else scores
    windows = list(_windows(len(ids), max_length, stride))
    ids = torch.tensor(ids)
    with evaluating(model, bf16=bf16) as device:
        for first in tqdm(
            range(0, len(windows), batch_size), desc="Perplexity", unit="batch", disable=None, leave=False
        ):
            rows = windows[first : first + batch_size]
            batch, labels = _window_batch(ids, rows)
            targets = labels[:, 1:].to(device)
            kept = targets != -100
            logits = model(**model_inputs(batch, model)).logits[:, :-1][kept]
            losses = F.cross_entropy(logits.float(), targets[kept], reduction="none").split(kept.sum(1).tolist())
            scores += [(loss.sum().item(), len(loss)) for loss in losses]
    nll, scored = sum(loss for loss, _ in scores), sum(tokens for _, tokens in scores)
    words = len(text.split()) + text.count("\n")
    return {
        "token_perplexity": _exp(nll / scored),
        "token_perplexity_interval": list(map(_exp, bootstrap(scores, lambda means: means[:, 0] / means[:, 1]))),
        "word_perplexity": _exp(nll / scored * len(ids) / max(words, 1)),
        "nll": nll,
        "tokens": scored,
        "words": words,
        "stride": stride,
        "max_length": max_length,
    }


def classification(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    bf16: bool = False,
    scores: Scores | None = None,
) -> dict:
    """Measure a classifier.

    Args:
        model: Model that maps inputs to `logits` of shape (batch, classes), or (batch, tokens, classes).
        batches: Inputs with `labels` of shape (batch,), or (batch, tokens), where -100 is ignored.
        bf16: Whether to compute in bfloat16 autocast.
        scores: List that receives the number of right predictions and of all predictions of each row.

    Returns:
        `accuracy` (share) and its 95% Wilson interval, `cross_entropy` (mean, in nats) and `examples` (rows, or tokens
        that count).

    Raises:
        DataError: No batches.
    """
    metric, loss, examples = Accuracy(keep_in_memory=True), 0.0, 0
    with evaluating(model, bf16=bf16) as device:
        for batch in tqdm(batches, desc="Classifying", unit="batch", disable=None, leave=False):
            labels = batch["labels"].to(device)
            logits = model(**model_inputs(batch, model)).logits
            counts = labels != -100
            if scores is not None:
                right = (logits.argmax(-1) == labels) & counts
                rows = [part.reshape(len(part), -1).sum(1).tolist() for part in (right, counts)]
                scores += zip(*rows, strict=True)
            logits, labels = logits[counts].float(), labels[counts]
            metric.add_batch(predictions=logits.argmax(-1), references=labels)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            examples += len(labels)
    if not examples:
        raise DataError("there are no batches to classify: pass at least one.")
    accuracy = metric.compute()["accuracy"]
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(wilson(round(accuracy * examples), examples)),
        "cross_entropy": loss / examples,
        "examples": examples,
    }


def embedding_fidelity(
    model: PreTrainedModel, reference: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, bf16: bool = False
) -> dict[str, float]:
    """Compare embeddings with those of a reference model.

    An embedding is the mean of the last hidden states of the body, without the head: over the tokens that the
    attention mask keeps, over image patches, or over the pixels of a feature map. Learned poolers are left out: many
    checkpoints do not have one, and a random one would decide the result.

    Args:
        model: Model under test.
        reference: Model to compare with, on any device.
        batches: Inputs; `labels` are ignored.
        bf16: Whether to compute in bfloat16 autocast.

    Returns:
        `cosine`, the mean over rows of the cosine between the two embeddings, and its 95% interval by a bootstrap.

    Raises:
        DataError: No batches.
    """
    found, limits = [], Limits.of(model)
    with evaluating(model, bf16=bf16) as device, evaluating(reference, bf16=bf16):
        for batch in tqdm(batches, desc="Embedding", unit="batch", disable=None, leave=False):
            limits.check("the data", batch)
            ours = embedding(model, batch)
            theirs = embedding(reference, batch).to(device)
            found += F.cosine_similarity(ours, theirs, dim=-1).tolist()
    if not found:
        raise DataError("there are no batches to embed: pass at least one.")
    interval = bootstrap([[cosine] for cosine in found], lambda means: means[:, 0])
    return {"cosine": math.fsum(found) / len(found), "cosine_interval": list(interval)}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count parameters; shared ones count once.

    Returns:
        `parameters`, and `non_embedding_parameters`: those outside `nn.Embedding` tables (tokens, positions, token
        types), and so without an output layer that is tied to one.
    """
    total = sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values())
    return {"parameters": total, "non_embedding_parameters": total - embeddings_of(model)}


def embeddings_of(model: nn.Module) -> int:
    """Number of parameters in `nn.Embedding` tables; shared ones count once."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum({id(table): table.numel() for table in tables}.values())


def bytes_in_memory(model: nn.Module) -> int:
    """Size of the parameters of a model, in bytes; shared ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def bytes_on_disk(path: str | Path) -> int:
    """Sum the sizes of the `*.safetensors` files in a folder, in bytes.

    Raises:
        CheckpointError: The folder has no such files.
    """
    files = list(Path(path).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no *.safetensors file in {path}: give the folder that save_pretrained wrote.")
    return sum(file.stat().st_size for file in files)


@contextmanager
def evaluating(model: nn.Module, *, bf16: bool = False) -> Iterator[torch.device]:
    """Put a model in eval and inference mode, yield its device, and restore the mode of every submodule."""
    device = next(model.parameters()).device
    with eval_mode(model), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield device


def _windows(tokens: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, first scored token and end of each window; a window scores only tokens that no earlier one scored."""
    scored = 0
    for start in range(0, tokens, stride):
        end = min(start + max_length, tokens)
        yield start, scored, end
        scored = end
        if end == tokens:
            return


def _window_batch(ids: Tensor, rows: list[tuple[int, int, int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs padded on the right, and labels that are -100 wherever a token is not to be scored."""
    longest = max(end - start for start, _, end in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (start, scored, end) in enumerate(rows):
        input_ids[row, : end - start] = ids[start:end]
        mask[row, : end - start] = 1
        labels[row, scored - start : end - start] = ids[scored:end]
    return {"input_ids": input_ids, "attention_mask": mask}, labels


def _exp(value: float) -> float:
    """Exponential, or infinity on overflow: the perplexity of a broken model is then not an error."""
    return math.exp(value) if value < 709 else math.inf


def embedding(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """Embeddings of a batch, (rows, width): see `embedding_fidelity`."""
    inputs = model_inputs(batch, model)
    states = model.base_model(**inputs).last_hidden_state.float()
    if states.dim() == 4:  # (batch, channels, height, width) of a convolutional network
        return states.mean(dim=(2, 3))
    mask = inputs.get("attention_mask", states.new_ones(states.shape[:2])).unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)
