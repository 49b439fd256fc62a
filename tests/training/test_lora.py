"""Low-rank healing trains few parameters, and leaves only better weights."""

import copy
import sys

import pytest
import torch
from helpers import LAYERS, tiny_model
from torch.utils.data import DataLoader

from hf_layerfuse import Fuse, HealRecipe, Plan, RecipeError, apply, heal, heal_scope
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.training.lora import low_rank

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

HEADS = {"gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification", "llama": "LlamaForCausalLM"}
HEADS |= {"vit": "ViTForImageClassification"}


@pytest.mark.parametrize("kind", HEADS)
def test_residuals_are_merged(kind):
    """Initial residuals change nothing. After changes, the merged model computes the same as with residuals. Heads,
    embeddings, norms and biases are unchanged, and everything can be trained again."""
    model = tiny_model(kind, HEADS[kind])
    before, modules = copy.deepcopy(model.state_dict()), {name: type(m) for name, m in model.named_modules()}
    inputs = dummy_inputs(model)
    expected = model(**inputs).logits
    with low_rank(model, 2):
        torch.testing.assert_close(model(**inputs).logits, expected)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora" in name for name in trained)
        assert sum(p.numel() for p in trained.values()) < 0.3 * sum(value.numel() for value in before.values())
        with torch.no_grad():
            for parameter in trained.values():
                parameter += 0.1
            moved = model(**inputs).logits
    assert not torch.allclose(moved, expected)
    torch.testing.assert_close(model(**inputs).logits, moved, rtol=1e-4, atol=1e-5)
    assert {name: type(m) for name, m in model.named_modules()} == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(after[name].ndim == 2 for name in changed)
    assert not any(part in name for name in changed for part in ("embed", "wte", "wpe", "lm_head", "classifier"))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_healing_by_residuals(kind, tmp_path):
    """The loss falls, also with losses of inner states. Interrupted at the end and called again, it gives the same
    result."""

    def run():
        teacher = tiny_model(kind, HEADS[kind])
        plan = Plan(kind, LAYERS, (Fuse("layer", (1, 2)), Fuse("layer", (3, 4))))
        student = apply(teacher, plan)
        ids = torch.randint(3, 64, (8, 8), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row if kind == "gpt2" else row[0] % 2} for row in ids]
        recipe = HealRecipe(
            steps=10, learning_rate=3e-2, eval_every=5, mixed_precision="no", lora_rank=4, hidden_weight=1.0
        )
        scope = heal_scope(student, teacher, plan, recipe)
        options = {"scope": scope, "validation_batches": DataLoader(rows, 4)}
        report = heal(student, DataLoader(rows, 4), recipe, teacher=teacher, checkpoints=tmp_path / "run", **options)
        return student, report

    student, report = run()
    assert report.validation_loss[-1][1] < report.validation_loss[0][1]
    again, second = run()
    assert second.train_loss == report.train_loss
    theirs = student.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())


def test_errors_take_the_residuals_away():
    """After an error, residuals are removed without merging."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    before = copy.deepcopy(model.state_dict())

    def fail():
        with low_rank(model, 2):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_merged_is_refused(monkeypatch):
    """Weights shared by depths, and a missing library, are refused before anything changes."""
    shared = apply(tiny_model("gpt2"), Plan("gpt2", LAYERS, (Fuse("layer", (1, 2), "share"),)))
    with pytest.raises(RecipeError, match=r"give fusion\.rank"), low_rank(shared, 2):
        pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"hf-layerfuse\[peft\]"), low_rank(tiny_model("gpt2"), 2):
        pass
    with pytest.raises(RecipeError, match=r"heal\.lora_rank and heal\.mix"):
        HealRecipe(lora_rank=2, mix=True)
