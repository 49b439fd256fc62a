"""Calibration data become batches and splits, and the calibration loss measures the distance between outputs."""

import math

import pytest
import torch
from datasets import Dataset
from helpers import HEADS, LAYOUTS, tiny_model
from transformers import BatchEncoding

from hf_layerfuse import fuse
from hf_layerfuse.calibration.samples import ROWS, Sample, read
from hf_layerfuse.errors import DataError
from hf_layerfuse.evaluation.batches import take
from hf_layerfuse.evaluation.divergence import calibration_loss, divergence, prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs

every_head = pytest.mark.parametrize(
    ("model_type", "head"),
    [
        pytest.param(name, head, id=head.__name__, marks=() if name in LAYOUTS else pytest.mark.slow)
        for name, head in HEADS
    ],
)


def numbered(count):
    return {"input_ids": torch.arange(count)[:, None], "labels": torch.arange(count)}


def who(sample, roles):
    """Indices of the sequences with a role."""
    parts = [batch["input_ids"][:, 0][role] for batch, role in zip(sample.batches, roles, strict=True)]
    return torch.cat(parts).tolist()


@pytest.mark.parametrize(
    ("count", "held_out", "selection"),
    [
        (1, [], []),
        (2, [1], []),
        (5, [4], []),
        (7, [6], [4]),
        (8, [7], [4]),
        (24, [7, 15, 23], [4, 10, 16, 21]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 24])
def test_splits_are_decided_by_sequence(count, held_out, selection, size):
    """Every eighth sequence is held out, and every fifth of the others is for selection, for any batches. With fewer
    than eight, the last one is held out. A single one is both fitted and evaluated."""
    sequences = numbered(count)
    batches = [{k: v[i : i + size] for k, v in sequences.items()} for i in range(0, count, size)]
    sample = Sample.of(iter(batches))
    assert who(sample, sample.held_out) == held_out
    assert who(sample, sample.selection) == selection
    assert who(sample, sample.evaluated) == (held_out or [0])
    assert torch.cat([batch["input_ids"][:, 0] for batch in sample.held_out_batches]).tolist() == (held_out or [0])
    assert all(len(batch["input_ids"]) for batch in sample.held_out_batches)


@pytest.mark.parametrize(("share", "kept"), [(1.0, 48), (0.5, 24), (0.4, 20), (0.05, 3), (0.001, 1)])
@pytest.mark.parametrize("size", [8, 16, 48])
def test_a_share_is_spread_evenly(share, kept, size):
    """A share of the sequences is spread over all data, for any batches, and has at least one sequence."""
    sample = Sample.of([{"input_ids": part} for part in torch.arange(48).unsqueeze(1).split(size)], share)
    numbers = torch.cat([batch["input_ids"][:, 0] for batch in sample.batches])
    assert numbers.tolist() == [i * 48 // kept for i in range(kept)]
    assert sum(held_out.sum() for held_out in sample.held_out) == (max(1, kept // 8) if kept > 1 else 0)


def test_labels_and_what_is_no_tensor_are_left_out():
    """Calibration ignores labels, numbers and texts, and skips empty batches."""
    batch = BatchEncoding({**numbered(3), "texts": ["a", "b", "c"], "scale": torch.tensor(2.0), "flag": True})
    sample = Sample.of([{"input_ids": torch.empty(0, 4)}, batch])
    assert [set(batch) for batch in sample.batches] == [{"input_ids"}]
    assert len(sample.held_out) == len(sample.evaluated) == 1


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.empty(0, 4)}], iter(())])
def test_no_sequences(batches):
    """Empty calibration data are an error that says so."""
    with pytest.raises(DataError, match="no sequences"):
        Sample.of(batches)


