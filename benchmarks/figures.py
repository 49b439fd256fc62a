"""How the tables of all benchmarks name models, and write figures with their intervals."""

import math
from collections.abc import Mapping
from typing import Any

from hf_layerfuse.evaluation.intervals import wilson

MODELS = {
    "minilm-sst2": "MiniLM, 6 x 384",
    "minilm": "MiniLM, 6 x 384",
    "gpt2": "GPT-2, 12 x 256",
    "gemma3-270m": "Gemma 3, 18 x 640",
    "smollm2-135m": "SmolLM2, 30 x 576",
    "resnet56": "ResNet-56, 27 x 16-64",
    "resnet34": "ResNet-34, 16 x 32-256",
    "mobilenet-v2": "MobileNetV2, half width",
    "vit-cifar10": "ViT, 6 x 128",
}
"""Architecture, layers and width of each checkpoint; a test compares them with the checkpoints."""

DATA = {
    "minilm-sst2": "SST-2",
    "minilm": "WikiText-2",
    "gpt2": "WikiText-2",
    "gemma3-270m": "WikiText-2",
    "smollm2-135m": "WikiText-2",
    **dict.fromkeys(("resnet56", "resnet34", "mobilenet-v2", "vit-cifar10"), "CIFAR-10"),
}

HEADLINE = {
    "minilm": "cosine",
    "gpt2": "token_perplexity",
    "gemma3-270m": "token_perplexity",
    "smollm2-135m": "token_perplexity",
}
"""Metric that the tables of a checkpoint show; accuracy for all others."""

FORMS = {"accuracy": "{:.2%}", "cosine": "{:.3f}", "cross_entropy": "{:.3f}", "token_perplexity": "{:,.1f}"}

FOUND_NOTHING = "healing found nothing better"
"""Note on a model whose training never lowered the validation loss, so that it kept its weights."""


def headline(name: str) -> str:
    """The metric that the tables of a checkpoint show."""
    return HEADLINE.get(name, "accuracy")


def label_of(name: str) -> str:
    """A checkpoint by its shape and its data, such as `GPT-2, 12 x 256, WikiText-2`."""
    return f"{MODELS[name]}, {DATA[name]}"


def title(name: str, parameters: int) -> str:
    """A checkpoint by its size, such as `GPT-2, 12 x 256, 11.7M`, and its data."""
    return f"{MODELS[name]}, {size(parameters)}, {DATA[name]}"


def size(parameters: int) -> str:
    """A number of parameters in millions."""
    return f"{parameters / 1e6:.3g}M"


def half_width(row: Mapping[str, Any], metric: str) -> float | None:
    """Half of the 95% interval of a figure: Wilson's for an accuracy, else the measured one; None if unknown."""
    if metric == "accuracy":
        low, high = wilson(round(row[metric] * row["examples"]), row["examples"])
    elif f"{metric}_interval" in row:
        low, high = row[f"{metric}_interval"]
    else:
        return None
    return (high - low) / 2


def figure(row: Mapping[str, Any], metric: str) -> str:
    """A figure with half of its interval, such as `89.56% ± 2.0`, or alone if the interval is unknown."""
    value, half = FORMS[metric].format(row[metric]), half_width(row, metric)
    if half is None:
        return value
    return f"{value} ± {100 * half:.1f}" if metric == "accuracy" else f"{value} ± {FORMS[metric].format(half)}"


def difference(row: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> str:
    """Difference of a model from another: in points of accuracy with its interval, or in percent of the perplexity.

    The interval is that of two independent samples. On the same examples it is narrower if both models are mostly right
    on the same ones.
    """
    if metric != "accuracy":
        return f"{row[metric] / other[metric] - 1:+.1%}"
    half = math.hypot(half_width(row, metric), half_width(other, metric))
    return f"{100 * (row[metric] - other[metric]):+.2f} ± {100 * half:.1f} points"


def retrained(row: Mapping[str, Any], metric: str, best_step: int | None) -> str:
    """The figure of a model after retraining, marked if the weights from before it were kept."""
    return figure(row, metric) + (f"; {FOUND_NOTHING}" if best_step == 0 else "")
