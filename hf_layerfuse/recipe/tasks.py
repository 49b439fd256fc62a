"""What a task is: the head, the columns of its data, and how its inputs are made. One row a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal[
    "causal-lm",
    "masked-lm",
    "text-classification",
    "token-classification",
    "image-classification",
    "feature-extraction",
]


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        auto_class: class of transformers that loads a model with the head for it.
        pipeline: tag of the Hub.
        labels: what `data.label_column` holds: one class a row, one a word, or nothing.
        content: what the model reads.
    """

    auto_class: str
    pipeline: str
    labels: Literal["row", "word", None] = None
    content: Literal["text", "words", "image"] = "text"


TASKS: dict[str, TaskSpec] = {
    "causal-lm": TaskSpec("AutoModelForCausalLM", "text-generation"),
    "masked-lm": TaskSpec("AutoModelForMaskedLM", "fill-mask"),
    "text-classification": TaskSpec("AutoModelForSequenceClassification", "text-classification", "row"),
    "token-classification": TaskSpec("AutoModelForTokenClassification", "token-classification", "word", "words"),
    "image-classification": TaskSpec("AutoModelForImageClassification", "image-classification", "row", "image"),
    "feature-extraction": TaskSpec("AutoModel", "feature-extraction"),
}
"""Every `Task`, by its name."""
