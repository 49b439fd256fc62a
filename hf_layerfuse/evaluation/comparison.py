"""A model against its original: quality with intervals, sizes, and latency measured in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import DataError
from .batches import Batches, model_inputs
from .divergence import prediction
from .dummy_inputs import predicts_next_token
from .intervals import bootstrap
from .latency import latency_side_by_side
from .limits import Limits
from .metrics import bytes_in_memory, embedding, evaluating, parameter_counts
from .precision import batch_for, in_float32
from .timing import device_name


class Metric(NamedTuple):
    """One way to score rows.

    Attributes:
        name: Name of the metric.
        lower_is_better: Whether a smaller value is the better one.
        score: Function of a model, a reference and a batch that returns a sum and its divisor per row, (rows, 2).
        of_mean: Function of the mean score that returns the value of the metric.
    """

    name: str
    lower_is_better: bool
    score: Callable[[PreTrainedModel, PreTrainedModel | None, Mapping[str, Any]], Tensor]
    of_mean: Callable[[np.ndarray], np.ndarray] = lambda mean: mean


def evaluate(
    model: PreTrainedModel, batches: Batches, reference: PreTrainedModel | None = None
) -> dict[str, float | int | str | list[float]]:
    """Measure the quality of a model.

    Causal language models are scored by token perplexity, models with `labels` of classes in the batches by accuracy,
    and all others by the cosine between their embeddings and those of a reference. On a CPU, models in half precision
    compute in float32.

    Args:
        model: Model under test.
        batches: Test data, as an iterable of dicts of model inputs that was used for nothing else.
        reference: Original, for models without labels.

    Returns:
        `metric`, its name; `value`; `interval`, the 95% interval by a bootstrap over rows; and `rows`.

    Raises:
        DataError: There are no rows, the model does not accept a batch, or there are neither labels nor a reference.
    """
    model, batches = in_float32(model), list(batches)
    reference = None if reference is None else in_float32(reference)
    metric = _metric_of(model, batches, reference)
    scores = _scores(metric, model, reference, batches)
    return {
        "metric": metric.name,
        "value": float(_value(metric, scores.mean(0)[None])[0]),
        "interval": list(bootstrap(scores, lambda means: _value(metric, means))),
        "rows": len(scores),
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of a model with its original.

    `print(comparison)` shows a table.

    Attributes:
        metric: Name of the metric.
        quality: Value of the original and of the model.
        difference: Value of the model less that of the original.
        interval: 95% interval of the difference, by a bootstrap over the same rows of both.
        verdict: `better`, `worse`, or `no difference` where the interval contains 0.
        rows: Number of rows of test data.
        parameters: Number of unique parameters of the original and of the model.
        bytes: Size of the weights in memory.
        latency_ms: Median latency by batch size, measured in turn.
        speedup: Latency of the original divided by that of the model, by batch size.
        device: Device of both models.
    """

    metric: str
    quality: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    verdict: str
    rows: int
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    latency_ms: Mapping[int, tuple[float, float]]
    speedup: Mapping[int, float]
    device: str

    def table(self) -> list[list[str]]:
        """The comparison as rows of text, header first."""
        low, high = self.interval
        return [
            *size_rows(self.parameters, self.bytes),
            *(
                [f"latency, batch {batch} (ms)", *(f"{ms:.2f}" for ms in pair), f"{self.speedup[batch]:.2f}x speed"]
                for batch, pair in self.latency_ms.items()
            ),
            [
                self.metric,
                *(f"{value:.4g}" for value in self.quality),
                f"{self.difference:+.4g} ({low:+.4g} to {high:+.4g}): {self.verdict}",
            ],
        ]

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[place]) for row in rows) for place in range(3)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]).rstrip()
            for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        tree = asdict(self)
        for name in ("latency_ms", "speedup"):
            tree[name] = {str(batch): value for batch, value in tree[name].items()}
        return tree


