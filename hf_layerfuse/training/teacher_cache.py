"""Cache of the teacher's most likely classes for a training set, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel

from ..data.collate import TEACHER_IDS, TEACHER_LOGPROBS
from ..evaluation.batches import model_inputs
from ..evaluation.divergence import prediction
from ..evaluation.fingerprint import fingerprint
from ..evaluation.modes import eval_mode


def with_teacher(
    rows: Dataset,
    teacher: PreTrainedModel,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
    *,
    top_k: int,
    temperature: float,
    batch_size: int,
) -> Dataset:
    """Add the teacher's `top_k` log-probabilities and their classes to prepared rows.

    The cache of `datasets` holds them: the same teacher runs once for the same rows, also across runs and processes.
    An interrupted computation starts over.

    Args:
        rows: Rows from `prepare`, with inputs that are the same in every epoch.
        teacher: Model with logits.
        collate: Function that turns rows into a batch.
        top_k: Number of classes to keep per token or per row; at most all classes.
        temperature: Divisor of the logits.
        batch_size: Number of rows per batch of the teacher.

    Returns:
        Rows with two more columns of tokens x k, or k, numbers each.
    """
    inputs = [name for name in rows.column_names if name != "labels"]

    def answers(batch: dict[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        made = [{name: batch[name][place] for name in inputs} for place in range(len(batch[inputs[0]]))]
        with torch.inference_mode():
            logits = prediction(teacher(**model_inputs(collate(made), teacher))).float() / temperature
        best = logits.log_softmax(-1).topk(min(top_k, logits.shape[-1]))
        lengths = [len(row["input_ids"]) if best.values.dim() == 3 else None for row in made]
        return {
            TEACHER_IDS: _unpadded(best.indices.to(torch.int32), lengths),
            TEACHER_LOGPROBS: _unpadded(best.values.to(torch.float16), lengths),
        }

    features = {**rows.features, TEACHER_IDS: List(Value("int32")), TEACHER_LOGPROBS: List(Value("float16"))}
    key = [rows._fingerprint, fingerprint(teacher), top_k, temperature, batch_size]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = None
    if not rows.cache_files:  # rows in memory, such as windows of text, have no cache folder
        file = Path(datasets.config.HF_DATASETS_CACHE) / "hf_layerfuse" / f"teacher-{name}.arrow"
        file.parent.mkdir(parents=True, exist_ok=True)
    with eval_mode(teacher):
        found = rows.map(
            answers,
            batched=True,
            batch_size=batch_size,
            features=Features(features),
            new_fingerprint=name,
            cache_file_name=file and str(file),
            load_from_cache_file=True,
            desc="teacher",
        )
    return found.with_format("numpy", columns=[TEACHER_IDS, TEACHER_LOGPROBS], output_all_columns=True)


def _unpadded(values: Tensor, lengths: list[int | None]) -> list[np.ndarray]:
    """Values of each row, without padding."""
    return [row[:length].flatten().cpu().numpy() for row, length in zip(values, lengths, strict=True)]
