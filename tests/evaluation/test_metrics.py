"""Every measurement equals a slow, obvious computation."""

import json
import lzma
import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerfuse.errors import CheckpointError, DataError
from hf_layerfuse.evaluation.latency import latency, latency_side_by_side
from hf_layerfuse.evaluation.metrics import (
    Accuracy,
    bytes_on_disk,
    classification,
    embedding_fidelity,
    evaluating,
    parameter_counts,
    perplexity,
)


class LetterTokenizer:
    """One token per character."""

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 60 for letter in text]}

    def decode(self, ids: list[int], **options) -> str:
        return "".join(chr(64 + (index - 3 - 4) % 60) for index in ids)


TEXT = "it was a dark and\n stormy night \n" * 3


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2", "GPT2LMHeadModel")


def _brute_force(model, text: str, max_length: int, stride: int) -> tuple[float, int]:
    """Score one token at a time, each with the context of the first window that contains it as a target."""
    ids = LetterTokenizer()(text)["input_ids"]
    total, scored, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + max_length, len(ids))
        for position in range(max(done, start + 1), end):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
            total -= F.log_softmax(logits, -1)[ids[position]].item()
            scored += 1
        done = end
        if end == len(ids):
            break
    return total, scored


@pytest.mark.parametrize(
    ("max_length", "stride", "batch_size"), [(16, 16, 4), (16, 5, 1), (16, 5, 4), (64, 64, 4), (12, 11, 4)]
)
def test_perplexity_equals_one_token_at_a_time(model, max_length: int, stride: int, batch_size: int) -> None:
    """Sliding windows in batches, with an incomplete last one, score every token like the obvious loop."""
    result = perplexity(model, LetterTokenizer(), TEXT, max_length=max_length, stride=stride, batch_size=batch_size)
    total, scored = _brute_force(model, TEXT, max_length, stride)
    assert result["nll"] == pytest.approx(total, rel=1e-5)
    assert result["tokens"] == scored
    unscored = math.ceil(len(TEXT) / max_length) if stride == max_length else 1
    assert scored == len(TEXT) - unscored
    assert result["token_perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-5)
    words = len(TEXT.split()) + TEXT.count("\n")
    assert result["words"] == words
    assert result["word_perplexity"] == pytest.approx(math.exp(total / scored * len(TEXT) / words), rel=1e-4)


def test_perplexity_of_a_part_is_that_of_the_shorter_text(model) -> None:
    """max_windows reads only the first windows, and counts only their words."""

    class Lossless(LetterTokenizer):
        def decode(self, ids: list[int], **options) -> str:
            return TEXT[: len(ids)]

    part = perplexity(model, Lossless(), TEXT, max_length=16, stride=8, batch_size=2, max_windows=3)
    assert part == perplexity(model, Lossless(), TEXT[:32], max_length=16, stride=8, batch_size=2)


def test_perplexity_refuses_what_cannot_be_scored(model) -> None:
    """Too little text, a window longer than the model, and a stride that skips tokens are errors."""
    with pytest.raises(DataError, match="1 tokens"):
        perplexity(model, LetterTokenizer(), "a", max_length=16, batch_size=1)
    for max_length, stride in ((65, 65), (16, 17), (16, 0), (1, 1)):
        with pytest.raises(DataError, match="do not fit"):
            perplexity(model, LetterTokenizer(), TEXT, max_length=max_length, stride=stride, batch_size=1)


@pytest.mark.slow
def test_published_perplexity_is_reproduced(shared: Path) -> None:
    """A GPT-2 trained on WikiText-2 has the published perplexity, per token and per word."""
    folder = shared / "models" / "gpt2-wikitext2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = lzma.decompress((shared / "data" / "wikitext2" / "test.txt.xz").read_bytes()).decode()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reported = json.loads((folder / "results.json").read_text())
    measured = perplexity(model, tokenizer, text, max_length=256, batch_size=16, bf16=True)
    for name in ("token_perplexity", "word_perplexity"):
        assert measured[name] == pytest.approx(reported[name]["test"], rel=1e-3)


def test_accuracy_is_a_metric_of_the_evaluate_library() -> None:
    """Batches add up, and the instance can be reused."""
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[0, 1], references=torch.tensor([0, 0]))
    metric.add_batch(predictions=[2, 2], references=[2, 2])
    assert metric.compute() == {"accuracy": 0.75}
    assert metric.compute(predictions=[1], references=[0]) == {"accuracy": 0.0}


