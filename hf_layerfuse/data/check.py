"""Prepared rows compared with the limits of the model that reads them."""

from __future__ import annotations

import pyarrow.compute as pc
from datasets import Dataset

from ..errors import DataError
from ..evaluation.limits import Limits


def check_rows(rows: Dataset, limits: Limits, split: str) -> None:
    """Raise `DataError` if a row has no tokens, or tokens that the model cannot read.

    Args:
        rows: Rows that `prepare` returned. Rows without `input_ids`, such as images, are not read.
        limits: Limits of the model.
        split: Name of the split, for the message.
    """
    if "input_ids" not in rows.column_names or len(rows) == 0:
        return
    ids = rows.select_columns("input_ids").with_format("arrow")[:].column("input_ids")
    lengths = pc.list_value_length(ids)
    if pc.min(lengths).as_py() == 0:
        empty = pc.indices_nonzero(pc.equal(lengths, 0))
        raise DataError(
            f"{len(empty)} of {len(rows)} rows of {split} have no tokens, the first is row {empty[0].as_py()}: remove "
            "rows with empty texts."
        )
    limits.check_length(split, pc.max(lengths).as_py())
    extremes = pc.min_max(pc.list_flatten(ids))
    limits.check_ids(split, extremes["min"].as_py(), extremes["max"].as_py())