def compare(
    original: PreTrainedModel,
    fused: PreTrainedModel,
    batches: Batches,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    sequence_length: int | None = None,
    repeats: int = 10,
) -> Comparison:
    """Compare a model with its original on test data, by quality, size and latency.

    The metric is that of `evaluate`. Both models are scored on the same rows, and take turns while they are timed. On a
    CPU, models in half precision compute in float32, which is faster there; their size is that of their own type.

    Args:
        original: Model before fusing.
        fused: Model after fusing, on the same device.
        batches: Test data that was used for nothing else.
        batch_sizes: Batch sizes of the latency; empty to time nothing.
        sequence_length: Tokens per row of the latency; 128 when None.
        repeats: Number of timed passes of each model and batch size.

    Raises:
        DataError: There are no rows, or a model does not accept a batch.
    """
    sizes = [(parameter_counts(model)["parameters"], bytes_in_memory(model)) for model in (original, fused)]
    original, fused, batches = in_float32(original), in_float32(fused), list(batches)
    metric = _metric_of(original, batches, original)
    pairs = np.concatenate([_scores(metric, model, original, batches) for model in (original, fused)], axis=1)

    def difference(means: np.ndarray) -> np.ndarray:
        return _value(metric, means[:, 2:]) - _value(metric, means[:, :2])

    means = pairs.mean(0)[None]
    low, high = bootstrap(pairs, difference)
    verdict = "no difference"
    if low > 0 or high < 0:
        verdict = "worse" if (low > 0) == metric.lower_is_better else "better"
    models = {"original": original, "fused": fused}
    timed: dict[str, Any] = {name: {} for name in models}
    if batch_sizes:
        timed = latency_side_by_side(models, batch_sizes, sequence_length=sequence_length, repeats=repeats)
    times = {batch: tuple(timed[name][batch]["median_ms"] for name in models) for batch in batch_sizes}
    return Comparison(
        metric=metric.name,
        quality=(float(_value(metric, means[:, :2])[0]), float(_value(metric, means[:, 2:])[0])),
        difference=float(difference(means)[0]),
        interval=(low, high),
        verdict=verdict,
        rows=len(pairs),
        parameters=(sizes[0][0], sizes[1][0]),
        bytes=(sizes[0][1], sizes[1][1]),
        latency_ms=times,
        speedup={batch: before / after for batch, (before, after) in times.items()},
        device=device_name(fused.device),
    )


def size_rows(parameters: tuple[int, int], bytes_: tuple[int, int]) -> list[list[str]]:
    """Sizes of an original and of a model as rows of text, header first."""
    return [
        ["", "original", "model", "change"],
        *(
            [name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"]
            for name, (before, after) in {"parameters": parameters, "bytes in memory": bytes_}.items()
        ),
    ]


def _value(metric: Metric, means: np.ndarray) -> np.ndarray:
    """Values of a metric from means of sums and divisors, (resamples, 2)."""
    return metric.of_mean(means[:, 0] / means[:, 1])


def _metric_of(model: PreTrainedModel, batches: Sequence[Any], reference: PreTrainedModel | None) -> Metric:
    if not batches:
        raise DataError("there are no batches to evaluate: pass at least one.")
    labels = batches[0].get("labels")
    if predicts_next_token(model):
        return PERPLEXITY
    if isinstance(labels, Tensor) and not labels.is_floating_point() and getattr(model.config, "num_labels", 0) > 1:
        return ACCURACY
    if reference is None:
        raise DataError(
            f"{type(model).__name__} is neither a causal language model, nor are there class labels in the batches: "
            "pass batches with labels, or the original as reference=."
        )
    return COSINE


def _scores(
    metric: Metric, model: PreTrainedModel, reference: PreTrainedModel | None, batches: Iterable[Mapping[str, Any]]
) -> np.ndarray:
    """Sum and divisor of each row, (rows, 2). Rows without anything to score are left out."""
    limits, found = Limits.of(model), []
    with evaluating(model), evaluating(reference if reference is not None else model):
        for batch in (batch_for(model, batch) for batch in batches):
            limits.check("the test data", batch)
            found.append(metric.score(model, reference, batch).double().cpu())
    scores = torch.cat(found) if found else torch.zeros(0, 2)
    scores = scores[scores[:, 1] > 0]
    if not len(scores):
        raise DataError("the test data hold nothing to score: pass rows with tokens, and labels other than -100.")
    return scores.numpy()


def _perplexity(model: PreTrainedModel, reference: PreTrainedModel | None, batch: Mapping[str, Any]) -> Tensor:
    inputs = model_inputs(batch, model)
    ids = inputs["input_ids"]
    counted = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    counted = counted[:, 1:] & counted[:, :-1]
    logits = model(**inputs).logits[:, :-1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.stack([(losses * counted).sum(1), counted.sum(1)], dim=1)


def _accuracy(model: PreTrainedModel, reference: PreTrainedModel | None, batch: Mapping[str, Any]) -> Tensor:
    labels = batch["labels"].to(model.device).flatten(1) if batch["labels"].ndim > 1 else batch["labels"][:, None]
    labels = labels.to(model.device)
    guesses = prediction(model(**model_inputs(batch, model))).argmax(-1).reshape(labels.shape)
    counted = labels != -100
    return torch.stack([((guesses == labels) & counted).sum(1), counted.sum(1)], dim=1)


def _cosine(model: PreTrainedModel, reference: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    theirs = embedding(reference, batch).to(model.device)
    cosines = F.cosine_similarity(embedding(model, batch), theirs, dim=-1)
    return torch.stack([cosines, torch.ones_like(cosines)], dim=1)


PERPLEXITY = Metric("token perplexity", True, _perplexity, lambda mean: np.exp(np.minimum(mean, math.log(1e300))))
ACCURACY = Metric("accuracy", False, _accuracy)
COSINE = Metric("cosine to the original", False, _cosine)
