"""Limits of a model: which inputs it accepts. Data are compared with them before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError

_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True)
class Limits:
    """Inputs that a model accepts.

    Attributes:
        main: Name of the main input, which every batch has.
        tokens: Number of token embeddings; None for models that read no tokens.
        positions: Maximum number of tokens in a row; None for models without a position table.
        types: Number of token types; None for models without a table of them.
        image: Channels, height and width of an image; None where the model accepts any size.
    """

    main: str | None = None
    tokens: int | None = None
    positions: int | None = None
    types: int | None = None
    image: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Limits:
        """Read the limits of a model from its tables."""
        if model.main_input_name == "pixel_values":
            size = getattr(model.config, "image_size", None)
            # convolutional networks state no size, or accept others
            if size is None or not any(name.endswith("position_embeddings") for name, _ in model.named_parameters()):
                return cls(main="pixel_values")
            height, width = (size, size) if isinstance(size, int) else size
            return cls(main="pixel_values", image=(model.config.num_channels, height, width))
        if model.main_input_name != "input_ids":
            return cls(main=model.main_input_name)
        tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        positions = [
            # RoBERTa counts positions from after its padding id, so that it never reads the first rows of its table
            table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
            for name, table in tables.items()
            if name.endswith(_POSITION_TABLES)
        ]
        types = [table.num_embeddings for name, table in tables.items() if name.endswith("token_type_embeddings")]
        return cls(
            main="input_ids",
            tokens=None if (embeddings := token_embeddings(model)) is None else len(embeddings.weight),
            positions=min(positions, default=None),
            types=min(types, default=None),
        )

    def check_ids(self, what: str, least: int, most: int) -> None:
        """Raise `DataError` if token ids are outside the table.

        Args:
            what: Name of the data, for the message.
            least: Smallest token id.
            most: Largest token id.
        """
        if self.tokens is not None and (least < 0 or most >= self.tokens):
            raise DataError(
                f"{what} has the token id {least if least < 0 else most}, and the model has {self.tokens} token "
                f"embeddings, for ids 0 to {self.tokens - 1}: use the tokenizer that the model was trained with. For "
                "new tokens, call model.resize_token_embeddings(len(tokenizer)) and train them before you fuse."
            )

    def check_length(self, what: str, length: int) -> None:
        """Raise `DataError` if rows are longer than the position table.

        Args:
            what: Name of the data, for the message.
            length: Number of tokens in the longest row.
        """
        if self.positions is not None and length > self.positions:
            raise DataError(
                f"{what} has a row of {length} tokens, and the model reads at most {self.positions}: truncate rows to "
                f"{self.positions} tokens (data.max_length in a recipe, max_length= of a tokenizer)."
            )

    def check(self, what: str, batch: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the model accepts a batch.

        Args:
            what: Name of the batch, for the message.
            batch: Model inputs; other values than tensors are not checked.
        """
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        ids, mask, types = (tensors.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        if self.main is not None and self.main not in tensors and "inputs_embeds" not in tensors:
            raise DataError(
                f"{what} has {', '.join(map(str, batch)) or 'no inputs'}, and the model reads {self.main!r}: add it."
            )
        if ids is not None:
            if ids.ndim < 2 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise DataError(
                    f"{what} has input_ids of type {ids.dtype} and shape {tuple(ids.shape)}: give whole numbers of "
                    "shape (rows, tokens)."
                )
            for name, other in (("attention_mask", mask), ("token_type_ids", types)):
                if other is not None and other.ndim < 4 and other.shape != ids.shape:
                    raise DataError(
                        f"{what} has {name} of shape {tuple(other.shape)} for input_ids of shape {tuple(ids.shape)}: "
                        "give both the same shape."
                    )
            if ids.numel() == 0 and len(ids):
                raise DataError(f"{what} has {len(ids)} rows without tokens: leave out empty texts.")
            if ids.numel():
                self.check_ids(what, int(ids.min()), int(ids.max()))
                self.check_length(what, ids.shape[-1])
        if mask is not None and mask.ndim == 2 and not mask.any(-1).all():
            row = int((~mask.any(-1)).nonzero()[0])
            raise DataError(f"row {row} of {what} has no tokens, its attention_mask is 0: leave out empty texts.")
        if types is not None and self.types is not None and types.numel() and int(types.max()) >= self.types:
            raise DataError(
                f"{what} has the token type {int(types.max())}, and the model has {self.types}: leave out "
                "token_type_ids, or tokenise with the tokenizer of the model."
            )
        pixels = tensors.get("pixel_values")
        if pixels is not None and (pixels.ndim != 4 or not pixels.is_floating_point()):
            raise DataError(
                f"{what} has pixel_values of type {pixels.dtype} and shape {tuple(pixels.shape)}: give numbers of "
                "shape (rows, channels, height, width)."
            )
        if pixels is not None and self.image is not None and tuple(pixels.shape[1:]) != self.image:
            raise DataError(
                f"{what} has images of shape {tuple(pixels.shape[1:])}, and the model reads {self.image} (channels, "
                "height, width): use the image processor of the model."
            )

    def check_all(self, what: str, batches: Iterable[Mapping[str, Any]]) -> None:
        """Raise `DataError` unless the model accepts all batches."""
        for number, batch in enumerate(batches):
            if isinstance(batch, Mapping):
                self.check(f"batch {number} of {what}", batch)


def token_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Token embeddings of a model; None if it reads no tokens or does not say where they are."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # the answer of Transformers for such a model
        return None
