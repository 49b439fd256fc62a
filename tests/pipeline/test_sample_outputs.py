"""Sample outputs are those of both models on the first rows, whatever the task."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from runs import WORDS, save_text_model, sentences
from transformers import AutoTokenizer

from hf_layerfuse.pipeline.samples import Samples, sample_outputs


@pytest.fixture
def tokenizer(tmp_path):
    save_text_model(tmp_path, "BertModel")
    return AutoTokenizer.from_pretrained(tmp_path)


def inputs(task, tokenizer, rows, label=None):
    """What `sample_outputs` needs of the data of a run."""
    batch = dict(tokenizer(rows, padding=True, return_tensors="pt"))
    if label is not None:
        batch["labels"] = label(batch)
    recipe = SimpleNamespace(task=task, data=SimpleNamespace(text_column="text"))
    splits = {"test": {"text": rows}}
    return SimpleNamespace(
        recipe=recipe, splits=splits, reported="test", processor=tokenizer, reported_batches=lambda: [batch]
    )


def test_both_models_continue_the_same_prompt(tokenizer):
    """The continuations are those of greedy generation, and equal models have equal ones."""
    model, other = (tiny_model("gpt2", "GPT2LMHeadModel", seed=seed).eval() for seed in (0, 1))
    rows = ["", " ".join(WORDS[:40]), " ".join(WORDS[5:50]), "w3"]
    found = sample_outputs(inputs("causal-lm", tokenizer, rows), model, other)
    assert [len(each.prompt.split()) for each in found.continuations] == [16, 16]
    first = found.continuations[0]
    ids = tokenizer(first.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(expected[0, 16:], skip_special_tokens=True).startswith(first.original.split("<eos>")[0])
    assert first.original != first.result
    same = sample_outputs(inputs("causal-lm", tokenizer, rows), model, model)
    assert all(each.original == each.result for each in same.continuations)
    assert Samples.from_dict(found.to_dict()) == found
    assert sample_outputs(inputs("causal-lm", tokenizer, [""]), model, model) is None


def test_changed_predictions_are_counted(tokenizer):
    """Every prediction that differs became right, became wrong, or stayed wrong."""
    model, other = (tiny_model("bert", "BertForSequenceClassification", seed=seed, num_labels=3) for seed in (0, 5))
    rows = sentences(40, 0)
    data = inputs("text-classification", tokenizer, rows, lambda batch: torch.arange(40) % 3)
    with torch.no_grad():
        [batch] = data.reported_batches()
        before, after = (
            each.eval()(**{name: batch[name] for name in batch if name != "labels"}).logits.argmax(-1)
            for each in (model, other)
        )
    found = sample_outputs(data, model, other)
    assert (found.rows, found.outputs) == (40, 40)
    assert found.improved + found.worsened + found.moved == int((before != after).sum()) > 0
    for each in found.predictions:
        assert each.text == rows[each.row]
        assert each.original == model.config.id2label[int(before[each.row])]
        assert each.result == other.config.id2label[int(after[each.row])]
    assert sample_outputs(data, model, model) == Samples(rows=40, outputs=40)
    assert Samples.from_dict(found.to_dict()) == found


def test_words_of_a_text_are_predictions(tokenizer):
    """Tokens without a label do not count, and a changed one is named."""
    model, other = (tiny_model("bert", "BertForTokenClassification", seed=seed) for seed in (0, 5))
    label = lambda batch: torch.where(batch["attention_mask"].bool(), 0, -100)  # noqa: E731
    found = sample_outputs(inputs("token-classification", tokenizer, sentences(20, 0), label), model, other)
    assert found.outputs > found.rows == 20
    assert all(each.word in each.text for each in found.predictions)


def test_embeddings_that_changed_most(tokenizer):
    """The least cosine comes first."""
    model, other = (tiny_model("bert", "BertModel", seed=seed) for seed in (0, 1))
    found = sample_outputs(inputs("feature-extraction", tokenizer, sentences(20, 0)), model, other)
    cosines = [each.cosine for each in found.distances]
    assert cosines == sorted(cosines)
    assert found.rows == 20 > len(cosines)
