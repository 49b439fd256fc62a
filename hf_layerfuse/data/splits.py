"""From a data recipe to rows: load the splits, check their columns, name their classes."""

import contextlib
import csv
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset

from ..errors import DataError
from ..recipe import DataRecipe
from ..recipe.pointer import is_pointer
from ..recipe.tasks import TASKS, Task
from .labels import encode_labels, encode_row, encode_word_labels

Rows = Dataset | IterableDataset

# Quotes and words such as "null" are text, not syntax: by default, the csv builder reads them as missing values.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_COMPRESSIONS = (".xz", ".gz")
_STRINGS = ("string", "large_string")


def load_splits(data: DataRecipe, task: Task, seed: int, *, classes: Sequence[str] | None = None) -> dict[str, Rows]:
    """Load the splits `train`, `validation` and `test` that the recipe has, and check their columns.

    Without `data.validation`, the last `data.held_out` rows of `train` become the held-out split. Rows grouped by
    class, as in image folders and IMDB, are first shuffled with `seed`, because their head and tail hold a single
    class. Class ids are those of the model, see `encode_labels`. With `data.streaming`, `train` is read when it is
    used, and its classes are those of `validation`.

    Args:
        data: Source of the rows.
        task: Task, which decides the columns.
        seed: Seed of the shuffle.
        classes: Class names of the model in the order of their ids, from `class_names`; None accepts any classes.

    Raises:
        DataError: A file, a column or a text is missing, a split is empty or too small, or a class is unknown.
    """
    splits = DatasetDict()
    for split in ("train", "validation", "test"):
        source = getattr(data, split)
        if source is not None:
            load = _load_hub if data.name else _load_local
            splits[split] = load(data, source, split, streaming=data.streaming and split == "train")
            _check_columns(splits[split], split, data, task)
    streamed = splits.pop("train") if data.streaming else None
    given = splits["validation"].features if data.streaming else {}
    if TASKS[task].labels == "word":
        encode_word_labels(splits, data.label_column, classes)
    if TASKS[task].labels == "row":
        encode_labels(splits, data.label_column, classes)
        for split, rows in splits.items():
            labels = np.asarray(rows[data.label_column][:])
            if np.count_nonzero(np.diff(labels)) < len(np.unique(labels)):
                splits[split] = rows.shuffle(seed=seed)
    if streamed is not None:
        if TASKS[task].labels:
            column = data.label_column
            features = {"before": given[column], "after": splits["validation"].features[column]}
            known = {"column": column, "classes": len(classes or ()), **features}
            streamed = streamed.map(encode_row, fn_kwargs=known)
        splits["train"] = streamed
    elif "validation" not in splits:
        rows = splits["train"]
        kept = len(rows) - data.held_out
        if kept < 1:
            raise DataError(
                f"data.train={data.train!r} has {len(rows)} rows, too few to hold out data.held_out={data.held_out} of "
                "them for validation: lower data.held_out, or name a split or file as data.validation."
            )
        splits["train"], splits["validation"] = rows.select(range(kept)), rows.select(range(kept, len(rows)))
    return splits


def _load_hub(data: DataRecipe, source: str, split: str, *, streaming: bool) -> Rows:
    what = f"{source!r} of {data.name!r}, config {data.config!r},"
    return _load(what, data.name, name=data.config, split=source, streaming=streaming)


def _load_local(data: DataRecipe, source: str, split: str, *, streaming: bool) -> Rows:
    path = Path(source).expanduser()
    files = glob.escape(str(path.resolve()))
    if path.is_dir():
        images = {"data_files": f"{files}/*/*", "drop_labels": False, "streaming": streaming}
        return _load(f"image folder {source!r}", "imagefolder", **images)
    if not path.is_file():
        raise DataError(
            f"data.{split}={source!r}: no such file or folder. Correct the path, or set data.name to use the Hub."
        )
    if is_pointer(path):
        raise DataError(
            f"data.{split}={source!r} is a pointer of git-lfs, not the content: run `git lfs pull` in its folder, or "
            "download the file."
        )
    *_, kind, compression = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if compression not in _COMPRESSIONS:
        kind = compression
    if kind not in _BUILDERS or (kind == ".parquet" and kind != compression):
        raise DataError(
            f"data.{split}={source!r}: cannot read this kind of file. Use {', '.join(_BUILDERS)}, or a folder with one "
            f"subfolder of images per class; all but .parquet may end in {', '.join(_COMPRESSIONS)} as well."
        )
    builder, options = _BUILDERS[kind]
    return _load(f"file {source!r}", builder, data_files=files, streaming=streaming, **options)


def _load(what: str, builder: str, *, split: str = "train", **options: Any) -> Rows:
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except Exception as error:  # parsers of user files raise anything, such as StopIteration for an empty one
        raise DataError(
            f"{what} cannot be loaded, or is empty: {error.__cause__ or error}. Check the name and the split, and that "
            "the file is complete."
        ) from error


def columns_of(data: DataRecipe, task: Task) -> list[str]:
    """Columns that a task reads."""
    content = data.image_column if task == "image-classification" else data.text_column
    return [content, data.label_column] if TASKS[task].labels else [content]


def _check_columns(rows: Rows, split: str, data: DataRecipe, task: Task) -> None:
    streamed = isinstance(rows, IterableDataset)
    first = None
    if streamed:
        with contextlib.closing(iter(rows)) as read:
            first = next(read, None)
    if first is None if streamed else len(rows) == 0:
        raise DataError(f"data.{split}={getattr(data, split)!r} has no rows: choose another split or file.")
    columns, known = columns_of(data, task), list(first) if streamed else rows.column_names
    for column in columns:
        if column not in known:
            raise DataError(
                f"{split} has no column {column!r}; its columns are {', '.join(known)}. Set "
                "data.text_column, data.label_column or data.image_column."
            )
        if streamed:
            continue  # rows are checked when they are read
        if rows.data.column(column).null_count:
            raise DataError(f"column {column!r} of {split} has missing values: fill them in or remove those rows.")
    if streamed:
        return
    feature = rows.features[columns[0]]
    words = getattr(feature, "feature", None)
    fits = {
        "image": isinstance(feature, datasets.Image),
        "text": getattr(feature, "dtype", None) in _STRINGS,
        "words": getattr(words, "dtype", None) in _STRINGS,
    }
    if not fits[TASKS[task].content]:
        raise DataError(
            f"column {columns[0]!r} of {split} holds {feature}, which {task} cannot read: choose another column."
        )
