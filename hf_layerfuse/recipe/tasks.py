"""Table of tasks: model head, Hub tag, labels and inputs."""

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
        auto_class: Class of transformers that loads a model with the head for this task.
        pipeline: Pipeline tag on the Hub.
        labels: Content of `data.label_column`: one class per row, one per word, or None.
        content: Kind of input that the model reads.
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
"""All tasks by name."""
