"""Calibration batches without labels, and their splits: fitted, selection and held-out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DataError
from ..evaluation.batches import Batches, take, without_labels
from ..evaluation.limits import Limits

HELD_OUT_EVERY = 8
"""Number of calibration sequences per held-out one."""

SELECTION_EVERY = 5
"""Number of fitted sequences per sequence of the selection split, which sets the strength of a penalty."""

ROWS = 16
"""Rows of a data set in one batch."""


def read(batches: Batches | Dataset, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Read calibration data as a list of batches.

    The rows of a data set become batches of 16, with the columns that the model takes. Token sequences of different
    lengths are padded on the right, with a mask.

    Args:
        batches: Calibration batches, or a data set with a column for each model input.
        model: Model that reads the batches.

    Raises:
        DataError: The data set has no column for the main input of the model, a batch holds no tensors, or the model
            does not accept a batch: a token id or a length beyond its tables, an empty row, or an image of another
            shape.
    """
    batches = _rows(batches, model) if isinstance(batches, Dataset) else list(batches)
    for batch in batches:
        _tensors(batch)
    Limits.of(model).check_all("the calibration data", batches)
    return batches


def _rows(batches: Dataset, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Batches of the rows of a data set."""
    main = model.main_input_name
    if main not in batches.column_names:
        raise DataError(
            f"the calibration data set has the columns {', '.join(batches.column_names)} but not {main!r}: tokenise "
            "its texts, or process its images, first."
        )
    takes = inspect.signature(model.forward).parameters
    rows = batches.select_columns([name for name in batches.column_names if name in takes and name != "labels"])
    pad = max(getattr(model.config, "pad_token_id", None) or 0, 0)
    return [_collate(part, pad) for part in rows.with_format("torch").iter(ROWS)]


def _collate(columns: Mapping[str, Any], pad: int) -> dict[str, Tensor]:
    """One tensor per column. Ragged columns are filled with zeros or the padding token, and get a mask if needed."""
    found = {name: _filled(values, 0) for name, values in columns.items()}
    if isinstance(columns.get("input_ids"), list):
        ids = _filled(columns["input_ids"], -1)
        found["input_ids"] = ids.masked_fill(ids < 0, pad)  # some heads look for padding to find the last token
        found.setdefault("attention_mask", (ids >= 0).long())
    return found


def _filled(rows: Tensor | Sequence[Any], value: int) -> Tensor:
    """Combine tensors of different sizes, in possibly nested lists, into one tensor."""
    if isinstance(rows, Tensor):
        return rows
    rows = [_filled(row, value) for row in rows]
    sizes = [max(of) for of in zip(*(row.shape for row in rows), strict=True)]
    found = rows[0].new_full((len(rows), *sizes), value)
    for place, row in zip(found, rows, strict=True):
        place[tuple(map(slice, row.shape))] = row
    return found


@dataclass(frozen=True)
class Sample:
    """Calibration sequences, some of them held out to evaluate a fit.

    Attributes:
        batches: Dicts of model inputs, tensors only, without labels.
        held_out: Masks of the held-out split, (batch,) per batch. Fits never use its sequences.
        selection: Masks of the selection split, (batch,) per batch. The split sets the strength of the penalty of a
            fit, and is then fitted too. It is empty if fewer than five sequences are fitted; the end of each sequence
            then replaces it.
    """

    batches: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Tensor]
    selection: Sequence[Tensor]

    @classmethod
    def of(cls, batches: Batches, share: float = 1.0) -> Sample:
        """Hold out every eighth sequence, or the last of fewer than eight. A single sequence is fitted and evaluated.

        The splits depend on the order of the sequences, not on their division into batches.

        Args:
            batches: Calibration batches, dicts of model inputs.
            share: Share of the sequences to use, evenly spread.

        Raises:
            DataError: No sequences, or a batch that is not a dict of tensors.
        """
        every = [batch for batch in map(_tensors, batches) if len(next(iter(batch.values())))]
        if not every:
            raise DataError("the calibration batches hold no sequences: give `batches` with at least one sequence.")
        if share < 1:
            sizes = [len(next(iter(batch.values()))) for batch in every]
            total = sum(sizes)
            count = max(1, math.ceil(share * total))
            chosen = torch.zeros(total, dtype=torch.bool)
            chosen[torch.arange(count) * total // count] = True
            chosen = chosen.split(sizes)
            every = [take(batch, mask) for batch, mask in zip(every, chosen, strict=True) if mask.any()]
        sizes = [len(next(iter(batch.values()))) for batch in every]
        total = sum(sizes)
        numbers = torch.arange(total)
        held_out = (
            numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 if total >= HELD_OUT_EVERY else numbers == max(total - 1, 1)
        )
        order = (~held_out).cumsum(0)
        selection = ~held_out & (order % SELECTION_EVERY == 0)
        return cls(every, held_out.split(sizes), selection.split(sizes))

    @property
    def evaluated(self) -> list[Tensor]:
        """Masks of the sequences for evaluation, (batch,) per batch: the held-out split, or a single sequence."""
        alone = not any(mask.any() for mask in self.held_out)
        return [torch.ones_like(mask) if alone else mask for mask in self.held_out]

    @property
    def fitted_batches(self) -> list[dict[str, Tensor]]:
        """The batches without the held-out split, for fitting."""
        return [take(batch, ~mask) for batch, mask in zip(self.batches, self.held_out, strict=True) if not mask.all()]

    @property
    def held_out_batches(self) -> list[dict[str, Tensor]]:
        """The batches with only the sequences for evaluation."""
        return [take(batch, mask) for batch, mask in zip(self.batches, self.evaluated, strict=True) if mask.any()]


def _tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch that have at least one axis, without labels."""
    inputs = without_labels(batch) if isinstance(batch, Mapping) else {}
    found = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    if not found:
        raise DataError(
            f"a calibration batch is a {type(batch).__name__} without tensors: give dicts of model inputs, such as "
            "`tokenizer(texts, padding=True, return_tensors='pt')` returns, or a tokenised `datasets.Dataset`."
        )
    return found
