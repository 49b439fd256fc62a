"""From rows to batches: tokenise, pack into windows, sample."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..errors import DataError
from ..recipe import DataRecipe
from ..recipe.tasks import TASKS, Task
from .collate import ROW, CollateImages, CollateText
from .sampler import ByLength
from .splits import Rows, columns_of

Processor = PreTrainedTokenizerBase | BaseImageProcessor

_LINES_AT_ONCE = 10_000  # bounds the memory of the tokeniser; more than the lines of WikiText-2 validation or test
_ROWS_AT_ONCE = 32  # of streamed data: images are large
SHUFFLED = 10_000
"""Size of the shuffle buffer for streamed rows."""


def text_of(dataset: Dataset, data: DataRecipe) -> str:
    """Join the rows of `data.text_column`, each with exactly one newline at its end: the text of the original file."""
    return _join(dataset[data.text_column][:])


def prepare(dataset: Rows, processor: Processor, data: DataRecipe, task: Task, *, training: bool) -> Rows:
    """Turn rows into model inputs.

    Causal language models get windows of `data.max_length` tokens of the joined text, without overlap and without
    special tokens. Text is tokenised in pieces of 10,000 lines; streaming drops the incomplete window at the end of a
    piece. Masked language models read line by line, without empty lines. For a word of several tokens, the first token
    has the label. Images are processed when they are read.

    Args:
        dataset: One split of `load_splits`.
        processor: Tokenizer, or image processor for image classification.
        data: Columns, `max_length`, and maximum number of rows (windows), of which the first are used.
        task: Task, which decides the inputs and whether there are `labels`.
        training: Whether the rows are for training: then `max_train_samples` applies instead of `max_test_samples`,
            and a shorter last window is left out.

    Returns:
        Rows with `input_ids`, or `pixel_values` of shape (channels, height, width), and `labels` where the task has
        them. For causal language models `labels` are the `input_ids`; the model shifts them. Labels of masked
        language models are drawn when rows are batched.

    Raises:
        DataError: A `data.max_length` longer than the model reads, or too little text for one training window.
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

    rows = _first(dataset.select_columns(columns_of(data, task)), limit)
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

    Masked words are those of epoch 0 until `collate_fn.set_epoch` is called, as `heal` does.

    Args:
        prepared: Rows that `prepare` returned.
        processor: Processor that prepared them.
        batch_size: Number of rows per batch.
        shuffle: Whether the order is drawn anew from `seed` every epoch, without a smaller last batch. Texts come in
            batches of similar length (`ByLength`); streamed rows are drawn from the next 10,000.
        seed: Seed of the order, of masked words and of augmentation.
        task: Task, as for `prepare`.
        augment: Whether images of a shuffled training set are shifted and mirrored.
        top_k: Number of teacher classes in the rows, see `with_teacher`.

    Returns:
        Batches with `input_ids` and `attention_mask` (batch, tokens), or `pixel_values` (batch, channels, height,
        width); with `labels` (batch, tokens) that are -100 on padding, or (batch,) for classification.

    Raises:
        DataError: Too few rows for one shuffled batch, or a tokenizer without a padding token.
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


def _streamed(rows: IterableDataset, processor: Processor, data: DataRecipe, task: Task) -> IterableDataset:
    """`prepare` for streamed rows."""
    columns = columns_of(data, task)
    rows = rows.select_columns(columns).map(_complete)
    if task == "causal-lm":
        arguments = {"tokenizer": processor, "text": data.text_column, "length": data.max_length}
        options = {"batched": True, "batch_size": _LINES_AT_ONCE, "remove_columns": columns}
        return rows.map(_windows_of_lines, fn_kwargs=arguments, **options)
    if task == "masked-lm":
        rows = rows.filter(_has_words, fn_kwargs={"text": data.text_column})
    if task in ("masked-lm", "image-classification"):
        rows = rows.map(_numbered, with_indices=True)
    return rows.map(_reader(processor, data, task), batched=True, batch_size=_ROWS_AT_ONCE, remove_columns=columns)


def _complete(row: dict[str, Any]) -> dict[str, Any]:
    for column, value in row.items():
        if value is None:
            raise DataError(f"a row of train has no value in column {column!r}: fill it in or remove the row.")
    return row


def _numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {ROW: number}


def _reader(processor: Processor, data: DataRecipe, task: Task) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Function that turns a batch of rows into model inputs."""
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
    images = [picture.convert("RGB") for picture in batch[image]]  # some images may be grey or transparent
    found = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"], "labels": batch[label]}
    return found if ROW not in batch else {**found, ROW: batch[ROW]}
