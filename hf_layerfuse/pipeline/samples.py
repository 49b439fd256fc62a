"""Sample outputs of the original and of the result: what the figures mean on a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..evaluation.batches import model_inputs
from ..evaluation.limits import Limits
from ..evaluation.metrics import embedding, evaluating
from ..recipe.tasks import TASKS
from ..training.distributed import process_state

if TYPE_CHECKING:
    from .run_data import RunData

_PROMPTS = 3
_PROMPT_TOKENS = 16
_NEW_TOKENS = 40
_LINES = 200  # that are searched for prompts
_ROWS = 256
_SHOWN = 6
_CHARACTERS = 300


@dataclass(frozen=True)
class Continuation:
    """Continuation of a prompt by both models.

    Attributes:
        prompt: Beginning of a text.
        original: Continuation by the original, greedy.
        result: Continuation by the result, greedy.
    """

    prompt: str
    original: str
    result: str


@dataclass(frozen=True)
class Prediction:
    """Row for which the result predicts another class than the original.

    Attributes:
        row: Number of the row, counted from 0.
        label: Class in the data.
        original: Class that the original predicts.
        result: Class that the result predicts.
        text: Text as the model reads it; None for images.
        word: Token that was classified; None where the whole row was.
    """

    row: int
    label: str
    original: str
    result: str
    text: str | None = None
    word: str | None = None


@dataclass(frozen=True)
class Distance:
    """Row whose embedding changed much.

    Attributes:
        row: Number of the row, counted from 0.
        cosine: Cosine between the embeddings by the original and by the result.
        text: Text as the model reads it.
    """

    row: int
    cosine: float
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Outputs of both models on the first rows of the split that the results are reported on.

    Attributes:
        rows: Number of rows that were compared, or of prompts.
        outputs: Number of predictions that were compared: one per row, or one per labelled token.
        improved: Number of predictions that became right.
        worsened: Number of predictions that became wrong.
        moved: Number of predictions that changed from one wrong class to another.
        continuations: Continuations of prompts, for causal language models.
        predictions: First predictions that changed, for models with classes.
        distances: Rows with the least cosine, for embeddings.
    """

    rows: int
    outputs: int = 0
    improved: int = 0
    worsened: int = 0
    moved: int = 0
    continuations: tuple[Continuation, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    distances: tuple[Distance, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The samples as JSON types. Empty fields are omitted."""
        return {name: value for name, value in asdict(self).items() if value not in ((), [], 0)} | {"rows": self.rows}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Samples:
        """Read samples from JSON types."""
        lists = {"continuations": Continuation, "predictions": Prediction, "distances": Distance}
        rows = {name: tuple(kind(**row) for row in tree.get(name, ())) for name, kind in lists.items()}
        return cls(**{**tree, **rows})


def sample_outputs(inputs: RunData, original: PreTrainedModel, result: PreTrainedModel) -> Samples | None:
    """Compare the outputs of two models on a few rows.

    Args:
        inputs: Data of the run.
        original: Model before fusing.
        result: Model that the run writes.

    Returns:
        The samples; None except on the main process, or where there is no text to start from.
    """
    if not process_state().is_main_process:
        return None
    if inputs.recipe.task == "causal-lm":
        return _continued(inputs, original, result)
    if inputs.recipe.task == "feature-extraction":
        return _embedded(inputs, original, result)
    return _classified(inputs, original, result)


def _continued(inputs: RunData, original: PreTrainedModel, result: PreTrainedModel) -> Samples | None:
    tokenizer = inputs.processor
    lines = inputs.splits[inputs.reported][inputs.recipe.data.text_column][:_LINES]
    every = [ids for ids in tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if ids]
    if not every:
        return None
    long = [ids for ids in every if len(ids) >= 2 * _PROMPT_TOKENS]
    chosen = (long or sorted(every, key=len, reverse=True))[:_PROMPTS]
    positions = Limits.of(original).positions or _PROMPT_TOKENS + _NEW_TOKENS
    length = min(_PROMPT_TOKENS, (min(map(len, chosen)) + 1) // 2, positions)
    prompts = torch.tensor([ids[:length] for ids in chosen])
    count = min(_NEW_TOKENS, positions - length)
    texts = [
        [tokenizer.decode(_until(row, tokenizer.eos_token_id)) for row in _greedy(model, prompts, count)]
        for model in (original, result)
    ]
    starts = [tokenizer.decode(ids) for ids in prompts.tolist()]
    return Samples(rows=len(chosen), continuations=tuple(map(Continuation, starts, *texts)))


def _greedy(model: PreTrainedModel, prompts: Tensor, count: int) -> list[list[int]]:
    """Return the most probable tokens after prompts of one length, whatever the generation config says."""
    with evaluating(model) as device:
        ids = prompts.to(device)
        for _ in range(count):
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            following = model(**model_inputs(batch, model)).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    return ids[:, prompts.shape[1] :].tolist()


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _batches(inputs: RunData) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield batches with the numbers of their first rows, for about `_ROWS` rows."""
    start = 0
    for batch in islice(inputs.reported_batches(), _ROWS):
        yield start, batch
        start += len(next(iter(batch.values())))
        if start >= _ROWS:
            return


def _texts(inputs: RunData) -> Callable[[Mapping[str, Any], int], str | None]:
    """Return a function of a batch and a place in it that returns the text as the model reads it."""
    if TASKS[inputs.recipe.task].content == "image":
        return lambda batch, place: None
    masked = inputs.recipe.task == "masked-lm"  # a text without its masks would say nothing

    def text(batch: Mapping[str, Any], place: int) -> str:
        ids = batch["input_ids"][place][batch["attention_mask"][place].bool()]
        words = inputs.processor.decode(ids, skip_special_tokens=not masked)
        return words if len(words) <= _CHARACTERS else f"{words[:_CHARACTERS]}…"

    return text


def _classified(inputs: RunData, original: PreTrainedModel, result: PreTrainedModel) -> Samples:
    text, found = _texts(inputs), []
    rows = outputs = improved = worsened = moved = 0
    with evaluating(original), evaluating(result):
        for start, batch in _batches(inputs):
            labels = batch["labels"]
            before, after = (
                model(**model_inputs(batch, model)).logits.argmax(-1).cpu() for model in (original, result)
            )
            counted = labels != -100
            differs = counted & (before != after)
            rows, outputs = start + len(labels), outputs + int(counted.sum())
            improved += int((differs & (after == labels)).sum())
            worsened += int((differs & (before == labels)).sum())
            moved += int((differs & (before != labels) & (after != labels)).sum())
            for place in map(tuple, differs.nonzero().tolist()[: _SHOWN - len(found)]):
                word = inputs.processor.decode([int(batch["input_ids"][place])]) if len(place) > 1 else None
                classes = [_class(inputs, original, int(ids[place])) for ids in (labels, before, after)]
                found.append(Prediction(start + place[0], *classes, text(batch, place[0]), word))
    counts = {"improved": improved, "worsened": worsened, "moved": moved}
    return Samples(rows=rows, outputs=outputs, **counts, predictions=tuple(found))


def _class(inputs: RunData, model: PreTrainedModel, index: int) -> str:
    """Name of a class; for masked words, classes are tokens."""
    if inputs.recipe.task == "masked-lm":
        return inputs.processor.decode([index])
    return str(model.config.id2label.get(index, index))


def _embedded(inputs: RunData, original: PreTrainedModel, result: PreTrainedModel) -> Samples:
    text, found, rows = _texts(inputs), [], 0
    with evaluating(original), evaluating(result):
        for start, batch in _batches(inputs):
            before, after = (embedding(model, batch).float().cpu() for model in (original, result))
            cosines = F.cosine_similarity(before, after, dim=-1).tolist()
            found += [Distance(start + place, cosine, text(batch, place)) for place, cosine in enumerate(cosines)]
            found = sorted(found, key=lambda row: row.cosine)[:_SHOWN]
            rows = start + len(cosines)
    return Samples(rows=rows, distances=tuple(found))
