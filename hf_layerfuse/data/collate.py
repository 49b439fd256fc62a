"""Rows to batches: padding, masked words, shifted and mirrored images.

Random draws for a row depend only on the seed, the epoch and the row. They are the same in every process, with any
number of workers, and after an interruption.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

ROW = "row"
"""Column with the row numbers of a training set."""

TEACHER_IDS, TEACHER_LOGPROBS = "teacher_ids", "teacher_logprobs"
"""Columns with the most likely classes of the teacher, and with their log-probabilities."""

MASKED = 0.15
"""Share of the tokens that a masked language model predicts (Devlin et al. 2019): of these, 80% are masked, 10% are
other tokens, and 10% stay."""

_SHIFT = 8
"""Images are shifted by up to 1/8 of their height and width: 4 pixels of 32 (He et al. 2016, section 4.2)."""

_PADDING = {"labels": -100, "attention_mask": 0, "token_type_ids": 0}


class Collate:
    """Base class that collates rows into a batch; `epoch` changes the random draws."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def draws(self, row: int) -> np.random.Generator:
        """Random generator of a row."""
        return np.random.default_rng([self.seed, self.epoch, row])


class CollateText(Collate):
    """Text, padded on the right to the longest row of the batch.

    Args:
        tokenizer: Tokenizer whose padding token fills short rows.
        seed: Seed of the masked words.
        masks: Whether words are masked and become the `labels`.
        top_k: Number of teacher classes per token or row, if rows have them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, seed: int = 0, *, masks: bool = False, top_k: int = 1
    ) -> None:
        super().__init__(seed)
        self.top_k = top_k
        # windows of a causal model are equally long or masked, so any token works
        self.pad = tokenizer.pad_token_id or 0
        self.masks = masks
        if masks:
            self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
            self.special = set(tokenizer.all_special_ids)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.masks:
            rows = [self._masked(place, row) for place, row in enumerate(rows)]
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in rows[0]:
            if name == ROW:
                continue
            values = [row[name] for row in rows]
            if name in (TEACHER_IDS, TEACHER_LOGPROBS):
                batch[name] = self._answers(values)
                continue
            if isinstance(values[0], list):
                fill = _PADDING.get(name, self.pad)
                values = [value + [fill] * (longest - len(value)) for value in values]
            batch[name] = torch.tensor(values)
        return batch

    def _answers(self, values: list[np.ndarray]) -> Tensor:
        """Teacher answers, (rows, tokens or 1, k), zero on padding."""
        parts = [torch.as_tensor(value).view(-1, self.top_k) for value in values]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def _masked(self, place: int, row: dict[str, Any]) -> dict[str, Any]:
        draws, ids = self.draws(row.get(ROW, place)), np.array(row["input_ids"])
        words = np.flatnonzero(~np.isin(ids, list(self.special)))
        chosen = words[draws.random(len(words)) < MASKED]
        if not len(chosen) and len(words):
            chosen = draws.choice(words, 1)
        labels = np.full_like(ids, -100)
        labels[chosen] = ids[chosen]
        kinds = draws.random(len(chosen))
        others = draws.integers(self.vocabulary, size=len(chosen))
        ids[chosen] = np.where(kinds < 0.8, self.mask, np.where(kinds < 0.9, others, ids[chosen]))
        return {**row, "input_ids": ids.tolist(), "labels": labels.tolist()}


class CollateImages(Collate):
    """Images of one size with their classes; `moves` shifts and mirrors them at random."""

    def __init__(self, seed: int = 0, *, moves: bool = False) -> None:
        super().__init__(seed)
        self.moves = moves

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [row["pixel_values"] for row in rows]
        if self.moves:
            images = [self._moved(image, self.draws(int(row[ROW]))) for image, row in zip(images, rows, strict=True)]
        labels = torch.tensor([int(row["labels"]) for row in rows])
        return {"pixel_values": torch.stack(images), "labels": labels}

    @staticmethod
    def _moved(image: Tensor, draws: np.random.Generator) -> Tensor:
        """Shift an image (channels, height, width) over a border of zeros, and mirror it with probability 1/2."""
        height, width = image.shape[-2:]
        down, right = height // _SHIFT, width // _SHIFT
        top, left = draws.integers(2 * down + 1), draws.integers(2 * right + 1)
        image = F.pad(image, (right, right, down, down))[..., top : top + height, left : left + width]
        return image.flip(-1) if draws.random() < 0.5 else image
