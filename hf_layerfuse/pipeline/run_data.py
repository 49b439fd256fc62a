"""The data of a run, prepared once, and the measurements that are taken on them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.check import check_rows
from ..data.collate import CollateText
from ..data.labels import class_names
from ..data.prepare import calibration_batches, loader, prepare, text_of
from ..data.splits import load_splits
from ..evaluation import metrics as evaluate
from ..evaluation.latency import latency_side_by_side
from ..evaluation.limits import Limits
from ..evaluation.paired import change_intervals
from ..evaluation.precision import store_as
from ..models.files import stored_dtype
from ..models.modeling import FusedMixin
from ..models.verify import verify
from ..recipe import Recipe
from ..recipe.tasks import TASKS
from ..training.distributed import process_state
from ..training.teacher_cache import with_teacher
from .progress import say
from .results import Latency, Measurement


class RunData:
    """The data of a run, prepared once, and the measurements that are taken on them."""

    def __init__(self, recipe: Recipe, processor: Any, model: PreTrainedModel) -> None:
        say("reading the data")
        self.recipe, self.processor = recipe, processor
        # the result is saved in the data type of the original's file; computation may use another one
        self.dtype = stored_dtype(recipe.model) or model.dtype
        store_as(model, self.dtype)
        classes = class_names(model.config) if TASKS[recipe.task].labels else None
        self.splits = load_splits(recipe.data, recipe.task, recipe.seed, classes=classes)
        self.reported = "test" if "test" in self.splits else "validation"
        self.train = self._prepare("train", training=True)
        limits = Limits.of(model)
        if (pad := getattr(processor, "pad_token_id", None)) is not None:
            limits.check_ids("the tokenizer, for padding,", pad, pad)
        for split, rows in self.splits.items():
            if isinstance(rows, Dataset):  # streamed rows are read later
                check_rows(self.train if split == "train" else self._prepare(split), limits, split)
        self._report_batches: Any = None
        self._scores_before: evaluate.Scores = []

    def _prepare(self, split: str, *, training: bool = False) -> Any:
        return prepare(self.splits[split], self.processor, self.recipe.data, self.recipe.task, training=training)

    def _batches(self, split: str) -> Any:
        size, task = self.recipe.evaluate.batch_size, self.recipe.task
        return loader(self._prepare(split), self.processor, size, shuffle=False, seed=0, task=task)

    def calibration(self) -> list[Any]:
        recipe = self.recipe
        size = recipe.evaluate.batch_size
        return calibration_batches(
            self.train, self.processor, recipe.data, recipe.task, batch_size=size, seed=recipe.seed
        )

    def train_loader(self, teacher: PreTrainedModel, seed: int) -> Any:
        """Batches to train on, in an order that depends on the seed; with the teacher's answers, if they are kept."""
        recipe, rows, top_k = self.recipe, self.train, self.recipe.heal.teacher_top_k
        if top_k is not None:
            top_k = min(top_k, teacher.config.vocab_size if recipe.task == "causal-lm" else teacher.config.num_labels)
            collate = CollateText(self.processor)
            settings = {"temperature": recipe.heal.temperature, "batch_size": recipe.evaluate.batch_size}
            with process_state().main_process_first():
                rows = with_teacher(rows, teacher, collate, top_k=top_k, **settings)
        options = {"seed": seed, "task": recipe.task, "augment": recipe.data.augment, "top_k": top_k}
        return loader(rows, self.processor, recipe.heal.batch_size, shuffle=True, **options)

    def validation_batches(self) -> Any:
        return self._batches("validation")

    def measure(self, model: PreTrainedModel, original: PreTrainedModel, name: str) -> Measurement | None:
        """Measure a model whose weights are rounded already; the result is None except on the main process."""
        state = process_state()
        figures = None
        if state.is_main_process:
            say(f"measuring {name}")
            figures = Measurement(**self.size(model, original), metrics=self.metrics(model, original))
        state.wait_for_everyone()
        return figures

    def size(self, model: PreTrainedModel, original: PreTrainedModel) -> dict[str, int]:
        """Sizes of a model and of its file, which is verified unless it is the original."""
        with tempfile.TemporaryDirectory(prefix="layerfuse-") as directory:
            save_weights(model, self.dtype, Path(directory))
            if model is not original:
                verify(model, Path(directory))
            return {**evaluate.parameter_counts(model), "bytes": evaluate.bytes_on_disk(directory)}

    def time(self, stages: Mapping[str, tuple[Measurement | None, PreTrainedModel]]) -> dict[str, Measurement | None]:
        """Add latencies to the measurements of all stages, from one measurement in which their models take turns.

        Args:
            stages: Measurement and model by the name of the stage, the original first. Stages with the same model have
                the same latency.
        """
        measured = {name: figures for name, (figures, _) in stages.items()}
        state, settings = process_state(), self.recipe.evaluate
        if settings.latency and state.is_main_process:
            say("timing all models in turn")
            models = {str(id(model)): model for _, model in stages.values()}
            timed = latency_side_by_side(
                models, sequence_length=self.recipe.data.max_length, repeats=settings.latency_repeats
            )
            original = next(iter(timed.values()))
            for name, (figures, model) in stages.items():
                measured[name] = figures.with_latency(against(original, timed[str(id(model))]))
        state.wait_for_everyone()
        return measured

    def metrics(self, model: PreTrainedModel, original: PreTrainedModel) -> dict[str, Any]:
        """Metrics of a model, with intervals of their changes from those of the original."""
        scores: evaluate.Scores = []
        metrics = self._scored(model, original, scores)
        if model is original:
            self._scores_before = scores
        elif scores:
            if not self._scores_before:  # a run that resumes measured the original earlier
                self._scored(original, original, self._scores_before)
            metrics |= change_intervals(tuple(metrics), self._scores_before, scores)
        return metrics

    def _scored(self, model: PreTrainedModel, original: PreTrainedModel, scores: evaluate.Scores) -> dict[str, Any]:
        """Metrics of a model. `scores` receives those of each row, except for embeddings."""
        data, settings = self.recipe.data, self.recipe.evaluate
        if self.recipe.task == "causal-lm":
            return evaluate.perplexity(
                model,
                self.processor,
                text_of(self.splits[self.reported], data),
                max_length=data.max_length,
                stride=settings.stride,
                batch_size=settings.batch_size,
                max_windows=data.max_test_samples,
                scores=scores,
            )
        if self.recipe.task == "feature-extraction":
            return evaluate.embedding_fidelity(model, original, self.reported_batches())
        return evaluate.classification(model, self.reported_batches(), scores=scores)

    def reported_batches(self) -> Any:
        """Batches of the split that the results are reported on, in the order of its rows."""
        if self._report_batches is None:
            self._report_batches = self._batches(self.reported)
        return self._report_batches


def against(original: Mapping[int, dict[str, Any]], model: Mapping[int, dict[str, Any]]) -> dict[int, Latency]:
    """Times of a model with its speed-up over the original.

    Args:
        original: Times of the original by batch size, from `latency_side_by_side`.
        model: Times of the model from the same call.
    """
    return {
        batch: Latency(**row, speedup=original[batch]["median_ms"] / row["median_ms"]) for batch, row in model.items()
    }


def save_weights(model: PreTrainedModel, dtype: torch.dtype, path: Path, *, with_code: bool = False) -> None:
    """Save a model in the given data type. A model of a fused class is saved with its code where `with_code` is set."""
    if model.dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(path, **({"with_code": True} if with_code and isinstance(model, FusedMixin) else {}))