@pytest.mark.parametrize("batch", [{}, {"labels": torch.ones(2)}, {"input_ids": [[1, 2]]}, torch.ones(2, 3), "text"])
def test_batches_that_are_none(batch):
    """Anything other than a dict of tensors is an error that says what to pass."""
    with pytest.raises(DataError, match=f"is a {type(batch).__name__} without tensors: give dicts"):
        Sample.of([batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [False, {}, {"input_ids": [[1, 2]]}])
def test_the_front_door_refuses_batches_that_are_none(batch, dtype):
    """`fuse` says so before it converts a batch or checks the model on it."""
    model = tiny_model("gpt2").to(dtype)
    with pytest.raises(DataError, match="without tensors: give dicts"):
        fuse(model, keep_layers=3, batches=[batch], effort="low")


def test_take():
    """Values without a sequence dimension stay whole when some sequences of a batch are taken."""
    batch = {"input_ids": torch.arange(6).view(3, 2), "position_ids": torch.arange(2)[None]}
    some = take(batch, torch.tensor([True, False, True]))
    assert some["input_ids"].tolist() == [[0, 1], [4, 5]]
    assert some["position_ids"] is batch["position_ids"]


def rows(count=ROWS + 3, shortest=3):
    return [[5 + (i + j) % 50 for j in range(shortest + i % 4)] for i in range(count)]


@pytest.mark.parametrize(("model_type", "pad"), [("bert", 0), ("roberta", 1), ("llama", 7), ("distilbert", None)])
def test_ragged_data_sets_are_padded(model_type, pad):
    """Rows of different length become batches of 16, filled with the padding token of the model, and a mask."""
    model = tiny_model(model_type, pad_token_id=pad)
    ragged = rows()
    batches = read(
        Dataset.from_dict({"input_ids": ragged, "text": ["x"] * len(ragged), "labels": [0] * len(ragged)}), model
    )
    assert [len(batch["input_ids"]) for batch in batches] == [ROWS, 3]
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)
    found = [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert found == ragged
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert (ids[mask == 0] == (pad or 0)).all()
        assert (mask.diff() <= 0).all(), "padding is on the right"
        assert mask.dtype == ids.dtype == torch.int64


def test_masks_and_types_of_the_data_set_are_kept():
    """A data set keeps its own masks, padded with zeros like its other columns."""
    ragged = rows()
    masks = [[0] + [1] * (len(row) - 1) for row in ragged]
    types = [[1] * len(row) for row in ragged]
    data = Dataset.from_dict({"input_ids": ragged, "attention_mask": masks, "token_type_ids": types})
    batch = read(data, tiny_model("bert"))[0]
    for i, row in enumerate(ragged[:ROWS]):
        assert batch["attention_mask"][i].tolist() == masks[i] + [0] * (6 - len(row))
        assert batch["token_type_ids"][i].tolist() == types[i] + [0] * (6 - len(row))


def test_equal_lengths_need_no_mask():
    """Rows of equal length are stacked without a mask."""
    batch = read(Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]}), tiny_model("llama"))[0]
    assert set(batch) == {"input_ids"}
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_ragged_choices():
    """The choices of a row may have different lengths too."""
    data = Dataset.from_dict({"input_ids": [[[5, 6], [7, 8, 9]], [[5, 6, 7, 8], [9, 5, 6, 7]]]})
    model = tiny_model("bert", "BertForMultipleChoice")
    batch = read(data, model)[0]
    assert batch["input_ids"].tolist() == [[[5, 6, 0, 0], [7, 8, 9, 0]], [[5, 6, 7, 8], [9, 5, 6, 7]]]
    assert batch["attention_mask"].sum(-1).tolist() == [[2, 3], [4, 4]]
    assert math.isfinite(calibration_loss(model, model, [batch]))


def test_images():
    """Image data sets give float batches, without a mask."""
    pixels = torch.rand(3, 3, 8, 8)
    batches = read(Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [0, 1, 0]}), tiny_model("vit"))
    assert [set(batch) for batch in batches] == [{"pixel_values"}]
    torch.testing.assert_close(batches[0]["pixel_values"], pixels)


def test_a_data_set_that_was_not_tokenised():
    """If the main input is missing, the error lists the existing columns."""
    with pytest.raises(DataError, match="has the columns text but not 'input_ids': tokenise"):
        read(Dataset.from_dict({"text": ["a"]}), tiny_model("bert"))


