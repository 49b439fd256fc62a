"""From a data recipe to batches: load, check, tokenise, pack into windows."""

import contextlib
import csv
import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from .collate import ROW, CollateImages, CollateText
from .errors import DataError
from .labels import encode_labels, encode_row, encode_word_labels
from .recipe import DataRecipe
from .sampling import ByLength
from .tasks import TASKS, Task

Processor = PreTrainedTokenizerBase | BaseImageProcessor
Rows = Dataset | IterableDataset

# Quotes and words such as "null" are text, not syntax: by default the csv builder would read them as missing values.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_COMPRESSIONS = (".xz", ".gz")
_LINES_AT_ONCE = 10_000  # bounds the memory of the tokeniser; more than the lines of WikiText-2 validation or test
_ROWS_AT_ONCE = 32  # that are streamed: images are large
SHUFFLED = 10_000
"""Rows that are streamed are drawn from so many at a time."""

_STRINGS = ("string", "large_string")


def load_splits(data: DataRecipe, task: Task, seed: int, *, label2id: dict[str, int] | None = None) -> dict[str, Rows]:
    """Load `train`, `validation` and `test`, as far as the recipe has them, and check their columns.

    Without `data.validation`, the last `data.held_out` rows leave `train` to become it. Rows that are grouped by
    class, as in image folders and IMDB, are first shuffled with `seed`: their head and tail hold a single class.
    Classes become ids by `label2id` where the names agree (in any case), else in the order of the data set, else in
    the sorted order of the names in `train`. With `data.streaming`, `train` is read when it is used, and its classes
    are those of `validation`.

    Args:
        data: where the rows come from.
        task: decides which columns are needed.
        seed: of the shuffle.
        label2id: classes of the model that the ids have to fit; the placeholders `LABEL_0`, ... say nothing.

    Raises:
        DataError: a file, a column or a text is missing, a split is empty or too small, or a class is unknown.
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
        encode_word_labels(splits, data.label_column, label2id)
    if TASKS[task].labels == "row":
        encode_labels(splits, data.label_column, label2id)
        for split, rows in splits.items():
            labels = np.asarray(rows[data.label_column][:])
            if np.count_nonzero(np.diff(labels)) < len(np.unique(labels)):
                splits[split] = rows.shuffle(seed=seed)
    if streamed is not None:
        if TASKS[task].labels:
            column = data.label_column
            features = {"before": given[column], "after": splits["validation"].features[column]}
            streamed = streamed.map(encode_row, fn_kwargs={"column": column, **features})
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


def text_of(dataset: Dataset, data: DataRecipe) -> str:
    """Join the rows of `data.text_column`, each ended by exactly one newline: the text of the file they came from."""
    return _join(dataset[data.text_column][:])


def prepare(dataset: Rows, processor: Processor, data: DataRecipe, task: Task, *, training: bool) -> Rows:
    """Turn rows into model inputs.

    Causal language models get windows of `data.max_length` tokens of the joined text, without overlap and without
    special tokens; text is tokenised in pieces of 10,000 lines, and where it is streamed, what is left of a piece
    belongs to no window. Masked language models read line by line; empty lines
    are left out. Of a word that is several tokens, the first one has its label. Images are processed when they are
    read.

    Args:
        dataset: one split of `load_splits`.
        processor: tokenizer, or image processor for image classification.
        data: columns, `max_length`, and how many rows (windows) to use at most: the first ones.
        task: decides the inputs and whether there are `labels`.
        training: `max_train_samples` rather than `max_test_samples` holds, and a last window that is shorter than
            the others is left out.

    Returns:
        Rows with `input_ids`, or `pixel_values` of shape (channels, height, width), and `labels` where the task has
        them. For causal language models `labels` are the `input_ids`; the model shifts them. Those of masked language
        models are drawn when rows are batched.

    Raises:
        DataError: `data.max_length` is longer than the model reads, or there is no whole window to train on.
    """
    if not isinstance(processor, BaseImageProcessor) and data.max_length > processor.model_max_length:
        raise DataError(
            f"data.max_length={data.max_length} is more than the {processor.model_max_length} tokens the model reads: "
            "lower data.max_length."
        )
    limit = data.max_train_samples if training else data.max_test_samples
    if isinstance(dataset, IterableDataset):
        rows = _streamed(dataset, processor, data, task)
        return rows if limit is None else rows.take(limit)
    if task == "causal-lm":
        return _first(_windows(dataset, processor, data, training), limit)

    rows = _first(dataset.select_columns(_columns(data, task)), limit)
    if task == "masked-lm":
        rows = rows.filter(_has_words, fn_kwargs={"text": data.text_column})
    if task == "masked-lm" or (training and task == "image-classification"):
        rows = rows.add_column(ROW, np.arange(len(rows)))
    if task == "image-classification":
        return rows.with_transform(_reader(processor, data, task))
    # A tokenizer remembers the truncation it was last called with, and the cache key of `map` covers that state:
    # calling it once beforehand makes the key the same on the first run and on every later one.
    processor("", truncation=True, max_length=data.max_length)
    gone = [column for column in rows.column_names if column != ROW]
    read = _reader(processor, data, task)
    return rows.map(read, batched=True, remove_columns=gone, num_proc=data.num_proc, desc="tokenise")


def loader(
    prepared: Rows,
    processor: Processor,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    task: Task,
    augment: bool = False,
    top_k: int | None = None,
) -> DataLoader:
    """Batch prepared rows into dicts of tensors for `model(**batch)`; text is padded on the right, with a mask.

    Masked words are those of epoch 0 until the `set_epoch` of `collate_fn` is called; `heal` does that.

    Args:
        prepared: what `prepare` returns.
        processor: the one it was prepared with.
        batch_size: rows per batch.
        shuffle: read in an order drawn anew from `seed` every epoch, and leave out a last, smaller batch. Texts come in
            batches of about the same length (`ByLength`), rows that are streamed are drawn from the next 10,000.
        seed: of the order, of masked words and of augmentation.
        task: as for `prepare`.
        augment: shift and mirror images of a shuffled training set.
        top_k: answers of a teacher that rows have, see `with_teacher`.

    Returns:
        Batches with `input_ids` and `attention_mask` (batch, tokens), or `pixel_values` (batch, channels, height,
        width); with `labels` (batch, tokens) that are -100 on padding, or (batch,) for classification.

    Raises:
        DataError: there is no full batch to shuffle, or the tokenizer has no padding token.
    """
    streamed = isinstance(prepared, IterableDataset)
    if shuffle and not streamed and len(prepared) < batch_size:
        raise DataError(
            f"{len(prepared)} training rows do not fill a batch of {batch_size}: lower the batch size or use more rows."
        )
    if task == "image-classification":
        numbered = streamed or ROW in prepared.column_names
        collate = CollateImages(seed, moves=shuffle and augment and numbered)
    else:
        if processor.pad_token_id is None and task != "causal-lm":
            raise DataError(
                "the tokenizer has no padding token, so texts of different lengths cannot share a batch: set "
                "tokenizer.pad_token (to tokenizer.eos_token, for example) and model.config.pad_token_id to match."
            )
        if task == "masked-lm" and processor.mask_token_id is None:
            raise DataError("the tokenizer has no mask token, which masked-lm needs: set tokenizer.mask_token.")
        collate = CollateText(processor, seed, masks=task == "masked-lm", top_k=top_k or 1)
    if streamed:
        rows = prepared.shuffle(seed=seed, buffer_size=SHUFFLED) if shuffle else prepared
        return DataLoader(rows, batch_size, drop_last=shuffle, collate_fn=collate)
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "shuffle": shuffle}
    if shuffle and task not in ("causal-lm", "image-classification"):  # where rows differ in length
        options = {"sampler": ByLength([len(ids) for ids in prepared["input_ids"]], batch_size, seed)}
    return DataLoader(prepared, batch_size, drop_last=shuffle, collate_fn=collate, **options)


def calibration_batches(
    prepared_train: Rows, processor: Processor, data: DataRecipe, task: Task, *, batch_size: int, seed: int
) -> list[dict[str, Tensor]]:
    """Draw `data.calibration_samples` prepared training rows (all, if there are fewer) at random and batch them."""
    if isinstance(prepared_train, IterableDataset):
        sample = prepared_train.shuffle(seed=seed, buffer_size=SHUFFLED).take(data.calibration_samples)
    else:
        order = np.random.default_rng(seed).permutation(len(prepared_train))[: data.calibration_samples]
        sample = prepared_train.select(order)
    return list(loader(sample, processor, batch_size, shuffle=False, seed=seed, task=task))


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
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} cannot be loaded, or is empty: {error.__cause__ or error}. Check the name and the split, and that "
            "the file is whole."
        ) from error


def _columns(data: DataRecipe, task: Task) -> list[str]:
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
    columns, known = _columns(data, task), list(first) if streamed else rows.column_names
    for column in columns:
        if column not in known:
            raise DataError(
                f"{split} has no column {column!r}; its columns are {', '.join(known)}. Set "
                "data.text_column, data.label_column or data.image_column."
            )
        if streamed:
            continue  # what is in the rows is seen when they are read
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


def _streamed(rows: IterableDataset, processor: Processor, data: DataRecipe, task: Task) -> IterableDataset:
    """`prepare` of rows that are read while training."""
    columns = _columns(data, task)
    rows = rows.select_columns(columns)
    if task == "causal-lm":
        arguments = {"tokenizer": processor, "text": data.text_column, "length": data.max_length}
        options = {"batched": True, "batch_size": _LINES_AT_ONCE, "remove_columns": columns}
        return rows.map(_windows_of_lines, fn_kwargs=arguments, **options)
    if task == "masked-lm":
        rows = rows.filter(_has_words, fn_kwargs={"text": data.text_column})
    if task in ("masked-lm", "image-classification"):
        rows = rows.map(_numbered, with_indices=True)
    return rows.map(_reader(processor, data, task), batched=True, batch_size=_ROWS_AT_ONCE, remove_columns=columns)


def _numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {ROW: number}


def _reader(processor: Processor, data: DataRecipe, task: Task) -> Callable[[dict[str, list]], dict[str, Any]]:
    """What makes model inputs of a batch of rows."""
    label = data.label_column if TASKS[task].labels else None
    if task == "image-classification":
        return partial(_pixels, processor=processor, image=data.image_column, label=label)
    tokenise = _tokenise_words if TASKS[task].content == "words" else _tokenise
    return partial(tokenise, tokenizer=processor, text=data.text_column, label=label, max_length=data.max_length)


def _windows_of_lines(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text: str, length: int
) -> dict[str, list[list[int]]]:
    (ids,) = _tokenise_lines(batch, tokenizer, text)["input_ids"]
    windows = [ids[start : start + length] for start in range(0, len(ids) // length * length, length)]
    return {"input_ids": windows, "labels": windows}


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _join(lines: list[str]) -> str:
    return "".join(line.removesuffix("\n") + "\n" for line in lines)


def _windows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataRecipe, training: bool) -> Dataset:
    pieces = rows.map(
        _tokenise_lines,
        batched=True,
        batch_size=_LINES_AT_ONCE,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "text": data.text_column},
        num_proc=data.num_proc,
        desc="tokenise",
    )
    ids = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces["input_ids"]])
    end = len(ids) // data.max_length * data.max_length if training else len(ids)
    if end < 2:
        raise DataError(
            f"the text has {len(ids)} tokens, too few for a window of data.max_length={data.max_length}: use a longer "
            "text or a smaller max_length."
        )
    windows = [ids[start : min(start + data.max_length, end)] for start in range(0, end, data.max_length)]
    return Dataset.from_dict({"input_ids": windows, "labels": windows})


def _tokenise_lines(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text: str
) -> dict[str, list[list[int]]]:
    tokens = tokenizer(
        _join(batch[text]), add_special_tokens=False, verbose=False
    )  # too long for the model, on purpose
    return {"input_ids": [tokens["input_ids"]]}


def _tokenise(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, text: str, label: str | None, max_length: int
) -> dict[str, list[Any]]:
    rows = dict(tokenizer(batch[text], truncation=True, max_length=max_length))
    return rows if label is None else {**rows, "labels": batch[label]}


def _tokenise_words(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, text: str, label: str, max_length: int
) -> dict[str, list[Any]]:
    rows = tokenizer(batch[text], is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for place, of_words in enumerate(batch[label]):
        words = rows.word_ids(place)
        first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
        labels.append([of_words[word] if starts else -100 for word, starts in zip(words, first, strict=True)])
    return {**rows, "labels": labels}


def _has_words(row: dict[str, Any], text: str) -> bool:
    return bool(row[text].strip())


def _pixels(batch: dict[str, list[Any]], processor: BaseImageProcessor, image: str, label: str) -> dict[str, Any]:
    images = [picture.convert("RGB") for picture in batch[image]]  # grey and transparent images among coloured ones
    found = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"], "labels": batch[label]}
    return found if ROW not in batch else {**found, ROW: batch[ROW]}
