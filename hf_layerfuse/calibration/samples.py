"""Unlabelled batches, and which of them judge."""

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

JUDGES = 8
"""One calibration sequence in so many judges."""

CHOOSERS = 5
"""Of those that do not, one in so many chooses the strength of a penalty."""


ROWS = 16
"""Rows of a data set that make one batch."""


def read(batches: Batches | Dataset, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Calibration data as a list of batches.

    The rows of a data set become batches of 16 with the columns that the model takes; token sequences of different
    length are padded on the right, with a mask.

    Raises:
        DataError: the data set has no column that is the main input of the model.
    """
    if not isinstance(batches, Dataset):
        return list(batches)
    main = model.main_input_name
    if main not in batches.column_names:
        raise DataError(
            f"the calibration data set has the columns {', '.join(batches.column_names)} and not {main!r}: tokenise "
            "it (or process its images) first."
        )
    takes = inspect.signature(model.forward).parameters
    rows = batches.select_columns([name for name in batches.column_names if name in takes and name != "labels"])
    pad = max(getattr(model.config, "pad_token_id", None) or 0, 0)
    return [_collate(part, pad) for part in rows.with_format("torch").iter(ROWS)]


def _collate(columns: Mapping[str, Any], pad: int) -> dict[str, Tensor]:
    """One tensor per column, ragged ones filled with zeros, or the padding token, and a mask where there was none."""
    found = {name: _filled(values, 0) for name, values in columns.items()}
    if isinstance(columns.get("input_ids"), list):
        ids = _filled(columns["input_ids"], -1)
        found["input_ids"] = ids.masked_fill(ids < 0, pad)  # where heads look for the end of a sequence
        found.setdefault("attention_mask", (ids >= 0).long())
    return found


def _filled(rows: Tensor | Sequence[Any], value: int) -> Tensor:
    """Tensors of different sizes, in lists that may hold lists, as one tensor."""
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
    """Calibration sequences, some of which judge what the others have led to.

    Attributes:
        batches: dicts of model inputs, tensors only, without labels.
        judges: (batch,) per batch, True for a sequence that nothing is fitted to.
        choosers: (batch,) per batch, True for a sequence that chooses the strength of the penalty of a fit, and is
            fitted afterwards. None are where fewer than five sequences are fitted: the end of each takes their place.
    """

    batches: Sequence[Mapping[str, Tensor]]
    judges: Sequence[Tensor]
    choosers: Sequence[Tensor]

    @classmethod
    def of(cls, batches: Batches, share: float = 1.0) -> Sample:
        """Every eighth sequence judges; with fewer, the last one; a single one is fitted and judges.

        Who does what depends on the order of the sequences, and not on the batches that they come in.

        Args:
            batches: calibration batches.
            share: of the sequences to use, evenly spread.

        Raises:
            DataError: there are no sequences, or a batch is no dict of tensors.
        """
        every = [batch for batch in map(_tensors, batches) if len(next(iter(batch.values())))]
        if not every:
            raise DataError("the calibration batches hold no sequences: give `batches` with at least one of inputs.")
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
        judges = numbers % JUDGES == JUDGES - 1 if total >= JUDGES else numbers == max(total - 1, 1)
        order = (~judges).cumsum(0)
        choosers = ~judges & (order % CHOOSERS == 0)
        return cls(every, judges.split(sizes), choosers.split(sizes))

    @property
    def judged(self) -> list[Tensor]:
        """(batch,) per batch: the judges, or all where there is a single sequence."""
        alone = not any(mask.any() for mask in self.judges)
        return [torch.ones_like(mask) if alone else mask for mask in self.judges]

    @property
    def fitting(self) -> list[dict[str, Tensor]]:
        """The batches of all others, on which models are fitted."""
        return [take(batch, ~mask) for batch, mask in zip(self.batches, self.judges, strict=True) if not mask.all()]

    @property
    def judging(self) -> list[dict[str, Tensor]]:
        """The batches of the judges alone."""
        return [take(batch, mask) for batch, mask in zip(self.batches, self.judged, strict=True) if mask.any()]


def _tensors(batch: Any) -> dict[str, Tensor]:
    """The inputs of a batch, without labels and what belongs to no sequence."""
    inputs = without_labels(batch) if isinstance(batch, Mapping) else {}
    found = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    if not found:
        raise DataError(
            f"a calibration batch is a {type(batch).__name__} without tensors: give dicts of model inputs, as "
            "`tokenizer(texts, padding=True, return_tensors='pt')` makes them, or a tokenised `datasets.Dataset`."
        )
    return found