def test_other_batches_pass_through():
    """Any other iterable is read once as batches."""
    batches = [numbered(2), numbered(3)]
    assert read(iter(batches), tiny_model("llama")) == batches


def padded(model, count=4):
    """A batch in which every other sequence of tokens ends early."""
    batch = dummy_inputs(model, count)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1::2, ..., -5:] = 0
    return batch


@every_head
def test_loss_of_every_head(model_type, head):
    """Every head is compared, with and without padding. The loss is 0 between equal models and positive between others,
    and it adds up over single sequences."""
    model, other = tiny_model(model_type, head), tiny_model(model_type, head, seed=1)
    batch = padded(model)
    assert abs(calibration_loss(model, model, [batch])) < 1e-12
    loss = calibration_loss(other, model, [batch])
    assert loss > 1e-4
    apart = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    assert calibration_loss(other, model, apart) == pytest.approx(loss, rel=1e-4)


def distributions(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_of_token_logits():
    """KL(theirs || ours) over the tokens that are not padding, written out."""
    p, q = distributions(2, 3, 5), distributions(2, 3, 5, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = sum(
        (p[i, j].softmax(-1) * (p[i, j].softmax(-1) / q[i, j].softmax(-1)).log()).sum().item()
        for i, j in ((0, 0), (0, 1), (1, 0))
    )
    total, count = divergence({"logits": q}, {"logits": p}, mask)
    assert (total, count) == (pytest.approx(expected, rel=1e-5), 3)


def test_classes_are_not_tokens():
    """Class logits are one distribution per row, even if there are as many classes as tokens in the mask."""
    p, q = distributions(2, 3), distributions(2, 3, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert divergence({"logits": q}, {"logits": p}, mask) == divergence({"logits": q}, {"logits": p})
    assert divergence({"logits": q}, {"logits": p}, mask)[1] == 2


def test_positions_of_answers_are_not_padding():
    """Logits of answer positions are one distribution over the tokens that are not padding."""
    p, q = distributions(2, 4), distributions(2, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    total, count = divergence({"start_logits": q}, {"start_logits": p}, mask)
    first = divergence({"logits": q[:1]}, {"logits": p[:1]})[0]
    second = divergence({"logits": q[1:, :2]}, {"logits": p[1:, :2]})[0]
    assert (total, count) == (pytest.approx(first + second), 2)


@pytest.mark.parametrize("name", ["last_hidden_state", "logits"])
def test_divergence_of_numbers(name):
    """Hidden states, and logits of a single number, are compared by their relative squared error."""
    shape = (2, 3, 5) if name == "last_hidden_state" else (2, 3, 1)
    p, q = distributions(*shape), distributions(*shape, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kept = mask.bool()
    total, count = divergence({name: q}, {name: p}, mask)
    assert total == pytest.approx((p - q)[kept].square().sum().item())
    assert count == pytest.approx(p[kept].square().sum().item())


def test_the_loss_is_a_mean_over_all_tokens():
    """Batches count by their number of tokens."""
    model, other = tiny_model("llama", "LlamaForCausalLM"), tiny_model("llama", "LlamaForCausalLM", seed=1)
    short, long = dummy_inputs(model, 1, 4), dummy_inputs(model, 3, 8, seed=1)
    one, two = (calibration_loss(other, model, [batch]) for batch in (short, long))
    assert calibration_loss(other, model, [short, long]) == pytest.approx((4 * one + 24 * two) / 28)


def test_modes_come_back_after_the_loss():
    """The loss is measured without dropout, and training mode is restored."""
    model = tiny_model("bert").train()
    batch = dummy_inputs(model)
    assert calibration_loss(model, model, [batch]) < 1e-12
    assert all(module.training for module in model.modules())


def test_nothing_to_compare():
    """Without batches there is an error instead of a loss."""
    model = tiny_model("llama")
    with pytest.raises(DataError, match="nothing to compare"):
        calibration_loss(model, model, [])


def test_prediction_skips_the_loss():
    """The prediction of an output that begins with a loss is its logits."""
    logits = torch.ones(2, 3)
    assert prediction({"loss": torch.tensor(1.0), "logits": logits}) is logits
