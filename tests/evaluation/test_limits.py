"""Data that a model cannot read are refused before any work, with both numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import network, tiny_model

from hf_layerfuse import DataError, collapse, fuse, merge
from hf_layerfuse.data.check import check_rows
from hf_layerfuse.evaluation.limits import Limits
from hf_layerfuse.evaluation.metrics import embedding_fidelity

LIMITS = {
    "gpt2": Limits("input_ids", tokens=64, positions=64),
    "bert": Limits("input_ids", tokens=64, positions=40, types=2),
    "roberta": Limits("input_ids", tokens=64, positions=38, types=2),  # 40 less the padding id 1 and one more
    "distilbert": Limits("input_ids", tokens=64, positions=40),
    "llama": Limits("input_ids", tokens=64),  # rotary positions have no table
    "vit": Limits("pixel_values", image=(3, 8, 8)),
    "deit": Limits("pixel_values", image=(3, 8, 8)),
}


@pytest.mark.parametrize("model_type", LIMITS)
def test_limits_are_where_a_model_fails(model_type: str) -> None:
    """The largest inputs within the limits run, and the next ones do not."""
    model, limits = tiny_model(model_type), LIMITS[model_type]
    assert Limits.of(model) == limits
    if limits.image is not None:
        model(pixel_values=torch.zeros(1, *limits.image))
        with pytest.raises(ValueError, match="size"):
            model(pixel_values=torch.zeros(1, 3, 10, 10))
        return
    length = limits.positions or 100
    model(input_ids=torch.full((1, length), limits.tokens - 1))
    if limits.positions is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, length + 1), 5))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), limits.tokens))


def ids(value: int = 5, tokens: int = 8) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.full((2, tokens), value)}


BAD = {
    "token": (
        ids(64),
        "token id 64, and the model has 64 token embeddings, for ids 0 to 63: .*resize_token_embeddings",
    ),
    "negative token": (ids(-1), "token id -1"),
    "length": (ids(tokens=41), "a row of 41 tokens, and the model reads at most 40: truncate rows to 40"),
    "empty": (ids(tokens=0), "2 rows without tokens"),
    "masked": ({**ids(), "attention_mask": torch.tensor([[1] * 8, [0] * 8])}, "row 1 of batch 1 .* has no tokens"),
    "mask": ({**ids(), "attention_mask": torch.tensor(1)}, r"attention_mask of shape \(\) for input_ids of shape"),
    "float": ({"input_ids": torch.ones(2, 8)}, r"input_ids of type torch\.float32 and shape \(2, 8\)"),
    "other input": ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "has pixel_values, and the model reads 'input_ids'"),
    "type": ({**ids(), "token_type_ids": torch.full((2, 8), 2)}, "token type 2, and the model has 2"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("search", [fuse, collapse])
def test_calibration_batches_are_checked(name: str, search: Callable) -> None:
    """The second of two batches is checked too, before anything is computed."""
    model = tiny_model("bert", "BertForMaskedLM")
    model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    bad, message = BAD[name]
    target = {"keep_layers": 3} if search is fuse else {"count": 2}
    with pytest.raises(DataError, match=message):
        search(model, batches=[ids(), bad], **target)


def test_a_calibration_data_set_is_checked() -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6], [5, 99, 7]]})
    with pytest.raises(DataError, match="token id 99"):
        fuse(tiny_model("gpt2"), keep_layers=3, batches=rows)


def test_images_are_checked() -> None:
    model = tiny_model("vit", "ViTForImageClassification")
    with pytest.raises(DataError, match=r"shape \(3, 10, 8\), and the model reads \(3, 8, 8\)"):
        fuse(model, keep_layers=3, batches=[{"pixel_values": torch.zeros(2, 3, 10, 8)}])


def test_convolutions_read_images_of_any_size() -> None:
    assert Limits.of(network("basic")) == Limits("pixel_values")
    with pytest.raises(DataError, match="no sequences"):
        merge(network("basic"), latency_budget=0.5, batches=[{"pixel_values": torch.zeros(0, 3, 48, 48)}])


ROWS: dict[str, tuple[list[list[int]], str]] = {
    "empty": ([[5], [], [6, 7], []], "2 of 4 rows of test have no tokens, the first is row 1"),
    "token": ([[5], [64, 3]], "test has the token id 64"),
    "length": ([[5] * 41, [6]], "test has a row of 41 tokens, and the model reads at most 40"),
}


@pytest.mark.parametrize("name", ROWS)
def test_prepared_rows_are_checked(name: str) -> None:
    """All rows are checked, also those of a selection in another order."""
    ids, message = ROWS[name]
    rows = Dataset.from_dict({"input_ids": [*ids, [63] * 40]})
    check_rows(rows.select([len(ids)]), Limits("input_ids", tokens=64, positions=40), "test")
    with pytest.raises(DataError, match=message):
        check_rows(rows.select(range(len(ids))), Limits("input_ids", tokens=64, positions=40), "test")


def test_means_over_nothing_are_no_numbers() -> None:
    """An embedding of a row without tokens would be nan, and so the mean of all rows."""
    model = tiny_model("bert")
    batch: dict[str, Any] = {**ids(), "attention_mask": torch.tensor([[1] * 8, [0] * 8])}
    with pytest.raises(DataError, match="row 1 of the data has no tokens"):
        embedding_fidelity(model, model, [batch])