def _text_batches(model, lengths: list[int], batch_size: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (length,), generator=generator) for length in lengths]
    batches = []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.sum(1) % 2})
    return batches


def test_classification_does_not_depend_on_the_batches() -> None:
    """Accuracy and cross-entropy are means over rows: batches of one or of unequal size, padded or not, agree."""
    model = tiny_model("bert", "BertForSequenceClassification").train()
    lengths = [3, 9, 5, 12, 7]
    alone, together = (classification(model, _text_batches(model, lengths, size)) for size in (1, 3))
    assert model.training
    assert alone["examples"] == together["examples"] == 5
    assert alone["accuracy"] == together["accuracy"]
    assert alone["cross_entropy"] == pytest.approx(together["cross_entropy"], rel=1e-5)
    model.eval()
    with torch.no_grad():
        outputs = [model(**batch) for batch in _text_batches(model, lengths, 1)]
    assert alone["cross_entropy"] == pytest.approx(sum(output.loss.item() for output in outputs) / 5, rel=1e-5)
    with pytest.raises(DataError, match="no batches"):
        classification(model, [])


@pytest.mark.parametrize(("kind", "head"), [("bert", "BertModel"), ("vit", "ViTForImageClassification")])
def test_fidelity_is_one_with_itself_and_less_with_another(kind: str, head: str) -> None:
    """The fidelity of a model to itself is 1 with any padding, and lower to a model with other weights."""
    model, other = tiny_model(kind, head), tiny_model(kind, head, seed=1)
    if kind == "bert":
        batches = _text_batches(model, [3, 9, 5], 2)
    else:
        batches = [{"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}]
    assert embedding_fidelity(model, model, batches)["cosine"] == pytest.approx(1, abs=1e-6)
    assert embedding_fidelity(model, other, batches)["cosine"] < 0.9
    if kind == "bert":
        single = embedding_fidelity(model, other, _text_batches(model, [3, 9, 5], 1))["cosine"]
        assert embedding_fidelity(model, other, batches)["cosine"] == pytest.approx(single, abs=1e-5)


def test_parameters_are_counted_once() -> None:
    """A tied output layer and a manual tie count once; embeddings are the token and position tables."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    total = sum(value.numel() for value in {id(p): p for p in model.parameters()}.values())
    tables = (64 + 64) * 32  # tokens and positions; the output layer is the token table
    assert parameter_counts(model) == {"parameters": total, "non_embedding_parameters": total - tables}
    first, second = model.transformer.h[0].mlp.c_fc, model.transformer.h[1].mlp.c_fc
    second.weight = first.weight
    assert parameter_counts(model)["parameters"] == total - first.weight.numel()


def test_bytes_on_disk(tmp_path: Path) -> None:
    """Only safetensors files count, and a folder without them is an error."""
    with pytest.raises(CheckpointError, match="save_pretrained"):
        bytes_on_disk(tmp_path)
    tiny_model("gpt2", "GPT2Model").save_pretrained(tmp_path)
    assert bytes_on_disk(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


def test_latency_names_its_conditions() -> None:
    """Each batch size has its results; the model keeps its mode; all models are timed on equal inputs."""
    model = tiny_model("gpt2", "GPT2LMHeadModel").train()
    timed = latency(model, (1, 2), sequence_length=8, repeats=1, warmup=0)
    assert set(timed) == {1, 2}
    assert timed[2]["input_shape"] == [2, 8]
    conditions = {"repeats": 1, "warmup": 0, "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"}
    assert timed[2].items() >= {**conditions, "spread_ms": 0.0}.items()
    assert timed[1]["median_ms"] > 0
    assert model.training


def test_models_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round times one pass of each model."""
    order = []
    models = {name: tiny_model("gpt2", "GPT2Model") for name in ("a", "b")}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    timed = latency_side_by_side(models, (1,), sequence_length=4, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert json.loads(json.dumps(timed))["a"]["1"]["repeats"] == 3


def test_evaluating_restores_every_mode() -> None:
    """A frozen submodule in eval mode stays in it, and an error does not leave the model in eval mode."""
    model = tiny_model("bert", "BertModel").train()
    model.pooler.eval()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.training
    assert not model.pooler.training
