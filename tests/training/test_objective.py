"""Losses of healing: layers are compared with the original layers that the plan matches, and padding never counts."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import LAYERS, in_turn, tiny_model
from torch.nn import functional as F

from hf_layerfuse import Drop, Fuse, HealRecipe, Plan, PlanError, apply, fused_parameters, layer_map
from hf_layerfuse.data.collate import TEACHER_IDS, TEACHER_LOGPROBS, CollateText
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.math import losses
from hf_layerfuse.math.losses import distillation_loss, relative_mse, top_k_loss
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.plan.match import Match
from hf_layerfuse.training.objective import Objective
from hf_layerfuse.training.teacher_cache import with_teacher

PLANS = {
    # edits, and for each layer of the result, the layers that its states and its attention answer to
    "nothing": ((), [(i, i) for i in range(LAYERS)]),
    "depth": ((Fuse("layer", (1, 2)), Fuse("layer", (3, 4, 5))), [(0, 0), (2, 2), (5, 5)]),
    "drop": ((Drop("layer", 0), Drop("layer", 3)), [(1, 1), (3, 2), (4, 4), (5, 5)]),
    "share": ((Fuse("layer", (1, 3), "share"),), [(i, i) for i in range(LAYERS)]),
    "attention": (
        (Fuse("attention", (0, 1)), Drop("attention", 3)),
        [(0, 1), (1, None), (2, 2), (3, None), (4, 4), (5, 5)],
    ),
    "mlp": ((Fuse("mlp", (4, 5)), Drop("layer", 2)), [(0, 0), (2, 1), (3, 3), (4, 4), (5, 5)]),
}


def matched(matches: tuple[Match, ...], kind: str) -> dict[int, int]:
    layer = lambda path: next(int(part) for part in path.split(".") if part.isdigit())  # noqa: E731
    return {layer(match.student): layer(match.teacher) for match in matches if match.kind == kind}


@pytest.mark.parametrize(("model_type", "name"), in_turn(PLANS))
def test_layers_answer_to_the_end_of_their_group(model_type, name):
    """The map follows the plan, and every path in it is a module of the right depth and kind."""
    edits, expected = PLANS[name]
    teacher = tiny_model(model_type)
    plan = Plan(model_type, LAYERS, edits)
    student = apply(teacher, plan)
    found = layer_map(student, teacher, plan)
    assert matched(found, "hidden") == {i: hidden for i, (hidden, _) in enumerate(expected)}
    assert matched(found, "attention") == {i: there for i, (_, there) in enumerate(expected) if there is not None}
    architecture = architecture_for(teacher)
    layers = {model: list(architecture.layer_list(model)) for model in (student, teacher)}
    for match in found:
        for model, path in ((student, match.student), (teacher, match.teacher)):
            module, depth = model.get_submodule(path), matched((match,), match.kind)
            index = next(iter(depth)) if model is student else next(iter(depth.values()))
            layer = layers[model][index]
            assert module is (layer if match.kind == "hidden" else layer.get_submodule(architecture.attention["out"]))


@pytest.mark.parametrize(("model_type", "name"), in_turn(PLANS))
def test_fused_weights_are_those_of_blocks_made_of_several(model_type, name):
    """Fused weights are all parameters of fused blocks, and no others; embeddings and heads are left out."""
    edits, _ = PLANS[name]
    plan = Plan(model_type, LAYERS, edits)
    student = apply(tiny_model(model_type), plan)
    architecture, slots = architecture_for(student), plan.layout().slots
    prefix = architecture.layers_path(student)
    made = {(edit.kind, layer) for edit in edits if isinstance(edit, Fuse) for layer in edit.layers}
    expected = set()
    for full, _ in student.named_parameters(remove_duplicate=False):
        if full.startswith(f"{prefix}."):
            index, rest = full.removeprefix(f"{prefix}.").split(".", 1)
            kind, first = architecture.owner(rest), slots[int(index)].layers[0]
            gone = kind is not None and slots[int(index)].source(kind) is None
            if not gone and {(kind, first), ("layer", first)} & made and kind is not None:
                expected.add(full)
    assert fused_parameters(student, plan) == expected
    assert bool(expected) == any(isinstance(edit, Fuse) for edit in edits)


def test_a_plan_of_something_else_is_refused():
    """Another plan, or another original, is refused."""
    teacher = tiny_model("gpt2")
    plan = Plan("gpt2", LAYERS, (Fuse("layer", (1, 2)),))
    student = apply(teacher, plan)
    with pytest.raises(PlanError, match="leads from 6 layers to 6"):
        layer_map(student, teacher, Plan("gpt2", LAYERS))
    with pytest.raises(PlanError, match="has 5"):
        layer_map(student, student, plan)


@pytest.mark.parametrize(("model_type", "kind"), in_turn(["hidden", "attention"]))
def test_copies_are_at_no_distance_and_training_closes_it(model_type, kind):
    """The loss of a copy is zero. That of another model is positive, and gradient steps on it alone lower it."""
    teacher, student = tiny_model(model_type), tiny_model(model_type, seed=1)
    plan = Plan(model_type, LAYERS)
    recipe = HealRecipe(ce_weight=0.0, kl_weight=0.0, **{f"{kind}_weight": 2.0})
    batch = dummy_inputs(teacher)
    copied = Objective(recipe, same := copy.deepcopy(teacher), teacher, layer_map(same, teacher, plan))
    assert copied.train(same, batch).item() == 0
    objective = Objective(recipe, student, teacher, layer_map(student, teacher, plan))
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = objective.train(student, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 0.5
    assert losses[-1] < 0.8 * losses[0]
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_hidden_states_are_those_of_transformers():
    """The loss is the mean over layers of the relative error over tokens that are not padding."""
    teacher = tiny_model("bert", "BertModel")
    plan = Plan("bert", LAYERS, (Fuse("layer", (1, 2)), Fuse("layer", (3, 4))))
    student = apply(teacher, plan)
    batch = dummy_inputs(teacher)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 9:] = 0
    mask = batch["attention_mask"].bool()
    recipe = HealRecipe(ce_weight=0.0, kl_weight=0.0, hidden_weight=1.5)
    with torch.inference_mode():
        ours, theirs = (model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    errors = []
    for i, at in enumerate((0, 2, 4, 5)):
        p, q = theirs[at][mask], ours[i][mask]
        errors.append(F.mse_loss(q, p) / p.square().mean())
    loss = Objective(recipe, student, teacher, layer_map(student, teacher, plan)).train(student, batch)
    torch.testing.assert_close(loss, 1.5 * torch.stack(errors).mean())
    assert loss > 0


def test_relative_error_has_no_unit():
    """A common factor changes nothing, zero has distance one, and there is no division by zero."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 10, 4, generator=generator)
    torch.testing.assert_close(relative_mse(7 * ours, 7 * theirs), relative_mse(ours, theirs))
    assert relative_mse(torch.zeros(10, 4), theirs).item() == pytest.approx(1)
    assert relative_mse(theirs, torch.zeros(10, 4)).isfinite()


