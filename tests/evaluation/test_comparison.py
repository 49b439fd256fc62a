"""A comparison scores both models on the same rows, with intervals, and calls nothing better inside them."""

import copy
import json
import math

import pytest
import torch
from helpers import some_batches, tiny_model
from torch.nn import functional as F

from hf_layerfuse import DataError, Drop, Fuse, Plan, apply, compare, evaluate
from hf_layerfuse.evaluation.metrics import classification, embedding_fidelity

SHARED = Plan("gpt2", 6, (Fuse("layer", (1, 2, 3), "share"),))


def labelled(model, rows: int = 4, classes: int = 2) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batches = some_batches(model)
    return [{**batch, "labels": torch.randint(classes, (len(batch["input_ids"]),))} for batch in batches]


def test_perplexity_is_that_of_the_definition() -> None:
    """Tokens behind padding are left out."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    batch = some_batches(model)[0]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 10:] = 0
    found = evaluate(model, [batch])
    with torch.inference_mode():
        logits = model(**batch).logits
    losses = [
        F.cross_entropy(logits[row, : length - 1], batch["input_ids"][row, 1:length], reduction="none")
        for row, length in ((0, 10), (1, batch["input_ids"].shape[1]))
    ]
    assert found["value"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert (found["metric"], found["rows"]) == ("token perplexity", 2)


def test_accuracy_and_cosine_are_those_of_the_metrics() -> None:
    model = tiny_model("bert", "BertForSequenceClassification")
    batches = labelled(model)
    assert evaluate(model, batches)["value"] == pytest.approx(classification(model, batches)["accuracy"])
    body, other = tiny_model("bert"), tiny_model("bert", seed=1)
    batches = some_batches(body)
    found = evaluate(other, batches, reference=body)
    assert found["value"] == pytest.approx(embedding_fidelity(other, body, batches)["cosine"], abs=1e-6)


def test_labels_per_word() -> None:
    """Words labelled -100 do not count."""
    model = tiny_model("bert", "BertForTokenClassification")
    batch = some_batches(model)[0]
    labels = torch.zeros_like(batch["input_ids"])
    labels[:, 5:] = -100
    with torch.inference_mode():
        right = (model(**batch).logits.argmax(-1)[:, :5] == 0).double().mean().item()
    assert evaluate(model, [{**batch, "labels": labels}])["value"] == pytest.approx(right)


def test_a_model_is_no_better_than_itself() -> None:
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    found = compare(model, copy.deepcopy(model), some_batches(model), batch_sizes=())
    assert (found.difference, found.interval, found.verdict) == (0.0, (0.0, 0.0), "no difference")


def test_a_damaged_model_is_worse() -> None:
    """A random model has a perplexity near the size of its vocabulary; one that always repeats a token is worse."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    worse = copy.deepcopy(model)
    with torch.no_grad():
        worse.transformer.ln_f.bias += 50 * worse.lm_head.weight[3]
    found = compare(model, worse, some_batches(model, 12), batch_sizes=())
    assert found.interval[0] > 0
    assert found.verdict == "worse"
    assert compare(worse, model, some_batches(model, 12), batch_sizes=()).verdict == "better"


def test_sizes_latency_and_table() -> None:
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    small = apply(model, Plan("gpt2", 6, (Drop("layer", 2), Drop("layer", 3))))
    found = compare(model, small, some_batches(model), batch_sizes=(1, 2), sequence_length=8, repeats=2)
    assert found.parameters == (model.num_parameters(), small.num_parameters())
    assert found.bytes == tuple(4 * count for count in found.parameters)
    assert found.speedup[2] == found.latency_ms[2][0] / found.latency_ms[2][1]
    assert json.loads(json.dumps(found.to_dict()))["speedup"]["2"] == found.speedup[2]
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert all(line == line.rstrip() for line in lines)
    shared = compare(model, apply(model, SHARED), some_batches(model), batch_sizes=())
    assert shared.parameters[1] < shared.parameters[0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([{"input_ids": torch.full((2, 4), 99)}], "token id 99"),
        ([{"input_ids": torch.full((2, 1), 5)}], "nothing to score"),
    ],
)
def test_bad_data_are_refused(batches: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(tiny_model("gpt2", "GPT2LMHeadModel"), batches)


def test_embeddings_need_a_reference() -> None:
    with pytest.raises(DataError, match="pass batches with labels, or the original as reference="):
        evaluate(tiny_model("bert"), some_batches(tiny_model("bert")))