@pytest.mark.parametrize("numbers", [1, 30, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_and_its_gradient_are_those_of_the_formula(monkeypatch, dtype, numbers):
    """The divergence is right for any chunk of logits, and if only some rows count; the teacher gets no gradient."""
    monkeypatch.setattr(losses, "_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(4, 5, 7, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    rows = torch.tensor([0, 3, 4, 11, 19])

    def formula() -> torch.Tensor:
        p, q = ((logits.flatten(0, 1)[rows].float() / 3).log_softmax(-1) for logits in (theirs.detach(), ours))
        return 9 * (p.exp() * (p - q)).sum(-1).mean()

    found = distillation_loss(ours, theirs, 3.0, rows)
    torch.testing.assert_close(found, formula())
    (expected,) = torch.autograd.grad(2 * formula(), ours)
    (2 * found).backward()
    assert theirs.grad is None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(distillation_loss(ours, theirs, 3.0, rows), found.detach())


def test_small_gradients_survive_until_they_are_scaled():
    """Half precision scales the loss to keep small gradients; the divergence must not round them before that."""
    theirs = torch.linspace(-1, 1, 5000)[None]
    wide, half = (torch.zeros(1, 5000, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float16))
    for logits in (wide, half):
        (2.0**16 * distillation_loss(logits, theirs, 100.0)).backward()
    torch.testing.assert_close(half.grad.float(), wide.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_few_classes_bound_the_loss_of_all(temperature):
    """With all classes, the loss is the divergence; with fewer, it is a lower bound that grows with each class."""
    ours, theirs = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0)) * 2
    whole = distillation_loss(ours, theirs, temperature)

    def loss(k: int):
        best = (theirs / temperature).log_softmax(-1).topk(k)
        return top_k_loss(ours, best.indices, best.values, temperature)

    losses = [loss(k) for k in range(1, 13)]
    torch.testing.assert_close(losses[-1], whole, rtol=1e-4, atol=1e-6)
    assert all(before <= after + 1e-6 for before, after in zip(losses, [*losses[1:], whole], strict=True))
    assert losses[0] > 0


class _Tokenizer:
    pad_token_id = 0


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertForTokenClassification"),
        ("llama", "LlamaForCausalLM"),
    ],
)
def test_answers_that_were_kept_are_those_of_the_teacher(kind, head):
    """Rows of different lengths with cached teacher outputs give the loss and gradients of the teacher itself, which
    does not run again."""
    teacher, student = tiny_model(kind, head), tiny_model(kind, head, seed=1)
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 4, 7, 7, 2, 8]
    rows = {"input_ids": [torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths]}
    if "Token" in head:
        rows["labels"] = [[-100, *(torch.randint(2, (n - 1,), generator=generator).tolist())] for n in lengths]
    elif "Sequence" in head:
        rows["labels"] = [n % 2 for n in lengths]
    else:
        rows["labels"] = rows["input_ids"]
    plain = Dataset.from_dict(rows)
    classes = 64 if "LM" in head else 2
    options = {"temperature": 2.0, "batch_size": 4}
    kept = with_teacher(plain, teacher, CollateText(_Tokenizer()), top_k=classes, **options)
    recipe = HealRecipe(ce_weight=0.5, temperature=2.0)

    def loss_of(rows, teacher):
        batch = CollateText(_Tokenizer(), top_k=classes)([rows[i] for i in (4, 0, 3)])
        loss = Objective(recipe, student, teacher).train(student, batch)
        student.zero_grad()
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    expected, gradients = loss_of(plain, teacher)
    silent = copy.deepcopy(teacher)
    silent.forward = None
    found, others = loss_of(kept, silent)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=2e-2, atol=2e-3 * gradient.abs().max().item() + 1e-7)
    few = with_teacher(plain, teacher, CollateText(_Tokenizer()), top_k=1, **options)
    assert few._fingerprint != kept._fingerprint
    again = with_teacher(plain, teacher, CollateText(_Tokenizer()), top_k=classes, **options)
    assert again._fingerprint == kept._fingerprint
    other = with_teacher(plain, student, CollateText(_Tokenizer()), top_k=classes, **options)
    assert other._fingerprint != kept._fingerprint
    assert {TEACHER_IDS, TEACHER_LOGPROBS} < set(kept.column_names)
